"""Recall and its chance level against counting; Retrieval.py --evaluate; validation while pre-training."""

import itertools
import json

import pytest
import torch
from conftest import refused
from stages import log_lines, read, run
from tiny import TOKENIZER, Notes, gray_images, gray_level, tiny_config, tiny_model

from dataset import create_dataset
from evaluation import retrieval
from evaluation.retrieval import SCORE, Validation, thinned
from utils import load_checkpoint

CPU = torch.device("cpu")
IMAGES = 11


def test_chance_equals_enumeration_of_all_orders():
    captions = [1, 2, 3]
    image_of_text = [0, 1, 1, 2, 2, 2]
    chance = retrieval.chance_metrics(captions)
    orders = list(itertools.permutations(range(6)))
    for k in (1, 5):
        hits = sum(any(image_of_text[t] == i for t in order[:k]) for order in orders for i in range(3))
        assert chance[f"tr_r{k}"] == pytest.approx(100 * hits / len(orders) / 3)
    assert chance["ir_r1"] == pytest.approx(100 / 3) and chance["ir_r5"] == 100.0


def split(folder) -> str:
    """The file of a split of `IMAGES` gray images with one to three captions each."""
    names = gray_images(folder, IMAGES)
    words = ["red", "green", "blue"]
    entries = [
        {"image": name, "caption": [f"number {i} in {' '.join(words[: n + 1])}" for n in range(1 + i % 3)]}
        for i, name in enumerate(names)
    ]
    (folder / "val.json").write_text(json.dumps(entries))
    return str(folder / "val.json")


def validation(folder, *overrides) -> Validation:
    cfg = tiny_config(f"data.val=[{split(folder)}]", "data.num_workers=0", "eval.batch_size=4", *overrides)
    return Validation(create_dataset("pretrain_eval", cfg, "val"), TOKENIZER, cfg, CPU, Notes(folder))


def validation_numbers(folder) -> dict:
    """A random model's numbers, in as many processes as there are; the time they took left out."""
    found = validation(folder, "eval.text_batch_size=5")(tiny_model().backbone, 3, "bf16")
    return {key: value for key, value in found.items() if key != "seconds"}


@torch.no_grad()
def test_the_numbers_equal_counting_with_one_forward_an_item(tmp_path):
    validate, backbone = validation(tmp_path), tiny_model().backbone
    found = validate(backbone, 7, "fp32")
    backbone.eval()
    data = validate.dataset
    images = torch.cat([backbone.encode_image(data[i][0][None])[1] for i in range(IMAGES)])
    texts = torch.cat([backbone.encode_text(*TOKENIZER.encode([text], 25))[1] for text in data.captions])
    similarity, owner = images @ texts.T, torch.tensor(data.image_of_caption)
    hits = {"tr": [], "ir": []}
    for image, row in enumerate(similarity):
        hits["tr"].append((owner[row.argsort(descending=True)] == image).tolist().index(True))
    for text, column in enumerate(similarity.T):
        hits["ir"].append(column.argsort(descending=True).tolist().index(data.image_of_caption[text]))
    for name, ranks in hits.items():
        for k in (1, 5, 10):
            assert found[f"itc_{name}_r{k}"] == pytest.approx(100 * sum(r < k for r in ranks) / len(ranks))
    six = [found[f"itc_{name}_r{k}"] for name in hits for k in (1, 5, 10)]
    assert found[SCORE] == pytest.approx(sum(six) / 6) and 0 < found[SCORE] < 100
    assert (found["images"], found["texts"]) == (IMAGES, len(texts))
    assert found["chance_ir_r1"] == pytest.approx(100 / IMAGES)
    assert validate.run.logged == [(7, "val", found)] and any("chance" in line for line in validate.run.lines)


def test_at_most_so_many_images_evenly_spread_with_their_captions(tmp_path):
    whole = validation(tmp_path).dataset
    some = thinned(whole, 4)
    assert gray_level(torch.stack([some[i][0] for i in range(4)])).tolist() == [0, 2, 5, 8]
    pairs = zip(whole.captions, whole.image_of_caption, strict=True)
    expected = [text for text, image in pairs if image in (0, 2, 5, 8)]
    assert some.captions == expected and len(some) == 4
    assert some.image_of_caption == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert thinned(whole, IMAGES).captions == whole.captions and len(whole) == IMAGES
    few = validation(tmp_path, "eval.images=4")
    assert len(few.dataset) == 4 and few.run.lines[0].startswith(f"val: 4 of {IMAGES} images, {len(expected)} captions")


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory):
    """Pre-trainings without and with validation, and an evaluation of the latter's end."""
    folder = tmp_path_factory.mktemp("runs")
    run("pretrain", demo, folder / "without")
    settings = [f"data.val=[{demo}/data/retrieval_val.json]", "eval.batch_size=5", "train.best=val"]
    run("pretrain", demo, folder / "with", *settings, "data.num_workers=1")
    flags = ["--evaluate", "--checkpoint", folder / "with/checkpoint_last.pth"]
    run("retrieval", demo, folder / "zeroshot", "text.max_tokens=25", "eval.folds=7", flags=flags)
    return folder


def test_pretraining_is_the_same_with_validation_and_without(runs):
    ours, theirs = (load_checkpoint(runs / name / "checkpoint_last.pth") for name in ("with", "without"))
    torch.testing.assert_close(ours["model"], theirs["model"], atol=0, rtol=0)
    assert ours["progress"] == theirs["progress"]
    for one, other in zip(ours["rng"], theirs["rng"], strict=True):
        assert torch.equal(one["torch"], other["torch"]) and one["python"] == other["python"]


def test_the_best_epoch_on_images_of_validation_is_kept(runs):
    lines = log_lines(runs / "with", "val")
    assert [line["step"] for line in lines] == [4, 8] and lines[0]["images"] == 9
    assert read(runs / "with/metrics.json")["val"][SCORE] == lines[1][SCORE]
    best, last = (load_checkpoint(runs / f"with/checkpoint_{name}.pth") for name in ("best", "last"))
    scores = [line[SCORE] for line in lines]
    assert best["best"] == last["best"] == {SCORE: max(scores), "epoch": 1 + scores.index(max(scores))}
    assert best["progress"]["step"] == 4 * best["best"]["epoch"]
    assert not (runs / "without/checkpoint_best.pth").exists() and not log_lines(runs / "without", "val")


def test_the_script_writes_validations_columns_those_of_re_ranking_rankings_and_the_mean_over_folds(runs):
    numbers = read(runs / "zeroshot/metrics.json")
    assert list(numbers) == ["val", "test", "test_folds", "run"]
    last = log_lines(runs / "with", "val")[-1]
    for key in (key for key in last if key.startswith(("itc", "chance"))):
        assert last[key] == pytest.approx(numbers["val"][key]), key
    columns = {f"{stage}_{key}" for stage in ("itc", "itm", "chance") for key in retrieval.chance_metrics([1])}
    assert all(columns <= set(numbers[split]) for split in ("val", "test", "test_folds"))
    assert numbers["test_folds"]["chance_ir_r1"] == 100  # one image a fold
    result = read(runs / "zeroshot/retrieval_result.json")["test"]
    assert len(result["text_retrieval"]) == numbers["test"]["images"] == 7
    assert len(result["image_retrieval"]) == numbers["test"]["texts"]
    first = result["image_retrieval"][0]
    assert len(first["ranked"]) == len(first["scores"]) == 4 and first["scores"][0] >= first["scores"][1]


def test_images_that_cannot_be_cut_into_folds_are_one_line(demo, tmp_path):
    flags = ["--evaluate", "--checkpoint", demo / "model.pth"]
    refused(lambda: run("retrieval", demo, tmp_path, "eval.folds=5", flags=flags), "7 images cannot be cut into 5")
