"""What the start of a training and an evaluation says about their data."""

import logging
from functools import partial

import annotated
import pytest
import torch
from annotated import entry, make, write
from tiny import TOKENIZER as BERT

from dataset import create_dataset, create_train_loader
from dataset.advice import Texts, warn_of_cut_texts, warn_of_shared_images
from dataset.pretrain import PretrainCollate
from dataset.text import clean_caption
from engine.config import STAGES, load_config
from utils import ROOT

folder = annotated.folder

ENGLISH = ["A man with a red helmet on a small moped", "Two zebras graze beside a wooden fence in the evening"] * 60


def test_the_share_of_cut_texts_counts_word_pieces_and_words_of_texts_from_everywhere():
    texts = ["a dog", "a very small dog", "unbelievably", "A, dog!"]  # "unbelievably" is five pieces
    assert [Texts("x", texts, room).share_cut(BERT) for room in (1, 2, 3, 4, 5)] == [1, 0.75, 0.75, 0.25, 0]
    assert Texts("x", texts, 2, partial(clean_caption, max_words=None)).share_cut(BERT) == 0.5  # "a dog" twice
    assert Texts("x", texts, 5, max_words=3).share_cut(BERT) == 0.25 and Texts("x", [], 4).share_cut(BERT) == 0
    many = Texts("x", ["a dog"] * 60_000 + ["a very small dog"] * 40_000, 3)
    assert len(many.probes()) == 10_000 and many.share_cut(BERT) == pytest.approx(0.4, abs=0.01)


CUT = [
    ("pretrain", "Pretrain", "text.max_tokens=6", "captions (data.max_words 40, text.max_tokens 6)"),
    ("caption_train", "Caption", "text.max_tokens=6", "captions (text.max_tokens 6)"),
    ("vqa_train", "VQA", "text.max_question_tokens=5", "questions (text.max_question_tokens 5)"),
]


@pytest.mark.parametrize(("kind", "name", "limit", "cut"), CUT)
def test_a_training_says_which_texts_are_cut_and_cannot_be_written(tmp_path, caplog, kind, name, limit, cut):
    rows = [f"{i}.png,{i},{text},{text},a dog" for i, text in enumerate(ENGLISH)]
    (tmp_path / "train.csv").write_text("\n".join(["image,question_id,question,caption,answer", *rows]))
    changes = [f"data.train=[{tmp_path}/train.csv]", "data.image_root=none", "data.val=[]", "train.batch_size=8"]
    changes += ["data.num_workers=0", limit]
    cfg = load_config(ROOT / f"configs/small/{name}.yaml", changes, STAGES[kind.partition("_")[0]])
    dataset = create_dataset(kind, cfg)
    with caplog.at_level(logging.INFO, "semmim"):
        create_train_loader(dataset, cfg, PretrainCollate(BERT, 6), torch.device("cpu"))
    assert f"100.0% of {cut}" in caplog.text
    assert f"letters this vocabulary cannot write: 0.0% of {cut.split()[0]}" in caplog.text


@pytest.mark.parametrize("kind", ["retrieval_eval", "caption_eval", "vqa_eval"])
def test_an_evaluation_says_which_texts_it_cuts(folder, caplog, kind):
    """Captions of 100 words that begin with the same 30 are the same query; references and what fits are not cut."""
    long = " ".join(f"word{i % 3}" for i in range(100))
    entries = [entry(0, caption=f"{long} one", question=f"{long}?"), entry(1, caption="a dog"), entry(2, caption="two")]
    stage = kind.partition("_")[0]
    cfg = load_config(STAGES[stage].schema, [f"text.vocab={BERT.vocab_file}"], STAGES[stage])
    warn_of_cut_texts({"val": make(kind, write(folder, entries[1:]))}, cfg, BERT)
    assert caplog.text == ""
    warn_of_cut_texts({"val": make(kind, write(folder, entries))}, cfg, BERT)
    key = {"retrieval": "captions (data.max_words", "vqa": "questions (text.max_question_tokens"}.get(stage)
    assert f"val: 33.3% of {key}" in caplog.text if key else caplog.text == ""


@pytest.mark.parametrize("stage", ["retrieval", "caption", "vqa"])
def test_images_that_training_and_evaluation_share_are_counted(folder, caplog, stage):
    train = make(f"{stage}_train", write(folder, [entry(0), entry(1, image="./b.png")], "train.json"))
    splits = {"val": [2], "test": [1, 2], "dev": [0, 1]}
    files = {split: write(folder, [entry(n) for n in numbers], f"{split}.json") for split, numbers in splits.items()}
    held_out = {split: make(f"{stage}_eval", file) for split, file in files.items()}
    warn_of_shared_images(train, held_out)
    test, dev, both = caplog.messages
    assert "test: 1 of 2 images are in data.train" in test and str(folder / "b.png") in test
    assert "dev: 2 of 2 images are in data.train" in dev and "1 images are in data.val and data.test" in both
