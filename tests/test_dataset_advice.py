"""What is said at the start of a training whose data and settings do not fit."""

import logging
import time

import pytest
import torch

from dataset import create_dataset, create_train_loader
from dataset.advice import cut_advice, size_advice, vocabulary_advice
from dataset.caption import CaptionCollate
from dataset.pretrain import PretrainCollate
from dataset.text import Tokenizer
from dataset.vqa import VQACollate
from engine import config
from utils import ROOT, as_config

ENGLISH = [
    "A man with a red helmet on a small moped on a dirt road.",
    "Two zebras graze beside a wooden fence, in the evening.",
    "A kitchen with stainless steel appliances and granite countertops",
    "The letter u with an umlaut.",
    "An Adelaide Rosella (a parrot)",
] * 5
GERMAN = [
    "Ein Mann mit rotem Helm fährt auf einem kleinen Moped über einen Feldweg.",
    "Zwei Zebras grasen am Abend neben einem hölzernen Zaun.",
    "Die Küche hat Geräte aus Edelstahl und Arbeitsplatten aus Granit",
] * 6
RUSSIAN = ["Мужчина в красном шлеме едет на маленьком мопеде по грунтовой дороге.", "Две зебры пасутся у забора"] * 8
CHINESE = ["一个戴着红色头盔的男人骑着小型摩托车", "两只斑马在傍晚的木栅栏旁吃草"] * 60


@pytest.fixture(scope="module")
def bert():
    return Tokenizer(ROOT / "configs/bert/vocab.txt")


@pytest.fixture(scope="module")
def demo():
    return Tokenizer(ROOT / "configs/demo/vocab.txt")


def test_english_captions_fit_bert_s_vocabulary(bert):
    assert vocabulary_advice(bert, [ENGLISH]) == []


def test_words_spelled_letter_by_letter_are_said_with_examples(demo):
    (line,) = vocabulary_advice(demo, [ENGLISH])
    assert f"text.vocab {demo.vocab_file}: " in line and "spelled letter by letter" in line
    spelled = line.split("(such as ")[1].split(")")[0].split(", ")
    for word in spelled:
        assert len(demo.word_pieces([word])[0]) == len(word)
    words = [word.strip(".,()").lower() for text in ENGLISH for word in text.split()]
    alone = sum(len(word) > 2 and len(demo.word_pieces([word])[0]) == len(word) for word in words)
    assert f"{alone / len(words):.0%} of the words" in line


@pytest.mark.parametrize("texts", [GERMAN, RUSSIAN, CHINESE])
def test_another_language_is_noticed(bert, texts):
    (line,) = vocabulary_advice(bert, [ENGLISH[:1], texts])
    assert "take the vocab.txt of a BERT in their language" in line


def test_few_words_say_nothing(demo):
    assert vocabulary_advice(demo, [["hedgehog"] * 50]) == []


def test_millions_of_captions_cost_no_more_than_thousands(bert):
    class Many:
        asked = 0

        def __len__(self):
            return 3_000_000

        def __getitem__(self, place):
            self.asked += 1
            return ENGLISH[place % len(ENGLISH)]

    texts, start = Many(), time.process_time()
    assert vocabulary_advice(bert, [texts]) == []
    assert texts.asked <= 10_000
    assert time.process_time() - start < 5


def test_many_cut_texts_are_said(bert):
    shares = {"captions (data.max_words 30, text.max_tokens 25)": 0.22, "prompts (text.max_prompt_tokens 5)": 0.05}
    assert cut_advice(shares) == [
        "22% of captions (data.max_words 30, text.max_tokens 25) are cut; raise what stands in the brackets"
    ]


@pytest.mark.parametrize(
    "entries, images, batch, itc, words",
    [
        (1000, 1000, 32, {"negatives": "batch", "queue_size": 65536}, []),
        (1000, 1000, 32, {"negatives": "queue", "queue_size": 8000}, []),
        (1000, 1000, 32, {"negatives": "queue", "queue_size": 65536}, ["holds each of the 1000 images 65 times"]),
        (200, 40, 32, {}, ["holds more than half of the 40 images"]),
        (63, 63, 32, {}, ["more than half", "31 of 63 entries are left out of every epoch"]),
    ],
)
def test_batches_and_queues_too_large_for_the_set_are_said(entries, images, batch, itc, words):
    lines = size_advice(entries, images, batch, as_config({"itc": itc} if itc else {}))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


@pytest.mark.parametrize(
    "train, val, passes",
    [
        ({"epochs": 101}, [], 101),
        ({"epochs": 100}, [], None),
        ({"epochs": 500}, ["val.json"], None),
        ({"epochs": None, "steps": 30_000}, [], 960),
        ({"epochs": None, "minutes": 30.0}, [], None),
    ],
)
def test_a_training_that_sees_a_small_set_very_often_is_said(train, val, passes):
    lines = size_advice(1000, 1000, 32, as_config({"train": train, "data": {"val": val}}))
    assert len(lines) == (passes is not None)
    if passes:
        assert f"the 1000 entries are seen {passes} times each" in lines[0] and "data.val" in lines[0]


@pytest.mark.parametrize(
    "kind, stage, name", [("pretrain", "pretrain", "Pretrain"), ("caption_train", "caption", "Caption")]
)
def test_a_training_says_it_once_in_its_log(tmp_path, caplog, kind, stage, name, bert, demo):
    lines = [f"{i}.png,{text.replace(',', '')}" for i, text in enumerate(ENGLISH)]
    (tmp_path / "train.csv").write_text("image,caption\n" + "\n".join(lines) + "\n")
    changes = [f"data.train=[{tmp_path}/train.csv]", "data.image_root=none", "train.batch_size=8", "text.max_tokens=6"]
    cfg = config.load_config(
        ROOT / f"configs/small/{name}.yaml", [*changes, "data.num_workers=0"], config.STAGES[stage]
    )
    dataset = create_dataset(kind, cfg)
    for tokenizer, spelled in ((bert, 0), (demo, 1)):
        collate = PretrainCollate(tokenizer, 6) if stage == "pretrain" else CaptionCollate(tokenizer, 6, 5)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "semmim"):
            create_train_loader(dataset, cfg, collate, torch.device("cpu"))
        assert caplog.text.count("letter by letter") == spelled
        assert caplog.text.count("are cut; raise what stands in the brackets") == 1


def test_questions_and_answers_are_looked_at(tmp_path, caplog, demo):
    rows = [f"{i}.png,{i},what is the hedgehog doing in the backyard?,sleeping underneath leaves" for i in range(40)]
    (tmp_path / "q.csv").write_text("image,question_id,question,answer\n" + "\n".join(rows) + "\n")
    changes = [f"data.train=[{tmp_path}/q.csv]", "data.val=[]", "data.num_workers=0"]
    cfg = config.load_config(ROOT / "configs/small/VQA.yaml", changes, config.STAGES["vqa"])
    with caplog.at_level(logging.WARNING, "semmim"):
        create_train_loader(create_dataset("vqa_train", cfg), cfg, VQACollate(demo, (30, 5, 5), 9), torch.device("cpu"))
    assert caplog.text.count("letter by letter") == 1
    assert "holds more than half of the 40 images" in caplog.text
