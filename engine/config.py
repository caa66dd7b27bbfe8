"""Configurations: reading and merging YAML files and --override, and the settings that each stage accepts.

A file lies over its `base`, that one over the stage's schema, which holds every key with its default. A value is of its
default's kind; the tables at the end say what else it must be, and which keys a resumed run may change.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from evaluation.ranking import SCORES
from evaluation.vqa import SCORING
from models.generation import Generation, answer_options
from models.weights import check_value
from utils import Config, UserError, as_config, find_file, one_line, open_file, replacing, shown


@dataclass(frozen=True)
class Stage:
    """What the configuration of a stage may hold.

    name: as checkpoints hold it; schema: the file that holds every key with its default; check: what several keys must
    fulfill together.
    """

    name: str
    schema: str | os.PathLike
    check: Callable[[Config], object]


def arguments(
    about: str, argv: Sequence[str] | None, config: str | None = None, output_dir: str | None = None
) -> argparse.Namespace:
    """A script's arguments; about: its help, config, output_dir: their defaults, None: they must be given."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default=config, required=config is None, help="YAML file (default: %(default)s)")
    add("--output_dir", default=output_dir, required=output_dir is None, help="folder for all that the run writes")
    add("--checkpoint", help="checkpoint to start from or to evaluate")
    again = "resume from OUTPUT_DIR/checkpoint_last.pth if it exists, otherwise start"
    add("--resume", action="store_true", help=again)
    add("--other_ranks", action="store_true", help="let --resume continue with another number of processes")
    add("--evaluate", action="store_true", help="only evaluate")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--seed", type=int, help="replaces the configuration's seed")
    changes = {"nargs": "*", "action": "extend", "default": [], "metavar": "KEY.SUB=VALUE"}
    add("--override", help="changes to the configuration", **changes)
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------------- reading


def load_config(path: str | os.PathLike, overrides: Sequence[str], stage: Stage) -> Config:
    """Read a configuration file over its bases and the stage's schema, and check every key and value.

    A file's `base:` names the file that it changes, relative to itself. `overrides` are strings `a.b=value`, the value
    in YAML. Maps are merged, lists replaced.
    """
    file, layers = find_file(path, "--config"), []
    while file is not None:
        values = read_yaml(file)
        layers.insert(0, (str(file), values))
        base = values.pop("base", None)
        if len(layers) > 20:
            raise UserError(f"{file}: base {one_line(base)} leads back to a file that changes it")
        file = None if base is None else file.parent / str(base)
    layers += [(f"--override {one_line(override)}", _parse_override(override)) for override in overrides]
    return merged_config(layers, stage)


def merged_config(layers: list[tuple[str, dict]], stage: Stage) -> Config:
    """The stage's schema with `layers`, (where it comes from, maps of maps), over it, the last one uppermost; checked.

    Of the ways to say how long training takes, the one given last has its value and the others have none.
    """
    known = read_yaml(find_file(stage.schema, "schema"))
    merged = copy.deepcopy(known)
    for source, values in layers:
        _merge(merged, values, known, source)
        given = [key for key in LENGTH if lookup(values, key) not in (None, "none")]
        for key in LENGTH if given else ():
            if key not in given:
                merged["train"][key.removeprefix("train.")] = None
    config = as_config(merged)
    _check(config, stage)
    return config


def save_config(config: Config, path: str | os.PathLike) -> None:
    """Write a configuration as YAML, in the order of its keys."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yaml.dump(config.to_dict(), file)


def lookup(config: dict, key: str):
    """config["a"]["b"] for "a.b", None if it is not there."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def differences(before: dict, now: dict, prefix: str = "") -> dict[str, tuple]:
    """{dotted key: (value before, value now)} of all values that differ."""
    found = {}
    for key in {**before, **now}:
        new = now.get(key)
        old = before.get(key, {} if isinstance(new, dict) else None)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found


def read_yaml(path: Path) -> dict:
    """The map that a file holds, {} for an empty one; UserError naming the file if it is none."""
    with open_file(path) as file:
        values = parse_yaml(file.read(), f"{path}: not a readable YAML file")
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a map of keys to values")
    return values or {}


def parse_yaml(text: str | bytes, source: str):
    """The value that a YAML text stands for, as JSON can hold it; otherwise UserError, beginning with `source`."""
    try:
        value = YAML(typ="safe", pure=True).load(text)
        plain = json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
        if plain != value:  # JSON's keys are text, and 1.10 would become "1.1"
            raise ValueError("a key is no text")
        return plain
    except Exception as error:  # also what a malformed number, date or tag makes Python raise
        raise UserError(f"{source}: {one_line(error)}; put it in quotes if text is meant") from None


def _parse_override(override: str) -> dict:
    name, found, text = override.partition("=")
    source = f"--override {one_line(override)}"
    if not found:
        raise UserError(f"{source}: write it as key.sub=value")
    value = parse_yaml(text, source)
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def _merge(target: dict, values: dict, known: dict | None, source: str, prefix: str = "") -> None:
    """Lay `values` over `target`; `known` is the schema's map here, or None if anything is accepted."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if known is not None and key not in known:
            near = difflib.get_close_matches(key[:80], known, n=1, cutoff=0)[0]
            raise UserError(f"{source}: unknown key {one_line(name)}; the nearest known key is {prefix}{near}")
        default = None if known is None else known[key]
        kinds = KINDS.get(name) or (() if default is None else (kind(default),))
        if "null" in kinds and value == "none":
            value = None
        if kinds and not _is(value, kinds):
            raise UserError(f"{source}: {name} is {kind(value)} ({shown(value)}); {' or '.join(kinds)} is expected")
        if isinstance(default, list):
            items = kind(default[0]) if default else "text"
            if wrong := [item for item in value if not _is(item, (items,))]:
                raise UserError(f"{source}: {name} holds {kind(wrong[0])} ({shown(wrong[0])}); {items} is expected")
        if isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge(target[key], value, None if name in KINDS else default or None, source, f"{name}.")
        else:
            target[key] = value


def kind(value) -> str:
    """What a value of JSON is, in words."""
    kinds = {bool: "true/false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a map"}
    return kinds.get(dict if isinstance(value, dict) else type(value), "null")


def _is(value, kinds: Sequence[str]) -> bool:
    return kind(value) in kinds or ("a number" in kinds and kind(value) == "a whole number")


def _check(config: Config, stage: Stage) -> None:
    """Raise UserError, which begins with the key, if a value is not what the tables and the stage's check say."""
    for low, high, keys in RANGES:
        for key in keys:
            for value in _values(config, key):
                check_value(key, value, float, low, high)
    for key, known in CHOICES.items():
        for value in _values(config, key):
            if value not in known:
                raise UserError(f"{key}: {shown(value)} must be one of {', '.join(known)}")
    if (scale := lookup(config, "augment.crop_scale")) and (len(scale) != 2 or scale[0] > scale[1]):
        raise UserError(f"augment.crop_scale: {scale} must be [smallest, largest], shares of the area")
    if len(config.train.betas) != 2:
        raise UserError(f"train.betas: {config.train.betas} must be two numbers")
    if sum(lookup(config, key) is not None for key in LENGTH) != 1:
        raise UserError(f"{', '.join(LENGTH)}: exactly one of them must have a value")
    stage.check(config)


def _values(config: Config, key: str) -> list:
    """The values of a key: those of a list, or the one that is not null."""
    value = lookup(config, key)
    return value if isinstance(value, list) else [] if value is None else [value]


# --------------------------------------------------------------------- what values may be, in every stage that has them

LENGTH = ("train.epochs", "train.steps", "train.minutes")
KINDS = {  # of keys that may be of other kinds than their default, and of maps whose keys are the user's own
    "data.image_root": ("text", "a map", "null"),  # one folder, or one for each of the entries' data sets
    "data.answer_weight": ("a map",),
    "mim.codebook": ("text", "null"),
    "augment.randaugment_magnitude": ("a number",),
    **dict.fromkeys(("train.epochs", "train.steps", "mim.inject_from"), ("a whole number", "null")),
    **dict.fromkeys(("train.minutes", "itm.temperature"), ("a number", "null")),
}
ANY, TINY = sys.float_info.max, 1e-9
RANGES = (  # smallest, largest, keys: also of each number in a list
    (1, ANY, ("train.epochs", "train.steps", "train.batch_size", "train.accumulation", "train.log_every")),
    (1, ANY, ("train.keep_checkpoints", "scst.samples", "rerank.k", "eval.images", "eval.batch_size")),
    (0, 2**62, ("seed",)),
    (1, 4096, ("image_size", "model.image_encoder.image_size")),
    (1, 512, ("text.max_prompt_tokens", "text.max_question_tokens", "text.max_ocr_tokens")),  # BERT's positions
    (1, 512, ("text.max_label_tokens", "text.max_answer_tokens")),
    (3, 512, ("text.max_tokens",)),
    (0, 1, ("data.max_bad_share", "itc.alpha", "momentum", "mlm.probability", "mim.center_momentum")),
    (0, 1, ("train.label_smoothing",)),
    (0, 1 - TINY, ("train.betas",)),
    (0, 10, ("augment.randaugment_magnitude",)),
    (0, ANY, ("train.lr", "train.lr_vit", "train.min_lr", "train.weight_decay", "train.clip_grad")),
    (TINY, ANY, ("train.minutes", "mim.mask_temperature", "mim.student_temperature", "mim.teacher_temperature")),
    (TINY, 1, ("mim.mask_ratio", "augment.crop_scale")),
    (0.001, 1, ("itm.harden",)),
    (0.001, 0.5, ("itc.temperature",)),
    (0.001, ANY, ("itm.temperature",)),
)
CHOICES = {  # also of each text in a list
    "augment.resize": ("torch", "pillow"),
    "data.per": ("caption", "image"),
    "train.precision": ("auto", "bf16", "fp32"),
    "train.tracker": ("none", "wandb"),
    "train.best": ("val", "none"),
    "train.objective": ("cross_entropy", "scst"),
    "model.image_encoder.positions": ("normal", "sincos"),
    "itc.negatives": ("queue", "batch"),
    "mim.target": ("encoding", "pixels", "dvae", "none"),
    "mim.masking": ("text_guided", "random"),
    "mim.similarity": ("tokens", "values"),
    "mim.predict": ("masked", "all"),
    "rerank.score": SCORES,
    "scst.mode": ("sample", "beam"),
    "scst.baseline": ("mean", "greedy"),
    "scst.log_prob": ("sum", "mean"),
    "answer.mode": ("generate", "rank"),
    "eval.scoring": SCORING,
    "eval.splits": ("val", "test"),
}
MAY_CHANGE = {  # by a resumed run: neither the model, nor the losses, nor the order of the data, nor the choice on val
    *LENGTH,
    *(f"train.{key}" for key in ("lr", "lr_vit", "min_lr", "warmup_steps", "weight_decay", "clip_grad", "precision")),
    *(f"train.{key}" for key in ("compile", "log_every", "checkpoint_every", "keep_checkpoints", "tracker")),
    *(f"train.{key}" for key in ("best", "images")),
    *(f"data.{key}" for key in ("image_root", "image_prefix_map", "max_bad_share", "cache_images", "num_workers")),
    *(f"data.{key}" for key in ("test", "official", "answer_list")),
    *("augment.resize", "checkpointing", "text_checkpointing", "rerank.batch_size"),
    *(f"model.{part}.{key}" for part in ("image_encoder", "bert") for key in ("weights", "checkpointing")),
    "model.image_encoder.positions",  # of the start alone
    *(f"eval.{key}" for key in ("splits", "batch_size", "text_batch_size", "folds", "spice")),
    *(f"answer.{key}" for key in ("mode", "beams", "min_tokens", "max_tokens", "length_penalty", "k_test")),
}


def _at_least_two_pairs(cfg: Config) -> None:
    if cfg.train.batch_size < 2:
        raise UserError("train.batch_size: one image on a rank leaves image-text matching no negative; use 2 or more")


def _check_pretrain(cfg: Config) -> None:
    _at_least_two_pairs(cfg)
    if cfg.train.best == "val" and not cfg.data.val:
        raise UserError("train.best: val chooses the best epoch on data.val, which is empty: name files there")


PRETRAIN = Stage("pretrain", "configs/Pretrain.yaml", _check_pretrain)
RETRIEVAL = Stage("retrieval", "configs/Retrieval_coco.yaml", _at_least_two_pairs)
CAPTION = Stage("caption", "configs/Caption_coco.yaml", lambda cfg: Generation(**cfg.generation))
VQA = Stage("vqa", "configs/VQA.yaml", lambda cfg: answer_options(cfg.answer))
STAGES = {stage.name: stage for stage in (PRETRAIN, RETRIEVAL, CAPTION, VQA)}
