"""Weights: reading the files that others published, found locally or on the hub, and putting them into a module."""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from utils import UserError, find_file, one_line, open_file, reason, shown

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
BESIDE = ("*config.json", "vocab.txt", "tokenizer.json")  # what they say of the weights is checked
EXTENSIONS = (".safetensors", ".bin", ".pt", ".pth")


# ------------------------------------------------------------------------------------------------ finding files


def find_weights(source: str) -> Path:
    """The weight file of a local file or folder, or of a name on the hub; a folder may have it in its `model/`.

    `package:NAME` is the folder of the installed Python package NAME.
    """
    if source.startswith("package:"):
        source = package_folder(source)
    for name in WEIGHT_FILES:  # one after the other: from the hub both would be downloaded
        path = find_or_download(source, "weights", (name, *BESIDE))
        if path.is_file():
            return path
        for file in (path / name, path / "model" / name):
            if file.is_file():
                return file
    raise UserError(f"{path}: the folder has none of {', '.join(WEIGHT_FILES)}")


def package_folder(source: str) -> str:
    """The folder of `package:NAME`."""
    name = source.removeprefix("package:").replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None  # looking for a.b would run a
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{source}: no Python package {name!r} is installed; install it with pip")
    return next(iter(spec.submodule_search_locations))


def find_or_download(source: str | os.PathLike, what: str, files: tuple[str, ...]) -> Path:
    """A local file or folder or, if there is none of that name, the folder of a hub repository.

    what: see `utils.find_file`; files: what is downloaded of the repository, unless the cache has it.
    """
    name = str(source)
    try:
        return find_file(source, what)
    except UserError:
        if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(EXTENSIONS):  # no hub name
            raise
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub's client has errors of its own for names, rights, network and cache
        why = one_line(error, 160)
        raise UserError(f"{what} {name}: no such file or folder here, and the hub did not give it ({why})") from None


# ------------------------------------------------------------------------------------------------ reading them


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """-> the state dict in a .safetensors, .pt, .pth or .bin file, on the CPU. No code from the file is run, and so no
    TorchScript archive is read.

    A dict under "state_dict" or "model" is unpacked and DDP's `module.` removed. A file that is absent, broken, or
    something else than a dict of tensors is a UserError.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such weight file; give a file, a hub name or 'random'")
    try:
        if str(path).endswith(".safetensors"):
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch have errors of their own for a broken file
        raise UserError(f"{path}: not a readable weight file ({reason(error)})") from None
    for key in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict):
        raise UserError(f"{path}: holds no state dict (a dict of tensors)")
    return {str(k).removeprefix("module."): v for k, v in weights.items() if isinstance(v, Tensor)}


def read_architecture(path: str | os.PathLike) -> dict:
    """The map in a model's config.json; UserError if there is none."""
    try:
        with open_file(path) as file:
            values = json.loads(file.read().decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: a model's configuration that cannot be read ({reason(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, not the map of a model's configuration")
    return values


def architecture_beside(path: Path, name: str = "config.json") -> dict:
    """The map in a JSON file beside a weight file; {} without one."""
    config = path.with_name(name)
    return read_architecture(config) if config.is_file() else {}


# ------------------------------------------------------------------------------------------------ checking them


def check_finite(weights: Mapping[str, Tensor], source: str | os.PathLike, advice: str = "take another file") -> None:
    """UserError if a weight is infinite or no number: it would spoil every result in silence."""
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{source}: {one_line(name)} holds values that are not finite; {advice}")


def check_weights(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: str | os.PathLike,
    advice: str,
    lacking: str | None = None,
) -> None:
    """UserError unless `weights` have the very names and shapes of `own`, a module's state dict.

    source: the file, which the one line names first; advice: what to do, with which it ends; lacking: prefix of the
    names that may be missing.
    """
    missing = [name for name in own if name not in weights and not (lacking and name.startswith(lacking))]
    left_over = [name for name in weights if name not in own]
    wrong = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    for names, problem in ((missing, "is missing"), (left_over, "has no place in the model"), (wrong, None)):
        if names:
            name, others = names[0], len(names) - 1
            problem = problem or f"has the shape {list(weights[name].shape)} instead of {list(own[name].shape)}"
            more = f" (and {others} more)" if others else ""
            raise UserError(f"{source}: {one_line(name)} {problem}{more}; {advice}")


def check_vocabulary(path: Path, vocab: str | os.PathLike) -> str:
    """What is known of the vocabulary that text weights were trained with, as the end of a line for the log.

    UserError if the one beside them is not that of the file `vocab`: of the same size it loads, and every text is
    gibberish.
    """
    beside, whole = path.with_name("vocab.txt"), path.with_name("tokenizer.json")
    if beside.is_file():
        theirs = read_pieces(beside)
    elif whole.is_file():
        pieces = read_architecture(whole).get("model", {}).get("vocab", {})
        beside, theirs = whole, sorted(pieces, key=pieces.get) if isinstance(pieces, dict) else []
    else:
        return "whether its words are those of text.vocab no file beside it says"
    for number, (own, their) in enumerate(zip_longest(read_pieces(find_file(vocab, "text.vocab")), theirs)):
        if own != their:
            raise UserError(
                f"{beside}: its word piece {number} is {shown(their)}, that of text.vocab ({vocab}) is {shown(own)}: "
                "the weights would read other words; set text.vocab to the vocabulary of model.bert.weights"
            )
    return "its vocabulary is text.vocab's"


def read_pieces(path: Path) -> list[str]:
    """The word pieces of a vocab.txt."""
    return path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")


def check_value(name: str, value, kind: type, low: float = 1, high: float = sys.float_info.max) -> None:
    """UserError unless `value` is a number of `kind` (int or float) from `low` to `high`."""
    if not isinstance(value, int | kind) or isinstance(value, bool) or not low <= value <= high:
        what = "whole number" if kind is int else "number"
        limits = f"from {low:g} to {high:g}" if high < sys.float_info.max else f"of at least {low:g}"
        raise UserError(f"{name} is {shown(value)}; a {what} {limits} is needed")


def load_exactly(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: str | os.PathLike,
    advice: str,
    lacking: str | None = None,
    extra: bool = False,
) -> None:
    """Copy `weights` into `module`, all that it has and nothing else, or raise `check_weights`' UserError.

    Weights that are not finite are a UserError too. extra: whether `weights` may hold more, which is left out.
    """
    own = module.state_dict()
    if extra:
        weights = {name: value for name, value in weights.items() if name in own}
    check_weights(own, weights, source, advice, lacking)
    check_finite(weights, source)
    module.load_state_dict(weights, strict=False)
