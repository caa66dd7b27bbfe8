"""What a preparation found: counts beside the published ones, odd entries, and the record that a second run reads."""

import hashlib
import json
import os
from pathlib import Path

from utils import one_line, write_json

SHOWN = 3  # places that are named of a kind of odd entry


class Report:
    """Collects numbers and prints them; `lines` and `to_dict` after the work."""

    def __init__(self, name: str):
        self.name = name
        self.counts: list[dict] = []
        self.odd_entries: dict[str, dict] = {}
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def count(self, what: str, number: int, published: int | None = None, rounded: int = 1, first: str = "") -> None:
        """A number of the files; a difference from the published one (known to `rounded`) is a warning.

        first: the first entry known to be missing or too much.
        """
        self.counts.append({"what": what, "files": number, "published": published})
        if published is None or abs(number - published) <= rounded // 2:
            return
        more = number - published
        which = f"; first: {first}" if first else ""
        direction = "more" if more > 0 else "fewer"
        self.warn(f"{what}: {number:,}, {abs(more):,} {direction} than the published {published:,}{which}")

    def odd(self, kind: str, where: str) -> None:
        """One more entry of a kind of odd ones; where the first ones stand is kept, as text that can be printed: the
        name of a file may not be."""
        where = one_line(where)
        found = self.odd_entries.setdefault(one_line(kind), {"count": 0, "first": []})
        found["count"] += 1
        if found["count"] <= SHOWN:
            found["first"].append(where)

    def first_odd(self, *kinds: str) -> str:
        """The first odd entry of these kinds, for the warnings of counts; "" where there is none."""
        kind = next((kind for kind in kinds if kind in self.odd_entries), None)
        return f"{self.odd_entries[kind]['first'][0]} ({kind})" if kind else ""

    def warn(self, line: str) -> None:
        self.warnings.append(one_line(line, 1000))

    def note(self, line: str) -> None:
        self.notes.append(one_line(line, 1000))

    def lines(self) -> list[str]:
        width = max((len(count["what"]) for count in self.counts), default=0) + 2
        result = [f"{self.name:{width}}{'files':>12}{'published':>12}"]
        for count in self.counts:
            known = "" if count["published"] is None else f"{count['published']:,}"
            result.append(f"{count['what']:{width}}{count['files']:>12,}{known:>12}")
        for kind, found in self.odd_entries.items():
            result.append(f"odd: {found['count']:,} x {kind}; first: {', '.join(found['first'])}")
        result += self.notes
        return result + [f"warning: {line}" for line in self.warnings]

    def to_dict(self) -> dict:
        return {
            "counts": self.counts,
            "odd_entries": self.odd_entries,
            "notes": self.notes,
            "warnings": self.warnings,
        }


# ------------------------------------------------------------------------------------------------ a second run


def describe_state(arguments: dict, sources: list[Path], folders: list[Path], code: list[Path]) -> dict:
    """All that a result depends on: arguments, size and time of the sources, the folders' own times, the code."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code))).hexdigest()[:16]
    files = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(set(sources))}
    return {
        "arguments": {key: str(value) for key, value in sorted(arguments.items())},
        "sources": files,
        "folders": {str(folder): _folder_state(folder) for folder in folders},
        "code": digest,
    }


def _folder_state(folder: Path) -> str:
    """Changes when a file is added to or removed from a folder, or from one up to two levels in it."""
    digest = hashlib.sha256()
    level = [folder] if folder.is_dir() else []
    for _ in range(3):
        below = []
        for path in level:
            digest.update(f"{path} {path.stat().st_mtime_ns}".encode())
            with os.scandir(path) as entries:
                below += sorted(Path(entry.path) for entry in entries if entry.is_dir())
        level = below
    return digest.hexdigest()[:16]


def is_done(record: Path, state: dict) -> dict | None:
    """The record of an earlier run with the same state whose files are all there unchanged, else None."""
    try:
        earlier = json.loads(record.read_text(encoding="utf-8"))
        same = earlier["state"] == state
        whole = all(Path(name).stat().st_size == size for name, size in earlier["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return earlier if same and whole else None


def write_record(record: Path, state: dict, job) -> None:
    """The record of a finished Job."""
    sizes = {str(path): path.stat().st_size for path in job.files}
    entries = {str(path): count for path, count in job.files.items()}
    content = {"state": state, "files": sizes, "entries": entries, "report": job.report.to_dict()}
    with job.written.replacing(record) as temporary:
        write_json(temporary, content)
