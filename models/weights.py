"""Weights: reading the files that others published, found locally or on the hub, and putting them into a module."""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from itertools import zip_longest

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from utils import UserError, find_file, one_line, open_file, reason, shown

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
BESIDE = ("vocab.txt", "tokenizer.json", "preprocessor_config.json")  # what they say of the weights is checked
EXTENSIONS = (".safetensors", ".bin", ".pt", ".pth")


# ------------------------------------------------------------------------------------------------ finding files


def find_weights(source: str) -> tuple[str, str | None]:
    """-> (weight file, config.json beside it or None) for a local file or folder, or a name on the hub.

    `package:NAME` is the folder of the installed Python package NAME. A folder is searched for WEIGHT_FILES, then its
    `model/`. Nothing is downloaded unless `source` names no local path.
    """
    if source.startswith("package:"):
        name = source.removeprefix("package:").replace("-", "_")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None  # looking for a.b would run a
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{source}: no Python package {name!r} is installed; install it with pip")
        source = next(iter(spec.submodule_search_locations))
    try:
        path = str(find_file(source, "weights"))
    except UserError:
        if source.count("/") > 1 or source.startswith((".", "/", "~")) or source.endswith(EXTENSIONS):
            raise
        return download(source)
    if os.path.isfile(path):
        config = os.path.join(os.path.dirname(path), "config.json")
        return path, config if os.path.isfile(config) else None
    for folder in (path, os.path.join(path, "model")):
        for name in WEIGHT_FILES:
            if os.path.isfile(os.path.join(folder, name)):
                return find_weights(os.path.join(folder, name))
    raise UserError(f"{path}: the folder has none of {', '.join(WEIGHT_FILES)}")


def download(name: str) -> tuple[str, str]:
    """-> (weight file, config.json) of the model `name` on the Hugging Face hub, from its cache if it is there."""
    from huggingface_hub import hf_hub_download

    for file in WEIGHT_FILES:
        try:
            found = hf_hub_download(name, file), hf_hub_download(name, "config.json")
            for beside in BESIDE:
                with contextlib.suppress(Exception):  # there is none, or it is not in the cache and the hub not reached
                    hf_hub_download(name, beside)  # into the same folder
            return found
        except Exception as error:  # offline, unknown name, no such file: each has its own class, none is ours to tell
            why = reason(error)
    raise UserError(
        f"weights {name!r}: neither a local path nor available on the hub ({why}); give a local folder or file, or "
        "'random'"
    )


# ------------------------------------------------------------------------------------------------ reading them


def read_weights(path: str) -> dict[str, Tensor]:
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
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: a model's configuration that cannot be read ({reason(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, not the map of a model's configuration")
    return values


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
    shown: Callable[[str], str] = str,
) -> None:
    """UserError unless `weights` are plain tensors of the very names and shapes of `own`, a module's state dict.

    source: the file, which the one line names first; advice: what to do, with which it ends; lacking: prefix of the
    names that may be missing; shown: how a name is called in the file, if it was renamed.
    """
    missing = [name for name in own if name not in weights and not (lacking and name.startswith(lacking))]
    left_over = [name for name in weights if name not in own]
    wrong = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    odd = [name for name in own if name in weights and not is_plain(weights[name])]
    problems = "is missing", "has no place in the model", "", "is a sparse, quantized, complex or expanded tensor"
    for names, problem in zip((missing, left_over, wrong, odd), problems, strict=True):
        if names:
            name, others = names[0], len(names) - 1
            problem = problem or f"has the shape {list(weights[name].shape)} instead of {list(own[name].shape)}"
            more = f" (and {others} more)" if others else ""
            raise UserError(f"{source}: {one_line(shown(name))} {problem}{more}; {advice}")


def is_plain(value: Tensor) -> bool:
    """Whether it has real values of its own, as many as its shape says."""
    if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def check_vocabulary(path: str, vocab: str | os.PathLike) -> str:
    """What is known of the vocabulary that text weights were trained with, as the end of a line for the log.

    UserError if the one beside them is not that of the file `vocab`: of the same size it loads, and every text is
    gibberish.
    """
    beside, whole = (os.path.join(os.path.dirname(path), name) for name in ("vocab.txt", "tokenizer.json"))
    if os.path.isfile(beside):
        theirs = read_pieces(beside)
    elif os.path.isfile(whole):
        pieces = read_architecture(whole).get("model", {}).get("vocab", {})
        beside, theirs = whole, sorted(pieces, key=pieces.get) if isinstance(pieces, dict) else []
    else:
        return "whether its words are those of text.vocab no file beside it says"
    ours = read_pieces(find_file(vocab, "text.vocab"))
    for number, (own, their) in enumerate(zip_longest(ours, theirs)):
        if own != their:
            raise UserError(
                f"{beside}: its word piece {number} is {shown(their)}, that of text.vocab ({vocab}) is {shown(own)}: "
                "the weights would read other words; set text.vocab to the vocabulary of model.bert.weights"
            )
    return "its vocabulary is text.vocab's"


def read_pieces(path: str | os.PathLike) -> list[str]:
    """The word pieces of a vocab.txt."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        return [line.rstrip("\r\n") for line in file.read().rstrip("\n").split("\n")]


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
