"""One preparation: where things are, what was asked for, what was found and written."""

import argparse
import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from tools.prepare.files import Written, writing_list
from tools.prepare.held_out import HeldOut, leaks_by_content, load_held_out
from tools.prepare.report import Report


class Job:
    """What every data set's `prepare` gets.

    source: folder of the official files; output: the folder that configurations call data/; images: folder of the
    images; options: the command's arguments; report; files: {path: entries} written so far;
    written: which files of OUTPUT these tools wrote.
    """

    def __init__(self, name: str, options: argparse.Namespace, images: Path):
        self.name, self.options = name, options
        self.source, self.output, self.images = options.source, options.output, images
        self.report = Report(name)
        self.files: dict[Path, int] = {}
        self.written = Written(self.output)
        self._listings: dict[str, frozenset[str]] = {}

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator:
        """A function that appends an entry to OUTPUT/name; the file is in place when the block has ended."""
        with writing_list(self.written, self.output / name) as write:
            yield write
        self.files[self.output / name] = write.count

    def has(self, image: str) -> bool:
        """Whether an image (a path in the images' folder) may be written: with --require-images it must exist."""
        if not self.options.require_images or self.exists(image):
            return True
        self.report.odd("image that is not on disk, left out", image)
        return False

    def exists(self, image: str) -> bool:
        folder, name = os.path.split(image)
        if folder not in self._listings:  # one listing a folder: asking for each of millions of files is slow
            path = self.images / folder
            self._listings[folder] = frozenset(os.listdir(path)) if path.is_dir() else frozenset()
        return name in self._listings[folder]

    def pretrain_path(self, image: str) -> str:
        """An image's path as pre-training files name it: relative to their folder, or absolute where the images are
        not below OUTPUT."""
        return f"{self._pretrain_prefix}/{image}"

    @functools.cached_property
    def _pretrain_prefix(self) -> str:
        images, folder = self.images.resolve(), (self.output / "pretrain").resolve()
        return os.path.relpath(images, folder) if images.is_relative_to(self.output.resolve()) else str(images)

    def held_out(self, *needed: str) -> HeldOut:
        """The validation and test images that earlier preparations found, their contents read with --check-leaks."""
        held_out = load_held_out(self.output, self.report, needed)
        if self.options.check_leaks:
            held_out.read_images(self.options.workers, self.report)
        return held_out

    def leaks(self, held_out: HeldOut, images: list[str]) -> dict[str, str]:
        """{image: what it is a copy of} by content; {} without --check-leaks."""
        if not self.options.check_leaks or not len(held_out.known):
            return {}
        present = {str(self.images / image): image for image in images if self.exists(image)}
        found = leaks_by_content(present, held_out, self.options.workers, self.report)
        return {present[path]: what for path, what in found.items()}
