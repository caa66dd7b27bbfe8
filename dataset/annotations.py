"""Annotation files: reading, checking and resolving the JSON lists that ALBEF and mPLUG published."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from utils import UserError, find_file

# Required keys of an entry and the kinds of value they may have; other keys are kept as they are.
TEXT = (str,)
TEXT_OR_LIST = (str, list)
IDENTIFIER = (str, int)
KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "pretrain": {"image": TEXT, "caption": TEXT_OR_LIST},
    "retrieval_train": {"image": TEXT, "caption": TEXT_OR_LIST, "image_id": IDENTIFIER},
    "retrieval_eval": {"image": TEXT, "caption": TEXT_OR_LIST},
    "vqa_train": {"image": TEXT, "question": TEXT, "answer": TEXT_OR_LIST},
    "vqa_eval": {"image": TEXT, "question": TEXT, "question_id": IDENTIFIER},
    "caption": {"image": TEXT},
}
NAMES = {str: "a string", list: "a list of strings", int: "a whole number"}


def load_annotations(
    files: str | Path | Sequence[str | Path],
    kind: str,
    image_root: str | Path | Mapping[str, str] | None = None,
    image_prefix_map: Mapping[str, str] | None = None,
    check: Callable[[dict], str | None] | None = None,
    convert: Callable[[dict, str], dict | None] | None = None,
) -> list[dict]:
    """Reads JSON lists and returns their entries, `image` replaced by the path to open.

    files: one path or several, looked up in the working directory, then in the repository.
    kind: a key of KINDS: which keys an entry must have.
    image_root: folder of relative `image` paths, or a map to one by the entry's `dataset`; None: the JSON
        file's own folder. image_prefix_map: {old: new}, the longest prefix that an `image` starts with is
        replaced before that (published files say val2014/ where a disk says otherwise).
    check: a further test of every entry; it returns what is wrong, or None.
    convert: for files of other layouts, called first with an entry and its place (for errors): the entry in
        this layout, or None to leave it out.
    Raises UserError naming the file, the entry's index and the key.
    """
    folders = _image_folders(image_root)
    entries = []
    for name in [files] if isinstance(files, str | Path) else files:
        path = Path(find_file(name, "annotation file"))
        for index, entry in enumerate(_read_list(path)):
            where = f"{path}: entry {index}"
            if convert is not None and isinstance(entry, dict):
                entry = convert(entry, where)
                if entry is None:
                    continue
            _check_entry(entry, kind, where)
            if problem := check and check(entry):
                raise UserError(f"{where}: {problem}")
            image = _rewrite_prefix(entry["image"], image_prefix_map or {})
            folder = path.parent if folders is None else _choose_folder(entry, folders, where)
            entries.append({**entry, "image": os.path.join(folder, image)})  # an absolute `image` stays as it is
    return entries


def read_json(path: Path):
    """The content of a JSON file; UserError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); annotation files are JSON lists of objects") from None


def _read_list(path: Path) -> list:
    data = read_json(path)
    if isinstance(data, dict) and isinstance(data.get("images"), list):  # Karpathy's files
        data = data["images"]
    if not isinstance(data, list):
        raise UserError(f"{path}: holds {type(data).__name__}, not a list; annotation files are JSON lists of objects")
    if not data:
        raise UserError(f"{path}: the list is empty")
    return data


def _check_entry(entry, kind: str, where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {type(entry).__name__}, not an object with {', '.join(KINDS[kind])}")
    for key, types in KINDS[kind].items():
        if key not in entry:
            raise UserError(f"{where} has no {key!r}; a {kind} entry needs {', '.join(KINDS[kind])}")
        value = entry[key]
        if not isinstance(value, types) or isinstance(value, bool):
            expected = " or ".join(NAMES[t] for t in types)
            raise UserError(f"{where}: {key!r} is {type(value).__name__}, it must be {expected}")
        if isinstance(value, list) and not (value and all(isinstance(item, str) for item in value)):
            raise UserError(f"{where}: {key!r} must be a list of strings with at least one")
    if not entry["image"]:
        raise UserError(f"{where}: 'image' is empty")


def _rewrite_prefix(image: str, prefixes: Mapping[str, str]) -> str:
    old = max((prefix for prefix in prefixes if image.startswith(prefix)), key=len, default=None)
    return image if old is None else prefixes[old] + image[len(old) :]


def _image_folders(image_root: str | Path | Mapping[str, str] | None) -> Path | dict[str, str | Path] | None:
    if image_root is None:
        return None
    if isinstance(image_root, Mapping):
        return {key: str(path) for key, path in image_root.items()}  # looked for when an entry names them
    return Path(find_file(image_root, "data.image_root"))


def _choose_folder(entry: dict, folders: Path | dict[str, str | Path], where: str) -> Path:
    if isinstance(folders, Path):
        return folders
    name = entry.get("dataset")
    if name not in folders:
        known = ", ".join(folders) or "nothing"
        raise UserError(f"{where} has the dataset {name!r}, but data.image_root names only {known}; add it there")
    if isinstance(folders[name], str):
        folders[name] = find_file(folders[name], f"data.image_root.{name}")
    return folders[name]


class StringTable:
    """A read-only list of strings in one block of memory.

    Millions of Python strings cost ten times their text, and forked data workers copy them page by page
    because counting references writes to them; one array of bytes is shared as it is.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self._ends = np.cumsum([0] + [len(item) for item in encoded], dtype=np.int64)  # [n+1]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        piece = self._bytes[self._ends[index] : self._ends[index + 1]]
        return piece.tobytes().decode("utf-8", "surrogatepass")
