"""Reading and writing models for use: checkpoints of any stage, and folders as the hub has them.

A folder holds model.safetensors (the backbone's weights under the names that they have in checkpoints), config.json
(see `write`), vocab.txt with its tokenizer_config.json, metrics.json if the checkpoint had one beside it, and the model
card README.md. No pickle is read or written, and nothing of the training run but what using the model needs: no path of
anybody's disk.

Everything that a file says is checked here, once: the architecture and the weights by `load_backbone`, the settings by
the rules of their stage's configuration.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import utils
from dataset.files import read_json
from dataset.text import Tokenizer, checkpoint_tokenizer
from engine.checkpoint import BEST, LAST
from engine.config import STAGES, checked_config
from evaluation.ranking import SCORES
from models.semmim import PREFIX, SemMIM, load_backbone
from utils import UserError

CONFIG, WEIGHTS, VOCAB, CASE = "config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"
METRICS, CARD = "metrics.json", "README.md"
KIND = {"model_type": "semmim", "format": 1}  # what config.json of an exported folder begins with
BERT_VOCAB = "configs/bert/vocab.txt"  # of a checkpoint that came without a configuration
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
CONVERTED = "converted from ALBEF"  # the stage of what tools/convert.py writes
# What of a stage's configuration is needed to use a model as that stage does.
KEPT = {
    "retrieval": ("text.max_tokens", "data.max_words", "rerank.k", "rerank.score"),
    "caption": ("text.prompt", "text.object_labels", "text.max_prompt_tokens", "generation"),
    "vqa": (
        *(f"text.max_{name}" for name in ("question_tokens", "ocr_words", "ocr_tokens", "label_tokens")),
        *("text.max_answer_tokens", "data.ocr", "data.labels", "answer"),
    ),
}


@dataclass
class Content:
    """A model and what is known of it.

    settings: {stage's name: the part of its configuration that KEPT names}, the checkpoint's own if that stage wrote
    it, otherwise the schema's; without a decoder, of retrieval alone. stage: the script that wrote the checkpoint
    ("pretrain", "retrieval", ...); step: optimizer steps done; best: the checkpoint's entry of that name; metrics: of
    the run's metrics.json; name: of file or folder.
    """

    backbone: SemMIM
    tokenizer: Tokenizer
    settings: utils.Config
    stage: str
    step: int | None
    best: dict
    metrics: dict
    name: str


# ---------------------------------------------------------------------------------------------------------- reading


def read(source: str | Path, image_size: int | None = None, **hub) -> Content:
    """A model from a checkpoint file, a run's folder (its best checkpoint, else its last), a folder of `write`, or the
    hub. Files are looked up in the working directory, then in the repository.

    image_size: another resolution than the model's, in pixels; hub: options of huggingface_hub.snapshot_download.
    Raises UserError if there is none, or a file of it is absent or broken.
    """
    path = locate(a_path(source), **hub)
    loaded, about, vocabulary = read_folder(path) if path.is_dir() else read_checkpoint(path)
    stage, step, best, settings = (about.get(key) for key in ("stage", "step", "best", "settings"))
    best = {} if best is None else best
    sound = {
        "stage": stage in (*STAGES, CONVERTED),
        "step": step is None or (type(step) is int and step >= 0),
        "best": isinstance(best, dict) and best.get("order") in (None, "itc", *SCORES),
        "settings": isinstance(settings, dict),
    }
    if wrong := [key for key, right in sound.items() if not right]:
        found = utils.shown(about.get(wrong[0]))
        raise UserError(f"{path}: its entry {wrong[0]} ({found}) is not what a script of this project writes")
    weights = loaded["model"] if isinstance(loaded["model"], dict) else {}
    decoder = any(str(key).startswith(f"{PREFIX}decoder.") for key in weights)
    used = utils.Config()
    for name in KEPT if decoder else ("retrieval",):
        what = f"{path}: settings.{name}"
        own = part(settings[name], KEPT[name], what) if name in settings else {}
        used[name] = part(checked_config(own, STAGES[name], what), KEPT[name], what)
    backbone, rest, _ = load_backbone(path, image_size, decoder=decoder, loaded=loaded)
    run = path if path.is_dir() else path.parent
    name = path.name if path.is_dir() else f"{run.name}/{path.name}"
    tokenizer = checkpoint_tokenizer(vocabulary, rest["description"])
    return Content(backbone, tokenizer, used, stage, step, best, read_metrics(run / METRICS), name)


def a_path(value: str | Path) -> str | Path:
    """UserError if it is none."""
    if not isinstance(value, str | Path):
        raise UserError(f"{utils.shown(value)} is no path; give a file, a folder or a name on the hub")
    return value


def locate(source: str | Path, **hub) -> Path:
    """A checkpoint file or a folder of `write`; what is neither here nor in the repository is asked of the hub."""
    try:
        path = utils.find_file(source, "model")
    except UserError:
        if not HUB_NAME.fullmatch(str(source)) or str(source).endswith((".pth", ".pt", ".safetensors")):
            raise
        return download(str(source), **hub)
    if not path.is_dir() or (path / CONFIG).is_file():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: holds neither {CONFIG} (see python -m tools.export) nor {BEST} nor {LAST}")


def download(name: str, **hub) -> Path:
    """The folder of a hub repository's files, from the cache if they are there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, VOCAB, CASE, METRICS], **hub))
    except Exception as error:  # the hub's client has errors of its own for names, rights, network and cache
        why = utils.one_line(error, 160)
        raise UserError(f"{name}: no such file or folder here, and the hub did not give it ({why})") from None


def read_checkpoint(path: Path) -> tuple[dict, dict, str]:
    """(weights and description, what config.json of a folder would say, the vocabulary) of any stage's checkpoint."""
    loaded = utils.load_checkpoint(path)
    stage, own, progress = (loaded.get(key) for key in ("stage", "config", "progress"))
    about = {"stage": stage, "best": loaded.get("best"), "settings": {}}
    about["step"] = progress.get("step") if isinstance(progress, dict) else None
    if own and isinstance(stage, str):
        about["settings"][stage] = own
    return loaded, about, lookup(own, "text.vocab", f"{path}: config") if own else BERT_VOCAB


def read_folder(folder: Path) -> tuple[dict, dict, Path]:
    """(weights and description, config.json, the vocabulary) of a folder of `write`."""
    if missing := [name for name in (CONFIG, WEIGHTS, VOCAB) if not (folder / name).is_file()]:
        raise UserError(f"{folder}: {missing[0]} is missing; export the model again (python -m tools.export)")
    config = read_json(folder / CONFIG)
    if not is_export(config):
        raise UserError(f"{folder / CONFIG}: not of a SemMIM model; export it again with python -m tools.export")
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: not a readable weight file ({utils.one_line(error)})") from None
    return {"model": weights, "description": config.get("description")}, config, folder / VOCAB


def is_export(config) -> bool:
    """Whether it is what `write` puts into config.json."""
    return isinstance(config, dict) and all(config.get(key) == value for key, value in KIND.items())


def part(values, keys: tuple[str, ...], source: str) -> utils.Config:
    """The part of a configuration that the dotted `keys` name."""
    found = utils.Config()
    for key in keys:
        *path, last = key.split(".")
        target = found
        for name in path:
            target = target.setdefault(name, utils.Config())
        target[last] = utils.as_config(lookup(values, key, source))
    return found


def lookup(values, key: str, source: str):
    """values["a"]["b"] for "a.b"; UserError if it is not there."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            raise UserError(f"{source}.{key} is missing; export the model again, or take another checkpoint")
        values = values[name]
    return values


def read_metrics(path: Path) -> dict:
    """A run's metrics.json, {} if there is none or it cannot be read: a model is usable without."""
    try:
        metrics = read_json(path)
    except UserError:
        return {}
    return metrics if isinstance(metrics, dict) else {}


# ---------------------------------------------------------------------------------------------------------- writing


def write(content: Content, folder: str | Path, card: str) -> Path:
    """Write all files of a folder, see the module's docstring; -> the folder, which is made if it is missing.

    Raises UserError, and writes nothing, if the folder holds something else than an exported model.
    """
    folder = Path(a_path(folder)).expanduser()
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise UserError(f"{folder}: holds something else than an exported model; name a new folder")
    utils.make_folder(folder)
    state = {f"{PREFIX}{key}": value.contiguous().cpu() for key, value in content.backbone.state_dict().items()}
    config = {**KIND, "stage": content.stage, "step": content.step, "best": content.best}
    config |= {"description": content.backbone.description, "settings": content.settings.to_dict()}
    vocabulary = content.tokenizer.vocab_file.read_bytes()  # before anything is written: it may be the folder's own
    if not (folder / CONFIG).exists():  # before all else: by it the next export knows what a kill has left as its own
        utils.write_json(folder / CONFIG, config)
    with utils.replacing(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
        (folder / WEIGHTS).unlink(missing_ok=True)  # at no time old weights beside new settings
        utils.write_json(folder / CONFIG, config)
    utils.write_json(folder / CASE, {"tokenizer_class": "BertTokenizer", **content.tokenizer.case})
    for name, data in ((VOCAB, vocabulary), (CARD, card.encode())):
        with utils.replacing(folder / name) as temporary:
            temporary.write_bytes(data)
    if content.metrics:
        utils.write_json(folder / METRICS, content.metrics)
    return folder


def _is_ours(folder: Path) -> bool:
    try:
        return is_export(read_json(folder / CONFIG))
    except UserError:
        return False
