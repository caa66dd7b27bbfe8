"""YAML as configurations use it: maps with text as keys, lists, text, numbers, true/false and null.

A file that would be waited for without end, that grows when its aliases are followed, or that holds anything else is
refused in one line, before anything of it is used.
"""

from __future__ import annotations

import warnings
from itertools import accumulate
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from utils import HALF_SURROGATE, UserError, one_line, shown

# Far above what a configuration needs: the largest of the project's has 4 KB, some 150 values, and is 4 deep.
MOST_BYTES = 200_000
MOST_VALUES = 10_000
DEEPEST = 50
KINDS = ((bool, "true/false"), ((int, float), "a number"), (str, "text"), (list, "a list"), (dict, "a map"))


def read_yaml(path: Path) -> dict:
    """The map that a file holds, {} for an empty one; UserError naming the file where it is none."""
    if not path.is_file():  # a pipe would be waited for without end
        raise UserError(f"{path}: not a readable YAML file: it is no regular file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: not a readable YAML file: it has more than {MOST_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable YAML file: {one_line(error)}") from None
    values = parse_yaml(text, f"{path}: not a readable YAML file")
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a map of keys to values")
    return values or {}


def parse_yaml(text: str, source: str):
    """The value that a YAML text stands for; UserError, beginning with `source`, where no configuration has such."""
    try:
        if len(text) > MOST_BYTES:
            raise UserError(f"{source}: it has more than {MOST_BYTES:,} characters")
        # ruamel takes seconds to find this out. Brackets within comments and texts count, which are no 200 either.
        if max(accumulate((c in "[{") - (c in "]}") for c in text), default=0) > 4 * DEEPEST:
            raise UserError(f"{source}: it is nested too deeply")
        if half := HALF_SURROGATE.search(text):
            raise UserError(f"{source}: it holds half of a surrogate pair ({half[0]!r}), which is no character")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ruamel's, of odd directives: what is read is checked below
            yaml = YAML(typ="safe", pure=True)
            root = yaml.compose(text)
            _check_size(root, source)
            value = None if root is None else yaml.constructor.construct_document(root)
    except RecursionError:
        raise UserError(f"{source}: it is nested too deeply") from None
    except YAMLError as error:
        raise UserError(f"{source}: {_reason(error)}") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # of a value's constructor
        if "digits" in str(error):  # Python reads none of more than 4,300 digits
            raise UserError(f"{source}: it holds a number that is too long") from None
        raise UserError(f"{source}: a value is not what its form or tag says ({one_line(error)})") from None
    _check_values(value, "", source)
    return value


def kind(value) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    return next((name for types, name in KINDS if isinstance(value, types)), f"a {type(value).__name__}")


def _check_size(root: Node | None, source: str) -> None:
    """UserError where the nodes are nested too deeply or, with all aliases followed, too many.

    An anchor's node is one object however often it is named, so that this counts without following anything twice.
    """
    sizes: dict[int, int | None] = {}  # None: begun, which an alias to a node from within it finds

    def size(node: Node, depth: int) -> int:
        if depth > DEEPEST:
            raise UserError(f"{source}: it is nested more than {DEEPEST} deep")
        if isinstance(node, ScalarNode):
            return 1
        if id(node) in sizes:
            if sizes[id(node)] is None:
                raise UserError(f"{source}: line {node.start_mark.line + 1}: an alias stands within its own anchor")
            return sizes[id(node)]
        sizes[id(node)] = None
        parts = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
        total = 1 + sum(size(part, depth + 1) for part in parts)
        if total > MOST_VALUES:
            line = node.start_mark.line + 1
            raise UserError(f"{source}: line {line} stands for more than {MOST_VALUES:,} values, its aliases followed")
        sizes[id(node)] = total
        return total

    if root is not None:
        size(root, 1)


def _check_values(value, name: str, source: str) -> None:
    """UserError for a value that no configuration holds, or a key that is not text; `name`: the dotted key."""
    where = f"{source}: {one_line(name)}" if name else source
    if kind(value) == f"a {type(value).__name__}" and not isinstance(value, list | dict):
        raise UserError(f"{where}: {shown(value)} is {kind(value)}; put it in quotes if text is meant")
    if isinstance(value, str) and (HALF_SURROGATE.search(value) or "\0" in value):
        raise UserError(f"{where}: {shown(value)} holds what is no character")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise UserError(f"{where}: the key {shown(key)} is {kind(key)}, not text; put it in quotes")
            _check_values(key, "a key", source)
            _check_values(item, f"{name}.{key}" if name else key, source)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, name, source)


def _reason(error: YAMLError) -> str:
    """ruamel's message in one line, with the place and without the text that it shows of it."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if not problem or mark is None:
        return one_line(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {one_line(problem)}"
