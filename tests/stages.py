"""Every stage's script as a user runs it, on demo scenes (conftest.demo) and with a very small model."""

import json
from pathlib import Path

from tiny import TINY, tiny_model

import Caption
import Pretrain
import Retrieval
import VQA
from tools.demo.__main__ import main as make_demo_data
from utils import save_checkpoint

SCENES = "--train 24 --val 9 --test 7 --size 32 --questions_per_scene 3 --workers 1".split()
STAGES = {  # main, configuration, settings
    "pretrain": (Pretrain.main, "configs/Pretrain.yaml", [*TINY, "train.images=false"]),
    "retrieval": (Retrieval.main, "configs/demo/Retrieval.yaml", ["rerank.k=4", "train.batch_size=6"]),
    "caption": (Caption.main, "configs/demo/Caption.yaml", ["train.batch_size=6", "generation.max_tokens=8"]),
    "vqa": (VQA.main, "configs/demo/VQA.yaml", ["data.bucket_batches=2", "train.batch_size=24"]),
}
SETTINGS = ["train.epochs=2", "train.log_every=1", "train.warmup_steps=2", "train.precision=fp32", "data.num_workers=0"]
FINETUNING = ["image_size=32", "text.vocab=configs/bert/vocab.txt", "eval.batch_size=4"]


def make_demo(folder: Path) -> Path:
    """data/: demo scenes, 24 of training, 9 of validation, 7 of test; model.pth: a random pre-training checkpoint."""
    make_demo_data(["--output", str(folder / "data"), *SCENES])
    model = tiny_model()
    content = {"model": model.state_dict(), "description": model.backbone.description, "stage": "pretrain"}
    save_checkpoint(folder / "model.pth", {**content, "progress": {"step": 3}})
    return folder


def run(stage: str, demo: Path, out: Path, *overrides: str, **options) -> Path:
    """Run a stage's script in this process; options: of `arguments`. -> out"""
    STAGES[stage][0](arguments(stage, demo, out, *overrides, **options))
    return out


def arguments(stage: str, demo: Path, out: Path, *overrides: str, flags=None, config: str | None = None) -> list[str]:
    """A script's arguments; flags: by default, for fine-tuning, `--checkpoint model.pth`."""
    _, file, own = STAGES[stage]
    if stage == "pretrain":
        data, flags = [f"data.train=[{demo}/data/pretrain.json]"], flags or []
    else:
        data = [f"data.{split}=[{demo}/data/{stage}_{split}.json]" for split in ("train", "val", "test")] + FINETUNING
        flags = ["--checkpoint", demo / "model.pth"] if flags is None else flags
    if stage == "vqa":
        data += [f"data.answer_list={demo}/data/answer_list.json"]
    start = ["--config", config or file, "--output_dir", out, "--device", "cpu", *flags, "--override"]
    return [*map(str, start), *data, *own, *SETTINGS, *overrides]


def log_lines(out: Path, split: str | None = None) -> list[dict]:
    """The lines of a run's log.jsonl, those of a split if given."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if split in (None, line["split"])]


def read(path: Path):
    return json.loads(path.read_text())
