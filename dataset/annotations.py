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
from functools import lru_cache, partial
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

Files = str | Path | Sequence[str | Path]
Columns = tuple[pa.Array, pa.Array, np.ndarray]  # see `pair_chunks`

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
    "vqa_eval": {"dataset": TEXT, "object_label": TEXT, "answer_type": TEXT, "question_type": TEXT},
}
READ = frozenset(  # all keys that something is read of
    "image caption sentences filename filepath dataset domain object_label ocr image_id img_id cocoid imgid question "
    "question_id answer answers label answer_type question_type".split()
)
DOMAINS = ("in", "near", "out")  # of NoCaps; its files say "near-domain"
IDENTIFIERS = {"question_id", "image_id", "img_id", "cocoid", "imgid"}
WHOLE_NUMBER = re.compile(  # COCO's twelve digits, too; pandas writes 139.0 if an id of the column is missing
    r"((?=[0-9]{12}$)[0-9]+|0|-?[1-9][0-9]{0,17})(?:\.0+)?"
)
COCO_NAME = re.compile(r"(?:COCO_\w+_|(?:^|/)(?=\d{12}\.))0*(\d{1,18})\.\w+$")  # of 2014, and of 2017: twelve digits
CHUNK = 2048  # entries of pre-training checked at a time


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
    """Where an entry stands, in errors "FILE: entry 3", "FILE: line 4" or "FILE: sample KEY".

    header: the texts that an official file holds beside its list (`dataset` of Karpathy's, `data_subtype` of VQA's);
    folder: that of the file, None if the entry's `image` is the path to open, as in a shard or a folder of images.
    """

    path: Path
    unit: str
    number: int | str
    header: Mapping[str, str] = {}
    folder: str | None = None

    def __str__(self) -> str:
        return one_line(f"{self.path}: {self.unit} {self.number}", 1000)


# ------------------------------------------------------------------------------------------------- all kinds


def load_annotations(source: Source, kind: str) -> list[dict]:
    """The entries of a kind of file (a key of KINDS), `image` replaced by the path to open."""
    return [entry for _, entry in located_entries(source, kind)]


def located_entries(
    source: Source,
    kind: str,
    convert: Callable[[dict, Place], list[dict]] | None = None,
    split: str | None = None,
    elements: Iterable[tuple[Place, int | str, Any]] | None = None,
) -> Iterator[tuple[Place, dict]]:
    """(place, entry) of all files, `image` replaced by the path to open.

    kind: a key of KINDS: which keys an entry must have. convert: for files of other layouts, called first with an entry
    and its place: what it is in this layout, as one entry, several, or none; its ValueErrors say what an entry lacks.
    split: "train", "val" or "test": of the entries that name a `split`, those of this one alone; at least one.
    elements: those of `_elements` to take; None: all.
    Raises UserError naming the file, the entry's number and the key.
    """
    folders, found = image_folders(source.image_root), False
    splits = official.KARPATHY_SPLITS.get(split)
    for file, number, read in _elements(source, kind) if elements is None else elements:
        where = file._replace(number=number)
        check_texts(read, where)
        if splits is None or "split" not in read or read["split"] in splits:
            for entry in _entries(read, where, kind, folders, source, convert):
                found = True
                yield where, entry
    if splits and not found:
        raise UserError(f"{source.files}: no entry has the split {' or '.join(splits)}")


def pair_chunks(source: Source) -> Iterator[Columns]:
    """The entries for pre-training in chunks: (paths to open [n], binary; their captions one after the other; the
    number of each entry's captions [n]). They are what `located_entries` yields, in a third of its time."""
    folders = image_folders(source.image_root)
    plain = not (isinstance(folders, dict) or source.image_prefix_map or source.columns)
    elements = _elements(source, "pretrain")
    while chunk := list(islice(elements, CHUNK)):
        columns = _plain_columns(chunk, folders) if plain else None
        yield columns or _columns([entry for _, entry in located_entries(source, "pretrain", elements=chunk)])


def _columns(entries: list[dict]) -> Columns:
    paths = pa.array([os.fsencode(entry["image"]) for entry in entries], pa.large_binary())
    captions = [strings(entry["caption"]) for entry in entries]
    texts = pa.array([text for group in captions for text in group], pa.large_string())
    return paths, texts, np.array([len(group) for group in captions], dtype=np.int64)


def _plain_columns(chunk: list[tuple[Place, int | str, Any]], root: Path | None) -> Columns | None:
    """As `_columns`, of elements of one file that all have an image, without links or dots, and one caption; else None.

    Arrow takes no column with anything but strings that can be encoded: no entry needs to be looked at by itself.
    """
    first = chunk[0][0]
    if first.folder is None:  # of a shard or a folder of images, whose paths are not looked for in a folder
        return None
    folder = os.path.join(root or first.folder, "")
    try:
        images, captions = (
            pa.array([element[key] for _, _, element in chunk], pa.large_string()) for key in ("image", "caption")
        )
        start, separator = (pa.scalar(text, pa.large_string()) for text in (folder, ""))
        inside = pc.binary_join_element_wise(start, images, separator)
        paths = pc.if_else(pc.starts_with(images, os.sep), images, inside)
        folders = pc.unique(pc.replace_substring_regex(paths, "[^/]*$", "")).to_pylist()
        is_plain = all(name is None or _real_folder(name) == (name.rstrip(os.sep), False) for name in folders)
    except (KeyError, TypeError, ValueError, pa.ArrowException):
        return None
    is_complete = not images.null_count + captions.null_count and pc.min(pc.binary_length(images)).as_py() > 0
    if not is_plain or not is_complete or any(file is not first for file, _, _ in chunk):
        return None
    return paths.cast(pa.large_binary()), captions, np.ones(len(chunk), dtype=np.int64)


def file_list(files: Files) -> Sequence[str | Path]:
    """One path or several, as several."""
    return [files] if isinstance(files, str | Path) else files


def strings(value: str | list[str]) -> list[str]:
    """The value of a key that may be one string or a list of them, as a list."""
    return [value] if isinstance(value, str) else value


def _elements(source: Source, kind: str) -> Iterator[tuple[Place, int | str, Any]]:
    """(a place in the file, the number for it, element) of every list, table, folder and shard: a place of its own for
    each of millions of elements would take as long as to read them."""
    for name in file_list(source.files):
        path = find_file(name, "annotation file")
        path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
        if shards := shard_files(path):
            for shard, key, entry in shard_entries(shards, source.max_bad_share):
                yield Place(shard, "sample", key), key, entry
        elif path.is_dir():
            for text, number, entry in folder_entries(path):
                yield Place(text, "line", number), number, entry
        else:
            header, unit, elements = _read_list(path, [source.columns.get(key, key) for key in KINDS[kind]])
            file, number = Place(path, unit, 0, header, str(path.parent)), None
            for number, element in elements:
                yield file, number, element
            if number is None:
                raise UserError(f"{path}: holds no entry")


def _read_list(path: Path, needed: list[str]) -> tuple[dict[str, str], str, Iterable[tuple[int, Any]]]:
    """(the texts beside the list of an official file, else {}; what its entries are counted in; their numbers and the
    entries); needed: the columns that a table must have."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        raise UserError(f"{path}: {PARQUET_PROBLEM}")
    if ending in LINES:
        return {}, "line", LINES[ending](path, needed)
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


# ------------------------------------------------------------------------------------------------- checks


def _entries(read: dict, where: Place, kind: str, folders, source: Source, convert=None) -> list[dict]:
    """The entries that an element of a file is, checked, and with the paths to open as their `image`; folders: of
    `image_folders`."""
    for key, name in source.columns.items():
        if name in read:
            read[key] = read[name]
    for key in IDENTIFIERS & read.keys():
        read[key] = whole_number(read[key])
    try:
        entries = convert(read, where) if convert else [read]
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    needed, optional = KINDS[kind], OPTIONAL.get(kind, {})
    for entry in entries:
        if missing := next((key for key in needed if key not in entry), None):
            raise UserError(f"{where} has no {missing!r}; a {kind} entry needs {', '.join(needed)}")
        for key, types in needed.items():
            check_kind(entry[key], key, types, where)
        for key, types in optional.items():
            if entry.get(key) == []:  # as if it were missing
                entry[key] = None
            if entry.get(key) is not None:
                check_kind(entry[key], key, types, where)
        if not entry["image"] or "\0" in entry["image"]:
            raise UserError(f"{where}: 'image' is empty or holds a zero byte")
        if where.folder is not None:
            entry["image"] = _image_path(entry, where, folders, source.image_prefix_map)
        elif where.unit == "line":  # of a folder of images
            entry["image"] = _real_file(entry["image"])
    return entries


def _image_path(entry: dict, where: Place, folders, prefixes: Mapping[str, str]) -> str:
    """The path to open, to which its links and .. lead: an image has one path, however files spell it."""
    folder, image = where.folder if folders is None else folders, entry["image"]
    if isinstance(folders, dict):
        name = entry.get("dataset")
        if not isinstance(name, str) or name not in folders:
            known = ", ".join(folders) or "nothing"
            raise UserError(
                f"{where} has the dataset {shown(name)}, but data.image_root names only {known}; add it there"
            )
        if isinstance(folders[name], str):
            folders[name] = find_file(folders[name], f"data.image_root.{name}").resolve()
        folder = folders[name]
    old = max((prefix for prefix in prefixes if image.startswith(prefix)), key=len, default="")
    return _real_file(os.path.join(folder, prefixes.get(old, old) + image[len(old) :]))


def _real_file(path: str) -> str:
    """Where an absolute path leads."""
    parent, name = os.path.split(path)
    folder, has_links = _real_folder(parent)
    path = os.path.join(folder, name)
    return os.path.realpath(path) if has_links else path


@lru_cache(maxsize=1 << 16)
def _real_folder(path: str) -> tuple[str, bool]:
    """Where a folder's absolute path leads, and whether links are in it: it is listed once, since to look at each of
    millions of files takes several times as long."""
    folder = os.path.realpath(path)
    try:
        with os.scandir(folder) as files:
            return folder, any(file.is_symlink() for file in files)
    except OSError:  # no such folder, or no right to list it
        return folder, False


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
    """UserError if an entry is no object, or a text that is read of it holds half of a surrogate pair (JSON can write
    one), which neither a tokenizer nor a result file can take."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {type(entry).__name__}, not an object")
    for key in READ & entry.keys():
        value = entry[key]
        if isinstance(value, int) or (isinstance(value, str) and value.isascii()):
            continue
        if HALF_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            raise UserError(f"{where}: {key!r} holds half of a surrogate pair, which is no character: {shown(value)}")


def image_folders(image_root: str | Path | Mapping[str, str] | None) -> Path | dict[str, str | Path] | None:
    """The folder of relative paths, None for that of the annotation file, or a map whose folders are looked for when an
    entry names them."""
    if isinstance(image_root, Mapping):
        return {key: str(path) for key, path in image_root.items()}
    return None if image_root is None else find_file(image_root, "data.image_root").resolve()


def _each_once(located: list[tuple[Place, dict]]) -> None:
    """UserError if a file or an entry stands there twice: if all entries of an image do. A caption that was published
    twice among others of its image stays."""
    places: dict[str, dict[tuple[str, ...], list[Place]]] = {}
    for where, entry in located:
        captions = tuple(caption.strip() for caption in strings(entry.get("caption") or []))
        places.setdefault(entry["image"], {}).setdefault(captions, []).append(where)
    for image, groups in places.items():
        if min(map(len, groups.values())) > 1:
            first, second = next(iter(groups.values()))[:2]
            raise UserError(f"{second}: {image} and its captions stand in {first} already; evaluate each entry once")


# ------------------------------------------------------------------------------------------------- retrieval


def load_pairs(source: Source) -> list[dict]:
    """The entries to fine-tune retrieval on."""
    return [
        entry
        for _, entry in located_entries(source, "retrieval_train", partial(_for_retrieval, split="train"), "train")
    ]


def load_candidates(source: Source, split: str) -> list[dict]:
    """The entries {image, caption} of retrieval's "val" or "test", whose captions are ranked for the images."""
    located = list(located_entries(source, "retrieval_eval", partial(_for_retrieval, split=split), split))
    _each_once(located)
    return [entry for _, entry in located]


def _for_retrieval(entry: dict, where: Place, split: str) -> list[dict]:
    """A plain entry as it is; Karpathy's as pairs (train) or as one image with its captions, if it has any."""
    if not official.is_karpathy(entry):
        return [entry]
    name = official.karpathy_set(entry, where.header)
    found = official.karpathy_pairs(entry, name) if split == "train" else [official.karpathy_image(entry, name)]
    return [item for item in found if item["caption"]]


# ------------------------------------------------------------------------------------------------- captioning


def load_captions(source: Source, split: str) -> list[dict]:
    """The images of a split ("train", "val" or "test"), each once: {image, captions, image_id, labels, domain}.

    image: the path to open; captions: list of str, as they stand (empty if a test set publishes none); image_id: the
    entry's, else COCO's number in the file name, else the image as its file names it first; labels: list of str;
    domain: one of DOMAINS or None. To be evaluated, an image must have one id, and no entry may stand there twice.
    """
    images: dict[str, dict] = {}
    of_id, evaluated = {}, []
    for where, entry in located_entries(source, "caption", _for_captioning, split):
        image, domain = entry["image"], (entry.get("domain") or "").removesuffix("-domain") or None
        if domain not in (None, *DOMAINS):
            raise UserError(f"{where}: 'domain' is {shown(domain)}, it must be one of {', '.join(DOMAINS)}")
        identifier = entry["name"] if entry["image_id"] is None else entry["image_id"]
        labels = split_labels(entry.get("object_label") or "")
        new = {"image": image, "captions": [], "image_id": identifier, "labels": labels, "domain": domain}
        first = images.setdefault(image, new)
        first["captions"] += [] if entry.get("caption") is None else strings(entry["caption"])
        if split == "train":  # of which no places are kept: there are many
            continue
        evaluated.append((where, entry))
        place, other = of_id.setdefault(first["image_id"], (where, first))
        if other is not first or entry["image_id"] not in (None, first["image_id"]):
            raise UserError(
                f"{where}: {image} has the image_id {shown(identifier)}, but {other['image']} has "
                f"{shown(other['image_id'])} in {place}; over all files, an id must stand for one image, and an image "
                "have one id (have two files counted from 0?)"
            )
    _each_once(evaluated)
    return list(images.values())


def split_labels(object_label: str) -> list[str]:
    """mPLUG's "dog&&frisbee&&dog" -> ["dog", "frisbee"]"""
    return list(dict.fromkeys(label.strip() for label in object_label.split("&&") if label.strip()))


def _for_captioning(entry: dict, where: Place) -> list[dict]:
    """An entry of any layout with `image`, `caption` and `image_id` or, if it has none (None), `name`, its id then;
    Karpathy's without blank captions."""
    if official.is_karpathy(entry):
        entry = {**entry, **official.karpathy_image(entry, official.karpathy_set(entry, where.header))}
    ids = [entry[key] for key in ("image_id", "img_id", "cocoid", "imgid") if entry.get(key) not in (None, "", [])]
    if ids:
        entry["image_id"] = ids[0]
        return [entry]
    name = os.path.normpath(member_name(str(entry.get("image"))))
    number = COCO_NAME.search(name)
    return [entry | {"image_id": None, "name": int(number[1]) if number else name}]
