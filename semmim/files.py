"""Reading and writing models for use: checkpoints of any stage, and folders as the hub has them.

A folder holds model.safetensors (the backbone's weights under the names that they have in checkpoints), config.json
(`Content.config`), vocab.txt, metrics.json if the checkpoint had one beside it, and README.md, the model card. No
pickle is read or written, and nothing of the training run but what using the model needs: no path of anybody's disk.

Everything that a file says is checked here, once: the architecture and the weights by `load_backbone`, the settings by
the rules of their stage's configuration.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import utils
from dataset.entries import read_json
from dataset.text import Tokenizer, checkpoint_tokenizer
from engine.checkpoint import BEST, LAST
from engine.config import CAPTION, RETRIEVAL, STAGES, VQA, Stage, checked_config
from evaluation.ranking import SCORES
from models.semmim import PREFIX, SemMIM, load_backbone

CONFIG, WEIGHTS, VOCAB, METRICS, CARD = "config.json", "model.safetensors", "vocab.txt", "metrics.json", "README.md"
FORMAT = 1  # of config.json
BERT_VOCAB = "configs/bert/vocab.txt"  # of a checkpoint that came without a configuration
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
CONVERTED = "converted from ALBEF"  # the stage of what tools/convert.py writes
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

    settings: {stage's name: the part of its configuration that KEPT names}, the checkpoint's own if that stage wrote
    it, otherwise the schema's; stage: the script that wrote the checkpoint ("pretrain", "retrieval", ...); step:
    optimizer steps done; best: the checkpoint's entry of that name; metrics: of the run's metrics.json; name: of file
    or folder.
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


# ---------------------------------------------------------------------------------------------------------- reading


def read(source: str | Path, image_size: int | None = None, **hub) -> Content:
    """A model from a checkpoint file, a run's folder (its best checkpoint, else its last), a folder of `write`, or the
    hub. Files are looked up in the working directory, then in the repository.

    image_size: another resolution than the model's, in pixels; hub: options of huggingface_hub.snapshot_download.
    Raises UserError if there is none, or a file of it is absent or broken.
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
    raise utils.UserError(f"{path}: holds neither {CONFIG} (see python -m tools.export) nor {BEST} nor {LAST}")


def download(name: str, **hub) -> Path:
    """The folder of a hub repository's files, from the cache if they are there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, VOCAB, METRICS], **hub))
    except Exception as error:  # the hub's client has errors of its own for names, rights, network and cache
        why = utils.one_line(error, 160)
        raise utils.UserError(f"{name}: no such file or folder here, and the hub did not give it ({why})") from None


def read_checkpoint(path: Path, image_size: int | None = None) -> Content:
    """A model from the checkpoint of any stage; its decoder if it has one."""
    checkpoint = utils.load_checkpoint(path)
    stage, own, progress = (checkpoint.get(key) for key in ("stage", "config", "progress"))
    about = {"stage": stage, "best": checkpoint.get("best")}
    about["step"] = progress.get("step") if isinstance(progress, dict) else None
    if own:
        about["settings"] = {stage: own} if stage in KEPT else {}
        vocabulary = lookup(own, "text.vocab", f"{path}: its entry config")
    else:
        about["settings"], vocabulary = {}, BERT_VOCAB
    content = build(path, path, checkpoint, about, vocabulary, image_size)
    content.metrics, content.name = read_metrics(path.parent / METRICS), f"{path.parent.name}/{path.name}"
    return content


def read_folder(folder: Path, image_size: int | None = None) -> Content:
    """A model from a folder of `write`."""
    if missing := [name for name in (CONFIG, WEIGHTS, VOCAB) if not (folder / name).is_file()]:
        raise utils.UserError(f"{folder}: {missing[0]} is missing; export the model again (python -m tools.export)")
    config = read_json(folder / CONFIG)
    if not is_export(config):
        raise utils.UserError(
            f"{folder / CONFIG}: not of a SemMIM model in format {FORMAT}; export it again with python -m tools.export"
        )
    try:
        loaded = {"model": load_file(folder / WEIGHTS), "description": config.get("description")}
    except (OSError, SafetensorError) as error:
        raise utils.UserError(f"{folder / WEIGHTS}: not a readable weight file ({utils.one_line(error)})") from None
    content = build(folder / CONFIG, folder / WEIGHTS, loaded, config, folder / VOCAB, image_size)
    content.metrics, content.name = read_metrics(folder / METRICS), folder.name
    return content


def is_export(config) -> bool:
    return isinstance(config, dict) and config.get("model_type") == "semmim" and config.get("format") == FORMAT


def build(
    source: Path, weights: Path, loaded: dict, about: dict, vocabulary: str | Path, image_size: int | None
) -> Content:
    """A model from what its files hold, which is checked here; UserError naming the file and the entry.

    source: the file that `about` is of, which has stage, step, best and settings as config.json has them (a stage that
    is not in settings gets its schema's); weights: the file that `loaded` (model, description) is of.
    """
    stage, step, best, settings = (about.get(key) for key in ("stage", "step", "best", "settings"))
    best = {} if best is None else best
    sound = {
        "stage": stage in (*STAGES, CONVERTED),
        "step": step is None or (type(step) is int and step >= 0),
        "best": isinstance(best, dict) and best.get("order") in (None, "itc", *SCORES) and _plain(best),
        "settings": isinstance(settings, dict),
    }
    if wrong := [key for key, right in sound.items() if not right]:
        found = utils.shown(about.get(wrong[0]))
        raise utils.UserError(f"{source}: its entry {wrong[0]} ({found}) is not what a script of this project writes")
    backbone, rest, _ = load_backbone(weights, image_size, decoder=has_decoder(loaded["model"]), loaded=loaded)
    tokenizer = checkpoint_tokenizer(vocabulary, rest["description"])
    used = utils.Config()
    for kind in stages_of(backbone):
        name = f"{source}: settings.{kind.name}"
        own = part(settings[kind.name], KEPT[kind.name], name) if kind.name in settings else {}
        used[kind.name] = part(checked_config(own, kind, name), KEPT[kind.name], name)
    return Content(backbone, tokenizer, used, stage, step, best)


def _plain(values: dict) -> bool:
    """Whether it is a map of words to words and numbers."""
    return all(isinstance(k, str) and isinstance(v, str | int | float | None) for k, v in values.items())


def has_decoder(weights) -> bool:
    return isinstance(weights, dict) and any(str(key).startswith(f"{PREFIX}decoder.") for key in weights)


def stages_of(backbone: SemMIM) -> tuple[Stage, ...]:
    """The stages as which a model can be used: without a decoder it ranks, but writes no text."""
    return (RETRIEVAL,) if backbone.decoder is None else (RETRIEVAL, CAPTION, VQA)


def part(values, keys: tuple[str, ...], source: str) -> utils.Config:
    """The part of a configuration that the dotted `keys` name."""
    found: dict = {}
    for key in keys:
        *path, last = key.split(".")
        target = found
        for name in path:
            target = target.setdefault(name, {})
        target[last] = lookup(values, key, source)
    return utils.as_config(found)


def lookup(values, key: str, source: str):
    """values["a"]["b"] for "a.b"; UserError if it is not there."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            raise utils.UserError(f"{source}.{key} is missing; export the model again, or take another checkpoint")
        values = values[name]
    return values


def read_metrics(path: Path) -> dict:
    """A run's metrics.json, {} if there is none or it cannot be read: a model is usable without."""
    try:
        metrics = read_json(path)
    except utils.UserError:
        return {}
    return metrics if isinstance(metrics, dict) else {}


# ---------------------------------------------------------------------------------------------------------- writing


def write(content: Content, folder: str | Path, card: str) -> Path:
    """Write all files of a folder, see the module's docstring; -> the folder, which is made if it is missing.

    Raises UserError, and writes nothing, if the folder holds something else than an exported model.
    """
    folder = Path(folder).expanduser()
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise utils.UserError(f"{folder}: holds something else than an exported model; name a new folder")
    utils.make_folder(folder)
    state = {f"{PREFIX}{key}": value.contiguous().cpu() for key, value in content.backbone.state_dict().items()}
    vocabulary = content.tokenizer.vocab_file.read_bytes()  # before anything is written: it may be the folder's own
    with utils.replacing(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    utils.write_json(folder / CONFIG, content.config())
    for name, data in ((VOCAB, vocabulary), (CARD, card.encode())):
        with utils.replacing(folder / name) as temporary:
            temporary.write_bytes(data)
    if content.metrics:
        utils.write_json(folder / METRICS, content.metrics)
    return folder


def _is_ours(folder: Path) -> bool:
    try:
        return is_export(read_json(folder / CONFIG))
    except utils.UserError:
        return False
