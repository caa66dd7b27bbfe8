"""Whatever a file or a setting holds, its reader takes it or says in one line what is wrong with it."""

import json

import pytest
from annotated import EVAL, TRAIN, entry, make
from conftest import keys_of, one_line
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.config import STAGES, load_config, read_yaml
from utils import UserError

texts = st.text(st.characters(exclude_categories=())) | st.sampled_from(  # halves of surrogate pairs, too
    ["", "\0", "[SEP]", "a dog", "\ud83d", "a\u2028b", "COCO_val2014_" + "1" * 5000 + ".jpg", "&&", "*a", "&a {", "- |"]
)
scalars = st.none() | st.booleans() | st.integers() | st.integers(10**4000, 10**4000 + 9) | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
KEYS = "image caption image_id img_id cocoid imgid filename filepath sentences split domain dataset question".split()
KEYS += "question_id answer answer_type question_type object_label ocr".split()
plausible = st.lists(texts, max_size=10) | st.lists(st.fixed_dictionaries({"raw": texts}), max_size=2) | values
changes = st.dictionaries(st.sampled_from(KEYS), plausible, max_size=4)
entries = st.lists(changes.map(lambda changed: {**entry(0), **changed}) | values, min_size=1, max_size=3)
lists = (entries | values).map(json.dumps)
lines = st.lists(values.map(json.dumps) | st.text('"\t,;{}[ax\n'), max_size=4).map("\n".join)
SETTING = st.tuples(
    st.sampled_from(keys_of(load_config(STAGES["vqa"].schema, (), STAGES["vqa"]))), values.map(json.dumps)
)
READERS = {
    **{stage: (lists, "drawn.json", lambda path, stage=stage: make(stage, path)) for stage in TRAIN + EVAL},
    **{name: (lines, name, lambda path: make("pretrain", path)) for name in ("d.csv", "d.tsv", "d.jsonl", "d.token")},
    "scores": (lists, "s.json", lambda path: make("vqa_eval", path.with_name("one.json"), score_files=[path])),
    "configuration": (lists | lines, "drawn.yaml", read_yaml),
    "override": (
        SETTING.map("=".join),
        "d",
        lambda path: load_config(STAGES["vqa"].schema, [read(path)], STAGES["vqa"]),
    ),
}


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("reader", READERS)
def test_anything_is_read_or_refused_in_one_line(tmp_path, reader):
    drawn, name, open_it = READERS[reader]
    (tmp_path / "one.json").write_text(json.dumps([entry(0)]))

    @settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
    @given(drawn)
    @example(json.dumps([{**entry(0), "image_id": [], "dataset": [], "question_id": []}]))
    def check(content):
        (tmp_path / name).write_text(content, encoding="utf-8")
        try:
            open_it(tmp_path / name)
        except UserError as error:
            one_line(error)

    check()
