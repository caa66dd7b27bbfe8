"""Annotation files: every layout that the stages read, checked entry by entry and resolved to the images' paths.

    {"image", "caption": str | [str]}                                                 pre-training
    {"filepath", "filename", "sentences": [{"raw"}], "cocoid" | "imgid", "split"}     Karpathy's files: retrieval and
                                                                                      captioning
    {"image", "caption", "image_id"}  and  {"image", "caption": [str]}                retrieval: train, and val and test
    {"image", "caption": str | [str], "image_id"}                                     captioning: plain lists (ALBEF,
    {"image", "caption": [str], "img_id", "domain"}                                   BLIP) and NoCaps
    {"image", "question", "question_id", "dataset": "vqa" | "vg" | ..., "answer": [str x 10] | str,
     "object_label": "dog&&frisbee", "ocr": [[position, token], ...]}                 VQA (ALBEF, mPLUG)
    {"question_id", "question", "image_id"}                                           VQA's official question files

They stand in the files of dataset.files or in tar shards; the keys: docs/data.md. VQA's are read by dataset.questions.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataset import official
from dataset.files import LINES, PARQUET_PROBLEM, folder_entries, read_json
from dataset.shards import member_name, shard_entries, shard_files
from utils import HALF_SURROGATE, UserError, find_file, one_line, shown

Columns = tuple[pa.Array, pa.Array, np.ndarray]  # see `pair_chunks`
Files = str | Path | Sequence[str | Path]

CHUNK = 2048  # entries held as Python's objects at a time
TEXT, TEXTS, IDENTIFIER = (str,), (str, list), (str, int)  # kinds of values; a list is one of texts
NAMES = {str: "a string", list: "a list of strings", int: "a whole number"}
# The keys that an entry must have, and those that may be missing or empty; other keys are kept as they are.
KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    **dict.fromkeys(("pretrain", "retrieval_train", "retrieval_eval"), {"image": TEXT, "caption": TEXTS}),
    "caption": {"image": TEXT},
    "vqa_train": {"image": TEXT, "question": TEXT, "answer": TEXTS},
    "vqa_eval": {"image": TEXT, "question": TEXT, "question_id": IDENTIFIER},
}
OPTIONAL: dict[str, dict[str, tuple[type, ...]]] = {
    "caption": {"caption": TEXTS, "image_id": IDENTIFIER, "object_label": TEXT, "domain": TEXT},
    "vqa_train": {"dataset": TEXT, "question_id": IDENTIFIER, "object_label": TEXT},
    "vqa_eval": dict.fromkeys(("dataset", "object_label", "answer_type", "question_type"), TEXT) | {"answer": TEXTS},
}
DOMAINS = ("in", "near", "out")  # of NoCaps; its files say "near-domain"
IDENTIFIERS = {"question_id", "image_id", "img_id", "cocoid", "imgid"}
WHOLE_NUMBER = re.compile(  # COCO's twelve digits, too; pandas writes 139.0 if an id of the column is missing
    r"((?=[0-9]{12}$)[0-9]+|0|-?[1-9][0-9]{0,17})(?:\.0+)?"
)


@dataclass(frozen=True)
class Source:
    """Annotation files and where their images are.

    files: one path or several, looked up in the working directory, then in the repository. image_root: folder of
    relative `image` paths, or a map to one by the entry's `dataset`; None: the annotation file's own folder.
    image_prefix_map: {old: new}, the longest prefix that an `image` starts with is replaced before that (published
    files say val2014/ where a disk says otherwise). max_bad_share: of the samples of a line of `files` that damaged
    shards may lose. columns: {key: what the files call it}, for files whose keys have other names.
    """

    files: Files
    image_root: str | Path | Mapping[str, str] | None = None
    image_prefix_map: Mapping[str, str] = field(default_factory=dict)
    max_bad_share: float = 0.01
    columns: Mapping[str, str] = field(default_factory=dict)


class Place(NamedTuple):
    """Where an entry stands: `unit` and `number` are "entry" and 3, "line" and 4, or "sample" and its key.

    header: the texts that an official file holds beside its list (`dataset` of Karpathy's, `data_subtype` of VQA's);
    folder: that of the file, None if the entry's `image` is the path to open, as in a shard or a folder of images.
    """

    path: Path
    unit: str
    number: int | str = ""
    header: Mapping[str, str] = {}
    folder: str | None = None

    def __str__(self) -> str:
        return one_line(f"{self.path}: {self.unit} {self.number}", 1000)


def load_annotations(source: Source, kind: str) -> list[dict]:
    """The entries of a kind of file (a key of KINDS), as `located_entries` has them."""
    return [entry for _, entry in located_entries(source, kind)]


def located_entries(
    source: Source,
    kind: str,
    split: str | None = None,
    convert: Callable[[dict, Place], dict] | None = None,
    elements: Iterable[tuple[Place, int | str, Any]] | None = None,
) -> Iterator[tuple[Place, dict]]:
    """(place, entry) of all files, `image` the path to open, `name` what the file calls it.

    kind: a key of KINDS: which keys an entry must have. split: "train", "val" or "test", for files that name an entry's
    `split`, as Karpathy's: those of this one alone; at least one. convert: what makes an entry of this kind of one of
    another layout at a place. elements: those of `_elements` to take; None: all.
    Raises UserError naming the file, the entry's number and the key.
    """
    splits, found = official.KARPATHY_SPLITS.get(split), False
    find_folder = cache(lambda folder, key: str(find_file(folder, key).resolve()))
    for file, number, read in _elements(source) if elements is None else elements:
        where = file._replace(number=number)
        check_texts(read, where)
        if splits and read.get("split", splits[0]) not in splits:
            continue
        try:
            if splits and official.is_karpathy(read):
                name = (
                    read.get("dataset") or where.header.get("dataset") or ("coco" if "cocoid" in read else "karpathy")
                )
                read |= official.karpathy_image(read, name)
            entry = _plain(read, source.columns)
            entry = convert(entry, where) if convert else entry
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{where} is not as expected ({type(error).__name__}: {one_line(error)})") from None
        _check(entry, kind, where)
        path = entry["image"] if where.folder is None else _image_path(entry, where, source, find_folder)
        found = True
        yield where, {**entry, "name": entry["image"], "image": path}
    if splits and not found:
        raise UserError(f"{source.files}: no entry has the split {' or '.join(splits)}")


def pair_chunks(source: Source) -> Iterator[Columns]:
    """The entries for pre-training in chunks: (paths to open [n], binary; their captions one after the other; the
    number of each entry's captions [n]). They are what `located_entries` yields, in a fifth of its time."""
    root, plain = source.image_root, not (source.image_prefix_map or source.columns)
    if isinstance(root, str | Path):
        root = str(find_file(root, "data.image_root").resolve())
    elements = _elements(source)
    while chunk := list(islice(elements, CHUNK)):
        columns = _plain_columns(chunk, root) if plain and not isinstance(root, Mapping) else None
        if columns is None:
            entries = [entry for _, entry in located_entries(source, "pretrain", elements=chunk)]
            paths = pa.array([os.fsencode(entry["image"]) for entry in entries], pa.large_binary())
            groups = [strings(entry["caption"]) for entry in entries]
            texts = pa.array([text for group in groups for text in group], pa.large_string())
            columns = paths, texts, np.array([len(group) for group in groups], np.int64)
        yield columns


def _plain_columns(chunk: list[tuple[Place, int | str, Any]], root: str | None) -> Columns | None:
    """A chunk of one file, if each entry has a caption and an image whose folder no link or .. leads away from.

    Arrow takes no column with anything but strings that can be encoded: no entry needs to be looked at by itself.
    """
    file = chunk[0][0]
    if file.folder is None or chunk[-1][0] is not file:
        return None
    try:
        images, captions = (pa.array([x[key] for _, _, x in chunk], pa.large_string()) for key in ("image", "caption"))
        start, separator = (pa.scalar(text, pa.large_string()) for text in (os.path.join(root or file.folder, ""), ""))
        inside = pc.binary_join_element_wise(start, images, separator)
        paths = pc.if_else(pc.starts_with(images, os.sep), images, inside)
        folders = pc.unique(pc.replace_substring_regex(paths, "/[^/]*$", "")).to_pylist()
        plain = not images.null_count + captions.null_count and all(_real_folder(name) == name for name in folders)
    except (KeyError, TypeError, ValueError, pa.ArrowException):
        return None
    if not plain or pc.any(pc.match_substring_regex(images, "^$|\\x00")).as_py():
        return None
    return paths.cast(pa.large_binary()), captions, np.ones(len(chunk), np.int64)


def file_list(files: Files) -> Sequence[str | Path]:
    """One path or several, as several."""
    return [files] if isinstance(files, str | Path) else files


def strings(value: str | list[str]) -> list[str]:
    """The value of a key that may be one string or a list of them, as a list."""
    return [value] if isinstance(value, str) else value


def _elements(source: Source) -> Iterator[tuple[Place, int | str, Any]]:
    """(place without its number, number, element) of every list, table, folder and shard."""
    for name in file_list(source.files):
        path = find_file(name, "annotation file")
        path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
        if shards := shard_files(path):
            for shard, key, entry in shard_entries(shards, source.max_bad_share):
                yield Place(shard, "sample"), key, entry
        elif path.is_dir():
            for text, number, entry in folder_entries(path):
                yield Place(text, "line"), number, entry
        else:
            header, unit, elements = _read_list(path)
            number, file = None, Place(path, unit, header=header, folder=str(path.parent))
            for number, element in elements:
                yield file, number, element
            if number is None:
                raise UserError(f"{path}: holds no entry")


def _read_list(path: Path) -> tuple[dict[str, str], str, Iterable[tuple[int, Any]]]:
    """(the texts beside the list of an official file, else {}; what its entries are counted in; their numbers and the
    entries)"""
    ending = path.suffix.lower()
    if ending == ".parquet":
        raise UserError(f"{path}: {PARQUET_PROBLEM}")
    if ending in LINES:
        return {}, "line", LINES[ending](path)
    content = read_json(path)
    if isinstance(content, list):
        return {}, "entry", enumerate(content)
    lists = [key for key in ("images", "questions") if isinstance(content, dict) and isinstance(content.get(key), list)]
    if len(lists) != 1:
        raise UserError(
            f"{path}: holds no list of entries; name VQA's questions instead of their annotations; COCO's captions are "
            "read by tools.prepare"
        )
    header = {key: value for key, value in content.items() if isinstance(value, str)}
    return header, "entry", enumerate(content[lists[0]])


def _plain(read: dict, columns: Mapping[str, str]) -> dict:
    """An entry under this project's keys, without those that are null or an empty list, its ids as numbers."""
    entry = {key: value for key, value in read.items() if value is not None and value != []}
    entry |= {key: entry[name] for key, name in columns.items() if name in entry}
    return entry | {key: whole_number(entry[key]) for key in IDENTIFIERS & entry.keys()}


def _check(entry: dict, kind: str, where: Place) -> None:
    """UserError if an entry lacks a key of its kind, or the value of one is of another type."""
    needed, optional = KINDS[kind], OPTIONAL.get(kind, {})
    if missing := next((key for key in needed if key not in entry), None):
        raise UserError(f"{where} has no {missing!r}; a {kind} entry needs {', '.join(needed)}")
    for kinds in (needed, optional):
        for key, types in kinds.items():
            if key in entry:
                check_kind(entry[key], key, types, where)
    if not entry["image"] or "\0" in entry["image"]:
        raise UserError(f"{where}: 'image' is empty or holds a zero byte")


def _image_path(entry: dict, where: Place, source: Source, find_folder: Callable[[str, str], str]) -> str:
    """The path to open, to which links and .. of its folder lead: an image has one path, however files spell it."""
    image, prefixes, root, key = entry["image"], source.image_prefix_map, source.image_root, "data.image_root"
    if isinstance(root, Mapping):
        name = entry.get("dataset")
        if name not in list(root):
            known = ", ".join(root) or "nothing"
            raise UserError(f"{where} has the dataset {shown(name)}, but {key} names only {known}; add it there")
        root, key = root[name], f"{key}.{name}"
    folder = where.folder if root is None else find_folder(root, key)
    old = max((prefix for prefix in prefixes if image.startswith(prefix)), key=len, default="")
    parent, name = os.path.split(os.path.join(folder, prefixes.get(old, old) + image[len(old) :]))
    return os.path.join(_real_folder(parent), name)


_real_folder = lru_cache(maxsize=1 << 16)(os.path.realpath)  # looked up once for millions of images


def check_kind(value, key: str, types: tuple[type, ...], where: Place | str) -> None:
    """UserError if the value of `key` is of none of the `types`, or a list of anything but strings."""
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join(NAMES[t] for t in types)
        raise UserError(f"{where}: {key!r} is {type(value).__name__}, it must be {expected}")
    if isinstance(value, list) and not (value and all(isinstance(item, str) for item in value)):
        raise UserError(f"{where}: {key!r} must be a list of strings with at least one")


def whole_number(value):
    """139 of 139, "139", 139.0 and "139.0", as result files must name it; anything else as it is."""
    found = WHOLE_NUMBER.fullmatch(str(value).strip()) if isinstance(value, str | float) else None
    return int(found[1]) if found else value


def check_texts(entry: Any, where: Place | str) -> None:
    """UserError if an entry is no object, or a text of it holds half of a surrogate pair (JSON can write one), which
    neither a tokenizer nor a result file can take."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {type(entry).__name__}, not an object")
    if found := HALF_SURROGATE.search(json.dumps(entry, ensure_ascii=False)):
        raise UserError(f"{where}: a text holds {ascii(found[0])}, half of a surrogate pair, which is no character")


def _each_once(located: list[tuple[Place, dict]]) -> None:
    """UserError if a file or an entry stands there twice: if all entries of an image do. A caption that was published
    twice among others of its image stays."""
    places: dict[str, dict[tuple[str, ...], list[Place]]] = {}
    for where, entry in located:
        captions = tuple(caption.strip() for caption in strings(entry.get("caption", [])))
        places.setdefault(entry["image"], {}).setdefault(captions, []).append(where)
    for image, groups in places.items():
        if min(map(len, groups.values())) > 1:
            first, second = next(iter(groups.values()))[:2]
            raise UserError(f"{second}: {image} and its captions stand in {first} already; evaluate each entry once")


def load_pairs(source: Source) -> list[tuple[str, str]]:
    """(path of an image, caption) of all pairs to fine-tune retrieval on; Karpathy's captions as prepared lists have
    them."""
    pairs = []
    for _, entry in located_entries(source, "retrieval_train", "train"):
        captions = strings(entry["caption"])
        if official.is_karpathy(entry):
            captions = [text for caption in captions if (text := official.tidy(caption))]
        pairs += [(entry["image"], text) for text in captions]
    return pairs


def load_candidates(source: Source, split: str) -> list[tuple[str, str]]:
    """(path of an image, caption) of retrieval's "val" or "test", whose captions are ranked for the images."""
    located = list(located_entries(source, "retrieval_eval", split))
    _each_once(located)
    return [(entry["image"], text) for _, entry in located for text in strings(entry["caption"])]


def load_captions(source: Source, split: str) -> list[dict]:
    """The images of a split ("train", "val" or "test"), each once: {image, captions, image_id, labels, domain}.

    image: the path to open; captions: list of str, as they stand (empty if a test set publishes none); image_id: the
    entry's, else COCO's number in the file name, else the image as its file names it first; labels: list of str;
    domain: one of DOMAINS or None. To be evaluated, an image must have one id, and no entry may stand there twice.
    """
    images: dict[str, dict] = {}
    of_id, evaluated = {}, []
    for where, entry in located_entries(source, "caption", split):
        image, domain = entry["image"], entry.get("domain", "").removesuffix("-domain") or None
        if domain not in (None, *DOMAINS):
            raise UserError(f"{where}: 'domain' is {shown(domain)}, it must be one of {', '.join(DOMAINS)}")
        own = next((entry[key] for key in ("image_id", "img_id", "cocoid", "imgid") if key in entry), None)
        identifier = _image_id(entry["name"]) if own is None else own
        check_kind(identifier, "image_id", IDENTIFIER, where)
        labels = split_labels(entry.get("object_label", ""))
        new = {"image": image, "captions": [], "image_id": identifier, "labels": labels, "domain": domain}
        first = images.setdefault(image, new)
        first["captions"] += strings(entry.get("caption", []))
        if split == "train":  # of which no places are kept: there are many
            continue
        evaluated.append((where, entry))
        place, other = of_id.setdefault(first["image_id"], (where, first))
        if other is not first or own not in (None, first["image_id"]):
            raise UserError(
                f"{where}: {image} has the image_id {shown(identifier)}, but {other['image']} has "
                f"{shown(other['image_id'])} in {place}; over all files, an id must stand for one image, and an image "
                "have one id (have two files counted from 0?)"
            )
    _each_once(evaluated)
    return list(images.values())


def _image_id(name: str) -> int | str:
    """COCO's number in the name of an image, else the name."""
    name = os.path.normpath(member_name(name))
    number = official.coco_number(name)
    return name if number is None else number


def split_labels(object_label: str) -> list[str]:
    """mPLUG's "dog&&frisbee&&dog" -> ["dog", "frisbee"]"""
    return list(dict.fromkeys(label.strip() for label in object_label.split("&&") if label.strip()))
