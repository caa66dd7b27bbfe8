"""Entries of annotation files: reading JSON lists, checking keys and texts, resolving the images' paths.

Shards are read by dataset.shards; JSON lines, tables, token files and folders of images by dataset.tables.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataset.shards import shard_entries, shard_files
from dataset.tables import JSON_LINES, PARQUET, folder_entries, numbered_elements, parquet_problem
from utils import HALF_SURROGATE, UserError, find_file, one_line, open_file, shown

Files = str | Path | Sequence[str | Path]

# Required keys of an entry and the kinds of value they may have; other keys are kept as they are.
TEXT = (str,)
TEXT_OR_LIST = (str, list)
IDENTIFIER = (str, int)
KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "pretrain": {"image": TEXT, "caption": TEXT_OR_LIST},
    "retrieval_train": {"image": TEXT, "caption": TEXT_OR_LIST},
    "retrieval_eval": {"image": TEXT, "caption": TEXT_OR_LIST},
    "vqa_train": {"image": TEXT, "question": TEXT, "answer": TEXT_OR_LIST},
    "vqa_eval": {"image": TEXT, "question": TEXT, "question_id": IDENTIFIER},
    "caption": {"image": TEXT},
}
NAMES = {str: "a string", list: "a list of strings", int: "a whole number"}
# Keys that may be missing or null, else must be of these kinds.
OPTIONAL: dict[str, dict[str, tuple[type, ...]]] = {
    "retrieval_train": {"image_id": IDENTIFIER},
    "vqa_train": {"dataset": TEXT, "question_id": IDENTIFIER},
    "vqa_eval": {"dataset": TEXT, "answer_type": TEXT, "question_type": TEXT},
}
# What else is read as text of an entry: all of these must be encodable.
TEXTS = {
    "retrieval_train": ("sentences", "filename", "filepath"),
    "retrieval_eval": ("sentences", "filename", "filepath"),
    "vqa_train": ("object_label", "ocr"),
    "vqa_eval": ("answer", "object_label", "ocr"),
    "caption": (
        "caption",
        "sentences",
        "filename",
        "filepath",
        "object_label",
        "image_id",
        "img_id",
        "cocoid",
        "imgid",
    ),
}

OFFICIAL_LISTS = ("images", "questions")  # where Karpathy's files and VQA's question files keep their entries

PIECE = 1 << 20  # characters of a JSON list that are read at a time
SPACE = re.compile(r"[ \t\n\r]*")
LIST_BEGIN = re.compile(r"[ \t\n\r]*\[[ \t\n\r]*")
AFTER_ELEMENT = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")


@dataclass(frozen=True)
class Source:
    """Annotation files and where their images are.

    files: one path or several, looked up in the working directory, then in the repository: JSON lists and what
    dataset.tables reads; a .tar file, or a folder of them, is read as shards (see dataset.shards). image_root: folder
    of relative `image` paths, or a map to one by the entry's `dataset`; None: the annotation file's own folder.
    image_prefix_map: {old: new}, the longest prefix that an `image` starts with is replaced before that (published
    files say val2014/ where a disk says otherwise). max_bad_share: of the samples of a line of `files` that damaged
    shards may lose. columns: {key: what the files call it}, of tables and lists whose keys have other names.
    """

    files: Files
    image_root: str | Path | Mapping[str, str] | None = None
    image_prefix_map: Mapping[str, str] = field(default_factory=dict)
    max_bad_share: float = 0.01
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Where an entry stands, in errors "FILE: entry 3", "FILE: line 4" or "FILE: sample KEY".

    number: of the entry (from 0), of the line (from 1), or a sample's key; header: the texts that an official file
    holds beside its list (`dataset` of Karpathy's, `data_subtype` of VQA's); complete: whether the entry's `image` is
    the path to open already, as that of a shard or of an image found in a folder.
    """

    path: Path
    number: int | str
    header: Mapping[str, str] = field(default_factory=dict)
    unit: str = "entry"
    complete: bool = False

    def __str__(self) -> str:
        return one_line(f"{self.path}: {self.unit} {self.number}", 1000)


def located_entries(
    source: Source,
    kind: str,
    check: Callable[[dict], str | None] | None = None,
    convert: Callable[[dict, Place], list[dict]] | None = None,
) -> Iterator[tuple[Place, dict]]:
    """Reads annotation files of every kind, and yields their entries, `image` replaced by the path to open, each after
    its place.

    kind: a key of KINDS: which keys an entry must have.
    check: a further test of every entry; it returns what is wrong, or None.
    convert: for files of other layouts, called first with an entry and its place: what it is in this layout, as one
        entry, several, or none.
    Raises UserError naming the file, the entry's index and the key.
    """
    folders = image_folders(source.image_root)
    for where, read in _located_elements(source, kind):
        for entry in convert(read, where) if convert and isinstance(read, dict) else [read]:
            _check_entry(entry, kind, where)
            for texts in [read] if entry is read else [read, entry]:
                check_encodable(texts, (*KINDS[kind], *OPTIONAL.get(kind, ()), *TEXTS.get(kind, ())), where)
            if problem := check and check(entry):
                raise UserError(f"{where}: {problem}")
            yield where, {**entry, "image": _image_path(entry, where, folders, source.image_prefix_map)}


def _located_elements(source: Source, kind: str) -> Iterator[tuple[Place, Any]]:
    """(the place, the element) of every list's, table's, folder's and shard's."""
    for name in file_list(source.files):
        path = Path(find_file(name, "annotation file"))
        if located := _complete_elements(path, kind, source.max_bad_share):
            yield from located
        else:
            header, unit, values = _read_list(path, kind, source.columns)
            yield from ((Place(path, number, header, unit), read) for number, read in values)


def _complete_elements(path: Path, kind: str, max_bad_share: float) -> Iterator[tuple[Place, Any]] | None:
    """The elements of shards and of folders of images, whose images' paths are complete; None for other files."""
    if shards := shard_files(path):
        samples = shard_entries(shards, max_bad_share)
        return ((Place(shard, key, unit="sample", complete=True), entry) for shard, key, entry in samples)
    if path.is_dir():
        found = folder_entries(path, kind)
        return ((Place(text, number, unit="line", complete=True), entry) for text, number, entry in found)
    return None


def image_captions(source: Source) -> Iterator[tuple[str, str | list[str]]]:
    """(the path to open, the caption or captions) of the entries for pre-training: what `located_entries` yields, at
    a third of its time, since millions of entries are read.

    Raises UserError naming the file, the entry's index or line, and the key.
    """
    kind, folders = "pretrain", image_folders(source.image_root)
    for name in file_list(source.files):
        path = Path(find_file(name, "annotation file"))
        if path.is_dir() or shard_files(path):
            located = located_entries(replace(source, files=path), kind)
            yield from ((entry["image"], entry["caption"]) for _, entry in located)
            continue
        one_folder = None  # of all images, where neither the entry nor its path has a say in it
        if not isinstance(folders, dict) and not source.image_prefix_map:
            one_folder = os.path.join(path.parent if folders is None else folders, "")
        header, unit, values = _read_list(path, kind, source.columns)
        for number, entry in values:
            if one_folder is not None and type(entry) is dict:
                image, caption = entry.get("image"), entry.get("caption")
                if type(image) is str is type(caption) and image.isascii() and caption.isascii() and image:
                    yield (image if image[0] == os.sep else one_folder + image), caption
                    continue
            where = Place(path, number, header, unit)
            _check_entry(entry, kind, where)
            check_encodable(entry, KINDS[kind], where)
            yield _image_path(entry, where, folders, source.image_prefix_map), entry["caption"]


def file_list(files: Files) -> Sequence[str | Path]:
    """One path or several, as several."""
    return [files] if isinstance(files, str | Path) else files


def strings(value: str | list[str]) -> list[str]:
    """The value of a key that may be one string or a list of them, as a list."""
    return [value] if isinstance(value, str) else value


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError where it is none."""
    try:
        with open_file(path) as file:
            return json.loads(file.read().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        remedy = "annotation files are JSON lists of objects"
        if error.msg == "Extra data" and path.suffix.lower() not in JSON_LINES:
            remedy = "if it holds an object a line, name it .jsonl"
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; annotation files are JSON lists of objects") from None
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise UserError(f"{path}: holds a number that is too long ({str(error).split(';')[0]})") from None


def _read_list(
    path: Path, kind: str = "pretrain", columns: Mapping[str, str] | None = None
) -> tuple[dict[str, str], str, Iterable[tuple[int, Any]]]:
    """(the header of an official file, else {}; what its entries are counted in; their numbers and the entries)

    Everything but an official file is read in pieces, so that memory does not hold millions of Python objects.
    kind: a key of KINDS, for the columns that a table must have; columns: see `Source`.
    """
    columns = columns or {}
    if path.suffix.lower() == PARQUET:
        raise UserError(parquet_problem(path, kind))
    if (elements := numbered_elements(path, [columns.get(key, key) for key in KINDS[kind]])) is not None:
        return {}, "line", _renamed(elements, columns) if columns else elements
    with open_file(path) as file:
        is_list = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    header, values = ({}, _pieces(path)) if is_list else _whole_list(path)
    return header, "entry", _renamed(enumerate(values), columns) if columns else enumerate(values)


def _renamed(elements: Iterable[tuple[int, Any]], columns: Mapping[str, str]) -> Iterator[tuple[int, Any]]:
    for number, element in elements:
        if isinstance(element, dict):
            element = {**element, **{key: element[name] for key, name in columns.items() if name in element}}
        yield number, element


def _pieces(path: Path) -> Iterator:
    """The elements of a list; what cannot be read in pieces is read as a whole, which also says what is wrong."""
    count = 0
    try:
        for element in _stream_list(path):
            yield element
            count += 1
        if count:
            return
    except _NotStreamed:
        pass
    yield from _whole_list(path)[1][count:]


class _NotStreamed(Exception):
    """The file is no JSON list, or not one that can be read in pieces."""


def _stream_list(path: Path) -> Iterator:
    """The elements of a file's top-level JSON list, some megabytes of text in memory at a time."""
    scan, at, ended = json.JSONDecoder().scan_once, 0, False
    try:
        with io.TextIOWrapper(open_file(path), "utf-8-sig") as file:
            text = file.read(PIECE)
            while text.isspace():
                text = file.read(PIECE)
            begin = LIST_BEGIN.match(text)
            if begin is None:
                raise _NotStreamed
            at = begin.end()
            while True:
                try:
                    value, end = scan(text, at)
                    follows = AFTER_ELEMENT.match(text, end)  # seen, so a number does not go on in the next piece
                except (StopIteration, json.JSONDecodeError):
                    follows = None
                if follows is None:  # read on, at least as much as waits: a long element is tried a few times only
                    piece = file.read(max(PIECE, len(text) - at))
                    if not piece:
                        raise _NotStreamed
                    text = text[at:] + piece
                    at = SPACE.match(text).end()
                    continue
                ended, at = follows[1] == "]", follows.end()
                if ended and (text[at:] + file.read()).strip(" \t\n\r"):
                    raise _NotStreamed
                yield value
                if ended:
                    return
    except (OSError, ValueError, RecursionError):
        raise _NotStreamed from None


def _whole_list(path: Path) -> tuple[dict[str, str], list]:
    """(the header of an official file, else {}; the entries)"""
    data, header = read_json(path), {}
    if isinstance(data, dict):
        header = {key: value for key, value in data.items() if isinstance(value, str)}
        lists = [key for key in (*OFFICIAL_LISTS, "annotations") if isinstance(data.get(key), list)]
        if lists == ["annotations"]:
            raise UserError(f"{path}: holds annotations without their questions; name the question file in its place")
        if "annotations" in lists:
            raise UserError(f"{path}: images and captions lie apart, as COCO publishes them; see tools.prepare")
        data = data[lists[0]] if lists else data
    if not isinstance(data, list):
        raise UserError(f"{path}: holds {type(data).__name__}, not a list; annotation files are JSON lists of objects")
    if not data:
        raise UserError(f"{path}: the list is empty")
    return header, data


def _check_entry(entry, kind: str, where: Place) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {type(entry).__name__}, not an object with {', '.join(KINDS[kind])}")
    for key, types in KINDS[kind].items():
        if key not in entry:
            raise UserError(f"{where} has no {key!r}; a {kind} entry needs {', '.join(KINDS[kind])}")
        check_kind(entry[key], key, types, where)
    for key, types in OPTIONAL.get(kind, {}).items():
        if entry.get(key) is not None:
            check_kind(entry[key], key, types, where)
    if not entry["image"]:
        raise UserError(f"{where}: 'image' is empty")


def check_kind(value, key: str, types: tuple[type, ...], where: Place | str) -> None:
    """UserError where the value of `key` is of none of the `types`, or a list of anything but strings."""
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join(NAMES[t] for t in types)
        raise UserError(f"{where}: {key!r} is {type(value).__name__}, it must be {expected}")
    if isinstance(value, list) and not (value and all(isinstance(item, str) for item in value)):
        raise UserError(f"{where}: {key!r} must be a list of strings with at least one")


def check_encodable(entry: dict, keys: Iterable[str], where: Place | str) -> None:
    """UserError where a text holds half of a surrogate pair, which neither a tokenizer nor a result file can take."""
    for key in keys:
        pending = [entry.get(key)]
        while pending:
            value = pending.pop()
            if isinstance(value, list):
                pending += value
            elif isinstance(value, dict):
                pending += [*value, *value.values()]
            elif isinstance(value, str) and not value.isascii() and HALF_SURROGATE.search(value):
                raise UserError(
                    f"{where}: {key!r} holds half of a surrogate pair, which is no character: {shown(value)}; "
                    "write the whole character, or leave it out"
                )


def _rewrite_prefix(image: str, prefixes: Mapping[str, str]) -> str:
    old = max((prefix for prefix in prefixes if image.startswith(prefix)), key=len, default=None)
    return image if old is None else prefixes[old] + image[len(old) :]


def image_folders(image_root: str | Path | Mapping[str, str] | None) -> Path | dict[str, str | Path] | None:
    if image_root is None:
        return None
    if isinstance(image_root, Mapping):
        return {key: str(path) for key, path in image_root.items()}  # looked for when an entry names them
    return Path(find_file(image_root, "data.image_root"))


def _choose_folder(entry: dict, folders: Path | dict[str, str | Path], where: Place) -> Path:
    if isinstance(folders, Path):
        return folders
    name = entry.get("dataset")
    if not isinstance(name, str) or name not in folders:
        known = ", ".join(folders) or "nothing"
        raise UserError(f"{where} has the dataset {shown(name)}, but data.image_root names only {known}; add it there")
    if isinstance(folders[name], str):
        folders[name] = find_file(folders[name], f"data.image_root.{name}")
    return folders[name]


def _image_path(entry: dict, where: Place, folders, prefixes: Mapping[str, str]) -> str:
    """The path to open; folders: see `image_folders`."""
    if where.complete:
        return entry["image"]
    folder = where.path.parent if folders is None else _choose_folder(entry, folders, where)
    return os.path.join(folder, _rewrite_prefix(entry["image"], prefixes))  # an absolute `image` stays as it is
