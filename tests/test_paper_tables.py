"""The paper's tables as data, and one configuration per ablation row that changes one respect of the paper's model."""

import pytest
from conftest import ROOT, keys_of

from engine.config import PRETRAIN, differences, load_config
from tools.report.tables import PAPER

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


@pytest.mark.parametrize("name", CHANGES)
def test_an_ablation_row_differs_from_the_papers_model_in_its_one_respect(name):
    paper, row = (load_config(path, (), PRETRAIN) for path in (PRETRAIN.schema, f"configs/ablation/{name}.yaml"))
    assert {key: value for key, (_, value) in differences(paper, row).items()} == CHANGES[name]
    assert keys_of(row) == keys_of(paper)


def test_every_row_of_tables_4_to_7_has_its_file_and_every_file_its_row():
    named = {row["config"] for number in "4567" for row in PAPER[number]["rows"]}
    files = {path.stem for path in (ROOT / "configs/ablation").glob("*.yaml")}
    assert named == files == set(CHANGES)


def test_the_papers_model_has_the_same_numbers_in_every_table_and_every_row_a_value_for_every_column():
    own = {}
    for number, table in PAPER.items():
        keys = [key for key, _, _ in table["columns"]]
        assert all(len(row["values"]) == len(set(keys)) for row in table["rows"])
        (own[number],) = [dict(zip(keys, row["values"], strict=True)) for row in table["rows"] if row.get("paper")]
    for number in "4567":
        assert own[number] == {"coco_tr_r1": 81.5, "coco_ir_r1": 64.2, "vqa_test_dev": 78.12}
    assert list(own) == list("12345678") and {**own["1"], **own["3"], **own["4"]} == {**own["1"], **own["3"]}
