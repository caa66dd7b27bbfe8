"""The paper's tables as data, and one configuration per ablation row that changes one respect of the paper's model."""

import json
from pathlib import Path

import pytest

from engine.config import PRETRAIN, load_config

ROOT = Path(__file__).resolve().parent.parent
PAPER = json.loads((ROOT / "tools/report/paper_tables.json").read_text())
TABLES = PAPER["tables"]
SCHEMA = "configs/Pretrain.yaml"
# What each row changes, in Pretrain.yaml's own keys.
CHANGES = {
    "semmim": {},
    "table4_none": {"mim.target": "none"},
    "table4_pixels": {"mim.target": "pixels"},
    "table4_dvae": {"mim.target": "dvae", "mim.codebook": "data/flava-image-codebook"},
    "table5_random": {"mim.masking": "random"},
    "table6_15": {"mim.mask_ratio": 0.15},
    "table6_45": {"mim.mask_ratio": 0.45},
    "table7_none": {"mim.inject_from": None},
    "table7_1": {"mim.inject_from": 1},
    "table7_6": {"mim.inject_from": 6},
    "table7_9": {"mim.inject_from": 9},
}


def flat(config: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def resolved(path: str) -> dict:
    return flat(load_config(path, (), PRETRAIN))


@pytest.mark.parametrize("name", CHANGES)
def test_an_ablation_row_differs_from_the_papers_model_in_its_one_respect(name):
    paper, row = resolved(SCHEMA), resolved(f"configs/ablation/{name}.yaml")
    assert {key: row[key] for key in row if row[key] != paper[key]} == CHANGES[name]
    assert row.keys() == paper.keys()


def test_every_row_of_tables_4_to_7_has_its_file_and_every_file_its_row():
    named = {row["config"] for number in "4567" for row in TABLES[number]["rows"]}
    files = {path.stem for path in (ROOT / "configs/ablation").glob("*.yaml")}
    assert named == files == set(CHANGES)


def test_the_papers_model_has_the_same_numbers_in_every_ablation():
    rows = [row for number in "4567" for row in TABLES[number]["rows"] if row["config"] == "semmim"]
    assert len(rows) == 4 and all(row["paper"] and row["values"] == [81.5, 64.2, 78.12] for row in rows)
    by_key = {column[0]: value for column, value in zip(TABLES["1"]["columns"], ours("1"), strict=True)}
    assert [by_key["coco_tr_r1"], by_key["coco_ir_r1"], ours("3")[0]] == [81.5, 64.2, 78.12]


def ours(number: str) -> list:
    """The values of the paper's own row."""
    return next(row["values"] for row in TABLES[number]["rows"] if row.get("paper"))


def test_every_row_has_a_value_or_a_dash_for_every_column():
    assert list(TABLES) == list("12345678")
    for table in TABLES.values():
        keys = [key for key, _, _ in table["columns"]]
        assert len(set(keys)) == len(keys)
        assert all(len(row["values"]) == len(keys) for row in table["rows"])
        assert sum(bool(row.get("paper")) for row in table["rows"]) == 1
