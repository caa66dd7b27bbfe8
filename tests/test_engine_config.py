"""Configurations: what is laid over what, and which values are refused, in one line that names the key."""

import os

import pytest
from conftest import ROOT, refused

from engine.config import CHOICES, KINDS, MAY_CHANGE, PRETRAIN, RANGES, STAGES, arguments, load_config, lookup

pytestmark = pytest.mark.usefixtures("no_hanging")


def load(path, *overrides, stage=PRETRAIN):
    return load_config(path, overrides, stage)


@pytest.fixture
def write(tmp_path):
    """Write a file of a temporary folder and give its path."""

    def write(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return write


def test_a_file_changes_its_base_and_overrides_change_the_file(write):
    write("base.yaml", "train: {lr: 2e-4}\nseed: 7\nmomentum: 0.5")
    path = write("run.yaml", "base: base.yaml\nmomentum: 0.6\n")
    cfg = load(path, "train.lr=3e-5", "data.train=[b.json, c.json]")
    assert (cfg.seed, cfg.momentum, cfg.train.lr, cfg.data.train) == (7, 0.6, 3e-5, ["b.json", "c.json"])
    assert cfg.train.weight_decay == 0.02  # the schema's


def test_overrides_may_be_repeated_and_grouped():
    args = arguments("", ["--override", "a=1", "b=2", "--resume", "--override", "c=3"], "a.yaml", "out")
    assert args.override == ["a=1", "b=2", "c=3"] and args.resume and (args.config, args.seed) == ("a.yaml", None)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_the_length_that_is_given_last_counts(stage, write):
    def lengths(*overrides):
        train = load(path, *overrides, stage=stage).train
        return train.epochs, train.steps, train.minutes

    write("base.yaml", "train: {steps: 1000}")
    path = write("run.yaml", "base: base.yaml\nseed: 3")
    assert lengths() == (None, 1000, None)
    assert lengths("train.minutes=1.5") == (None, None, 1.5)
    assert lengths("train.steps=5", "train.epochs=3") == (3, None, None)
    assert lengths("train.steps=5", "train.steps=none", "train.epochs=2") == (2, None, None)
    path = write("run.yaml", "base: base.yaml\ntrain: {minutes: 2, steps: none}")
    assert lengths() == (None, None, 2)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_image_root_is_a_folder_a_map_or_none_in_every_stage(stage):
    def root(*overrides):
        return load(stage.schema, *overrides, stage=stage).data.image_root

    assert root("data.image_root=/a") == "/a" and root("data.image_root=none") is None
    assert root("data.image_root=/a", "data.image_root={coco: /b, my_own: /c}") == {"coco": "/b", "my_own": "/c"}
    assert root("data.image_root=none", "data.image_root.vg=/d") == {"vg": "/d"}
    for value in ("3", "[/a]", "true"):
        refused(lambda value=value: root("data.image_root=none", f"data.image_root={value}"), "data.image_root")


FILES = {
    "trian: {lr: 1.0}": "run.yaml: unknown key trian; the nearest known key is train",
    "train: {lrr: 1.0}": "run.yaml: unknown key train.lrr; the nearest known key is train.lr",
    "train: {lr: fast}": "run.yaml: train.lr is text ('fast'); a number is expected",
    "train: {lr: null}": "run.yaml: train.lr is null",
    "data: {cache_images: 1}": "run.yaml: data.cache_images is a whole number (1); true/false is expected",
    "seed: true": "run.yaml: seed is true/false (True); a whole number is expected",
    "data: {train: [a.json, 3]}": "run.yaml: data.train holds a whole number (3); text is expected",
    "- a\n- b": "run.yaml: a configuration is a map",
    "data: {image_prefix_map: {1.10: a}}": "run.yaml: not a readable YAML file: a key is no text",
    "seed: [": "run.yaml: not a readable YAML file",
    "seed: 1\nseed: 2": "run.yaml: not a readable YAML file",
    "seed: !!python/object/apply:os.system ['true']": "run.yaml: not a readable YAML file: could not determine",
    "base: none.yaml": "none.yaml: cannot be read",
    "base: run.yaml": "run.yaml: base run.yaml leads back",
    "train: {epochs: 1, steps: 5}": "train.epochs, train.steps, train.minutes: exactly one of them must have a value",
}


@pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
def test_a_wrong_file_is_one_line_that_names_file_and_key(write, content):
    refused(lambda: load(write("run.yaml", content)), FILES[content])


def test_a_configuration_that_is_a_pipe_or_a_folder_or_absent_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path):
        refused(lambda path=path: load(path), path, "cannot be read")
    refused(lambda: load("absent.yaml"), "--config: absent.yaml does not exist")


OVERRIDES = {
    "seed=\x1b[31mred\x1b[0m": "--override seed=",
    "x" * 3000 + "=1": "unknown key",
    "seed": "--override seed: write it as key.sub=value",
    "seed=-5": "seed is -5; a number from 0",
    "seed.a=1": "--override seed.a=1: seed is a map",
    "train.epochs=2.5": "train.epochs is a number (2.5); a whole number or null is expected",
    "train.epochs=none": "exactly one of them must have a value",
    "train.minutes=soon": "train.minutes is text ('soon'); a number or null is expected",
    "train.lr=.nan": "--override train.lr=.nan: Out of range float",
    "train.lr=-1e-4": "train.lr is -0.0001; a number of at least 0 is needed",
    "augment.crop_scale=[0.2, 2]": "augment.crop_scale is 2; a number from 1e-09 to 1 is needed",
    "augment.crop_scale=[1, 0.2]": "augment.crop_scale: [1, 0.2] must be [smallest, largest]",
    "train.betas=[0.9, 1.0]": "train.betas is 1.0; a number from 0 to 1 is needed",
    "train.precision=fp16": "train.precision: 'fp16' must be one of auto, bf16, fp32",
    "model.image_encoder.image_size=1000000": "image_size is 1000000; a number from 1 to 4096 is needed",
    "train.batch_size=1": "leaves image-text matching no negative",
    "train.best=val": "data.val, which is empty",
}
OF_STAGES = {
    "eval.splits=[tset]": ("retrieval", "eval.splits: 'tset' must be one of val, test"),
    "generation.min_tokens=30": ("caption", "min_tokens 30 is above max_tokens 25"),
    "generation.mode=best": ("caption", "'best' is none of beam, greedy, sample"),
    "answer.length_penalty=x": ("vqa", "answer.length_penalty is text"),
}


@pytest.mark.parametrize("override", [*OVERRIDES, *OF_STAGES], ids=range(len(OVERRIDES) + len(OF_STAGES)))
def test_a_wrong_override_is_one_line_that_names_its_key(override):
    name, part = OF_STAGES.get(override) or ("pretrain", OVERRIDES[override])
    refused(lambda: load(STAGES[name].schema, override, stage=STAGES[name]), part)


def test_every_key_of_the_tables_is_one_of_a_schema():
    schemas = [load(stage.schema, stage=stage) for stage in STAGES.values()]
    tables = {*KINDS, *CHOICES, *MAY_CHANGE, *(key for *_, keys in RANGES for key in keys)}
    for key in tables - {"mim.codebook"}:
        name, _, last = key.rpartition(".")
        assert any(last in (lookup(schema, name) or {} if name else schema) for schema in schemas), key


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")))
def test_every_configuration_of_the_project_fulfils_its_stage(path):
    named = (stage for name, stage in STAGES.items() if name in path.rsplit("/", 1)[-1].lower())
    load(ROOT / path, stage=PRETRAIN if "/ablation/" in path else next(named))
