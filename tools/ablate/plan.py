"""What tools.ablate runs: the rows of the paper's tables, each with every seed, stage by stage."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine import config as settings
from utils import ROOT, UserError, find_file

PAPER_DEPTH = 12  # layers of the image encoder whose numbers Table 7 names
SWITCHES = ("mim.target", "mim.masking", "mim.mask_ratio", "mim.inject_from")
KINDS = {"Pretrain.py": settings.PRETRAIN, "Retrieval.py": settings.RETRIEVAL, "VQA.py": settings.VQA}
STAGES = {"pretrain": "Pretrain.py", "zeroshot": "Retrieval.py", "retrieval": "Retrieval.py", "vqa": "VQA.py"}
# Settings that change no number: finished stages stay finished when one of them differs.
HARMLESS = ("data.num_workers", "data.cache_images", "train.log_every", "train.checkpoint_every")


@dataclass
class Stage:
    """One script's run: its name in STAGES, configuration file, overrides and the configuration that they give."""

    name: str
    config: str
    overrides: list[str]
    settings: dict  # dotted key -> value


@dataclass
class AblationRun:
    """A row with a seed: everything that happens in one folder, in order."""

    row: str
    seed: int
    folder: Path
    stages: list[Stage]
    notes: dict = field(default_factory=dict)  # for result.json

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.seed}"


def plan(args: argparse.Namespace) -> tuple[list[AblationRun], dict[str, str], list[str]]:
    """-> (the runs in order, {row: the row whose runs it shares}, lines about rows that cannot be run)."""
    base = settings.load_config(args.base, args.override, settings.PRETRAIN)
    depth = image_depth(base)
    rows, first, switches_of, left_out = {}, {}, {}, []
    for row in rows_of(args.tables):
        switches = switches_of[row] = row_switches(row, depth, base.mim.codebook)
        folder = switches.get("mim.codebook")
        if folder is not None and not any(Path(where, folder).expanduser().is_dir() for where in (".", ROOT)):
            left_out.append(f"{row}: left out, {folder} does not exist: give it by --override mim.codebook=FOLDER")
            continue
        rows[row] = first.setdefault(json.dumps(switches, sort_keys=True), row)
    seeds = range(base.seed, base.seed + args.seeds)
    runs = [make_run(args, row, switches_of[row], seed) for seed in seeds for row in dict.fromkeys(rows.values())]
    return runs, rows, left_out


def rows_of(tables: Sequence[str]) -> list[str]:
    """The rows' configurations (names of files in configs/ablation), the paper's model first, each once."""
    paper = json.loads((ROOT / "tools/report/paper_tables.json").read_text(encoding="utf-8"))["tables"]
    names = dict.fromkeys(row["config"] for number in tables for row in paper[number]["rows"])
    return sorted(names, key=lambda name: name != "semmim")


def row_switches(row: str, depth: int, codebook: str | None = None) -> dict:
    """{dotted key: value} that makes a row of a base whose image encoder has `depth` layers.

    codebook: the base's own folder of dVAE weights, which goes before the row file's.
    """
    values = read_settings(f"configs/ablation/{row}.yaml", (), "Pretrain.py")
    switches = {key: values[key] for key in SWITCHES}
    if switches["mim.inject_from"] is not None:
        switches["mim.inject_from"] = scaled_layer(switches["mim.inject_from"], depth)
    if switches["mim.target"] == "dvae":
        switches["mim.codebook"] = codebook or values["mim.codebook"]
    return switches


def scaled_layer(layer: int, depth: int) -> int:
    """The layer of `depth` that is as deep as `layer` of the paper's 12, rounded half up, at least 1."""
    return max(1, (2 * layer * depth + PAPER_DEPTH) // (2 * PAPER_DEPTH))


def image_depth(config) -> int:
    """Number of layers of a configuration's image encoder; built without memory for its weights."""
    from models.vit import ImageEncoder  # here: timm takes two seconds to import

    encoder = config.model.image_encoder
    with torch.device("meta"):
        return ImageEncoder(encoder.name, encoder.image_size, dict(encoder.args)).depth


def make_run(args: argparse.Namespace, row: str, switches: dict, seed: int) -> AblationRun:
    overrides = [f"{key}={'none' if value is None else json.dumps(value)}" for key, value in switches.items()]
    stages = [make_stage("pretrain", args.base, [*args.override, *overrides])]
    for name in args.stages:
        kind = "vqa" if name == "vqa" else "retrieval"
        chosen = getattr(args, kind) or beside(args.base, STAGES[name])
        stages.append(make_stage(name, chosen, getattr(args, f"{kind}_override")))
    notes = {"row": row, "seed": seed, "base": str(args.base), "switches": switches}
    return AblationRun(row, seed, args.output / row / f"seed_{seed}", stages, notes)


def make_stage(name: str, config: str, overrides: list[str]) -> Stage:
    values = dict(read_settings(str(config), tuple(overrides), STAGES[name]))
    if values.get("mim.target") != "dvae":
        values.pop("mim.codebook", None)  # read by that target alone
    return Stage(name, str(config), list(overrides), values)


@functools.cache  # seeds and rows ask for the same files again and again
def read_settings(config: str, overrides: tuple[str, ...], script: str) -> dict:
    return flatten(settings.load_config(config, overrides, KINDS[script]))


def beside(base: str, script: str) -> str:
    """The configuration of a fine-tuning script that lies beside the base's, under one of the project's names."""
    names = {"Retrieval.py": ("Retrieval.yaml", "Retrieval_coco.yaml"), "VQA.py": ("VQA.yaml",)}[script]
    folder = find_file(base, "--base").parent
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    option = "--vqa" if script == "VQA.py" else "--retrieval"
    raise UserError(f"{option} is missing: {folder} holds no {' or '.join(names)}")


def flatten(config: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}, without what changes no number and without the seed."""
    found = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{name}.")
        elif name not in (*HARMLESS, "seed"):
            found[name] = value
    return found
