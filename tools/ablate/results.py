"""What tools/ablate keeps in its folder: the numbers of finished stages, which are not mixed with others."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
from pathlib import Path

from tools.ablate.plan import AblationRun
from utils import UserError, one_line, write_json


def read_result(folder: Path) -> dict:
    """result.json of a run's folder: its notes and {"stages": {name: {"settings", "seconds", "metrics"}}}."""
    return _read(folder / "result.json", "stages", "remove it to run this row again")


def _read(path: Path, key: str, remedy: str) -> dict:
    """The file's content, of which `key` is a dict too; {key: {}} without the file."""
    if not path.is_file():
        return {key: {}}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content[key], dict):
            raise TypeError(f"{key} is no object")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: not readable ({one_line(repr(error))}); {remedy}") from None
    return content


def check_same(run: AblationRun) -> None:
    """Raise UserError where the folder holds stages of other settings: a table must not mix them."""
    for stage in run.stages:
        done = read_result(run.folder)["stages"].get(stage.name)
        if done is None:
            continue
        now = json.loads(json.dumps(stage.settings))
        for key in {**done["settings"], **now}:
            before, wanted = done["settings"].get(key), now.get(key)
            if before != wanted:
                raise UserError(
                    f"{run.folder / 'result.json'}: {stage.name} was run with {key} {before!r}, now it is {wanted!r}; "
                    "use another --output"
                )


def write_rows(folder: Path, base: str, rows: dict[str, str]) -> None:
    """FOLDER/rows.json: which row's folder serves each row of the base, added to those of earlier calls."""
    path = folder / "rows.json"
    known = _read(path, "rows", "remove it, and name all tables of this study again")
    write_json(path, {"base": base, "rows": {**known["rows"], **rows}})


@contextlib.contextmanager
def lock(folder: Path):
    """While open, no other process can work in the folder; its stages hold it too, should this process be killed."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another tools/ablate, or a run that it started, works here") from None
        except OSError:
            print(f"warning: {folder}: this file system has no locks; start no second study here", file=sys.stderr)
        yield file
