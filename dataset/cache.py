"""What data sets keep in memory, in blocks that processes share: strings, pre-training's entries, decoded images.

Millions of Python strings take ten times the memory of their text, and forked data workers copy them page by page. The
entries of large files are also kept in an Arrow file in $XDG_CACHE_HOME/semmim (or ~/.cache/semmim), whose name has a
digest of what it was made of. Later runs and the other processes of a machine map it: it is in memory once.
"""

import fcntl
import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataset.annotations import Source, file_list, pair_chunks
from dataset.shards import shard_files
from dataset.transforms import ImageError, open_image
from utils import find_file, make_folder, replacing

log = logging.getLogger("semmim")
pa.set_memory_pool(pa.system_memory_pool())  # others keep what was needed to read millions of entries

CACHED_FROM = 50_000_000  # bytes of annotation files; fewer are read in seconds
VERSION = 6  # of what the Arrow file holds: to be raised with every change of what is read, checked or stored


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

    @cached_property
    def lengths(self) -> np.ndarray:
        """Characters of each string."""
        return pc.utf8_length(self.array.cast(pa.large_string())).to_numpy()


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
    states = [(str(path.absolute()), path.stat()) for path in files]
    folders = any(path.is_dir() for path in files)  # of images: no size and time tells what is in them
    if folders or sum(state.st_size for _, state in states) < CACHED_FROM:
        return Pairs(read_pairs(source))
    made_of = [VERSION, *((state.st_size, state.st_mtime_ns) for _, state in states)]
    folder = make_folder(Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "semmim"))
    name = f"{files[0].stem}.{_digest([str(source), os.getcwd(), [name for name, _ in states]])}"
    path = folder / f"{name}.{_digest(made_of)}.arrow"
    with open(folder / "lock", "w") as lock:  # the first process of a machine makes the file, the others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for outdated in folder.glob(f"{glob.escape(name)}.*.arrow"):
                outdated.unlink()
            with replacing(path) as temporary:
                entries = read_pairs(source)
                with pa.ipc.new_file(str(temporary), entries.schema) as file:
                    file.write_table(entries)
    entries = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    pa.default_memory_pool().release_unused()
    log.info("%d entries of data.train in %s", len(entries), path)
    return Pairs(entries)


def _digest(values: list) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def decoded_images(paths: StringTable) -> list[np.ndarray | None]:
    """The images of the paths as RGB [H,W,3] uint8; None for one that cannot be read."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        images = list(pool.map(_decoded, map(paths.__getitem__, range(len(paths)))))
    log.info("cached %d images (%.0f MB)", len(paths), sum(image.size for image in images if image is not None) / 1e6)
    return images


def _decoded(path: str) -> np.ndarray | None:
    try:
        return np.asarray(open_image(path))
    except ImageError:
        return None
