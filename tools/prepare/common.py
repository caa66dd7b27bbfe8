"""What the preparations share: official files in, lists out, and a count of whatever is left out on the way."""

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from dataset.files import read_json
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
    return tqdm(items, label, total, unit=f" {unit}", mininterval=2, delay=1, leave=False)


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

    OUTPUT/prepared/SET.json has {file: [bytes, seconds]} of the lists that the set's preparations wrote. A list that is
    as it was left may be replaced; every other file is the user's, and is refused.
    """

    def __init__(self, options: argparse.Namespace, images: Path):
        self.name, self.options = options.set, options
        self.source, self.output, self.images = options.source, options.output, images
        self.prepared = self.output / "prepared"
        self.lines: list[str] = []  # counts, notes and warnings
        self.left_out: dict[str, tuple[int, list[str]]] = {}  # kind: (how many, the first places)

    @contextlib.contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """`utils.replacing` of a list below OUTPUT. Raises UserError if a file there is not the tool's own."""
        name, record = os.path.relpath(path, self.output), self.prepared / f"{self.name}.json"
        own_folder(self.prepared, "tools.prepare")
        written = read_json(record) if record.exists() else {}
        if os.path.lexists(path) and written.get(name) != _state(path):
            raise UserError(f"{path}: is not as tools.prepare wrote it; move it away, or name another --output")
        make_folder(path.parent)
        with replacing(path) as temporary:
            yield temporary
        write_json(record, written | {name: _state(path)})

    def write(self, name: str, entries: Iterable) -> int:
        """Write the JSON list OUTPUT/name, an entry a line, which is in place only when it is whole; its length.
        Raises UserError if there is no entry."""
        path, count = self.output / name, 0
        with self.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for count, entry in enumerate(entries, 1):
                file.write(("[\n" if count == 1 else ",\n") + json.dumps(entry))
            file.write("\n]\n")
            if not count:
                raise UserError(f"{path}: no entry is left to write; see what was left out")
        self.lines.append(f"{path}: {count:,} entries")
        return count

    def has(self, image: str) -> bool:
        """Whether an image (a path in the images' folder) may be written: with --require_images it must exist."""
        if not self.options.require_images or (self.images / image).is_file():
            return True
        self.leave_out("image that is not on disk", image)
        return False

    def count(self, what: str, number: int, published: int | None = None) -> None:
        """A number of the files; a difference from the published one is a warning."""
        text = f"{what}: {number:,}"
        if published in (None, number):
            self.lines.append(text)
        else:
            difference = f"{abs(number - published):,} {'more' if number > published else 'fewer'}"
            self.warn(f"{text}, {difference} than the published {published:,}")

    def leave_out(self, kind: str, where: str) -> None:
        """One more entry that is left out; the first places of a kind are shown."""
        number, first = self.left_out.get(kind, (0, []))
        self.left_out[kind] = number + 1, [*first, one_line(where)][:SHOWN]

    def warn(self, line: str) -> None:
        self.lines.append(f"warning: {line}")

    def report(self) -> list[str]:
        """What was left out and counted, in lines."""
        left_out = self.left_out.items()
        return [f"left out: {n:,} x {kind}; first: {', '.join(first)}" for kind, (n, first) in left_out] + self.lines


def _state(path: Path) -> list[int]:
    found = path.lstat()
    return [found.st_size, int(found.st_mtime)]
