"""What tools.ablate runs: the rows of the paper's tables, each with every seed, stage by stage."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine import config as settings
from utils import ROOT, Config, UserError, find_file

PAPER_DEPTH = 12  # layers of the image encoder whose numbers Table 7 names
SWITCHES = ("target", "masking", "mask_ratio", "inject_from")  # of mim: what a row is
STAGES = {"pretrain": "Pretrain.py", "zeroshot": "Retrieval.py", "retrieval": "Retrieval.py", "vqa": "VQA.py"}
CONFIGS = {"retrieval": ("Retrieval.yaml", "Retrieval_coco.yaml"), "vqa": ("VQA.yaml",)}  # beside the base
CONFIGS["zeroshot"] = CONFIGS["retrieval"]


@dataclass
class Stage:
    """One script's run: its name in STAGES, configuration file, overrides and the configuration that they give."""

    name: str
    config: str
    overrides: list[str]
    settings: Config


@dataclass
class AblationRun:
    """A row with a seed: everything that happens in one folder, in order."""

    row: str
    seed: int
    folder: Path
    stages: list[Stage]


def plan(args: argparse.Namespace) -> tuple[list[AblationRun], list[str]]:
    """-> (the runs, a seed's before the next seed's; rows that are left out, for they need a codebook)."""
    base = settings.load_config(args.base, args.override, settings.PRETRAIN)
    fine_tuning, rows, left_out = [], {}, []
    for name in args.stages:
        overrides = args.vqa_override if name == "vqa" else args.retrieval_override
        fine_tuning.append(make_stage(name, beside(args.base, CONFIGS[name]), overrides))
    for row in rows_of(args.tables):
        switches = row_switches(row, base)
        codebook = switches.get("mim.codebook")
        if codebook and not any(Path(folder, codebook).is_dir() for folder in (".", ROOT)):
            left_out.append(f"{row}: left out, {codebook} does not exist: give it by --override mim.codebook=FOLDER")
            continue
        changed = [f"{key}={'none' if value is None else json.dumps(value)}" for key, value in switches.items()]
        rows[row] = [make_stage("pretrain", args.base, [*args.override, *changed]), *fine_tuning]
    runs = [
        AblationRun(row, seed, args.output / row / f"seed_{seed}", stages)
        for seed in range(base.seed, base.seed + args.seeds)
        for row, stages in rows.items()
    ]
    return runs, left_out


def make_stage(name: str, config: str, overrides: list[str]) -> Stage:
    stage = settings.STAGES[STAGES[name].removesuffix(".py").lower()]
    return Stage(name, config, overrides, settings.load_config(config, overrides, stage))


def beside(base: str, names: Sequence[str]) -> str:
    """The configuration of fine-tuning that lies beside the base's, under one of these names."""
    folder = find_file(base, "--base").parent
    found = [str(folder / name) for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"--base {base}: beside it is no {' or '.join(names)}")
    return found[0]


def rows_of(tables: Sequence[str]) -> list[str]:
    """The rows' configurations (names of files in configs/ablation), the paper's model first, each once."""
    paper = json.loads((ROOT / "tools/report/paper_tables.json").read_text(encoding="utf-8"))["tables"]
    names = dict.fromkeys(row["config"] for number in tables for row in paper[number]["rows"])
    return sorted(names, key=lambda name: name != "semmim")


def row_switches(row: str, base: Config) -> dict:
    """{dotted key: value} that makes a row of a base. The base's own codebook goes before the row file's."""
    mim = settings.load_config(f"configs/ablation/{row}.yaml", (), settings.PRETRAIN).mim
    switches = {f"mim.{key}": mim[key] for key in SWITCHES}
    if mim.inject_from is not None:
        switches["mim.inject_from"] = scaled_layer(mim.inject_from, image_depth(base))
    if mim.target == "dvae":
        switches["mim.codebook"] = base.mim.codebook or mim.codebook
    return switches


def scaled_layer(layer: int, depth: int) -> int:
    """The layer of `depth` that is as deep as `layer` of the paper's 12, rounded half up, at least 1."""
    return max(1, (2 * layer * depth + PAPER_DEPTH) // (2 * PAPER_DEPTH))


def image_depth(config: Config) -> int:
    """Number of layers of a configuration's image encoder; built without memory for its weights."""
    from models.vit import ImageEncoder  # here: timm takes two seconds to import

    encoder = config.model.image_encoder
    with torch.device("meta"):
        return ImageEncoder(encoder.name, encoder.image_size, dict(encoder.args)).depth
