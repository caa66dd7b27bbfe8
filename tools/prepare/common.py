"""What the preparations share: official files in, lists out, and a count of whatever is left out on the way."""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.files import json_list, read_json
from utils import UserError, make_folder, one_line, own_folder, replacing, write_json

SHOWN = 3  # places that are named of a kind of entry that is left out


def find_official(source: Path, names: dict[str, str], optional: dict[str, str] | None = None) -> dict[str, Path]:
    """{name: path} of official files in `source` or a folder directly in it.

    names, optional: {official name: where it is published}. Raises a UserError that lists the missing names; missing
    optional ones are left out.
    """
    places = {name: [source / name, *sorted(source.glob(f"*/{name}"))] for name in {**names, **(optional or {})}}
    found = {name: path for name, paths in places.items() if (path := next(filter(Path.is_file, paths), None))}
    missing = [f"{name} ({address})" for name, address in names.items() if name not in found]
    if missing:
        raise UserError(f"--source {source} lacks {', '.join(missing)}; unpack archives first")
    return found


def progress(items: Iterable, label: str, unit: str, total: int | None = None) -> Iterable:
    """The items, with a progress line on stderr for work that takes more than a second."""
    every = 0.5 if sys.stderr.isatty() else 10  # seconds
    return tqdm(items, one_line(label), total, unit=f" {unit}", mininterval=every, delay=1, leave=False)


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Gives the folder OUTPUT.partial, which becomes `output`, a new or an empty folder, when the block ends without
    error: what an interrupted run leaves is never taken for the whole, and the next run replaces it."""
    output = output.resolve()  # of a link to another disk the folder there
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: must be a new or an empty folder; name another")
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(own_folder(partial, "semmim"))
    yield own_folder(partial, "semmim")
    (partial / ".semmim").unlink()
    partial.replace(output)


class Job:
    """One preparation: where things are, what it counted and left out.

    source: folder of the official files; output: the folder that configurations call data/; images: folder of the
    images; options: the command's arguments; prepared: OUTPUT/prepared, the tool's own folder.

    OUTPUT/prepared/SET.json records what was found and [bytes, seconds] of every list that the preparations of the set
    wrote. A list that is as it was left may be replaced; every other file is the user's, and is refused.
    """

    def __init__(self, options: argparse.Namespace, images: Path):
        self.name, self.options = options.set, options
        self.source, self.output, self.images = options.source, options.output, images
        self.prepared = own_folder(self.output / "prepared", "tools.prepare")
        self.counts: list[dict] = []
        self.left_out: dict[str, dict] = {}
        self.missing: set[str] = set()  # images that lists name and the disk lacks
        self.lines: list[str] = []  # notes and warnings
        self._listings: dict[str, frozenset[str]] = {}
        self._record = self.prepared / f"{self.name}.json"
        self._written = read_json(self._record)["written"] if self._record.exists() else {}

    # -------------------------------------------------------------------------------------------- files

    def read(self, path: Path, key: str | None, convert: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
        """(place, what `convert` makes of it) of the elements of an official file, or of the list under its `key`.

        The one door of malformed entries: what `convert` raises about an element leaves it out.
        """
        elements = progress(json_list(path, key), f"reading {path.name}", "entries")
        for number, element in enumerate(elements):
            where = f"{path.name} entry {number}"
            try:
                converted = convert(element)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                text = error if isinstance(error, ValueError) else repr(error)
                self.leave_out("entry that is not as published", f"{where} {text}")
            else:
                yield where, converted

    @contextlib.contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """`utils.replacing` of a list below OUTPUT. Raises UserError if a file there is not the tool's own."""
        name = os.path.relpath(path, self.output)
        if os.path.lexists(path) and self._written.get(name) != _state(path):
            raise UserError(f"{path}: is not as tools.prepare wrote it; move it away, or name another --output")
        make_folder(path.parent)
        with replacing(path) as temporary:
            yield temporary
        self._written[name] = _state(path)
        self.save()

    def write(self, name: str, entries: Iterable) -> int:
        """Write the JSON list OUTPUT/name, an entry a line, which is in place only when it is whole; its length.
        Raises UserError if there is no entry."""
        path, count = self.output / name, 0
        with self.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for count, entry in enumerate(entries, 1):
                file.write(("[\n" if count == 1 else ",\n") + json.dumps(entry))
            file.write("\n]\n")
            if not count:
                raise UserError(f"{path}: no entry is left to write; see the counts above")
        self.lines.append(f"{path}: {count:,} entries")
        return count

    def save(self) -> None:
        """Write the record."""
        found = {"counts": self.counts, "left_out": self.left_out, "lines": self.lines}
        write_json(self._record, {"written": self._written, **found})

    # -------------------------------------------------------------------------------------------- images

    def has(self, image: str) -> bool:
        """Whether an image (a path in the images' folder) may be written: with --require_images it must exist."""
        if self.exists(image):
            return True
        if self.options.require_images:
            self.leave_out("image that is not on disk", image)
            return False
        self.missing.add(image)
        return True

    def exists(self, image: str) -> bool:
        folder, name = os.path.split(image)
        if folder not in self._listings:  # one listing a folder: asking for each of millions of files is slow
            path = self.images / folder
            self._listings[folder] = frozenset(os.listdir(path)) if path.is_dir() else frozenset()
        return name in self._listings[folder]

    # -------------------------------------------------------------------------------------------- what was found

    def count(self, what: str, number: int, published: int | None = None, rounded: int = 1) -> None:
        """A number of the files; a difference from the published one (known to `rounded`) is a warning."""
        self.counts.append({"what": what, "files": number, "published": published})
        if published is not None and abs(number - published) > rounded // 2:
            difference = f"{abs(number - published):,} {'more' if number > published else 'fewer'}"
            self.warn(f"{what}: {number:,}, {difference} than the published {published:,}")

    def leave_out(self, kind: str, where: str) -> None:
        """One more entry that is left out; the first places of a kind are kept."""
        found = self.left_out.setdefault(kind, {"count": 0, "first": []})
        found["count"] += 1
        if found["count"] <= SHOWN:
            found["first"].append(one_line(where))

    def warn(self, line: str) -> None:
        self.lines.append(f"warning: {line}")

    def report(self) -> str:
        """What was counted, as a table and lines."""
        width = max((len(count["what"]) for count in self.counts), default=0) + 2
        lines = [f"{self.name:{width}}{'files':>12}{'published':>12}"]
        for count in self.counts:
            known = "" if count["published"] is None else f"{count['published']:,}"
            lines.append(f"{count['what']:{width}}{count['files']:>12,}{known:>12}")
        for kind, found in self.left_out.items():
            lines.append(f"left out: {found['count']:,} x {kind}; first: {', '.join(found['first'])}")
        return "\n".join(lines + self.lines)


def _state(path: Path) -> list[int]:
    found = path.lstat()
    return [found.st_size, int(found.st_mtime)]
