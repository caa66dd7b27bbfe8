"""Reading and writing models for use: checkpoints of any stage, and folders as the hub has them.

A folder holds model.safetensors (the backbone's weights under the names that they have in checkpoints), config.json
(`Content.config`), vocab.txt, metrics.json where the checkpoint had one beside it, and README.md, the model card. No
pickle is read or written, and nothing of the training run but what using the model needs: no path of anybody's disk.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import utils
from dataset.entries import read_json
from dataset.text import Tokenizer, checkpoint_tokenizer
from engine.checkpoint import BEST, LAST
from engine.config import CAPTION, RETRIEVAL, VQA, Stage, checkpoint_config, lookup
from models import earlier
from models.semmim import PREFIX, SemMIM, load_backbone

CONFIG, WEIGHTS, VOCAB, METRICS = "config.json", "model.safetensors", "vocab.txt", "metrics.json"
FORMAT = 1  # of config.json
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What of a stage's configuration is needed to use a model as that stage does.
KEPT: dict[str, tuple[str, ...]] = {
    RETRIEVAL.name: ("text.max_tokens", "data.max_words", "rerank.k", "rerank.score"),
    CAPTION.name: ("text.prompt", "text.object_labels", "text.max_prompt_tokens", "generation"),
    VQA.name: (
        *(f"text.max_{name}" for name in ("question_tokens", "ocr_words", "ocr_tokens", "label_tokens")),
        *("text.max_answer_tokens", "data.ocr", "data.labels", "answer"),
    ),
}


@dataclass
class Content:
    """A model and what is known of it.

    settings: {stage's name: the part of its configuration that KEPT names}, the checkpoint's own where that stage wrote
    it, else the schema's; stage: the script that wrote the checkpoint ("pretrain", "retrieval", ...); step: optimizer
    steps done; best: the checkpoint's entry of that name; metrics: of the run's metrics.json; name: of file or folder.
    """

    backbone: SemMIM
    tokenizer: Tokenizer
    settings: utils.Config
    stage: str
    step: int | None = None
    best: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    name: str = ""

    def config(self) -> dict:
        """What config.json holds, enough to rebuild the model without weights: plain values."""
        return {
            "model_type": "semmim",
            "format": FORMAT,
            "stage": self.stage,
            "step": self.step,
            "best": self.best,
            "description": self.backbone.description,
            "settings": self.settings.to_dict(),
        }


def read(source: str | Path, image_size: int | None = None, **hub) -> Content:
    """A model from a checkpoint file, a run's folder (its best checkpoint, else its last), a folder of `write`, or the
    hub. Files are looked up in the working directory, then in the repository.

    image_size: another resolution than the model's, in pixels; hub: options of huggingface_hub.snapshot_download.
    Raises UserError where there is none, or a file of it is absent or broken.
    """
    path = locate(source, **hub)
    return read_folder(path, image_size) if path.is_dir() else read_checkpoint(path, image_size)


def locate(source: str | Path, **hub) -> Path:
    """A checkpoint file or a folder of `write`; what is neither here nor in the repository is asked of the hub."""
    try:
        path = utils.find_file(source, "model")
    except utils.UserError:
        if not HUB_NAME.fullmatch(str(source)) or str(source).endswith((".pth", ".pt", ".safetensors")):
            raise
        return download(str(source), **hub)
    if not path.is_dir() or (path / CONFIG).is_file():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise utils.UserError(f"{path}: holds neither {CONFIG} (see tools/export.py) nor {BEST} nor {LAST}")


def download(name: str, **hub) -> Path:
    """The folder of a hub repository's files, from the cache where they are there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, VOCAB, METRICS], **hub))
    except Exception as error:  # the hub's client has errors of its own for names, rights, network and cache
        reason = " ".join(str(error).split())[:160]
        raise utils.UserError(f"{name}: no such file or folder here, and the hub did not give it ({reason})") from None


def read_checkpoint(path: Path, image_size: int | None = None) -> Content:
    """A model from the checkpoint of any stage; its decoder where it has one."""
    checkpoint = earlier.read_checkpoint(path)
    backbone, rest, _ = load_backbone(path, image_size, decoder=has_decoder(checkpoint["model"]), loaded=checkpoint)
    tokenizer = None
    settings = utils.Config()
    for stage in stages_of(backbone):
        cfg = checkpoint_config(rest, stage)
        settings[stage.name] = kept(cfg, KEPT[stage.name])
        tokenizer = tokenizer or checkpoint_tokenizer(cfg.text.vocab, rest["description"])
    step, metrics = rest.get("progress", {}).get("step"), path.parent / METRICS
    about = (rest.get("stage", "unknown"), step, rest.get("best", {}))
    return Content(backbone, tokenizer, settings, *about, read_metrics(metrics), f"{path.parent.name}/{path.name}")


def read_folder(folder: Path, image_size: int | None = None) -> Content:
    """A model from a folder of `write`."""
    if missing := [name for name in (CONFIG, WEIGHTS, VOCAB) if not (folder / name).is_file()]:
        raise utils.UserError(f"{folder}: {missing[0]} is missing; export the model again (tools/export.py)")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("model_type") != "semmim" or config.get("format") != FORMAT:
        raise utils.UserError(
            f"{folder / CONFIG}: not of a SemMIM model in format {FORMAT}; export it again with tools/export.py"
        )
    if absent := [key for key in ("description", "settings", "stage") if key not in config]:
        raise utils.UserError(f"{folder / CONFIG}: has no entry {absent[0]}; export the model again (tools/export.py)")
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise utils.UserError(f"{folder / WEIGHTS}: not a readable weight file ({error})") from None
    loaded = {"model": weights, "description": config["description"]}
    backbone, rest, _ = load_backbone(folder / WEIGHTS, image_size, decoder=has_decoder(weights), loaded=loaded)
    settings = utils.as_config(config["settings"])
    for stage in stages_of(backbone):
        try:
            for key in KEPT[stage.name]:
                lookup(settings[stage.name], key)
        except (KeyError, TypeError):
            raise utils.UserError(f"{folder / CONFIG}: settings.{stage.name}.{key} is missing") from None
    tokenizer = checkpoint_tokenizer(folder / VOCAB, rest["description"])
    about = (config["stage"], config.get("step"), config.get("best") or {})
    return Content(backbone, tokenizer, settings, *about, read_metrics(folder / METRICS), folder.name)


def write(content: Content, folder: Path) -> None:
    """Write everything but the model card; see the module's docstring."""
    state = {f"{PREFIX}{key}": value.contiguous().cpu() for key, value in content.backbone.state_dict().items()}
    vocabulary = content.tokenizer.vocab_file.read_bytes()  # before anything is written: it may be the folder's own
    with utils.replacing(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    utils.write_json(folder / CONFIG, content.config())
    with utils.replacing(folder / VOCAB) as temporary:
        temporary.write_bytes(vocabulary)
    if content.metrics:
        utils.write_json(folder / METRICS, content.metrics)


def has_decoder(weights: dict) -> bool:
    return any(key.startswith(f"{PREFIX}decoder.") for key in weights)


def stages_of(backbone: SemMIM) -> tuple[Stage, ...]:
    """The stages as which a model can be used: without a decoder it ranks, but writes no text."""
    return (RETRIEVAL,) if backbone.decoder is None else (RETRIEVAL, CAPTION, VQA)


def kept(cfg: utils.Config, keys: tuple[str, ...]) -> utils.Config:
    """The part of a configuration that the dotted `keys` name."""
    part: dict = {}
    for key in keys:
        *path, last = key.split(".")
        target = part
        for name in path:
            target = target.setdefault(name, {})
        target[last] = lookup(cfg, key)
    return utils.as_config(part)


def read_metrics(path: Path) -> dict:
    """A run's metrics.json, {} where there is none or it cannot be read: a model is usable without."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) else {}
