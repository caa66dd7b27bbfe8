"""Whatever a configuration, an answer or a caption is: documented errors, and numbers within their limits."""

import json
import math
import string

import pytest
from conftest import keys_of, one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import STAGES, load_config, read_yaml, save_config
from evaluation.cider import cider
from evaluation.vqa import vqa_metrics, vqa_table
from utils import UserError

SETTINGS = settings(max_examples=20)  # the rest: conftest.py

texts = st.text(st.characters(exclude_categories=()), max_size=20) | st.sampled_from(
    ["", "a: b", "!!int x", "\ud83d", "\0", *"none null ~ 1e400 0x1 2026-01-01 *a &a base { [".split()]
)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(10**310, 10**310 + 3)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
yaml_pieces = st.sampled_from(
    [*("&a ", "*a", "<<: ", "- ", "? ", ": ", "\n", "\n  ", "\t", "|\n", "[", "]", "{", "}", ",", "!!set ", "'", '"')]
)
yaml_texts = st.lists(yaml_pieces | st.text(string.printable, max_size=4), max_size=30).map("".join)


KEYS = {name: keys_of(load_config(stage.schema, (), stage)) for name, stage in STAGES.items()}


@pytest.mark.parametrize("name", STAGES)
def test_a_setting_of_any_value_is_taken_or_refused_in_one_line_that_names_its_key(name, tmp_path):
    stage = STAGES[name]

    @SETTINGS
    @given(st.sampled_from(KEYS[name]), values)
    def check(key, value):
        override = f"{key}={json.dumps(value)}"  # JSON is YAML
        try:
            config = load_config(stage.schema, [override], stage)
        except UserError as error:
            one_line(error, key, key.rpartition(".")[2], "--override")
            return
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml", (), stage) == config

    check()


files = yaml_texts.map(str.encode) | st.binary(max_size=60) | values.map(json.dumps).map(str.encode)
maps = st.dictionaries(st.sampled_from(KEYS["retrieval"]) | texts, values, max_size=3)


@SETTINGS
@given(files | maps.map(json.dumps).map(str.encode), yaml_texts | texts)
def test_any_file_and_any_override_are_a_configuration_or_one_line(tmp_path, content, override):
    path = tmp_path / "drawn.yaml"
    path.write_bytes(content)
    for read, named in (
        (lambda: read_yaml(path), "drawn.yaml"),
        (lambda: load_config(path, (), STAGES["retrieval"]).to_dict(), ""),
        (lambda: load_config(STAGES["vqa"].schema, [override], STAGES["vqa"]).to_dict(), "--override"),
    ):
        try:
            assert isinstance(read(), dict)
        except UserError as error:
            one_line(error, named)


words = st.text(max_size=12) | st.sampled_from(
    ["", " ", "a dog", "\n", *"two 2 none None the dont don't 1,000 1.5 new-york ? İ ß".split()]
)
ten = st.lists(words, min_size=10, max_size=10) | words.map(lambda word: [word] * 10)
references = words | words.map(lambda word: [word]) | ten | st.dictionaries(words, st.floats(0, 1), max_size=4)


@SETTINGS
@given(st.lists(st.tuples(words, references, st.none() | words, st.none() | words), min_size=1, max_size=6))
def test_the_metrics_of_any_answers_are_percentages(rows):
    numbers = vqa_metrics(*map(list, zip(*rows, strict=True)))
    assert numbers["questions"] == len(rows)
    found = [numbers["accuracy"], numbers["constant"], *numbers["by_answer_type"].values()]
    found += [*numbers["by_question_type"].values(), *numbers["constant_by_question_type"].values()]
    assert all(-1e-9 <= value <= 100 + 1e-9 for value in found)
    assert all(isinstance(line, str) for line in vqa_table("val", numbers)) and json.dumps(numbers)


captions = st.text(max_size=30) | st.sampled_from(
    ["", ".", "a dog", "a dog on a bed .", "A DOG!", "men's 10:30 u.s. (x)", "can't", "\u2028", "<eos>", "\0", "ı İ"]
)
splits = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=3)), min_size=1, max_size=5)


@SETTINGS
@given(splits)
def test_cider_of_any_captions_is_a_number_within_its_limits(rows):
    given_references = {i: texts for i, (_, texts) in enumerate(rows)}
    score = cider(given_references, {i: caption for i, (caption, _) in enumerate(rows)})
    assert math.isfinite(score) and -1e-6 <= score <= 1000 + 1e-6
