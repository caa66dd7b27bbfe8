"""The captioning model and its losses; Caption.py as a user runs it."""

import datetime
import functools
import json
import time

import pytest
import torch
import torch.distributed as dist
from conftest import in_ranks
from stages import log_lines, read, run
from tiny import NO_DROPOUT, TOKENIZER, make_batch, tiny_config

from dataset.caption import CaptionCollate
from evaluation import caption as caption_evaluation
from models.caption import CaptionModel, CrossEntropy, SelfCritical
from models.semmim import build_backbone
from utils import IGNORE, UserError, load_checkpoint


def tiny_captioner(seed=0):
    torch.manual_seed(seed)
    return CaptionModel(build_backbone(tiny_config(*NO_DROPOUT), mlm_head=False)[0], TOKENIZER)


def caption_batch(captions=("a red dog", "two cats on a mat"), prompts=("", "an image of")):
    samples = [
        {"image": image, "caption": caption, "prompt": prompt, "references": [caption], "path": "x.png", "bad": []}
        for image, caption, prompt in zip(make_batch(len(captions))["image1"], captions, prompts, strict=True)
    ]
    return CaptionCollate(TOKENIZER, 25, 25)(samples)


def memory_of(model, batch):
    image_embeds = model.backbone.image_encoder(batch["image"])
    return model.backbone.encode_memory(image_embeds, batch["prompt_ids"], batch["prompt_mask"])


def log_probs_of(model, ids, memory, mask):
    decoder = model.backbone.decoder
    return decoder.lm_logits(decoder(ids, decoder.project_memory(memory), mask)).log_softmax(-1)


# -------------------------------------------------------------------------------------------- model and losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_mean_over_all_tokens_and_leaves_unused_parts_alone(smoothing):
    model, batch = tiny_captioner(), caption_batch()
    assert batch["prompt_ids"][0].tolist() == [TOKENIZER.cls_id, *[TOKENIZER.pad_id] * 3]  # of an empty prompt
    loss, logs = model(batch, CrossEntropy(smoothing))
    log_probs = log_probs_of(model, batch["input_ids"], *memory_of(model, batch))
    said = batch["target"] != IGNORE
    right = log_probs.gather(2, batch["target"].clamp(min=0)[..., None])[..., 0]
    smooth = log_probs.mean(-1)
    expected = -((1 - smoothing) * right + smoothing * smooth)[said].mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without  # DistributedDataParallel would wait for them
    assert model.backbone.vision_proj.weight.grad is None and 0 <= logs["token_accuracy"] <= 1


@pytest.mark.parametrize("log_prob", ["sum", "mean"])
def test_the_self_critical_loss_equals_the_hand_formula(log_prob):
    """Two images, three sentences each: - 1/6 sum (r - mean of the other two) log p, p by a plain forward pass."""
    model, batch = tiny_captioner(), caption_batch()
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.5, 0.0, 0.0])
    seen = []

    def reward(sequences, references):
        seen.append(sequences)
        return rewards

    objective = SelfCritical(reward, mode="sample", samples=3, log_prob=log_prob, min_tokens=2, max_tokens=6)
    torch.manual_seed(4)
    loss, logs = model(batch, objective)
    sequences = seen[0]
    memory, mask = memory_of(model, batch)
    total = 0.0
    baselines = [4.0, 3.5, 1.5, 0.0, 0.25, 0.25]
    for row, (ids, r, b) in enumerate(zip(sequences.tolist(), rewards.tolist(), baselines, strict=True)):
        ids = ids[: ids.index(TOKENIZER.sep_id) + 1] if TOKENIZER.sep_id in ids else ids
        image, inputs = slice(row // 3, row // 3 + 1), torch.tensor([[TOKENIZER.cls_id, *ids[:-1]]])
        logits = log_probs_of(model, inputs, memory[image], mask[image])[0]
        logits[:2, TOKENIZER.sep_id] = -torch.inf
        log_p = getattr(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)], log_prob)()
        total = total - (r - b) * log_p / 6
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(logs["reward"], rewards.mean())


def test_with_a_greedy_baseline_the_greedy_sentence_is_judged_and_subtracted():
    model, batch = tiny_captioner(), caption_batch()
    judged = []

    def reward(sequences, references):
        judged.append(len(sequences))
        return torch.arange(len(sequences), dtype=torch.float32)

    objective = SelfCritical(reward, mode="sample", samples=2, baseline="greedy", max_tokens=5)
    rewards, baseline = objective.rewards(torch.zeros(4, 5), torch.zeros(2, 5), batch["references"])
    assert judged == [4, 2]
    assert rewards.tolist() == [[0, 1], [2, 3]] and baseline.tolist() == [[0, 0], [1, 1]]
    model(batch, objective)[0].backward()


def test_gradients_in_bf16_reach_the_decoder_after_generation():
    """Generation runs without gradient under the same autocast; its cached casts must not cut the loss off."""
    model, batch = tiny_captioner(), caption_batch()
    objective = SelfCritical(lambda s, r: torch.arange(len(s)).float(), mode="sample", samples=2, max_tokens=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model(batch, objective)
    loss.backward()
    queries = [p for name, p in model.named_parameters() if ".query.weight" in name and "decoder" in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in queries)


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def no_java(monkeypatch):
    """Without Java the evaluation takes no seconds; its own numbers are tested elsewhere."""
    monkeypatch.setattr(caption_evaluation.shutil, "which", lambda name: None)


caption = functools.partial(run, "caption")
SCST = "configs/demo/Caption_scst.yaml"


@pytest.mark.usefixtures("no_java")
def test_cross_entropy_then_scst_write_what_a_run_promises(demo, tmp_path):
    first, second = tmp_path / "ce", tmp_path / "scst"
    caption(demo, first)
    names = {path.name for path in first.iterdir()}
    assert {"checkpoint_last.pth", "checkpoint_best.pth", "caption_result.json", "metrics.json"} <= names
    result = read(first / "caption_result.json")
    ids = [entry["image_id"] for entry in read(demo / "data/caption_test.json")]
    assert [entry["image_id"] for entry in result] == ids and all(set(e) == {"image_id", "caption"} for e in result)
    numbers = read(first / "metrics.json")
    assert numbers["test"]["images"] == 7 and "install one" in numbers["test"]["spice"]
    best = load_checkpoint(first / "checkpoint_best.pth")["best"]
    assert best["cider"] == pytest.approx(max(line["cider"] for line in log_lines(first, "val") if line["step"]))
    assert numbers["val"]["cider"] == pytest.approx(best["cider"])

    flags = ["--checkpoint", first / "checkpoint_best.pth"]
    caption(demo, second, "scst.samples=3", "train.epochs=1", flags=flags, config=SCST)
    line = log_lines(second, "train")[0]
    assert {"reward", "reward_spread", "tokens", "time/reward_seconds"} <= set(line)
    assert line["time/reward_seconds"] > 0 and line["tokens"] <= 8
    assert log_lines(second, "val")[0]["step"] == 0  # where it started from


def caption_in_rank(_rank, *given):
    caption(*given, config=SCST)


@pytest.mark.usefixtures("no_java")
def test_two_processes_train_and_caption_every_image_once_and_a_long_judgment_keeps_no_process_waiting(
    demo, tmp_path, monkeypatch
):
    """Nine and seven images in batches of four; scst and cross-entropy reach every weight, or training would stop.

    The first split is judged for longer than a collective of the group waits.
    """
    overrides = ("train.epochs=1", "train.batch_size=4", "scst.samples=2", "eval.spice=false")
    judge, delays = caption_evaluation.caption_metrics, [6]

    def slowly(*given, **options):
        time.sleep(delays.pop() if delays else 0)
        return judge(*given, **options)

    with monkeypatch.context() as patch:
        join = functools.partial(dist.init_process_group, timeout=datetime.timedelta(seconds=4))
        patch.setattr(dist, "init_process_group", join)
        patch.setattr(caption_evaluation, "caption_metrics", slowly)
        in_ranks(2, caption_in_rank, demo, tmp_path / "two", *overrides)
    numbers = read(tmp_path / "two/metrics.json")
    for name, split, count in (("caption_result", "test", 7), ("caption_result_val", "val", 9)):
        ids = [entry["image_id"] for entry in read(tmp_path / f"two/{name}.json")]
        wanted = [entry["image_id"] for entry in read(demo / f"data/caption_{split}.json")]
        assert ids == wanted and len(ids) == count and isinstance(numbers[split]["cider"], float)
    flags = ["--evaluate", "--checkpoint", tmp_path / "two/checkpoint_best.pth"]
    caption(demo, tmp_path / "one", *overrides, flags=flags, config=SCST)
    for name in ("caption_result.json", "caption_result_val.json"):
        assert read(tmp_path / "one" / name) == read(tmp_path / "two" / name)


@pytest.mark.parametrize("objective", ["cross_entropy", "scst"])
def test_a_validation_split_or_a_reward_of_one_image_is_refused_before_the_work(demo, tmp_path, objective):
    """CIDEr of one image is 0 whatever it says: it can neither choose an epoch nor reward a sentence."""
    name = "val" if objective == "cross_entropy" else "train"
    one = demo / f"data/one_{name}.json"
    one.write_text(json.dumps(read(demo / f"data/caption_{name}.json")[:1]))
    settings = [f"data.{name}=[{one}]", f"train.objective={objective}", "train.batch_size=1"]
    with pytest.raises(UserError, match=f"data.{name}: .*one image|images with captions: 1"):
        caption(demo, tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()
