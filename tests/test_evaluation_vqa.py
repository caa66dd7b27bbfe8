"""The official VQA accuracy against its definition, answer normalization against cases checked by hand; `Answerer`."""

import itertools
import json
import random

import pytest
import torch
from tiny import TOKENIZER, Naming, Notes, gray_images

from engine.config import VQA, load_config
from evaluation import vqa

# Rule: (answer, what the official program makes of it), worked out mark by mark from its rules.
NORMALIZED = {
    "lower case, white space": [("light\nblue", "light blue"), ("", ""), ("café", "café")],
    "digits for number words, zero to ten and none": [("two", "2"), ("none", "0"), ("twenty one", "twenty 1")],
    "articles": [("the dog", "dog"), ("A man and an apple", "man and apple")],
    "periods before a digit stay": [("3.5", "3.5"), (".5", ".5"), ("yes.", "yes"), ("mt. rushmore", "mt rushmore")],
    "commas": [("100,978", "100978"), ("red,white", "red white")],
    "with a comma in a number every mark vanishes": [("10,000-ft", "10000ft"), ("1,000 (usd)", "1000 usd")],
    "apostrophes and colons stay": [("2:50 pm", "2:50 pm"), ("don't", "don't")],
    "one missing apostrophe is put back, two are not": [("oclock", "o'clock"), ("couldn'tve", "couldn't've")]
    + [("couldntve", "couldntve"), ("'ow'sat", "'ow's'at"), ("twas", "'twas"), ("somebody'd", "somebodyd")],
    "other marks become spaces": [("new-york", "new york"), ("{x};[y]", "x y"), ("b&w", "b&w")]
    + [("black and white-striped", "black and white striped"), ("a_b", "b")],  # what is left of it is an article
    "or nothing if one stands beside a space": [("x - ray-film", "x rayfilm"), ('"stop"', "stop")],
}


@pytest.mark.parametrize("rule", NORMALIZED)
def test_normalized_as_the_official_program_does(rule):
    for answer, expected in NORMALIZED[rule]:
        assert vqa.normalize_answer(answer) == expected


def brute_force(prediction, answers):
    """The mean over all ten sets of nine annotators of min(matches / 3, 1)."""
    sets = list(itertools.combinations(range(10), 9))
    assert len(sets) == 10
    return sum(min(sum(answers[i] == prediction for i in nine) / 3, 1) for nine in sets) / 10


def test_accuracy_equals_all_ten_subsets_written_out():
    rng = random.Random(0)
    for _ in range(500):
        words = rng.sample(["yes", "no", "red", "blue", "dog", "cat", "left", "7"], rng.randint(1, 5))
        answers = [rng.choice(words) for _ in range(10)]
        prediction = rng.choice([*words, "something else"])
        for scoring in vqa.SCORING:
            assert vqa.vqa_accuracy(prediction, answers, scoring) == pytest.approx(brute_force(prediction, answers))


# (prediction, the ten annotators' answers, accuracy today, accuracy before March 2021), by hand from its program:
# today both sides are processed where the ten are not all the same and neither where they are; before, the prediction
# always was, and of the annotators' answers only the punctuation, where they were not all the same.
COMPARED = [
    ("two", ["two"] * 10, 1, 0),
    ("2", ["two"] * 9 + ["2"], 1, 0.3),
    ("new-york", ["new-york"] * 9 + ["boston"], 1, 1),
    ("new york", ["new-york"] * 10, 0, 0),
    ("Yes", ["yes"] * 10, 0, 1),
    ("yes", ["Yes"] * 9 + ["no"], 1, 0),
    ("none", ["none"] * 7 + ["nothing"] * 3, 1, 0),
    ("0", ["none"] * 2 + ["nothing"] * 8, 0.6, 0),
    ("dog", ["a dog"] * 3 + ["dog"] * 1 + ["cat"] * 6, 1, 0.3),
    ("dog\n", [" dog"] * 5 + ["dog\t"] * 5, 1, 0),  # the same but for white space around them: ten who agree
    ("dog!", ["dog"] * 10, 0, 1),
    ("3 dogs", ["three dogs"] * 4 + ["3 dogs."] * 2 + ["dogs"] * 4, 1, 0.6),
    ("x" + "." * 40, ["x" + "." * 40] * 9 + ["y"], 1, 1),
    ("x" + "." * 32, ["x" * 1] * 9 + ["y"], 1, 1),  # the first 32 periods go
    ("x" + "." * 33, ["x" * 1] * 9 + ["y"], 0, 0),
]


@pytest.mark.parametrize(("prediction", "answers", "today", "before"), COMPARED)
def test_both_versions_of_the_official_program_are_followed_to_the_letter(prediction, answers, today, before):
    assert vqa.vqa_accuracy(prediction, answers, "official") == pytest.approx(today)
    assert vqa.vqa_accuracy(prediction, answers, "official_2017") == pytest.approx(before)


@pytest.mark.parametrize("scoring", vqa.SCORING)
@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        *[("Two", "2", 1), ("2", ["two"], 1), ("3", "2", 0), ("Skateboard.", {"skateboard": 0.9, "board": 0.3}, 0.9)],
        *[(answer, empty, 0) for empty in ({}, "", " ", [""], [" "] * 10) for answer in ("", "a", "yes")],
    ],
)
def test_single_answers_match_normalized_scores_are_looked_up_and_empty_ones_give_nothing(
    prediction, reference, expected, scoring
):
    assert vqa.vqa_accuracy(prediction, reference, scoring) == expected


def test_a_question_type_whose_references_are_all_empty_scores_0_and_is_counted():
    references, kinds = [{}, {}, ["yes"] * 10], ["how", "how", "is"]
    columns = vqa.vqa_metrics(["two", "", "yes"], references, [None] * 3, kinds)
    assert columns["empty_references"] == 2 and columns["accuracy"] == pytest.approx(100 / 3)
    assert columns["by_question_type"] == columns["constant_by_question_type"] == {"how": 0, "is": 100}


def test_columns_are_means_over_the_questions_of_each_type():
    yes, red = ["yes"] * 10, ["red"] * 8 + ["dark red"] * 2
    columns = vqa.vqa_metrics(
        ["yes", "no", "dark red", "2"],
        [yes, yes, red, "two"],
        ["yes/no", "yes/no", "other", None],
        ["is", "is", "what", "how many"],
    )
    assert columns["questions"] == 4
    assert columns["accuracy"] == pytest.approx(100 * (1 + 0 + 0.6 + 1) / 4)
    assert columns["by_answer_type"] == {"other": pytest.approx(60), "yes/no": 50}
    assert columns["by_question_type"] == {"how many": 100, "is": 50, "what": pytest.approx(60)}


@pytest.mark.parametrize("scoring", vqa.SCORING)
def test_constant_is_the_best_single_answer_of_each_question_type(scoring):
    rng = random.Random(1)
    said = ["yes", "no", "Two", "2", "red", "new-york", "New York"]
    references = [[rng.choice(said) for _ in range(10)] for _ in range(30)] + ["red", {"yes": 0.6}]
    references += [[rng.choice(said)] * 10 for _ in range(30)]
    kinds = [rng.choice(["is", "how", None]) for _ in references]
    columns = vqa.vqa_metrics(["yes"] * len(references), references, [None] * len(references), kinds, scoring)
    total = 0.0
    for kind in set(kinds):
        group = [reference for reference, k in zip(references, kinds, strict=True) if k == kind]
        candidates = {*said, *map(vqa.normalize_answer, said)}
        best = max(sum(vqa.vqa_accuracy(answer, reference, scoring) for reference in group) for answer in candidates)
        if kind is not None:
            assert columns["constant_by_question_type"][kind] == pytest.approx(100 * best / len(group))
        total += best
    assert columns["constant"] == pytest.approx(100 * total / len(references))
    assert columns["accuracy"] <= columns["constant"] + 1e-9


@pytest.fixture
def answerer(tmp_path):
    """Nine questions about four images, in mixed order; that of image i is right where it is answered with i."""
    names = gray_images(tmp_path, 4)
    asked = [2, 0, 3, 2, 1, 0, 2, 3, 1]
    entries = [
        {"image": names[image], "question": "how many", "question_id": 10 * place, "dataset": "vqa"}
        | {"answer": [{0: "7", 1: " "}.get(place, str(image))] * 10}
        for place, image in enumerate(asked)
    ]
    (tmp_path / "val.json").write_text(json.dumps(entries))
    overrides = [f"data.val=[{tmp_path / 'val.json'}]", "data.test=[]", "data.val_scores=[]", "data.num_workers=0"]
    overrides += ["data.image_root=none", "image_size=32", "eval.batch_size=4", "train.precision=fp32"]
    cfg = load_config("configs/VQA.yaml", overrides, VQA)
    return vqa.Answerer(cfg, TOKENIZER, torch.device("cpu"), Notes(tmp_path)), asked


def test_a_split_is_answered_in_its_order_scored_logged_and_written(answerer):
    answerer, asked = answerer
    numbers = answerer.evaluate(Naming(map(str, range(4))), "val", step=5, final=True)
    written = json.loads((answerer.run.dir / "vqa_result_val.json").read_text())
    assert written == [{"question_id": 10 * place, "answer": str(image)} for place, image in enumerate(asked)]
    assert numbers["accuracy"] == pytest.approx(100 * 7 / 9) and numbers["questions"] == 9
    assert answerer.run.logged == [(5, "val", {"accuracy": numbers["accuracy"], "constant": numbers["constant"]})]
    assert answerer.run.lines[2] == "val: 1 of 9 references hold no answer; their questions score 0"
    assert numbers["empty_references"] == 1
