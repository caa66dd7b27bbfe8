"""Rooms stand on floors, and none imports from one above it or beside it."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = [  # from the ground up; a room may import from itself and from the floors below
    ["utils"],
    ["optim", "scheduler", "models", "dataset"],
    ["evaluation"],
    ["engine"],
    ["semmim"],
    ["tools"],
    ["Pretrain", "Retrieval", "Caption", "VQA"],  # Pretrain.py's image of an epoch is drawn by a tool
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imported(path) -> set[str]:
    """The rooms that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names} & set(LEVEL)


@pytest.mark.parametrize("room", LEVEL)
def test_a_room_imports_only_from_the_floors_below(room):
    paths = sorted((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]
    for path in paths:
        for other in imported(path) - {room}:
            assert LEVEL[other] < LEVEL[room], f"{path.relative_to(ROOT)} imports {other}"


def test_optim_and_scheduler_load_no_room_but_utils():
    code = "import sys, optim, scheduler; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & set(LEVEL) <= {"optim", "scheduler", "utils"}


def test_nothing_that_takes_long_to_import_is_imported_before_it_is_used():
    scripts = ["Pretrain", "Retrieval", "Caption", "VQA", "semmim"]
    scripts += sorted(f"tools.{path.parent.name}.__main__" for path in ROOT.glob("tools/*/__main__.py"))
    scripts += sorted(f"tools.{path.stem}" for path in ROOT.glob("tools/*.py") if path.stem != "pages")
    code = f"import sys, {', '.join(scripts)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    slow = {"timm", "torchvision", "transformers", "torch._dynamo", "sklearn", "scipy.stats", "matplotlib"}
    assert len(scripts) > 12 and not slow & set(done.stdout.split())
