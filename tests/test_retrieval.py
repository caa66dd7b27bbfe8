"""Retrieval fine-tuning: the step, and Retrieval.py as a user runs it."""

import pytest
import torch
from stages import log_lines, read, run
from tiny import NO_DROPOUT, make_batch, tiny_config, tiny_model

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
    model(batch_of_pairs(), 0.4)[0].backward()
    model.after_step()
    assert model.teacher is None and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_fine_tuning_keeps_the_best_epoch_and_evaluates_with_it(demo, tmp_path, caplog):
    out, settings = tmp_path / "run", ["itc.negatives=queue", "itc.queue_size=20", "rerank.score=itm", "train.lr=1e-3"]
    run("retrieval", demo, out, *settings)
    names = {path.name for path in out.iterdir()}
    assert {"checkpoint_last.pth", "checkpoint_best.pth", "retrieval_result.json", "metrics.json"} <= names
    assert [line["step"] for line in log_lines(out, "train")] == list(range(1, 9))  # 24 pairs, 6 a step, 2 epochs
    every_epoch = [max(line["itm_r_mean"], line["itc_r_mean"]) for line in log_lines(out, "val")][:2]
    best = utils.load_checkpoint(out / "checkpoint_best.pth")["best"]
    assert best["r_mean"] == max(every_epoch)
    numbers = read(out / "metrics.json")
    assert numbers["val"][f"{best['order']}_r_mean"] == pytest.approx(best["r_mean"])  # the score's name is itm here
    dropped = [line for line in caplog.messages if "not used here" in line]  # one line says what retrieval drops
    assert len(dropped) == 1
    assert "cls_center, decoder, head, mlm_head, patch_center, queue, teacher" in dropped[0]

    flags = ["--evaluate", "--checkpoint", out / "checkpoint_best.pth"]
    again = read(run("retrieval", demo, tmp_path / "again", *settings, flags=flags) / "metrics.json")["test"]
    assert {**again, "seconds": 0} == {**numbers["test"], "seconds": 0}


def test_the_better_order_is_kept():
    worse, better = ({"itc_r_mean": 50.0, "itm_r_mean": value} for value in (35.25, 50.0))
    assert better_order(worse, "itm") == ("itc", 50.0)
    assert better_order(better, "itm+itc") == ("itm+itc", 50.0)


@pytest.mark.parametrize("score, remedy", [("itm", ", or try rerank.score=itm+itc/t"), ("itm+itc/t", "by ITC")])
def test_a_worse_re_ranking_is_a_warning(demo, tmp_path, caplog, monkeypatch, score, remedy):
    monkeypatch.setattr("evaluation.retrieval.better_order", lambda numbers, score: ("itc", 50.0))
    flags = ["--evaluate", "--checkpoint", demo / "model.pth"]
    run("retrieval", demo, tmp_path, f"rerank.score={score}", "eval.splits=[val]", flags=flags)
    (line,) = [line for line in caplog.messages if line.startswith(f"warning: re-ranking by {score} is worse than ITC")]
    assert line.endswith(remedy)
