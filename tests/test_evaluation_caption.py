"""The reward against pycocoevalcap, the metrics against pycocoevalcap called directly; `Captioner`."""

import inspect
import json
import os
import shutil
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from tiny import TOKENIZER, Naming, Notes, gray_images

from engine.config import CAPTION, load_config
from evaluation import caption
from evaluation.cider import CiderD, CiderReward, caption_words, cider
from tools.demo import scenes

NEEDS_JAVA = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


@pytest.fixture(scope="module")
def references():
    """Captions of 40 scenes, five each, by number."""
    return {i: scenes.captions(scenes.make_scene(3, i)) for i in range(40)}


@pytest.fixture(scope="module")
def results(references):
    """For each scene a caption: right, of another scene, with unknown and repeated words, of one word, none."""
    found = {i: references[(i + i % 3) % 40][0] for i in references}
    return found | {1: "zzz yyy zzz yyy zzz yyy " + references[1][1], 2: "a", 3: "", 4: "the the the the the"}


def words(texts):
    return [caption_words(text) for text in texts]


def test_cider_d_equals_pycocoevalcap(references, results):
    tokens = {i: words(texts) for i, texts in references.items()}
    candidates = {i: words([text]) for i, text in results.items()}
    mean, each = Cider().compute_score(tokens, candidates)
    scorer = CiderD(tokens.values())
    found = scorer.scores(list(candidates.values()), list(tokens.values()))
    np.testing.assert_allclose(found, each, atol=1e-12, rtol=0)
    assert cider(references, results) == pytest.approx(100 * mean, abs=1e-10)


def as_tokens(texts, cut=()):
    """Token ids [R, T] of sentences that end in [SEP], but for those whose numbers are in `cut`."""
    rows = [ids + [TOKENIZER.sep_id] * (i not in cut) for i, ids in enumerate(TOKENIZER.word_pieces(texts))]
    return TOKENIZER.pad(rows)[0]


@pytest.mark.parametrize("eos", [True, False])
def test_the_reward_is_pycocoevalcaps_cider_of_the_decoded_sentences(references, eos):
    """With `eos` of sentences that end in a word of their own, on both sides and in the document frequencies."""
    end = " <eos>" if eos else ""
    ended = {i: [text + end for text in words(texts)] for i, texts in references.items()}
    batch, texts = [5, 0], [references[5][1], "a red dog", references[0][0], references[5][0]]
    reward = CiderReward(TOKENIZER, references.values(), eos)
    found = reward(as_tokens(texts, cut=[1]), [references[i] for i in batch])
    theirs = CiderScorer()
    for group in ended.values():
        theirs += (group[0], group)
    theirs.compute_doc_freq()
    theirs.ref_len = np.log(float(len(theirs.crefs)))
    for number, text in enumerate(texts):
        theirs.ctest[batch[number // 2]] = CiderScorer(words([text])[0] + end, ended[batch[number // 2]]).ctest[0]
        assert found[number] == pytest.approx(theirs.compute_cider()[batch[number // 2]], abs=1e-12)
    assert found[0] > 1 > found[3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's T-shirt, isn't it?", "a man 's t-shirt is n't it"),
        ('The sign says "STOP" - at 10:30.', "the sign says stop at 10:30"),
        ("he cannot, she can't; (both)...", "he can not she ca n't -lrb- both -rrb-"),
        ("3.5 cakes & St. Mary's", "3.5 cakes & st. mary 's"),
        ("", ""),
    ],
)
def test_python_words_are_those_of_the_ptb_tokenizer(text, expected):
    assert caption_words(text) == expected


@NEEDS_JAVA
def test_metrics_equal_pycocoevalcap_called_directly(references, results, monkeypatch):
    results, scorers = results | {3: "a"}, {"rouge_l": Rouge(), "cider": Cider()}  # METEOR is given no empty caption
    spaces = " " in os.path.realpath(inspect.getfile(Meteor))  # where METEOR's program does not find its data
    if not spaces:
        scorers["meteor"] = Meteor()
        monkeypatch.setattr(caption, "Meteor", lambda: scorers["meteor"])  # one program, which takes seconds to start
    found = caption.caption_metrics(references, results)
    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in references.items()})
    res = tokenizer.tokenize({i: [{"caption": text}] for i, text in results.items()})
    expected = dict(zip(("bleu1", "bleu2", "bleu3", "bleu4"), Bleu(4).compute_score(gts, res)[0], strict=True))
    expected |= {name: scorer.compute_score(gts, res)[0] for name, scorer in scorers.items()}
    for name, value in expected.items():
        assert found[name] == pytest.approx(100 * value, abs=1e-9), name
    assert not spaces or "a path without spaces" in found["meteor"]
    assert found["tokenizer"] == "ptb" and found["cider"] > 100
    assert isinstance(found["spice"], float) or "python -m pycocoevalcap.spice.get_stanford_models" in found["spice"]


@pytest.mark.parametrize("java", ["absent", "a stub that fails"])
def test_without_java_the_rest_is_computed_with_python_words_and_marked(
    references, results, monkeypatch, tmp_path, java
):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755 if java != "absent" else 0o644)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = caption.caption_metrics(references, results)
    assert found["tokenizer"] == "python" and found["cider"] == pytest.approx(cider(references, results))
    assert all(isinstance(found[name], float) for name in ("bleu1", "bleu4", "rouge_l"))
    assert all("install one" in found[name] for name in ("meteor", "spice"))
    table = caption.caption_table("test", found | {"in": found})
    assert "python tokens" in table[0] and len(table) == 5 and table[-2].startswith("meteor: not computed")


class Failing:
    """As pycocoevalcap's METEOR, which waits for ever when it is deleted, if its lock is still held."""

    def __init__(self, *_):
        self.lock = threading.Lock()

    def compute_score(self, *_):
        self.lock.acquire()
        raise IndexError("list index out of range")

    def __del__(self):
        assert self.lock.acquire(timeout=5)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of its destructor
@pytest.mark.parametrize("broken", ["Bleu", "Cider", "Meteor", "Rouge", "Spice"])
def test_a_metric_that_fails_costs_no_other_column(references, results, monkeypatch, tmp_path, broken):
    constant = mock.Mock()
    constant.return_value.compute_score.return_value = 0.25, []
    monkeypatch.setattr(caption.shutil, "which", lambda name: name)
    monkeypatch.setattr(caption, "ptb_tokens", caption.python_tokens)
    monkeypatch.setattr(caption, "SPICE_PARSER", tmp_path)
    (tmp_path / "stanford-corenlp-3.6.0-models.jar").touch()
    for name in ("Meteor", "Spice"):  # Java programs
        monkeypatch.setattr(caption, name, constant)
    monkeypatch.setattr(caption, broken, Failing)
    found = caption.caption_metrics(references, results)
    for column in caption.CAPTION_COLUMNS:
        if column.startswith(broken.lower()):
            assert "IndexError: list index out of range" in found[column]
        else:
            assert isinstance(found[column], float), column


# --------------------------------------------------------------------------------------------------- Captioning a split


GRAYS = [4, 0, 8, 2, 6, 1, 7, 3, 5]  # the images' order
REFERENCES = {f"id{i}": [f"a gray of level {i // 2 * 2}", f"plain gray number {i}"] for i in GRAYS}
SAYS = [f"a gray of level {i}" for i in range(9)]
SAID = {f"id{i}": SAYS[i] for i in GRAYS}


@pytest.fixture
def captioner(tmp_path, monkeypatch, request):
    """Nine images of NoCaps' three domains with `REFERENCES`, the first of them blank ones instead; no Java."""
    monkeypatch.setattr(caption.shutil, "which", lambda name: None)
    names, blank = gray_images(tmp_path, 9), getattr(request, "param", 0)
    entries = [
        {"image": names[i], "image_id": f"id{i}", "domain": ("in", "near-domain", "out-domain")[i % 3]}
        | {"caption": ["...", " "] if place < blank else ["", *REFERENCES[f"id{i}"]]}
        for place, i in enumerate(GRAYS)
    ]
    (tmp_path / "val.json").write_text(json.dumps(entries))
    overrides = [f"data.val=[{tmp_path / 'val.json'}]", "data.image_root=none", "data.num_workers=0", "image_size=32"]
    overrides += ["eval.batch_size=4", "eval.splits=[val]", "generation.beams=2", "train.precision=fp32"]
    cfg = load_config("configs/Caption_coco.yaml", overrides, CAPTION)
    return caption.Captioner(cfg, TOKENIZER, torch.device("cpu"), Notes(tmp_path))


@pytest.mark.parametrize("training", [True, False])
def test_a_split_is_captioned_in_its_order_and_judged_by_domain(captioner, training):
    model = Naming(SAYS).train(training)
    captioner.evaluate_all(model)
    assert model.training == training
    written = json.loads((captioner.run.dir / "caption_result.json").read_text())
    assert written == [{"image_id": key, "caption": text} for key, text in SAID.items()]
    numbers = captioner.run.metrics["val"]
    for number, name in enumerate(("in", "near", "out")):
        chosen = [f"id{level}" for level in GRAYS if level % 3 == number]
        expected = caption.caption_metrics({k: REFERENCES[k] for k in chosen}, {k: SAID[k] for k in chosen})
        assert numbers[name] == {"images": 3, **expected, "spice": numbers[name]["spice"]}
    assert numbers["images"] == numbers["judged"] == 9 and numbers["cider"] == pytest.approx(cider(REFERENCES, SAID))
    assert captioner.validate(model) == pytest.approx(numbers["cider"])
    ((step, split, logged),) = captioner.run.logged
    assert (step, split) == (0, "val") and logged["cider"] == numbers["cider"] and "in" not in logged


@pytest.mark.parametrize("captioner, judged", [(9, 0), (2, 7)], indirect=["captioner"])
def test_images_whose_references_are_blank_are_captioned_counted_and_not_judged(captioner, judged):
    captioner.evaluate_all(Naming(SAYS))
    numbers = captioner.run.metrics["val"]
    assert len(json.loads((captioner.run.dir / "caption_result.json").read_text())) == numbers["images"] == 9
    assert numbers["judged"] == judged and ("cider" in numbers) == (judged > 0)
    if judged:
        expected = cider(dict(list(REFERENCES.items())[2:]), SAID)
        assert numbers["cider"] == pytest.approx(expected) == pytest.approx(captioner.validate(Naming(SAYS)))


def test_captions_and_counts_are_on_the_disk_before_judging(captioner, monkeypatch):
    monkeypatch.delattr(caption, "caption_metrics")
    with pytest.raises(NameError):
        captioner.evaluate_all(Naming(SAYS))
    assert captioner.run.metrics["val"]["images"] == captioner.run.metrics["val"]["judged"] == 9
    assert len(json.loads((captioner.run.dir / "caption_result.json").read_text())) == 9
