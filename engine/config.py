"""Configurations: reading and merging YAML files and --override, and the settings that each stage accepts.

A file lies over its `base`, that one over the stage's schema, which holds every key with its default. The rules say
what a value may be; one table a stage says which rule each key has, and which keys a resumed run may change.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.tokens import AnchorToken

from evaluation.ranking import SCORES
from evaluation.vqa import SCORING
from models.generation import MODES, Generation, answer_options
from utils import Config, UserError, as_config, find_file, one_line, open_file, replacing, shown

Rule = Callable[[str, object], None]  # of a dotted key and its value; raises UserError


@dataclass(frozen=True)
class Stage:
    """What the configuration of a stage may hold.

    name: as checkpoints hold it; schema: the file that holds every key with its default; rules: dotted key -> what its
    value must be; optional: keys that also take `none`; kinds: the kinds of value (as `kind` names them) of keys that
    may have others than their default, and of maps whose keys are the user's own; one_of: keys of which exactly one has
    a value, the one that was given last; may_change: keys that a resumed run may change (neither the model, nor the
    losses, nor the order of the data); check: what several keys must fulfill together.
    """

    name: str
    schema: str | os.PathLike
    rules: Mapping[str, Rule] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    one_of: tuple[str, ...] = ()
    may_change: tuple[str, ...] = ()
    check: Callable[[Config], object] | None = None


def add_arguments(parser: argparse.ArgumentParser, config: str | None = None, output_dir: str | None = None) -> None:
    """The arguments that all scripts share; `config` and `output_dir` are this script's defaults."""
    add = parser.add_argument
    add("--config", default=config, required=config is None, help="YAML file (default: %(default)s)")
    add("--output_dir", default=output_dir, required=output_dir is None, help="folder for all that the run writes")
    add("--checkpoint", help="checkpoint to start from or to evaluate")
    add(
        "--resume", action="store_true", help="resume from OUTPUT_DIR/checkpoint_last.pth if it exists, otherwise start"
    )
    add("--other_ranks", action="store_true", help="let --resume continue with another number of processes")
    add("--evaluate", action="store_true", help="only evaluate")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--seed", type=int, help="replaces the configuration's seed")
    changes = {"nargs": "*", "action": "extend", "default": [], "metavar": "KEY.SUB=VALUE"}
    add("--override", help="changes to the configuration", **changes)


# --------------------------------------------------------------------------------------------------------- reading


def load_config(path: str | os.PathLike, overrides: Sequence[str], stage: Stage) -> Config:
    """Read a configuration file over its bases and the stage's schema, and check every key and value.

    A file's `base:` names the file that it changes, relative to itself.
    `overrides` are strings `a.b=value`, the value in YAML. A value must be of its default's kind (number, text,
    true/false, list, map; a list's entries of its default's entries' kind) or of the stage's `kinds`, except that a
    default of null accepts anything, and one of {} any map. Maps are merged, lists replaced; of the stage's `one_of`,
    the one given in the uppermost file, or in `overrides`, has its value and the others have none.
    """
    path = find_file(path, "--config")
    known = _schema(stage)
    files = [path]
    while (base := read_yaml(files[-1]).get("base")) is not None:
        following = files[-1].parent / str(base)
        if not os.path.isfile(following):
            raise UserError(f"{files[-1]}: base {one_line(base)} does not exist (it is relative to this file)")
        if any(following.samefile(file) for file in files):
            raise UserError(f"{files[-1]}: base {base} leads back to this file")
        files.append(following)
    merged = copy.deepcopy(known)
    for file in reversed(files):
        values = _without_base(read_yaml(file))
        _merge(merged, values, known, str(file), stage)
        _keep_one(merged, [values], str(file), stage)
    changes = [_parse_override(override) for override in overrides or ()]
    for override, values in zip(overrides or (), changes, strict=True):
        _merge(merged, values, known, f"--override {one_line(override)}", stage)
    _keep_one(merged, changes, "--override", stage)
    config = as_config(merged)
    check_config(config, stage)
    return config


def checked_config(values: dict, stage: Stage, source: str) -> Config:
    """`values`, maps of maps, over the stage's schema, checked as a file is; UserError naming `source` and the key."""
    known = _schema(stage)
    merged = copy.deepcopy(known)
    _merge(merged, values, known, source, stage)
    config = as_config(merged)
    try:
        check_config(config, stage)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return config


def check_config(config: Config, stage: Stage) -> None:
    """Raise UserError if a value is not what the stage's rules say, naming its key."""
    for key, rule in stage.rules.items():
        rule(key, lookup(config, key))
    if stage.one_of and sum(lookup(config, key) is not None for key in stage.one_of) != 1:
        raise UserError(f"{', '.join(stage.one_of)}: exactly one of them must have a value")
    if stage.check:
        stage.check(config)


def save_config(config: dict, path: str | os.PathLike) -> None:
    """Write a configuration as YAML, in the order of its keys."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yaml.dump(config.to_dict() if isinstance(config, Config) else config, file)


def lookup(config: dict, key: str):
    """config["a"]["b"] for "a.b"."""
    for name in key.split("."):
        config = config[name]
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
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: not a readable YAML file: it has more than {MOST_BYTES:,} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a readable YAML file: {one_line(error)}") from None
    values = parse_yaml(text, f"{path}: not a readable YAML file")
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a map of keys to values")
    return values or {}


MOST_BYTES = 200_000  # far above what a configuration needs: the largest of the project's has 4 KB
KIND_NAMES = ((bool, "true/false"), ((int, float), "a number"), (str, "text"), (list, "a list"), (dict, "a map"))


def parse_yaml(text: str, source: str):
    """The value that a YAML text stands for; UserError, beginning with `source`, if no configuration has such a value.

    Anchors are refused: followed, a few lines of them stand for millions of values.
    """
    try:
        if any(isinstance(token, AnchorToken) for token in YAML(typ="safe", pure=True).scan(text)):
            raise UserError(f"{source}: it has an anchor (&name); write the value where it is needed")
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if problem and mark else ""
        raise UserError(f"{source}: {where}{one_line(problem or error)}") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{source}: a value is not what its form or tag says ({one_line(error)})") from None
    _check_kinds(value, "", source)
    return value


def _check_kinds(value, name: str, source: str) -> None:
    """UserError for a value, or a key, that no configuration holds; `name`: the dotted key."""
    where = f"{source}: {one_line(name)}" if name else source
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise UserError(f"{where}: the key {shown(key)} is {kind(key)}, not text; put it in quotes")
            _check_kinds(item, f"{name}.{key}" if name else key, source)
    elif isinstance(value, list):
        for item in value:
            _check_kinds(item, name, source)
    elif kind(value) not in ("null", "true/false", "a number", "text"):
        raise UserError(f"{where}: {shown(value)} is {kind(value)}; put it in quotes if text is meant")
    elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise UserError(f"{where}: {shown(value)} holds what is no character")


def kind(value) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    return next((name for types, name in KIND_NAMES if isinstance(value, types)), f"a {type(value).__name__}")


def _schema(stage: Stage) -> dict:
    return _without_base(read_yaml(find_file(stage.schema, "schema")))


def _without_base(values: dict) -> dict:
    return {key: value for key, value in values.items() if key != "base"}


def _parse_override(override: str) -> dict:
    name, found, text = override.partition("=")
    source = f"--override {one_line(override)}"
    if not found or not all(name.split(".")) or name.count(".") > 9:
        raise UserError(f"{source}: write it as key.sub=value")
    value = parse_yaml(text, f"{source}: the value is not valid YAML; quote it")
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def _merge(target: dict, values: dict, known: dict | None, source: str, stage: Stage, prefix: str = "") -> None:
    """Lay `values` over `target`; `known` is the schema's map here, or None if anything is accepted."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if known is not None and key not in known:
            near = difflib.get_close_matches(key[:80], known, n=1, cutoff=0)
            hint = f"; the nearest known key is {prefix}{near[0]}" if near else ""
            raise UserError(f"{source}: unknown key {one_line(name)}{hint}")
        default = None if known is None else known[key]
        kinds = stage.kinds.get(name) or (() if default is None else (kind(default),))
        if name in stage.optional and value in (None, "none"):
            value = None
        elif kinds and kind(value) not in kinds:
            found = one_line(value, 80) if isinstance(value, str) else shown(value)
            raise UserError(f"{source}: {name} is {kind(value)} ({found}); {' or '.join(kinds)} is expected")
        elif isinstance(default, list) and (wrong := [x for x in value if default and kind(x) != kind(default[0])]):
            expected = f"a list with nothing but {kind(default[0]).removeprefix('a ')}"
            raise UserError(f"{source}: {name} holds {kind(wrong[0])} ({shown(wrong[0])}); {expected} is expected")
        if isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge(target[key], value, None if name in stage.kinds else default or None, source, stage, name + ".")
        else:
            target[key] = value


def _keep_one(target: dict, layer: list[dict], source: str, stage: Stage) -> None:
    """Let `target`, over which the maps of `layer` lie by now, have a single value of `stage.one_of`: the layer's."""
    given = [
        key for key in stage.one_of if any(gives(values, key) for values in layer) and lookup(target, key) is not None
    ]
    if len(given) > 1:
        raise UserError(f"{source}: {' and '.join(given)} are both given; keep one of them")
    for key in stage.one_of if given else ():
        if key not in given:
            above, _, name = key.rpartition(".")
            lookup(target, above)[name] = None


def gives(values: dict, key: str) -> bool:
    """Whether a map of maps has the dotted key."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


# ----------------------------------------------------------------------------------------------------------- rules


def rule(words: str, test: Callable[[object], bool]) -> Rule:
    """A value must be what the words say and the test finds."""

    def check(key: str, value) -> None:
        if not test(value):
            raise UserError(f"{key}: {shown(value)} must be {words}")

    return check


def whole(low: int, high: float = math.inf) -> Rule:
    """A whole number of at least `low` (and at most `high`)."""
    limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    return rule(f"a whole number {limits}", lambda x: is_number(x) and isinstance(x, int) and low <= x <= high)


def number(low: float = 0.0, high: float = math.inf, above: bool = False) -> Rule:
    """A finite number from `low` (with `above`: above it) to `high`."""
    limits = [f"{'above' if above else 'of at least'} {low:g}"] if low > -math.inf else []
    limits += [f"of at most {high:g}"] if high < math.inf else []
    words = f"a finite number {' and '.join(limits)}".rstrip()
    return rule(words, lambda x: is_number(x) and (low < x if above else low <= x) and x <= high)


def is_number(value) -> bool:
    """Whether it is a finite number that floats can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def or_none(given: Rule) -> Rule:
    """What the rule accepts, or null."""
    return lambda key, value: None if value is None else given(key, value)


def choice(*known: str) -> Rule:
    """One of these words."""
    return rule(f"one of {', '.join(known)}", lambda x: x in known)


def _folders(value) -> bool:
    paths = value if isinstance(value, dict) else {"": value}
    return all(isinstance(text, str) for text in [*paths, *paths.values()]) and bool(paths) and "" not in paths.values()


text = rule("text", lambda x: isinstance(x, str))
texts_by_name = rule("a map of text to text", lambda x: all(isinstance(item, str) for item in x.values()))
crop_scale = rule(
    "[smallest, largest], shares of the area with 0 < smallest <= largest <= 1",
    lambda x: len(x) == 2 and all(map(is_number, x)) and 0 < x[0] <= x[1] <= 1,
)
betas = rule(
    "two numbers of at least 0 and below 1",
    lambda x: len(x) == 2 and all(is_number(rate) and 0 <= rate < 1 for rate in x),
)
folders = rule("a folder, or a map from the entries' `dataset` to folders", _folders)
files = rule("a list of files", lambda x: all(isinstance(path, str) and path for path in x))
weights = rule(
    "a map of numbers of at least 0", lambda x: all(is_number(weight) and weight >= 0 for weight in x.values())
)
splits = rule(
    "val, test or both, each once",
    lambda x: bool(x) and all(name in ("val", "test") for name in x) and len(set(x)) == len(x),
)


# --------------------------------------------------------------------------------------- the stages, side by side


def _at_least_two_pairs(cfg: Config) -> None:
    if cfg.train.batch_size < 2:
        raise UserError(
            f"train.batch_size: {cfg.train.batch_size} image on a rank leaves image-text matching no negative; "
            "use 2 or more"
        )


def each(given: Rule, *keys: str, prefix: str = "") -> dict[str, Rule]:
    """The same rule for several keys."""
    return {f"{prefix}{key}": given for key in keys}


COMMON = {
    "seed": whole(0, 2**62),
    "data.image_root": or_none(folders),
    "data.image_prefix_map": texts_by_name,
    "data.max_bad_share": number(0, 1),
    "data.num_workers": whole(0, 1024),
    "augment.crop_scale": crop_scale,
    "augment.randaugment_ops": whole(0, 10),
    "augment.randaugment_magnitude": number(0, 10),
    "augment.resize": choice("torch", "pillow"),
    **each(or_none(whole(1)), "train.epochs", "train.steps"),
    "train.minutes": or_none(number(0, above=True)),
    **each(whole(1), "batch_size", "accumulation", "log_every", "keep_checkpoints", prefix="train."),
    **each(number(0), "lr", "lr_vit", "min_lr", "weight_decay", "clip_grad", prefix="train."),
    **each(whole(0), "data.bucket_batches", "train.warmup_steps", "train.checkpoint_every"),
    "train.betas": betas,
    "train.precision": choice("auto", "bf16", "fp32"),
    "train.tracker": choice("none", "wandb"),
}
LENGTH = ("train.epochs", "train.steps", "train.minutes")
OPTIONAL = ("data.image_root", *LENGTH)
KINDS = {"data.image_root": ("text", "a map")}  # one folder, or one for each of the entries' data sets
CONTRAST = {  # ITC, ITM and the momentum model, in pre-training and retrieval
    "data.max_words": whole(1),
    "text.max_tokens": whole(3, 512),
    "itc.negatives": choice("queue", "batch"),
    "itc.queue_size": whole(0, 10**9),
    **each(number(0, 1), "itc.alpha", "momentum"),
    "itm.temperature": or_none(number(0.001)),
    "itm.harden": number(0.001, 1),
    **each(whole(1), "eval.batch_size", "eval.text_batch_size"),
}
TEXT = whole(1, 512)  # tokens that the positions of BERT suffice for
MAY_CHANGE = (
    *LENGTH,
    *(f"train.{key}" for key in ("lr", "lr_vit", "min_lr", "warmup_steps", "weight_decay", "clip_grad")),
    *(f"train.{key}" for key in ("precision", "log_every", "checkpoint_every", "keep_checkpoints", "tracker")),
    "train.compile",
    *(f"data.{key}" for key in ("image_root", "image_prefix_map", "max_bad_share", "cache_images", "num_workers")),
    "augment.resize",
)


def _check_pretrain(cfg: Config) -> None:
    _at_least_two_pairs(cfg)
    if cfg.train.best == "val" and not cfg.data.val:
        raise UserError("train.best: val chooses the best epoch on data.val, which is empty: name files there")


PRETRAIN = Stage(
    name="pretrain",
    schema="configs/Pretrain.yaml",
    optional=(*OPTIONAL, "itm.temperature", "mim.inject_from"),
    kinds=KINDS,
    one_of=LENGTH,
    rules={
        **COMMON,
        **CONTRAST,
        "data.val": files,
        "train.best": choice("val", "none"),
        "model.image_encoder.positions": choice("normal", "sincos"),
        **each(whole(1), "eval.images", "model.image_encoder.image_size", "model.embed_dim", "mim.head.hidden"),
        **each(whole(1), "text_layers", "fusion_layers", "decoder_layers", prefix="model.bert."),
        "itc.temperature": number(0.001, 0.5),
        "mlm.probability": number(0, 1),
        "mim.target": choice("encoding", "pixels", "dvae", "none"),
        "mim.masking": choice("text_guided", "random"),
        "mim.similarity": choice("tokens", "values"),
        "mim.predict": choice("masked", "all"),
        "mim.mask_ratio": number(0, 1, above=True),
        **each(number(0, above=True), "mask_temperature", "student_temperature", "teacher_temperature", prefix="mim."),
        "mim.head.patterns": whole(2),
        "mim.center_momentum": number(0, 1),
        "mim.codebook": or_none(text),
    },
    may_change=(
        *MAY_CHANGE,
        *("data.val", "eval.images", "eval.batch_size", "eval.text_batch_size", "train.best", "train.images"),
        *(f"model.{part}.{key}" for part in ("image_encoder", "bert") for key in ("weights", "checkpointing")),
        "model.image_encoder.positions",  # of the start alone
    ),
    check=_check_pretrain,
)


RETRIEVAL = Stage(
    name="retrieval",
    schema="configs/Retrieval_coco.yaml",
    optional=(*OPTIONAL, "itm.temperature"),
    kinds=KINDS,
    one_of=LENGTH,
    rules={
        **COMMON,
        **CONTRAST,
        **each(whole(1), "image_size", "rerank.k", "rerank.batch_size"),
        "data.per": choice("caption", "image"),
        "rerank.score": choice(*SCORES),
        "eval.splits": splits,
        "eval.folds": whole(0),
    },
    may_change=(
        *MAY_CHANGE,
        *("data.test", "checkpointing", "text_checkpointing", "rerank.batch_size"),
        *(f"eval.{key}" for key in ("splits", "batch_size", "text_batch_size", "folds")),
    ),
    check=_at_least_two_pairs,
)


CAPTION = Stage(
    name="caption",
    schema="configs/Caption_coco.yaml",
    optional=OPTIONAL,
    kinds=KINDS,
    one_of=LENGTH,
    rules={
        **COMMON,
        **each(whole(1), "image_size", "generation.beams", "scst.samples", "eval.batch_size"),
        "data.per": choice("caption", "image"),
        "text.max_tokens": whole(2, 512),
        **each(TEXT, "text.max_prompt_tokens", "generation.max_tokens"),
        "generation.mode": choice(*MODES),
        **each(whole(0), "generation.min_tokens", "generation.top_k"),
        "generation.length_penalty": number(-math.inf),
        "generation.top_p": number(0, 1, above=True),
        "generation.temperature": number(0, above=True),
        "train.objective": choice("cross_entropy", "scst"),
        "train.label_smoothing": number(0, 1),
        "scst.mode": choice("sample", "beam"),
        "scst.baseline": choice("mean", "greedy"),
        "scst.log_prob": choice("sum", "mean"),
        "eval.splits": splits,
    },
    may_change=(
        *MAY_CHANGE,
        *("data.test", "checkpointing", "text_checkpointing", "eval.splits", "eval.batch_size", "eval.spice"),
    ),
    check=lambda cfg: Generation(**cfg.generation),
)


VQA = Stage(
    name="vqa",
    schema="configs/VQA.yaml",
    optional=OPTIONAL,
    one_of=LENGTH,
    kinds={**KINDS, "data.answer_weight": ("a map",)},
    rules={
        **COMMON,
        **each(whole(1), "image_size", "text.max_ocr_words", "answer.beams", "answer.k_test", "eval.batch_size"),
        **each(TEXT, *(f"text.max_{part}_tokens" for part in ("question", "ocr", "label", "answer"))),
        "answer.max_tokens": TEXT,
        "data.answer_weight": weights,
        "answer.mode": choice("generate", "rank"),
        "answer.min_tokens": whole(0),
        "answer.length_penalty": number(-math.inf),
        "eval.scoring": choice(*SCORING),
    },
    may_change=(
        *MAY_CHANGE,
        *(f"data.{key}" for key in ("test", "official", "answer_list")),
        *(f"answer.{key}" for key in ("mode", "beams", "min_tokens", "max_tokens", "length_penalty", "k_test")),
        *("checkpointing", "text_checkpointing", "eval.batch_size"),
    ),
    check=lambda cfg: answer_options(cfg.answer),
)

STAGES = {stage.name: stage for stage in (PRETRAIN, RETRIEVAL, CAPTION, VQA)}
