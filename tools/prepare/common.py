"""What the preparations share: finding official files, writing only what is whole and ours, counting what is odd."""

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from dataset.files import json_elements, text_lines
from utils import UserError, make_folder, one_line, replacing, write_json

SHOWN = 3  # places that are named of a kind of odd entry
UNFINISHED = ".unfinished"  # marks a folder as one that `whole_folder` made


def find_official(source: Path, names: dict[str, str], optional: dict[str, str] | None = None) -> dict[str, Path]:
    """{name: path} of official files in `source` or a folder directly in it.

    names, optional: {official name: where it is published}. Raises a UserError that lists the missing names; missing
    optional ones are left out.
    """
    if not source.is_dir():
        raise UserError(f"--source {source}: no such folder; it holds the official files under their official names")
    found = {name: path for name in {**names, **(optional or {})} if (path := _locate(source, name))}
    missing = [name for name in names if name not in found]
    if missing:
        listed = ", ".join(f"{name} ({names[name]}{_packed_hint(source, name)})" for name in missing)
        raise UserError(f"--source {source} lacks {listed}")
    return found


def _locate(source: Path, name: str) -> Path | None:
    places = [source / name, *sorted(source.glob(f"*/{name}"))]
    return next((place for place in places if place.is_file()), None)


def _packed_hint(source: Path, name: str) -> str:
    packed = [f"{name}.zip", f"{name}.gz", f"{name}.tar.gz"]
    there = next((other for other in packed if _locate(source, other)), None)
    return f"; {there} is there: unpack it" if there else ""


def progress(items: Iterable, label: str, unit: str, total: int | None = None) -> Iterable:
    """The items, with a progress line on stderr for work that takes more than a second."""
    every = 0.5 if sys.stderr.isatty() else 10  # seconds
    return tqdm(items, one_line(label), total, unit=f" {unit}", mininterval=every, delay=1, leave=False)


def read_list(path: Path, key: str | None = None) -> Iterable:
    """`json_elements` of an official file, with a progress line."""
    return progress(json_elements(path, key), f"reading {path.name}", "entries")


def warn(line: str) -> None:
    """A line on stderr that explains the result and stops nothing."""
    print(f"warning: {one_line(line, 1000)}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ writing


def check_output(output: Path) -> None:
    """UserError if a whole folder cannot become `output`: anything but an empty folder is there."""
    try:
        if not os.path.lexists(output) or output.is_dir() and not any(output.iterdir()) and not os.path.ismount(output):
            return
    except OSError as error:
        raise UserError(f"--output {output}: cannot be read ({error.strerror or error})") from None
    raise UserError(f"--output {output}: must be a new or an empty folder (no mount point); name another")


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Gives the folder OUTPUT.partial, which becomes `output` when the block ends without error: what an interrupted
    run leaves is never taken for the whole, and the next run replaces it."""
    output = output.resolve()  # of a link to another disk the folder there
    partial = output.with_name(f"{output.name}.partial")
    if os.path.lexists(partial):
        if partial.is_symlink() or not (partial / UNFINISHED).is_file():
            raise UserError(f"{partial}: not left by an earlier try of this tool; move it away")
        warn(f"{partial} is left by an earlier try, and is replaced")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        (partial / UNFINISHED).touch()
    except OSError as error:
        raise UserError(f"{partial}: cannot be made ({error.strerror or error})") from None
    try:
        yield partial
    except BaseException:
        if os.listdir(partial) == [UNFINISHED]:
            shutil.rmtree(partial)
        raise
    try:
        (partial / UNFINISHED).unlink()
        partial.replace(output)
    except OSError as error:
        raise UserError(f"{partial}: whole, but cannot be renamed to {output.name} ({one_line(error)})") from None


class Job:
    """One preparation: where things are, what it wrote, what it counted.

    source: folder of the official files; output: the folder that configurations call data/; images: folder of the
    images; options: the command's arguments; files: {path: entries} of the lists written so far.

    OUTPUT/prepared/written.jsonl has [name, bytes, whole seconds] of every file that a preparation wrote. What stands
    there as it was left may be replaced or removed; everything else is the user's, and is refused.
    """

    def __init__(self, options: argparse.Namespace, images: Path):
        self.name, self.options = options.set, options
        self.source, self.output, self.images = options.source, options.output, images
        self.files: dict[Path, int] = {}
        self.counts: list[dict] = []
        self.odd_entries: dict[str, dict] = {}
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._listings: dict[str, frozenset[str]] = {}
        self._record = self.output / "prepared" / "written.jsonl"
        self._written: set[tuple[str, int, int]] = set()
        if os.path.lexists(self._record):
            for _, line in text_lines(self._record):
                with contextlib.suppress(ValueError, TypeError):  # a full disk may have cut a line
                    name, size, time = json.loads(line)
                    self._written.add((name, size, time))
            if not self._written:
                raise UserError(f"{self._record}: not written by tools.prepare; move it away")

    # -------------------------------------------------------------------------------------------- files

    def owns(self, path: Path) -> bool:
        """Whether a file stands there as a preparation wrote it."""
        return os.path.lexists(path) and self._state(path, path) in self._written

    @contextlib.contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """`utils.replacing` of a file below OUTPUT. Raises UserError if a file there is not the tool's own."""
        if os.path.lexists(path) and not self.owns(path):
            raise UserError(f"{path}: is not as tools.prepare wrote it; move it away, or name another --output")
        make_folder(path.parent)
        with replacing(path) as temporary:
            yield temporary
            make_folder(self._record.parent)
            state = self._state(path, temporary)
            with open(self._record, "a", encoding="utf-8") as file:
                file.write(json.dumps(state) + "\n")
            self._written.add(state)

    def _state(self, path: Path, file: Path) -> tuple[str, int, int]:
        found = file.lstat()
        return os.path.relpath(path, self.output), found.st_size, int(found.st_mtime)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Callable[[object], None]]:
        """A function that appends an entry to the JSON list OUTPUT/name, an entry a line; the file is in place only
        when the block has ended. Raises UserError if no entry was written."""
        path, count = self.output / name, 0
        with self.replacing(path) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:

                def write(entry) -> None:
                    nonlocal count
                    file.write((",\n" if count else "[\n") + json.dumps(entry))
                    count += 1

                yield write
                file.write("\n]\n")
            if not count:
                raise UserError(f"{path}: no entry is left to write; see the counts above")
        self.files[path] = count

    def write_json(self, name: str, content: dict) -> None:
        with self.replacing(self.output / name) as temporary:
            write_json(temporary, content)

    # -------------------------------------------------------------------------------------------- images

    def has(self, image: str) -> bool:
        """Whether an image (a path in the images' folder) may be written: with --require-images it must exist."""
        if not self.options.require_images or self.exists(image):
            return True
        self.odd("image that is not on disk, left out", image)
        return False

    def exists(self, image: str) -> bool:
        folder, name = os.path.split(image)
        if folder not in self._listings:  # one listing a folder: asking for each of millions of files is slow
            path = self.images / folder
            self._listings[folder] = frozenset(os.listdir(path)) if path.is_dir() else frozenset()
        return name in self._listings[folder]

    def pretrain_path(self, image: str) -> str:
        """An image's path as pre-training files name it: relative to their folder, or absolute if the images are not
        below OUTPUT."""
        return f"{self._pretrain_prefix}/{image}"

    @functools.cached_property
    def _pretrain_prefix(self) -> str:
        images, folder = self.images.resolve(), (self.output / "pretrain").resolve()
        return os.path.relpath(images, folder) if images.is_relative_to(self.output.resolve()) else str(images)

    # -------------------------------------------------------------------------------------------- what was found

    def count(self, what: str, number: int, published: int | None = None, rounded: int = 1, first: str = "") -> None:
        """A number of the files; a difference from the published one (known to `rounded`) is a warning.

        first: the first entry known to be missing or too much.
        """
        self.counts.append({"what": what, "files": number, "published": published})
        if published is None or abs(number - published) <= rounded // 2:
            return
        difference = f"{abs(number - published):,} {'more' if number > published else 'fewer'}"
        which = f"; first: {first}" if first else ""
        self.warn(f"{what}: {number:,}, {difference} than the published {published:,}{which}")

    def odd(self, kind: str, where: str) -> None:
        """One more entry of a kind of odd ones; the first places are kept."""
        found = self.odd_entries.setdefault(one_line(kind), {"count": 0, "first": []})
        found["count"] += 1
        if found["count"] <= SHOWN:
            found["first"].append(one_line(where))

    def first_odd(self, *kinds: str) -> str:
        """The first odd entry of these kinds, for the warnings of counts; "" without one."""
        kind = next((kind for kind in kinds if kind in self.odd_entries), None)
        return f"{self.odd_entries[kind]['first'][0]} ({kind})" if kind else ""

    def warn(self, line: str) -> None:
        self.warnings.append(one_line(line, 1000))

    def note(self, line: str) -> None:
        self.notes.append(one_line(line, 1000))

    def report(self) -> str:
        """What was counted, as a table and lines."""
        width = max((len(count["what"]) for count in self.counts), default=0) + 2
        lines = [f"{self.name:{width}}{'files':>12}{'published':>12}"]
        for count in self.counts:
            known = "" if count["published"] is None else f"{count['published']:,}"
            lines.append(f"{count['what']:{width}}{count['files']:>12,}{known:>12}")
        for kind, found in self.odd_entries.items():
            lines.append(f"odd: {found['count']:,} x {kind}; first: {', '.join(found['first'])}")
        return "\n".join([*lines, *self.notes, *(f"warning: {line}" for line in self.warnings)])
