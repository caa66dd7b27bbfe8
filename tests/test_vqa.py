"""Answering against slow, obvious references; VQA.py as a command."""

import functools

import pytest
import torch
from conftest import refused
from stages import log_lines, read, run
from tiny import NO_DROPOUT, TOKENIZER, tiny_config

import utils
from dataset.vqa import encode_answers, encode_questions
from evaluation.vqa import vqa_accuracy
from models.semmim import build_backbone
from models.vqa import VQAModel, answer_log_probs

LIMITS = (30, 25, 22)
ANSWERS = ["yes", "no", "red", "a red dog", "2", "on the left", "stop", "light blue"]
QUESTIONS = [
    ("is it red", "", ""),
    ("what does the sign say", "stop", ""),
    ("how many", "", "dog cat"),
    ("where", "", ""),
]


@pytest.fixture(scope="module")
def model():
    """Tiny, with weights large enough that answers differ from question to question."""
    torch.manual_seed(0)
    backbone, _ = build_backbone(tiny_config(*NO_DROPOUT), mlm_head=False)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(24 if "crossattention" in name else 6)
    return VQAModel(backbone, TOKENIZER).eval()


def question_batch(rows=None):
    images = torch.randn(4 if rows is None else max(rows) + 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids, mask = encode_questions(TOKENIZER, QUESTIONS, LIMITS)
    batch = {"image": images, "input_ids": ids, "attention_mask": mask}
    return batch if rows is None else {**batch, "image_rows": torch.tensor(rows)}


def score_one(model, batch, index, answer):
    """log p(answer) of one question, token after token, with nothing batched, padded or projected ahead."""
    net, row = model.backbone, int(batch["image_rows"][index]) if "image_rows" in batch else index
    image = net.image_encoder(batch["image"][row : row + 1])
    text = net.text_encoder(batch["input_ids"][index : index + 1, : batch["attention_mask"][index].sum()])
    fused = net.fusion_encoder(text, None, net.fusion_encoder.project_memory(image))
    memory = net.decoder.project_memory(torch.cat([image, fused], 1))
    written, total = [TOKENIZER.cls_id], 0.0
    for token in [*TOKENIZER.word_pieces([answer])[0], TOKENIZER.sep_id]:
        logits = net.decoder.lm_logits(net.decoder(torch.tensor([written]), memory=memory))[0, -1]
        total += float(logits.detach().double().log_softmax(-1)[token])
        written.append(token)
    return total


# ------------------------------------------------------------------------------------------------------------ The model


def test_loss_is_the_weighted_mean_over_questions_and_trains_only_what_answering_uses(model):
    batch = question_batch()
    answers, rows, weights = ["yes", "no", "stop", "2", "left"], [0, 0, 1, 2, 3], [0.7, 0.3, 1.0, 0.5, 0.4]
    ids, target, mask = encode_answers(TOKENIZER, answers, 20)
    batch |= {"answer_ids": ids, "answer_target": target, "answer_mask": mask}
    batch |= {"answer_rows": torch.tensor(rows), "answer_weights": torch.tensor(weights)}
    loss, _ = model(batch)
    scores = [score_one(model, batch, row, answer) for row, answer in zip(rows, answers, strict=True)]
    assert loss.item() == pytest.approx(-sum(w * s for w, s in zip(weights, scores, strict=True)) / 4, rel=1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("rows", [None, [0, 0, 1, 1]])
def test_ranking_equals_scoring_one_by_one_the_answers_with_the_most_probable_first_token(model, rows):
    batch, tensors = question_batch(rows), encode_answers(TOKENIZER, ANSWERS, 20)
    table = torch.tensor([[score_one(model, batch, i, answer) for answer in ANSWERS] for i in range(4)])
    first = encode_answers(TOKENIZER, ANSWERS, 1)  # cut to one token, without an end
    memory, memory_mask = model.remember(batch)
    with torch.no_grad():
        questions = torch.arange(4).repeat_interleave(len(ANSWERS))
        memory = model.backbone.decoder.project_memory(memory)
        repeated = [part.repeat(4, 1) for part in first]
        starts = answer_log_probs(model.backbone.decoder, memory, memory_mask, *repeated, questions).view(4, -1)
    for k in (1, 2, 3, 1000):
        allowed = torch.zeros_like(table, dtype=torch.bool).scatter(1, starts.topk(min(k, len(ANSWERS))).indices, True)
        expected = table.masked_fill(~allowed, -torch.inf)
        place, score = model.rank(batch, *tensors, k=k)
        assert torch.equal(place, expected.argmax(1))
        torch.testing.assert_close(score, expected.amax(1), atol=1e-4, rtol=1e-4)
    assert len(set(place.tolist())) > 1


def test_equal_answers_rank_in_the_lists_order(model):
    tensors = encode_answers(TOKENIZER, ["Yes", "yes", "YES"], 20)
    assert model.rank(question_batch(), *tensors, k=3)[0].tolist() == [0, 0, 0, 0]


# ----------------------------------------------------------------------------------------------------------- The script


vqa = functools.partial(run, "vqa")


def test_script_trains_chooses_an_epoch_and_writes_every_answer(demo, tmp_path):
    vqa(demo, tmp_path)
    asked = read(demo / "data/vqa_test.json")
    result = read(tmp_path / "vqa_result.json")
    assert [row["question_id"] for row in result] == [entry["question_id"] for entry in asked]
    assert all(set(row) == {"question_id", "answer"} and isinstance(row["answer"], str) for row in result)
    numbers = read(tmp_path / "metrics.json")
    accuracies = [vqa_accuracy(row["answer"], entry["answer"]) for row, entry in zip(result, asked, strict=True)]
    assert numbers["test"]["accuracy"] == pytest.approx(100 * sum(accuracies) / len(asked))
    assert {"by_answer_type", "by_question_type", "constant"} <= set(numbers["test"])
    val = [line["accuracy"] for line in log_lines(tmp_path, "val")]
    best = utils.load_checkpoint(tmp_path / "checkpoint_best.pth")
    assert len(val) == 3 and best["best"]["accuracy"] == max(val[:2]) == val[2] == numbers["val"]["accuracy"]
    assert best["stage"] == "vqa" and best["config"]["text"]["max_question_tokens"] == 30

    out = tmp_path / "again"  # the checkpoint alone gives the same answers
    vqa(demo, out, flags=["--evaluate", "--checkpoint", tmp_path / "checkpoint_best.pth"])
    assert (out / "vqa_result.json").read_text() == (tmp_path / "vqa_result.json").read_text()


def test_ranking_answers_come_from_the_list(demo, tmp_path):
    flags = ["--evaluate", "--checkpoint", demo / "model.pth"]
    vqa(demo, tmp_path, "answer.mode=rank", "answer.k_test=9", flags=flags)
    known = read(demo / "data/answer_list.json")
    assert all(row["answer"] in known for row in read(tmp_path / "vqa_result.json"))


def test_a_missing_checkpoint_is_named(demo, tmp_path):
    refused(lambda: vqa(demo, tmp_path, flags=[]), "--checkpoint is missing")
