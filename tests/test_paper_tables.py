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


def test_the_papers_model_has_the_same_numbers_in_every_table_and_every_row_a_value_for_every_column():
    own = {}
    for number, table in TABLES.items():
        keys = [key for key, _, _ in table["columns"]]
        assert all(len(row["values"]) == len(set(keys)) for row in table["rows"])
        (own[number],) = [dict(zip(keys, row["values"], strict=True)) for row in table["rows"] if row.get("paper")]
    for number in "4567":
        assert own[number] == {"coco_tr_r1": 81.5, "coco_ir_r1": 64.2, "vqa_test_dev": 78.12}
    assert list(own) == list("12345678") and {**own["1"], **own["3"], **own["4"]} == {**own["1"], **own["3"]}
