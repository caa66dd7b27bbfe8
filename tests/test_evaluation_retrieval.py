"""Recall and its chance level against counting; Retrieval.py --evaluate; validation while pre-training."""

import itertools
import json

import pytest
import torch
from PIL import Image
from test_cli import call, pretrain
from tiny import TOKENIZER, Notes, gray_images, gray_level, tiny_config, tiny_model

import Retrieval
import utils
from dataset import create_dataset
from evaluation import retrieval
from evaluation.retrieval import SCORE, Validation, thinned
from tools.demo import __main__ as make_demo_data
from utils import load_checkpoint

CPU = torch.device("cpu")
IMAGES = 11


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


# ---------------------------------------------------------------------------------------------------------- the script


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


def test_the_script_writes_metrics_rankings_and_the_mean_over_folds(project):
    Retrieval.main(arguments(project, "--override", "eval.folds=7", "rerank.k=99"))
    numbers = json.loads((project / "out" / "metrics.json").read_text())
    assert list(numbers) == ["val", "test", "test_folds", "run"]
    for split in (numbers["val"], numbers["test"]):
        for stage in ("itc", "itm", "chance"):
            assert {f"{stage}_{key}" for key in retrieval.chance_metrics([1])} <= set(split)
        assert (split["images"], split["texts"]) == (7, 14)
        assert split["chance_ir_r1"] == pytest.approx(100 / 7) and split["itm_tr_r5"] >= split["itm_tr_r1"]
    assert numbers["test_folds"]["chance_ir_r1"] == numbers["test_folds"]["itm_ir_r1"] == 100  # one image per fold
    result = json.loads((project / "out" / "retrieval_result.json").read_text())["test"]
    assert len(result["text_retrieval"]) == 7 and len(result["image_retrieval"]) == 14
    first = result["image_retrieval"][0]
    assert first["query"] == "image number 0" and len(first["ranked"]) == len(first["scores"]) == 7
    assert first["scores"][0] >= first["scores"][1] and first["ranked"][0].endswith(".png")


def test_folds_that_do_not_divide_the_images_are_one_line(project):
    with pytest.raises(utils.UserError, match="7 images cannot be cut into 3"):
        Retrieval.main(arguments(project, "eval.folds=3"))


# ----------------------------------------------------------------------------------------- validation: the numbers


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
    assert len(validation(tmp_path, "eval.images=4").dataset) == 4


# ---------------------------------------------------------------------------------------- validation: in training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 demo scenes a split."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    call(make_demo_data, "--output", folder, "--train", 24, "--val", 12, "--test", 12, "--size", 32, "--workers", 1)
    return folder


def with_validation(data, *overrides) -> list[str]:
    return [f"data.val=[{data / 'retrieval_val.json'}]", "eval.batch_size=5", *overrides]


def val_lines(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "val"]


def same_training(one, other) -> bool:
    ours, theirs = (load_checkpoint(run / "checkpoint_last.pth") for run in (one, other))
    states = zip(ours["rng"], theirs["rng"], strict=True)
    return (
        all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
        and ours["progress"] == theirs["progress"]
        and all(torch.equal(a["torch"], b["torch"]) and a["python"] == b["python"] for a, b in states)
    )


def test_pretraining_is_the_same_with_validation_and_without_and_the_best_epoch_is_kept(data, tmp_path):
    pretrain(data, tmp_path / "without")
    pretrain(data, tmp_path / "with", *with_validation(data, "train.best=val", "data.num_workers=1"))
    assert same_training(tmp_path / "without", tmp_path / "with")

    lines = val_lines(tmp_path / "with")
    assert [line["step"] for line in lines] == [4, 8] and lines[0]["images"] == 12
    assert json.loads((tmp_path / "with/metrics.json").read_text())["val"][SCORE] == lines[1][SCORE]
    best, last = (load_checkpoint(tmp_path / f"with/checkpoint_{name}.pth") for name in ("best", "last"))
    scores = [line[SCORE] for line in lines]
    assert best["best"] == last["best"] == {SCORE: max(scores), "epoch": 1 + scores.index(max(scores))}
    assert best["progress"]["step"] == 4 * best["best"]["epoch"]
    assert not (tmp_path / "without/checkpoint_best.pth").exists() and not val_lines(tmp_path / "without")

    call(  # ITC's columns of Retrieval.py
        Retrieval,
        *("--config", "configs/demo/Retrieval.yaml", "--output_dir", tmp_path / "zeroshot", "--evaluate"),
        *("--checkpoint", tmp_path / "with/checkpoint_last.pth", "--device", "cpu", "--override", "image_size=32"),
        *(f"data.{split}=[{data / f'retrieval_{split}.json'}]" for split in ("val", "test")),
        *("rerank.k=4", "data.num_workers=0", "text.vocab=configs/bert/vocab.txt", "text.max_tokens=25"),
        *("eval.splits=[val]", "train.precision=fp32"),
    )
    numbers = json.loads((tmp_path / "zeroshot/metrics.json").read_text())["val"]
    for key in (key for key in lines[1] if key.startswith(("itc", "chance"))):
        assert lines[1][key] == pytest.approx(numbers[key]), key


def test_the_best_epoch_needs_images_to_choose_it_on(data, tmp_path):
    with pytest.raises(utils.UserError, match="train.best: val chooses the best epoch on data.val, which is empty"):
        pretrain(data, tmp_path / "run", "train.best=val")
