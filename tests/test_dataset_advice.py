"""What the start of a training says about data and settings that do not fit."""

import logging
from functools import partial

import annotated
import pytest
import torch
from annotated import entry, make, write

from dataset import create_dataset, create_train_loader, warn_of_cut_texts
from dataset.advice import Texts, shared_images, size_advice, text_advice
from dataset.pretrain import PretrainCollate
from dataset.text import Tokenizer, clean_caption
from engine.config import STAGES, load_config
from utils import ROOT, as_config

folder = annotated.folder

ENGLISH = [
    "A man with a red helmet on a small moped on a dirt road.",
    "Two zebras graze beside a wooden fence, in the evening.",
    "A kitchen with stainless steel appliances and granite countertops",
] * 40
GERMAN = ["Ein Mann mit rotem Helm fährt auf einem kleinen Moped über einen Feldweg."] * 60
RUSSIAN = ["Мужчина в красном шлеме едет на маленьком мопеде по грунтовой дороге."] * 60
CHINESE = ["一个戴着红色头盔的男人骑着小型摩托车", "两只斑马在傍晚的木栅栏旁吃草"] * 60
BERT, DEMO = Tokenizer(ROOT / "configs/bert/vocab.txt"), Tokenizer(ROOT / "configs/demo/vocab.txt")


def advice(tokenizer, texts, share=0.0):
    return list(text_advice([Texts("captions (text.max_tokens 25)", texts, 24)], [share], tokenizer))


def test_the_share_of_cut_texts_counts_word_pieces_and_words_of_texts_from_everywhere():
    texts = ["a dog", "a very small dog", "unbelievably", "A, dog!"]  # "unbelievably" is five pieces
    assert [Texts("x", texts, room).share_cut(BERT) for room in (1, 2, 3, 4, 5)] == [1, 0.75, 0.75, 0.25, 0]
    assert Texts("x", texts, 2, partial(clean_caption, max_words=None)).share_cut(BERT) == 0.5  # "a dog" twice
    assert Texts("x", texts, 5, max_words=3).share_cut(BERT) == 0.25 and Texts("x", [], 4).share_cut(BERT) == 0
    many = Texts("x", ["a dog"] * 60_000 + ["a very small dog"] * 40_000, 3)
    assert len(many.probes()) == 10_000 and many.share_cut(BERT) == pytest.approx(0.4, abs=0.01)


def test_a_vocabulary_that_fits_and_few_words_say_nothing():
    assert advice(BERT, ENGLISH) == advice(DEMO, ["hedgehog"] * 50) == []


@pytest.mark.parametrize(("tokenizer", "texts"), [(DEMO, ENGLISH), (BERT, GERMAN), (BERT, RUSSIAN), (BERT, CHINESE)])
def test_unknown_words_and_other_languages_are_reported_with_examples(tokenizer, texts):
    (line,) = advice(tokenizer, texts)
    assert f"text.vocab {tokenizer.vocab_file}: " in line and "take the vocab.txt of a BERT in their language" in line
    for word in line.split("(such as ")[1].split(")")[0].split(", "):
        assert len(tokenizer.word_pieces([word])[0]) > 1 or tokenizer.unk_id in tokenizer.word_pieces([word])[0]


def test_many_cut_texts_are_reported():
    assert advice(BERT, ENGLISH, 0.05) == []
    expected = "22% of captions (text.max_tokens 25) are cut; raise what stands in the brackets"
    assert advice(BERT, ENGLISH, 0.22) == [expected]


QUEUE = {"negatives": "queue", "queue_size": 65536}
SIZES = [
    (1000, 1000, {"itc": {**QUEUE, "negatives": "batch"}}, []),
    (1000, 1000, {"itc": {**QUEUE, "queue_size": 8000}}, []),
    (1000, 1000, {"itc": QUEUE}, ["holds each of the 1000 images 65 times"]),
    (200, 40, {}, ["holds more than half of the 40 images"]),
    (1000, 1000, {"train": {"epochs": 101}}, ["the 1000 entries are seen 101 times each"]),
    (1000, 1000, {"train": {"epochs": 100}}, []),
    (1000, 1000, {"train": {"epochs": 500}, "data": {"val": ["val.json"]}}, []),
    (1000, 1000, {"train": {"epochs": None, "steps": 30_000}}, ["seen 960 times"]),
]


@pytest.mark.parametrize(("entries", "images", "cfg", "words"), SIZES)
def test_settings_that_do_not_fit_the_size_of_the_set_are_reported(entries, images, cfg, words):
    lines = list(size_advice(entries, images, 32, as_config(cfg)))
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))


CUT = [
    ("pretrain", "Pretrain", "text.max_tokens=6", "captions (data.max_words 40, text.max_tokens 6)"),
    ("caption_train", "Caption", "text.max_tokens=6", "captions (text.max_tokens 6)"),
    ("vqa_train", "VQA", "text.max_question_tokens=5", "questions (text.max_question_tokens 5)"),
]


@pytest.mark.parametrize(("kind", "name", "limit", "cut"), CUT)
def test_a_training_says_it_once_in_its_log(tmp_path, caplog, kind, name, limit, cut):
    texts = [text.replace(",", "") for text in ENGLISH]
    rows = [f"{i}.png,{i},{text},{text},a dog" for i, text in enumerate(texts)]
    (tmp_path / "train.csv").write_text("\n".join(["image,question_id,question,caption,answer", *rows]))
    changes = [f"data.train=[{tmp_path}/train.csv]", "data.image_root=none", "data.val=[]", "train.batch_size=8"]
    changes += ["data.num_workers=0", limit]
    cfg = load_config(ROOT / f"configs/small/{name}.yaml", changes, STAGES[kind.partition("_")[0]])
    dataset = create_dataset(kind, cfg)
    for tokenizer, unknown in ((BERT, 0), (DEMO, 1)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "semmim"):
            create_train_loader(dataset, cfg, PretrainCollate(tokenizer, 6), torch.device("cpu"))
        assert caplog.text.count("of the words are unknown") == unknown
        assert caplog.text.count("are cut; raise what stands in the brackets") == 1
        assert f"100.0% of {cut}" in caplog.text


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
def test_images_that_training_and_evaluation_share_are_counted(folder, stage):
    train = make(f"{stage}_train", write(folder, [entry(0), entry(1, image="./b.png")], "train.json"))
    splits = {"val": [2], "test": [1, 2], "dev": [0, 1]}
    files = {split: write(folder, [entry(n) for n in numbers], f"{split}.json") for split, numbers in splits.items()}
    held_out = {split: make(f"{stage}_eval", file) for split, file in files.items()}
    test, dev = shared_images(train, held_out)
    assert test.startswith("test: 1 of 2 images are in data.train") and str(folder / "b.png") in test
    assert dev.startswith("dev: 2 of 2 images are in data.train")
