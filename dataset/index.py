"""The entries of pre-training as a few arrays, and as a file that is made of them once and mapped from then on.

Millions of entries take half a minute to read and check. Where their files are large, the arrays are therefore kept in
a file beside the first of them, or in $XDG_CACHE_HOME/semmim (~/.cache/semmim) where that folder cannot be written to.
Later runs and the other processes of a machine map it: it is in memory once, whatever their number. It is made anew
whenever one of the annotation files has another size, time of change or content, or this module another VERSION.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.cache import Numbering, StringBuilder, StringTable
from dataset.entries import Source, file_list, image_captions, image_folders
from dataset.shards import shard_files
from utils import UserError, find_file, open_file, replacing

log = logging.getLogger("semmim")

VERSION = 1  # of what the file holds: to be raised with every change of what is read, checked or stored
MAGIC = b"semmim index\n"
INDEXED_FROM = 50_000_000  # bytes of annotation files; fewer are read in seconds
PROBED = 1 << 16  # bytes at the beginning and the end of a file that tell its content
ALIGNED = 64


@dataclass
class Pairs:
    """Entries for pre-training. image_id [entries] int32: number of the entry's image in `paths`, counted by first
    appearance; caption_start [entries + 1] int64: where its captions begin in `captions`."""

    image_id: np.ndarray
    caption_start: np.ndarray
    captions: StringTable
    paths: StringTable

    def arrays(self) -> dict[str, np.ndarray]:
        """What `of_arrays` makes the same pairs of."""
        return {
            "image_id": self.image_id,
            "caption_start": self.caption_start,
            "caption_ends": self.captions.ends,
            "caption_bytes": self.captions.bytes,
            "path_ends": self.paths.ends,
            "path_bytes": self.paths.bytes,
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Pairs":
        """The pairs of `arrays()`."""
        captions = StringTable.of_arrays(arrays["caption_ends"], arrays["caption_bytes"])
        paths = StringTable.of_arrays(arrays["path_ends"], arrays["path_bytes"])
        return cls(arrays["image_id"], arrays["caption_start"], captions, paths)


def load_pairs(source: Source) -> Pairs:
    """The entries of pre-training files, from their index where they are large.

    Raises UserError naming the file, the entry's index and the key.
    """
    named = [Path(find_file(name, "annotation file")) for name in file_list(source.files)]
    files = [file for path in named for file in shard_files(path) or [path]]
    folders = any(path.is_dir() for path in files)  # of images: what is in them, no size and time tells
    if folders or sum(path.stat().st_size for path in files if path.is_file()) < INDEXED_FROM:
        return read_pairs(source)
    settings, content = _settings(source, files), [_content(path) for path in files]
    places = _places(files[0], settings)
    with _one_at_a_time(files[0].parent):  # the first process of a machine makes the file, the others wait for it
        for place in places:
            if arrays := read_arrays(place, content):
                log.info("%d entries of data.train from their index %s", len(arrays["image_id"]), place)
                return Pairs.of_arrays(arrays)
        return _make_index(source, places, content)


def read_pairs(source: Source) -> Pairs:
    """The entries of pre-training files, read and checked one after the other."""
    captions, number, count = StringBuilder(), Numbering(), 0
    image_id, caption_start = array("i"), array("q", [0])
    for path, texts in image_captions(source):
        image_id.append(number(path))
        if type(texts) is str:
            captions.append(texts)
            count += 1
        else:
            for text in texts:
                captions.append(text)
            count += len(texts)
        caption_start.append(count)
    columns = np.frombuffer(image_id, dtype=np.int32), np.frombuffer(caption_start, dtype=np.int64)
    return Pairs(*columns, *(StringTable.of_arrays(*part.arrays()) for part in (captions, number.strings)))


def _make_index(source: Source, places: list[Path], content: list) -> Pairs:
    started = time.monotonic()
    log.info("reading data.train; later runs map what is made of it")
    pairs = read_pairs(source)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(place, content, pairs.arrays())
        except (OSError, UserError):
            continue
        log.info("%d entries in %.0f s, kept in %s", len(pairs.image_id), time.monotonic() - started, place)
        return Pairs.of_arrays(read_arrays(place, content) or pairs.arrays())
    folders = " nor ".join(str(place.parent) for place in places)
    log.warning("the index of data.train can be written neither to %s: every process reads the files", folders)
    return pairs


# ------------------------------------------------------------------------------------------------- what it is of


def _settings(source: Source, files: list[Path]) -> list:
    """All that decides, beside the files' content, what is made of them; images' paths may depend on the folder."""
    root = source.image_root
    folders = {k: str(v) for k, v in root.items()} if isinstance(root, Mapping) else str(image_folders(root))
    names = [str(path) for path in files]
    return [names, folders, dict(source.image_prefix_map), source.max_bad_share, os.getcwd()]


def _content(path: Path) -> list:
    """[size, time of change, digest of the beginning and the end] of a file; UserError where it cannot be read."""
    try:
        with open_file(path) as file:
            found = os.fstat(file.fileno())
            head = file.read(PROBED)
            file.seek(max(0, found.st_size - PROBED))
            digest = hashlib.blake2b(head + file.read(PROBED), digest_size=16).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return [found.st_size, found.st_mtime_ns, digest]


def _places(first: Path, settings: list) -> list[Path]:
    """Where the index may be, the best place first."""
    digest = hashlib.blake2b(json.dumps(settings).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    folders, cache = [first.parent], os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # a user without a home has none
        folders.append(Path(cache, "semmim"))
    return [folder / f".{first.stem}.{digest}.index" for folder in folders]


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """While it lasts, no other process is in it for the same folder (where the file system knows such locks)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which ends the lock


# ------------------------------------------------------------------------------------------------- the file


def write_arrays(path: Path, content: list, arrays: Mapping[str, np.ndarray]) -> None:
    """One-dimensional arrays and what they were made of, in a file that takes its place at once.

    The file: MAGIC, the length of the header in 8 bytes, the header as JSON, the arrays, each at a multiple of ALIGNED
    bytes after the header.
    """
    places, size = {}, 0
    for name, values in arrays.items():
        places[name] = [values.dtype.str, len(values), size]
        size += -(-values.nbytes // ALIGNED) * ALIGNED
    header = json.dumps({"version": VERSION, "content": content, "arrays": places, "bytes": size}).encode()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(MAGIC + len(header).to_bytes(8, "little") + header)
        file.write(bytes(-file.tell() % ALIGNED))
        for values in arrays.values():
            file.write(memoryview(values).cast("B") if len(values) else b"")
            file.write(bytes(-values.nbytes % ALIGNED))


def read_arrays(path: Path, content: list) -> dict[str, np.ndarray] | None:
    """The arrays of a file that was made of `content`, mapped; None where it is missing, cut or of something else."""
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = -(-file.tell() // ALIGNED) * ALIGNED
            whole = os.fstat(file.fileno()).st_size == start + header["bytes"]
            if (header["version"], header["content"]) != (VERSION, content) or not whole:
                return None
            mapped = np.memmap(file, dtype=np.uint8, mode="r")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return None
    flat = np.asarray(mapped)[start:]  # slices of a memmap object cost several times those of an array
    return {
        name: flat[at : at + length * np.dtype(kind).itemsize].view(kind)
        for name, (kind, length, at) in header["arrays"].items()
    }
