"""Whatever a JSON file holds, a stage either reads it or says in one line what is wrong with it."""

import contextlib
import json

import pytest
from annotated import EVAL, TRAIN, entry, make
from conftest import one_line
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import TOKENIZER

from dataset.caption import caption_tokens, target_text
from dataset.common import EmptyCaption, usable_caption
from dataset.vqa import encode_answers, encode_questions
from utils import UserError

SETTINGS = settings(max_examples=50)  # the rest: conftest.py
KEYS = (
    *("image", "caption", "image_id", "img_id", "cocoid", "imgid", "filename", "filepath", "sentences", "split"),
    *("domain", "dataset", "question", "question_id", "answer", "answer_type", "question_type", "object_label", "ocr"),
)
texts = st.text(st.characters(exclude_categories=())) | st.sampled_from(  # halves of surrogate pairs, too
    ["", " ", "\0", "?!", "[SEP]", "a dog", "left", "\ud83d", "a\u2028b", "COCO_val2014_" + "1" * 5000 + ".jpg", "&&"]
)
scalars = st.none() | st.booleans() | st.integers() | st.integers(10**4000, 10**4000 + 9) | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
plausible = st.lists(texts, max_size=10) | st.lists(st.fixed_dictionaries({"raw": texts}), max_size=2) | values
changes = st.dictionaries(st.sampled_from(KEYS), plausible, max_size=4)


@st.composite
def entries(draw):
    """Usable entries with some keys replaced by anything, and now and then no entry at all."""
    changed = [{**entry(n), **draw(changes)} for n in range(draw(st.integers(1, 3)))]
    return draw(st.just(changed) | st.lists(values, max_size=2).map(lambda rest: changed + rest) | values)


def write(folder, content):
    path = folder / "drawn.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("stage", TRAIN + EVAL)
def test_annotations_are_read_or_refused_in_one_line(tmp_path, stage):
    @SETTINGS
    @given(entries())
    @example([{**entry(0), "image_id": [], "dataset": [], "question_id": []}])
    def check(content):
        try:
            data = make(stage, write(tmp_path, content))
        except UserError as error:
            one_line(error, "drawn.json", "data.train: ")
            return
        assert len(data) > 0
        read_texts(stage, data)

    check()


def read_texts(stage, data):
    """Everything that the stage does with an entry's texts until they are tensors."""
    if stage.startswith("vqa"):
        parts = [*zip(*map(list_of, data.parts), strict=True)] if stage == "vqa_train" else data.parts
        encode_questions(TOKENIZER, parts, (30, 25, 22))
        if stage == "vqa_train":
            encode_answers(TOKENIZER, list_of(data.answers), 10)
    elif stage == "caption_eval":
        TOKENIZER.encode(data.prompts, 25)
        assert len(set(data.ids)) == len(data.ids)
    elif stage == "caption_train":
        caption_tokens(TOKENIZER, [target_text(text) for text in list_of(data.captions)], 25)
    else:
        for text in list_of(data.captions):
            with contextlib.suppress(EmptyCaption):
                TOKENIZER.encode([usable_caption(text, 30, "image")], 25)


def list_of(table):
    return [table[i] for i in range(len(table))]
