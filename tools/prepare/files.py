"""Files of the prepare tools: finding the official ones, reading large JSON lists entry by entry, writing lists."""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset.tables import text_lines
from evaluation.sharded import ProgressLine
from utils import UserError, make_folder, one_line, replacing

SPACE = re.compile(r"[ \t\n\r]*")
CHUNK = 1 << 20  # characters read at a time


def find_official(source: Path, names: dict[str, str], optional: dict[str, str] | None = None) -> dict[str, Path]:
    """{name: path} of official files in `source` or a folder directly in it.

    names, optional: {official name: where it is published}. Missing names are one UserError that lists them all;
    missing optional ones are left out.
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


# ------------------------------------------------------------------------------------------------ reading


def stream_entries(path: Path, key: str | None = None, label: str = "") -> Iterator:
    """The elements of a JSON list one at a time: of the file's top-level list, or of the list under `key` of its
    top-level object. Memory holds one element, so that files of gigabytes can be read. UserError where the file is
    no such JSON (a truncated download, say).
    """
    with _JsonStream(path, label or path.name) as stream:
        if stream.peek() == "{" and key is not None:
            stream.enter_key(key)
        elif stream.peek() == "{":
            raise UserError(f"{path}: holds an object, not a list; is it the official file?")
        yield from stream.elements()


class _JsonStream:
    """A JSON text that is decoded value by value.

    dataset.entries has a quicker reader, of a list that is the whole of a file. It finds no key and tells neither how
    far it is nor where it failed: the file is then read again as a whole, for which official files are too large.
    """

    def __init__(self, path: Path, label: str):
        self.path = path
        self.text, self.at, self.number = "", 0, 0
        self.decoder = json.JSONDecoder()
        self.progress = progress(f"reading {label}", "MB", max(path.stat().st_size // 1_000_000, 1))
        self.read_bytes = 0

    def __enter__(self):
        self.file = open(self.path, encoding="utf-8-sig")
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def more(self) -> bool:
        """Read on, at least as much as is waiting to be decoded: a long value is tried a few times only."""
        try:
            piece = self.file.read(max(CHUNK, len(self.text) - self.at))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from None
        self.text, self.at = self.text[self.at :] + piece, 0
        megabytes = self.file.buffer.tell() // 1_000_000
        self.progress.advance(megabytes - self.read_bytes)
        self.read_bytes = megabytes
        return bool(piece)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, mark: str) -> None:
        if self.peek() != mark:
            raise self.broken(f"{mark!r} is missing")
        self.at += 1

    def value(self):
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 100
                if cut and self.more():
                    continue
                raise self.broken(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(str(error)) from None
            if end == len(self.text) and self.more():  # a number may go on
                continue
            self.at = end
            return value

    def enter_key(self, key: str) -> None:
        """Go to the value of a key of the top-level object."""
        self.take("{")
        while self.peek() == '"':
            name = self.value()
            self.take(":")
            if name == key:
                return
            self.value()
            if self.peek() == ",":
                self.take(",")
        raise UserError(f"{self.path}: has no {key!r}; is it the official file?")

    def elements(self) -> Iterator:
        self.take("[")
        while (mark := self.peek()) != "]":
            if mark == "":
                raise self.broken("the file ends")
            if self.number:
                self.take(",")
            yield self.value()
            self.number += 1

    def broken(self, reason: str) -> UserError:
        return UserError(f"{self.path}: entry {self.number}: not valid JSON ({reason}); an incomplete download?")


def read_json(path: Path):
    """The content of a small JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({' '.join(str(error).split())[:150]})") from None


def progress(label: str, unit: str, total: int) -> ProgressLine:
    """A line on stderr every ten seconds with how much is done and the time left."""
    return ProgressLine(one_line(label), unit, total, log=lambda line: print(line, file=sys.stderr, flush=True))


def warn(line: str) -> None:
    """A line on stderr that explains what comes out, and stops nothing."""
    print(f"warning: {one_line(line, 1000)}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ writing


class ListWriter:
    """Writes a JSON list, an entry a line; `count` entries so far."""

    def __init__(self, file):
        self.file, self.count = file, 0
        file.write("[")

    def __call__(self, entry) -> None:
        self.file.write((",\n" if self.count else "\n") + json.dumps(entry))
        self.count += 1


class Written:
    """What these tools wrote into a folder: OUTPUT/prepared/written.jsonl has [name, size, time] of every file. What
    stands there as it was left may be replaced or removed; everything else is the user's, and is refused."""

    def __init__(self, output: Path):
        self.output, self.record = output, output / "prepared" / "written.jsonl"
        self.known = set()
        if os.path.lexists(self.record):
            for _, line in text_lines(self.record):
                with contextlib.suppress(ValueError, TypeError):  # a full disk may have cut a line
                    name, size, time = json.loads(line)
                    self.known.add((name, size, time))
            if not self.known:
                raise UserError(f"{self.record}: not written by tools.prepare; move it away")

    @contextlib.contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """`utils.replacing` of a file below the folder. Raises UserError where `path` is not one of these tools'."""
        if os.path.lexists(path) and not self.owns(path):
            raise UserError(f"{path}: is not as tools.prepare wrote it; move it away, or name another --output")
        make_folder(path.parent)
        with replacing(path) as temporary:
            yield temporary
            make_folder(self.record.parent)
            with open(self.record, "a", encoding="utf-8") as file:
                file.write(json.dumps(self._line(path, temporary)) + "\n")
            self.known.add(self._line(path, temporary))

    def owns(self, path: Path) -> bool:
        return os.path.lexists(path) and self._line(path, path) in self.known

    def _line(self, path: Path, file: Path) -> tuple[str, int, int]:
        found = file.lstat()
        return os.path.relpath(path, self.output), found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def writing_list(written: Written, path: Path) -> Iterator[Callable]:
    """A function that appends an entry to the JSON list `path`, which is in place only when the block has ended."""
    with written.replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            writer = ListWriter(file)
            yield writer
            file.write("\n]\n")
        if not writer.count:
            raise UserError(f"{path}: no entry is left to write; see the counts above")


UNFINISHED = ".unfinished"  # marks a folder as one that `whole_folder` made


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Gives the folder OUTPUT.partial, which becomes `output` when the block ends without error: what a refused or
    interrupted run leaves is never taken for the whole, and the next run replaces it."""
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
