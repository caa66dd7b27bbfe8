"""Reading and writing models for use: checkpoints of any stage, and folders as the hub has them.

A folder holds model.safetensors (the backbone's weights under the names that they have in checkpoints), config.json
(see `write`), vocab.txt with its tokenizer_config.json, metrics.json if the checkpoint had one beside it, and the model
card README.md. No pickle is read or written, and nothing of the training run but what using the model needs: no path of
anybody's disk.

Everything that a file says is checked here, once: the architecture and the weights by `load_backbone`, the settings by
the rules of their stage's configuration.
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

import utils
from dataset.files import read_json
from dataset.text import Tokenizer, checkpoint_tokenizer
from engine.checkpoint import BEST, LAST
from engine.config import STAGES, lookup, merged_config
from models.semmim import PREFIX, SemMIM, load_backbone
from models.weights import find_or_download, read_weights
from utils import UserError

CONFIG, WEIGHTS, VOCAB, CASE = "config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"
METRICS, CARD = "metrics.json", "README.md"
KIND = {"model_type": "semmim", "format": 1}  # what config.json of an exported folder begins with
BERT_VOCAB = "configs/bert/vocab.txt"  # of a checkpoint that came without a configuration
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


def read(source: str | Path) -> Content:
    """A model from a checkpoint file, a run's folder (its best checkpoint, else its last), a folder of `write`, or the
    hub. Files are looked up in the working directory, then in the repository.

    Raises UserError if there is none, or a file of it is absent or broken.
    """
    path = locate(source)
    run, name = (path, path.name) if path.is_dir() else (path.parent, f"{path.parent.name}/{path.name}")
    loaded, about, vocabulary = read_folder(path) if path.is_dir() else read_checkpoint(path)
    decoder = any(str(key).startswith(f"{PREFIX}decoder.") for key in loaded["model"])
    backbone, rest, _ = load_backbone(path, decoder=decoder, loaded=loaded)
    if about.get("stage") not in (*STAGES, CONVERTED):
        raise UserError(f"{path}: its stage is not one that a script of this project writes")
    settings = utils.Config()
    for stage in KEPT if decoder else ("retrieval",):
        own = part(lookup(about, f"settings.{stage}"), KEPT[stage])
        settings[stage] = part(merged_config([(f"{path}: settings.{stage}", own)], STAGES[stage]), KEPT[stage])
    tokenizer = checkpoint_tokenizer(vocabulary, rest["description"])
    metrics = read_json(run / METRICS) if (run / METRICS).is_file() else {}
    best = about.get("best") or {}
    return Content(backbone, tokenizer, settings, about["stage"], about.get("step"), best, metrics, name)


def locate(source: str | Path) -> Path:
    """A checkpoint file or a folder of `write`; what is neither here nor in the repository is asked of the hub."""
    path = find_or_download(source, "model", (CONFIG, WEIGHTS, VOCAB, CASE, METRICS))
    if not path.is_dir() or (path / CONFIG).is_file():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: holds neither {CONFIG} (see python -m tools.export) nor {BEST} nor {LAST}")


def read_checkpoint(path: Path) -> tuple[dict, dict, str]:
    """(weights and description, what config.json of a folder would say, the vocabulary) of any stage's checkpoint."""
    loaded = utils.load_checkpoint(path)
    stage, config = loaded.get("stage"), loaded.get("config")
    about = {"stage": stage, "best": loaded.get("best"), "step": lookup(loaded, "progress.step")}
    return loaded, {**about, "settings": {stage: config}}, lookup(config, "text.vocab") or BERT_VOCAB


def read_folder(folder: Path) -> tuple[dict, dict, Path]:
    """(weights and description, config.json, the vocabulary) of a folder of `write`."""
    config = own_config(folder)
    if missing := [name for name in (WEIGHTS, VOCAB) if not (folder / name).is_file()]:
        raise UserError(f"{folder}: {missing[0]} is missing; export the model again (python -m tools.export)")
    loaded = {"model": read_weights(folder / WEIGHTS), "description": config.get("description")}
    return loaded, config, folder / VOCAB


def own_config(folder: Path) -> dict:
    """config.json of a folder of `write`; UserError for any other folder."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    if not (isinstance(config, dict) and KIND.items() <= config.items()):
        raise UserError(f"{folder}: holds something else than an exported model, by its {CONFIG}; name another folder")
    return config


def part(values: dict | None, keys: tuple[str, ...]) -> utils.Config:
    """The part of a configuration that the dotted `keys` name, as far as it has them."""
    found = utils.Config()
    for key in keys:
        first, _, second = key.partition(".")
        if (value := lookup(values, key)) is not None:
            found = utils.as_config({**found, first: {**found.get(first, {}), second: value} if second else value})
    return found


# ---------------------------------------------------------------------------------------------------------- writing


def write(content: Content, folder: str | Path, card: str) -> Path:
    """Write all files of a folder, see the module's docstring; -> the folder, which is made if it is missing.

    Raises UserError, and writes nothing, if the folder holds something else than an exported model.
    """
    folder = Path(folder).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        own_config(folder)
    utils.make_folder(folder)
    state = {f"{PREFIX}{key}": value.contiguous().cpu() for key, value in content.backbone.state_dict().items()}
    vocabulary = content.tokenizer.vocab_file.read_bytes()  # before anything is written: it may be the folder's own
    config = {**KIND, "stage": content.stage, "step": content.step, "best": content.best}
    config |= {"description": content.backbone.description, "settings": content.settings.to_dict()}
    (folder / WEIGHTS).unlink(missing_ok=True)  # at no time old weights beside new settings
    utils.write_json(folder / CONFIG, config)  # first: by it the next export knows what a kill has left as its own
    with utils.replacing(folder / WEIGHTS) as temporary:
        save_file(state, temporary)
    utils.write_json(folder / CASE, {"tokenizer_class": "BertTokenizer", **content.tokenizer.case})
    for name, data in ((VOCAB, vocabulary), (CARD, card.encode())):
        with utils.replacing(folder / name) as temporary:
            temporary.write_bytes(data)
    if content.metrics:
        utils.write_json(folder / METRICS, content.metrics)
    return folder
