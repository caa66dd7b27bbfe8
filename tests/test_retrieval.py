"""Retrieval fine-tuning: the step, and Retrieval.py as a user runs it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NO_DROPOUT, make_batch, tiny_config, tiny_model

import Retrieval
import utils
from evaluation.retrieval import better_order
from models.retrieval import RetrievalModel


def retrieval_model(*overrides: str) -> RetrievalModel:
    """With random weights, without decoder, as `load_backbone` gives it."""
    backbone = tiny_model(*NO_DROPOUT).backbone
    backbone.decoder = backbone.mlm_head = None
    return RetrievalModel(backbone, tiny_config(*NO_DROPOUT, *overrides))


def batch_of_pairs() -> dict:
    """6 pairs of 4 images: pairs 0 and 4, and 1 and 5, show the same one."""
    batch = make_batch(6)
    batch["image_id"] = torch.tensor([0, 1, 2, 3, 0, 1])
    batch["image"] = batch["image1"][batch["image_id"]]
    return batch


def test_queue_and_teacher_follow_the_steps():
    model, batch = retrieval_model(), batch_of_pairs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model.teacher.vision_proj.weight.clone()
    for step in range(2):
        loss, _ = model(batch, 0.4)
        loss.backward()
        assert (model.queue.image_id >= 0).sum() == 6 * step  # a batch comes in after its step
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
    student = model.backbone.vision_proj.weight
    moved = model.teacher.vision_proj.weight - first
    assert 0 < moved.norm() < 0.05 * (student - first).norm()
    assert model.queue.image_id[:12].tolist() == [0, 1, 2, 3, 0, 1] * 2


def test_in_batch_contrast_needs_no_teacher():
    model = retrieval_model("itc.negatives=batch")
    loss, _ = model(batch_of_pairs(), 0.4)
    loss.backward()
    model.after_step()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == [] and model.teacher is None


@pytest.fixture
def project(tmp_path):
    """Twelve images of noise with two captions each, a random checkpoint."""
    entries, pairs = [], []
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        texts = [f"image number {i}", f"a {i} coloured thing"]
        entries.append({"image": f"{i}.png", "caption": texts})
        pairs += [{"image": f"{i}.png", "caption": text, "image_id": f"im{i}"} for text in texts]
    (tmp_path / "split.json").write_text(json.dumps(entries))
    (tmp_path / "train.json").write_text(json.dumps(pairs))
    model = tiny_model()
    checkpoint = {"model": model.state_dict(), "description": model.backbone.description, "progress": {"step": 3}}
    utils.save_checkpoint(tmp_path / "pretrained.pth", checkpoint)
    return tmp_path


def fine_tune(project, out, *overrides, flags=None) -> None:
    flags = flags or ["--checkpoint", project / "pretrained.pth"]
    files = [f"data.{split}=[{project / 'split.json'}]" for split in ("val", "test")]
    settings = ["image_size=32", "train.batch_size=6", "train.log_every=1", "train.precision=fp32", "train.epochs=2"]
    settings += ["eval.folds=0", "itc.queue_size=20", "train.warmup_steps=2", "data.num_workers=0", "train.lr=1e-3"]
    start = ["--config", "configs/Retrieval_coco.yaml", "--output_dir", str(out), "--device", "cpu", *map(str, flags)]
    data = [f"data.train=[{project / 'train.json'}]", "data.image_root=none"]
    Retrieval.main([*start, "--override", *files, *data, *settings, *overrides])


def log_lines(run, split):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def test_fine_tuning_keeps_the_best_epoch_and_evaluates_with_it(project, caplog):
    run = project / "run"
    fine_tune(project, run)
    names = {path.name for path in run.iterdir()}
    assert {"checkpoint_last.pth", "checkpoint_best.pth", "retrieval_result.json", "metrics.json"} <= names
    assert [line["step"] for line in log_lines(run, "train")] == list(range(1, 9))  # 24 pairs, 6 a step, 2 epochs
    every_epoch = [max(line["itm_r_mean"], line["itc_r_mean"]) for line in log_lines(run, "val")][:2]
    best = utils.load_checkpoint(run / "checkpoint_best.pth")["best"]
    assert best["r_mean"] == max(every_epoch)
    numbers = json.loads((run / "metrics.json").read_text())
    assert numbers["val"][f"{best['order']}_r_mean"] == pytest.approx(best["r_mean"])  # the score's name is itm here
    dropped = [line for line in caplog.messages if "not used here" in line]  # one line says what retrieval drops
    assert len(dropped) == 1
    assert "decoder, mlm_head, cls_center, head, patch_center, queue, teacher" in dropped[0]

    fine_tune(project, project / "again", flags=["--evaluate", "--checkpoint", run / "checkpoint_best.pth"])
    again = json.loads((project / "again/metrics.json").read_text())["test"]
    assert {**again, "seconds": 0} == {**numbers["test"], "seconds": 0}


def test_the_better_order_is_kept():
    worse, better = ({"itc_r_mean": 50.0, "itm_r_mean": value} for value in (35.25, 50.0))
    assert better_order(worse, "itm") == ("itc", 50.0)
    assert better_order(better, "itm+itc") == ("itm+itc", 50.0)
