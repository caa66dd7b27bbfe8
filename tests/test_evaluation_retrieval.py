"""Recall and chance levels against counting; the evaluation of Retrieval.py as a user runs it."""

import itertools
import json

import pytest
import torch
from PIL import Image
from tiny import tiny_model

import Retrieval
import utils
from evaluation import retrieval


def test_columns_equal_counting_query_by_query():
    ranks = {"tr": torch.tensor([0, 4, 5, 9, 10, 0, 3]), "ir": torch.tensor([1, 0, 7, 100, 0])}
    columns = retrieval.retrieval_metrics(ranks["tr"], ranks["ir"])
    for name, k in itertools.product(("tr", "ir"), (1, 5, 10)):
        hits = sum(rank in range(k) for rank in ranks[name].tolist())
        assert columns[f"{name}_r{k}"] == pytest.approx(100 * hits / len(ranks[name]))
    six = [value for key, value in columns.items() if key != "r_mean"]
    assert len(six) == 6 and columns["r_mean"] == pytest.approx(sum(six) / 6)


def test_chance_equals_enumeration_of_all_orders():
    captions = [1, 2, 3]
    image_of_text = [0, 1, 1, 2, 2, 2]
    chance = retrieval.chance_metrics(captions)
    orders = list(itertools.permutations(range(6)))
    for k in (1, 5):
        hits = sum(any(image_of_text[t] == i for t in order[:k]) for order in orders for i in range(3))
        assert chance[f"tr_r{k}"] == pytest.approx(100 * hits / len(orders) / 3)
    assert chance["ir_r1"] == pytest.approx(100 / 3) and chance["ir_r5"] == 100.0


# ------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture
def project(tmp_path):
    """A folder with images, annotations, a random checkpoint and a config."""
    entries = []
    for i in range(7):
        Image.new("RGB", (40, 30), (30 * i, 255 - 30 * i, 9 * i)).save(tmp_path / f"{i}.png")
        entries.append({"image": f"{i}.png", "caption": [f"image number {i}", f"a {i} coloured thing"]})
    (tmp_path / "split.json").write_text(json.dumps(entries))
    model = tiny_model()
    checkpoint = {"model": model.state_dict(), "description": model.backbone.description}
    utils.save_checkpoint(tmp_path / "model.pth", checkpoint)
    (tmp_path / "config.yaml").write_text(
        f"data: {{val: [{tmp_path}/split.json], test: [{tmp_path}/split.json], image_root: none}}\n"
        "image_size: 32\ntrain: {precision: fp32}\nrerank: {k: 4}\neval: {batch_size: 3, folds: 0}\n"
    )
    return tmp_path


def arguments(project, *more):
    return [
        *("--config", str(project / "config.yaml"), "--output_dir", str(project / "out"), "--device", "cpu"),
        *("--checkpoint", str(project / "model.pth"), "--evaluate"),
        *("--override", "data.num_workers=0", *more),
    ]


def test_script_writes_metrics_and_rankings_of_both_splits(project):
    Retrieval.main(arguments(project))
    numbers = json.loads((project / "out" / "metrics.json").read_text())
    assert list(numbers) == ["val", "test"]
    for split in numbers.values():
        for stage in ("itc", "itm", "chance"):
            assert {f"{stage}_{key}" for key in retrieval.chance_metrics([1])} <= set(split)
        assert (split["images"], split["texts"]) == (7, 14)
        assert split["chance_ir_r1"] == pytest.approx(100 / 7)
        assert split["itm_tr_r5"] >= split["itm_tr_r1"]
    result = json.loads((project / "out" / "retrieval_result.json").read_text())["test"]
    assert len(result["text_retrieval"]) == 7 and len(result["image_retrieval"]) == 14
    first = result["image_retrieval"][0]
    assert first["query"] == "image number 0" and len(first["ranked"]) == len(first["scores"]) == 4
    assert first["scores"][0] >= first["scores"][1] and first["ranked"][0].endswith(".png")


def test_script_reports_the_mean_over_folds(project):
    Retrieval.main(arguments(project, "--override", "eval.folds=7", "rerank.k=99"))
    numbers = json.loads((project / "out" / "metrics.json").read_text())["test_folds"]
    assert numbers["chance_ir_r1"] == numbers["itm_ir_r1"] == 100  # one image per fold


def test_script_evaluates_at_another_resolution(project):
    Retrieval.main(arguments(project, "--override", "image_size=48"))
    assert (project / "out" / "metrics.json").is_file()


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.test=[nowhere.json]", "nowhere.json"),
        ("image_size=36", "36"),
        ("rerank.kk=3", "rerank.k"),
        ("rerank.k=0", "rerank.k"),
        ("eval.batch_size=0", "eval.batch_size"),
        ("eval.splits=[train]", "eval.splits"),
        ("eval.folds=3", "7 images cannot be cut into 3"),
    ],
)
def test_wrong_input_is_a_user_error_that_names_it(project, override, message):
    with pytest.raises(utils.UserError, match=message) as error:
        Retrieval.main(arguments(project, "--override", override))
    assert "\n" not in str(error.value)


def test_missing_checkpoint_is_a_user_error(project):
    with pytest.raises(utils.UserError, match="--checkpoint"):
        Retrieval.main(["--config", str(project / "config.yaml"), "--output_dir", str(project / "out"), "--evaluate"])
    with pytest.raises(utils.UserError, match="does not exist"):
        Retrieval.main([*arguments(project), "--checkpoint", "nowhere.pth"])


def test_unreadable_image_is_a_user_error_that_names_it(project):
    (project / "5.png").write_bytes(b"not an image")
    with pytest.raises(utils.UserError, match="5.png"):
        Retrieval.main(arguments(project))
