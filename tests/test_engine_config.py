import argparse

import pytest
from conftest import ROOT

from engine import config as engine_config
from engine.config import CAPTION, PRETRAIN, RETRIEVAL, VQA, Stage, load_config
from utils import UserError

SCHEMA = """
seed: 42
name: small
flag: true
data: {train: [a.json], image_root: null, prefixes: {}}
train: {lr: 1e-4, inject_from: 12}
"""


@pytest.fixture
def write(tmp_path):
    """Write files of a temporary folder by name; the schema is there from the start."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    write("schema.yaml", SCHEMA)
    return write


def load(path, overrides=(), **options):
    return load_config(path, overrides, Stage("test", path.parents[0] / "schema.yaml", **options))


def test_a_file_changes_its_base_and_overrides_change_the_file(write):
    write("base.yaml", "train: {lr: 2e-4}\nname: base\n")
    path = write("run.yaml", "base: base.yaml\nname: run\n")
    cfg = load(path, ["train.lr=3e-5", "data.train=[b.json, c.json]"])
    assert (cfg.seed, cfg.name, cfg.train.lr, cfg.data.train) == (42, "run", 3e-5, ["b.json", "c.json"])
    assert cfg.train.inject_from == 12


@pytest.mark.parametrize(
    "text, message",
    [
        ("trian: {lr: 1.0}", "run.yaml: unknown key trian; the nearest known key is train"),
        ("train: {lrr: 1.0}", "run.yaml: unknown key train.lrr; the nearest known key is train.lr"),
        ("train: {lr: fast}", "run.yaml: train.lr is text (fast); a number is expected"),
        ("train: {lr: null}", "run.yaml: train.lr is null"),
        ("train: 3", "run.yaml: train is a number (3); a map is expected"),
        ("flag: 1", "run.yaml: flag is a number (1); true/false is expected"),
        ("seed: true", "run.yaml: seed is true/false (True); a number is expected"),
        ("name: [a]", "run.yaml: name is a list"),
        ("data: {train: a.json}", "run.yaml: data.train is text (a.json); a list is expected"),
        ("- a\n- b", "run.yaml: a configuration is a map"),
        ("seed: [", "run.yaml: not a readable YAML file"),
        ("seed: 1\nseed: 2", "run.yaml: not a readable YAML file"),
        ("base: none.yaml", "run.yaml: base none.yaml does not exist"),
        ("base: run.yaml", "run.yaml: base run.yaml leads back to this file"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_and_key(write, text, message):
    path = write("run.yaml", text)
    with pytest.raises(UserError) as error:
        load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_key_of_several_kinds_is_one_of_them_and_its_maps_have_the_users_keys(write):
    kinds = {"kinds": {"name": ("text", "a map")}}
    path = write("run.yaml", "name: {vqa: /a}")
    assert load(path, ["name.my_own=/b"], **kinds).name == {"vqa": "/a", "my_own": "/b"}
    assert load(path, ["name=/c"], **kinds).name == "/c"
    with pytest.raises(UserError, match=r"--override name=3: name is a number \(3\); text or a map is expected"):
        load(path, ["name=3"], **kinds)
    with pytest.raises(UserError, match="name is a map"):
        load(path)


@pytest.mark.parametrize("stage", ["pretrain", "retrieval", "caption", "vqa"])
def test_image_root_is_a_folder_a_map_or_none_in_every_stage(stage):
    def root(*overrides):
        return load_config(STAGES[stage].schema, overrides, STAGES[stage]).data.image_root

    assert root("data.image_root=/a") == "/a" and root("data.image_root=none") is None
    assert root("data.image_root=/a", "data.image_root={coco: /b, my_own: /c}") == {"coco": "/b", "my_own": "/c"}
    assert root("data.image_root=none", "data.image_root.vg=/d") == {"vg": "/d"}
    for value in ("3", "[/a]", "{coco: 3}", "{1: /a}", "{}", "''", "true"):
        with pytest.raises(UserError, match="data.image_root") as error:
            root("data.image_root=none", f"data.image_root={value}")
        assert "\n" not in str(error.value)


def test_overrides_may_be_repeated_and_grouped():
    parser = argparse.ArgumentParser()
    engine_config.add_arguments(parser, config="a.yaml", output_dir="out")
    args = parser.parse_args(["--override", "a=1", "b=2", "--resume", "--override", "c=3"])
    assert args.override == ["a=1", "b=2", "c=3"] and args.resume and not args.evaluate
    assert (args.config, args.output_dir, args.device, args.seed) == ("a.yaml", "out", "auto", None)


# ------------------------------------------------------------------------------------- the stages' rules

STAGES = {"pretrain": PRETRAIN, "retrieval": RETRIEVAL, "caption": CAPTION, "vqa": VQA}
WITHOUT_MEANING = {  # one of each kind of rule
    "pretrain": ("train.epochs=2.5", "train.epochs=0", "train.lr=.nan", "train.lr=-1e-4", "train.betas=[0.9, 1.0]")
    + ("augment.crop_scale=[1, 0.2]", "train.precision=fp16", "data.max_bad_share=2", "seed=-1", "momentum=1.5")
    + ("mim.mask_ratio=0", "mim.head.patterns=1", "itc.temperature=0", "text.max_tokens=2", "mim.target=codes"),
    "retrieval": ("rerank.k=0", "rerank.score=itc", "eval.splits=[]", "eval.splits=[val, val]"),
    "caption": ("generation.beams=2.5", "generation.mode=best", "generation.min_tokens=30", "scst.samples=0"),
    "vqa": ("answer.mode=guess", "answer.min_tokens=11", "answer.length_penalty=.nan"),
}


@pytest.mark.parametrize("stage, override", [(stage, x) for stage, all_of in WITHOUT_MEANING.items() for x in all_of])
def test_a_setting_without_meaning_is_one_line_that_names_its_key(stage, override):
    key = override.partition("=")[0]
    with pytest.raises(UserError) as error:
        load_config(STAGES[stage].schema, [override], STAGES[stage])
    message = str(error.value)
    assert key.rsplit(".", 1)[-1] in message and "\n" not in message


@pytest.mark.parametrize("stage", STAGES)
def test_every_rule_and_every_key_that_may_change_is_a_key_of_its_schema(stage):
    config = load_config(STAGES[stage].schema, (), STAGES[stage])
    for key in (*STAGES[stage].rules, *STAGES[stage].optional):
        engine_config.lookup(config, key)


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")))
def test_every_configuration_of_the_project_fulfils_its_stage(path):
    named = (stage for name, stage in STAGES.items() if name in path.rsplit("/", 1)[-1].lower())
    stage = PRETRAIN if "/ablation/" in path else next(named)
    load_config(ROOT / path, (), stage)
