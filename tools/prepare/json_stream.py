"""Reading large JSON lists entry by entry."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from tools.prepare.common import progress
from utils import UserError

SPACE = re.compile(r"[ \t\n\r]*")
CHUNK = 1 << 20  # characters read at a time


def stream_entries(path: Path, key: str | None = None) -> Iterator:
    """The elements of a JSON list one at a time: of the file's top-level list, or of the list under `key` of its
    top-level object. Memory holds one element, so that files of gigabytes can be read. UserError where the file is
    no such JSON (a truncated download, say).
    """
    with _JsonStream(path) as stream:
        if stream.peek() == "{" and key is not None:
            stream.enter_key(key)
        elif stream.peek() == "{":
            raise UserError(f"{path}: holds an object, not a list; is it the official file?")
        yield from progress(stream.elements(), f"reading {path.name}", "entries")


class _JsonStream:
    """A JSON text that is decoded value by value.

    dataset.entries has a quicker reader, of a list that is the whole of a file. It finds no key and tells neither how
    far it is nor where it failed: the file is then read again as a whole, for which official files are too large.
    """

    def __init__(self, path: Path):
        self.path = path
        self.text, self.at, self.number = "", 0, 0
        self.decoder = json.JSONDecoder()

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
