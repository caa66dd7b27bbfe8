"""Questions, answers and references, from files to tensors."""

import annotated
import pytest
import torch
from annotated import make, write
from conftest import refused
from official_files import vqa_annotations
from tiny import TOKENIZER

from dataset.questions import read_answer_list
from dataset.vqa import EvalBatches, VQACollate, encode_questions, question_parts

LIMITS = (30, 25, 22)
TEN = ["yes"] * 6 + ["no"] * 3 + ["maybe"]

folder = annotated.folder


def entry(number=1, image=0, **changes):
    values = {"question_id": number, "question": "Is it red?", "answer": TEN, "object_label": None}
    return annotated.entry(image, **{**values, **changes})


def train_set(folder, entries, **options):
    return make("vqa_train", write(folder, entries), **options)


def eval_set(folder, entries, **options):
    return make("vqa_eval", write(folder, entries), **options)


def words(ids):
    return " ".join(TOKENIZER.names(ids.tolist()))


def test_question_ocr_and_labels_are_joined_by_separators_and_an_empty_part_has_none():
    ocr = [[[0, 0], "STOP!"], [[1, 1], "Sign"]]
    parts = question_parts({"question": "What does it say?", "ocr": ocr, "object_label": "dog&&red sign"})
    ids, mask = encode_questions(TOKENIZER, [parts, ("what", "", "dog"), ("what", "stop", ""), ("", "", "")], LIMITS)
    assert [words(row[m.bool()]) for row, m in zip(ids, mask, strict=True)] == [
        "[CLS] what does it say [SEP] stop sign [SEP] dog red sign",
        *("[CLS] what [SEP] dog", "[CLS] what [SEP] stop", "[CLS]"),
    ]


def test_a_question_without_a_word_is_evaluated_since_every_one_needs_an_answer_but_not_trained_on(folder):
    entries = [entry(question="?!"), entry(2, 1)]
    assert eval_set(folder, entries).parts[0][0] == ""
    sample = train_set(folder, entries)[0]
    assert sample["parts"][0] == "is it red" and "a.png: a question without a word" in sample["bad"][0]


def test_answers_weigh_what_their_share_of_annotators_is(folder):
    answers = {"a": [*TEN[:-1], " yes "], "vg": "Blue", "b": ["left", "right"], "c": ["red", "", "red", "blue"]}
    entries = [entry(i, answer=answer, dataset=name) for i, (name, answer) in enumerate(answers.items())]
    data = train_set(folder, entries, answer_weight={"vg": 0.5, "gqa": 0.5})
    found = [dict(zip(data[i]["answers"], data[i]["weights"], strict=True)) for i in range(4)]
    assert found[0] == {"yes": pytest.approx(0.7), "no": pytest.approx(0.3)}
    assert found[1:] == [{"Blue": 0.5}, {"left": 0.5, "right": 0.5}, {"red": 0.5, "blue": 0.25}]


def test_flips_never_spoil_left_right_or_printed_words(folder):
    texts = [{"question": "what is left of it"}, {"answer": ["right"] * 10}, {"ocr": [[[], "stop"]]}, {}]
    data = train_set(folder, [entry(i, **text) for i, text in enumerate(texts)])
    seen = []
    data.transform = lambda image, rng, allow_flip: seen.append(allow_flip)
    for index in range(4):
        data[(0, index)]
    assert seen == [False, False, False, True]


def test_a_batch_has_every_answer_beside_its_question(folder):
    entries = [entry(), entry(2, 1, question="What is it, then?", answer=["t-shirt"] * 10)]
    collate = VQACollate(TOKENIZER, LIMITS, 20)
    data = train_set(folder, entries)
    batch = collate([data[0], data[1]])
    assert batch["image"].shape == (2, 3, 8, 8) and batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].sum(1).tolist() == [4, 5]
    assert collate([data[0], data[0]])["attention_mask"] is None  # where nothing is padded
    assert batch["answer_rows"].tolist() == [0, 0, 0, 1]
    assert batch["answer_weights"].tolist() == pytest.approx([0.6, 0.3, 0.1, 1.0])
    assert words(batch["answer_ids"][3]) == "[CLS] t - shirt"
    assert words(batch["answer_target"][3]) == "t - shirt [SEP]"
    assert batch["answer_mask"].tolist() == [[1, 1, 0, 0]] * 3 + [[1, 1, 1, 1]]
    assert len(batch["paths"]) == 2 and batch["bad"] == []


def test_references_come_from_official_files_then_entries_then_scores(folder):
    scores = write(
        folder, [{"question_id": i, "label": {"net": 1}, "question_type": "is"} for i in (1, 2, 3)], "minival.json"
    )
    official = vqa_annotations(folder, "val2014", {(1, 1): ["red"] * 10, (99, 1): ["red"] * 10})
    entries = [entry(1), entry(2), entry(3, answer=None)]
    data = eval_set(folder, entries, official=[official], score_files=[scores])
    assert data.references == [["red"] * 10, TEN, {"net": 1}]
    assert data.answer_types == ["other", None, None] and data.question_types == ["what is", "is", "is"]
    assert data.source == "official files (1 questions), entries (1 questions), score files (1 questions)"


def test_eval_batches_hold_every_question_once_and_every_image_once(folder):
    entries = [entry(i, image, question=f"question {i}") for i, image in enumerate([0, 1, 0, 2, 0, 1, 0])]
    data = eval_set(folder, entries)
    batches = EvalBatches(data, TOKENIZER, LIMITS, 3)
    seen = [i for b in range(len(batches)) for i in batches[b]["index"].tolist()]
    assert sorted(seen) == list(range(7)) and len(batches) == 3
    assert [len(batches[b]["image"]) for b in range(3)] == [1, 2, 1]
    for b in range(3):
        batch = batches[b]
        for place, row, ids in zip(batch["index"], batch["image_rows"], batch["input_ids"], strict=True):
            image, (question, _, _) = data[int(place)]
            assert torch.equal(batch["image"][row], image)
            assert words(ids).split()[-1] == question.split()[-1]


@pytest.mark.parametrize("content", [["yes", "yes"], ["yes", " "], ["a", 2], []])
def test_an_answer_list_holds_different_texts(folder, content):
    refused(lambda: read_answer_list(write(folder, content, "answers.json")), "answers.json: an answer list is")


@pytest.mark.parametrize(
    "answer",
    "10:30|men's|t-shirt|o'clock|3.5|1,000|1/2|$5|50%|#1|b&w|u.s.a.|mt. rushmore|dogs'|yes!|can't tell|12:30 pm"
    "|new york|jack-o-lantern|st. patrick's day|red, white and blue|p.m.|7-11".split("|"),
)
def test_generated_answers_are_spelt_as_people_do(answer):
    (ids,) = TOKENIZER.word_pieces([answer])
    assert TOKENIZER.decode_answer([TOKENIZER.cls_id, *ids, TOKENIZER.sep_id, TOKENIZER.pad_id]) == answer
