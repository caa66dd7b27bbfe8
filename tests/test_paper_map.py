"""README's map of the paper to the code, the keys of docs/paper.md, and the labels of the equations in models/."""

import importlib
import re
from fnmatch import fnmatch

import pytest
from conftest import ROOT, keys_of

from engine.config import STAGES, load_config

LABELS = ("Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Section 3.2.2")


def rows() -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """(what the paper has, [(file, names in it)]) of every row of the table."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Where the paper is in the code")[1]
    found = []
    for line in section.split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "paper":
            places = [place.partition(": ") for place in re.findall(r"`([^`]*)`", cells[1])]
            found.append((cells[0], [(path, [n for n in names.split(", ") if n]) for path, _, names in places]))
    return found


def named(path: str, name: str):
    """The object `name` (a.b too) of the file `path`."""
    item = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        item = getattr(item, part)
    return item


def test_everything_that_the_map_names_exists():
    table = rows()
    assert len(table) > 8
    for _, places in table:
        for path, names in places:
            assert (ROOT / path).is_file(), path
            for name in names:
                assert named(path, name).__doc__, (path, name)


@pytest.mark.parametrize("label", LABELS)
def test_an_equation_stands_in_one_place_and_the_map_names_it(label):
    places = next(places for what, places in rows() if label in what)
    documented = [name for path, names in places for name in names if label in named(path, name).__doc__]
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "models").glob("*.py")]
    assert len(documented) == 1 and sum(text.count(label) for text in texts) == 1


def test_every_key_that_the_decisions_name_exists():
    lines = (ROOT / "docs/paper.md").read_text(encoding="utf-8").splitlines()
    named_keys = {
        key for line in lines if line.startswith("| ") for key in re.findall(r"`([^`]+)`", line.split("|")[-2])
    }
    keys = {key for stage in STAGES.values() for key in keys_of(load_config(stage.schema, (), stage))}
    unknown = {name for name in named_keys - {"--checkpoint"} if not any(fnmatch(key, f"{name}*") for key in keys)}
    assert len(named_keys) > 15 and not unknown
