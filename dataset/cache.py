"""What data sets keep in memory, in blocks that processes share: strings, pre-training's entries, decoded images.

Millions of Python strings take ten times the memory of their text, and forked data workers copy them page by page. The
entries of large files are also kept in an Arrow file beside the first of them (else in $XDG_CACHE_HOME/semmim), which
later runs and the other processes of a machine map: it is in memory once.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from dataset.annotations import Source, file_list, pair_chunks
from dataset.shards import shard_files
from dataset.transforms import ImageError, open_image
from utils import UserError, find_file, replacing

log = logging.getLogger("semmim")
pa.set_memory_pool(pa.system_memory_pool())  # others keep what was needed to read millions of entries

CACHED_FROM = 50_000_000  # bytes of annotation files; fewer are read in seconds
VERSION = 5  # of what the Arrow file holds: to be raised with every change of what is read, checked or stored
SHARE_OF_MEMORY = 0.25  # that decoded images may take
AT_ONCE = 1000  # images decoded before their size is looked at


class StringTable:
    """A read-only list of strings in one block of memory; strings: texts, or an Arrow array of them."""

    def __init__(self, strings: Iterable[str] | pa.Array = ()):
        if not isinstance(strings, pa.Array):
            strings = pa.array([text.encode("utf-8", "surrogateescape") for text in strings], pa.large_binary())
        self.array = strings
        _, ends, text = strings.buffers()
        self.ends = np.frombuffer(ends, dtype=np.int64)[: len(strings) + 1] if len(strings) else np.zeros(1, np.int64)
        self.bytes = np.frombuffer(text or b"", dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return str(self.bytes[self.ends[index] : self.ends[index + 1]], "utf-8", "surrogateescape")


# ------------------------------------------------------------------------------------------------- entries


class Pairs:
    """Pre-training's entries. image_id [entries] int32: number of the entry's image in `paths`, counted by first
    appearance; caption_start [entries + 1] int64: where its captions begin in `captions`."""

    def __init__(self, entries: pa.Table):
        images, captions = (entries[name].chunk(0) for name in ("image", "captions"))
        self.image_id, self.paths = images.indices.to_numpy(), StringTable(images.dictionary)
        self.caption_start, self.captions = captions.offsets.to_numpy(), StringTable(captions.values)


def read_pairs(source: Source) -> pa.Table:
    """The entries of pre-training's files: `image`, the path to open (numbered in a dictionary), and `captions`."""
    images, captions, counts = [], [], [[0]]
    for paths, texts, numbers in pair_chunks(source):
        images.append(paths.dictionary_encode())
        captions.append(texts)
        counts.append(numbers)
    captions = pa.chunked_array(captions).combine_chunks()  # one after the other: a copy of both would be held
    images = pa.chunked_array(images).unify_dictionaries().combine_chunks()
    starts = pa.array(np.cumsum(np.concatenate(counts), dtype=np.int64))
    return pa.table({"image": images, "captions": pa.LargeListArray.from_arrays(starts, captions)})


def load_pairs(source: Source) -> Pairs:
    """The entries of pre-training's files, from their Arrow file if they are large."""
    named = [Path(find_file(name, "annotation file")) for name in file_list(source.files)]
    files = [file for path in named for file in shard_files(path) or [path]]
    states = [path.stat() for path in files]
    folders = any(path.is_dir() for path in files)  # of images: no size and time tells what is in them
    if folders or sum(state.st_size for state in states) < CACHED_FROM:
        return Pairs(read_pairs(source))
    settings = [[str(path.absolute()) for path in files], str(source), os.getcwd()]
    content = json.dumps([VERSION, settings, [[state.st_size, state.st_mtime_ns] for state in states]]).encode()
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "semmim")
    folder = files[0].parent if os.access(files[0].parent, os.W_OK) else cache
    with _one_at_a_time(files[0].parent):  # the first process of a machine makes the file, the others wait for it
        pairs = Pairs(_kept(folder / f".{files[0].stem}.{digest}.arrow", content, source))
    pa.default_memory_pool().release_unused()
    return pairs


def _kept(path: Path, content: bytes, source: Source) -> pa.Table:
    """The entries in the Arrow file `path`, which is made anew unless it was made of `content`."""
    if entries := _mapped(path, content):
        log.info("%d entries of data.train from %s", len(entries), path)
        return entries
    entries = read_pairs(source).replace_schema_metadata({b"content": content})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, pa.ipc.new_file(str(temporary), entries.schema) as file:
            file.write_table(entries)
    except (OSError, UserError) as error:
        log.warning("the entries of data.train cannot be kept (%s): every process reads the files", error)
        return entries
    log.info("%d entries, kept in %s", len(entries), path)
    return _mapped(path, content) or entries


def _mapped(path: Path, content: bytes) -> pa.Table | None:
    """The entries in an Arrow file that was made of `content`, mapped; None if it is missing or of something else."""
    try:
        entries = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException):
        return None
    return entries if entries.schema.metadata == {b"content": content} else None


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """While it lasts, no other process is in it for the same folder (if the file system knows such locks)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which ends the lock


# ------------------------------------------------------------------------------------------------- images


class ImageCache:
    """Decoded RGB images, indexed like `paths`; a broken image raises its ImageError at every visit. UserError if they
    take more than a quarter of the machine's memory, divided among its processes."""

    def __init__(self, paths: StringTable):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = memory * SHARE_OF_MEMORY / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._images: list[np.ndarray | ImageError] = []
        size = 0
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for first in range(0, len(paths), AT_ONCE):
                images = pool.map(_decode, [paths[i] for i in range(first, min(first + AT_ONCE, len(paths)))])
                self._images += images
                size += sum(image.size for image in self._images[first:] if isinstance(image, np.ndarray))
                if size > limit:
                    raise UserError(
                        f"data.cache_images: the decoded images take more than {limit / 1e9:.2f} GB (a quarter of the "
                        "memory, over all processes here); set it to false"
                    )
        log.info("cached %d images (%.0f MB)", len(paths), size / 1e6)

    def __getitem__(self, index: int) -> Image.Image:
        image = self._images[index]
        if isinstance(image, ImageError):
            raise ImageError(image.path, image.reason)
        return Image.fromarray(image)


def _decode(path: str) -> np.ndarray | ImageError:
    try:
        return np.asarray(open_image(path))  # [H,W,3] uint8
    except ImageError as error:
        return error
