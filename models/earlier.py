"""Checkpoints of earlier versions: what they called something, and what it is called now."""

import os

from utils import load_checkpoint

# What earlier versions called something, and what it is called now: weights, dotted keys of the configuration, and
# values of such keys; and what they did where a stage's key was not known to them.
RENAMED_WEIGHTS = {"cls_centre.value": "cls_center.value", "patch_centre.value": "patch_center.value"}
RENAMED_KEYS = {
    "mim.centre_momentum": "mim.center_momentum",
    "train.pictures": "train.images",
    "model.image_encoder.position_std": "model.image_encoder.positions",  # of the start alone: a resumed run may differ
}
RENAMED_VALUES = {"eval.scoring": {"program": "official_2017", "rules": "official"}}
ITM = {"itm.temperature": None, "itm.harden": 0.8}  # negatives by ITC's own temperature; 0.8 says nothing then
RESIZE = {"augment.resize": "pillow"}
ADDED_KEYS = {
    "pretrain": {
        **ITM,
        **RESIZE,
        "mim.similarity": "tokens",
        "mim.predict": "masked",
        "model.image_encoder.positions": "normal",
    },
    "retrieval": {**ITM, **RESIZE, "data.per": "caption"},
    "caption": {**RESIZE, "scst.eos": False},
    "vqa": RESIZE,
}


def read_checkpoint(path: str | os.PathLike, required: tuple[str, ...] = ("model",)) -> dict:
    """`utils.load_checkpoint`, with the names of earlier versions as today's; raises its UserError."""
    checkpoint = load_checkpoint(path, required)
    rename_old(checkpoint)
    return checkpoint


def rename_old(checkpoint: dict) -> None:
    """Give a checkpoint's weights and configuration the present names of RENAMED_*, and ADDED_KEYS, in place."""
    weights = checkpoint["model"] if isinstance(checkpoint.get("model"), dict) else {}
    for old, new in RENAMED_WEIGHTS.items():
        if old in weights:
            weights[new] = weights.pop(old)
    for old, new in RENAMED_KEYS.items():
        entries, name = _entries(checkpoint, old)
        if name in entries:
            entries[new.rpartition(".")[2]] = entries.pop(name)
    for key, names in RENAMED_VALUES.items():
        entries, name = _entries(checkpoint, key)
        if isinstance(entries.get(name), str):
            entries[name] = names.get(entries[name], entries[name])
    stage = checkpoint.get("stage")
    for key, value in ADDED_KEYS.get(stage if isinstance(stage, str) else "", {}).items():
        section = key.split(".")[0]
        if isinstance(checkpoint.get("config"), dict):
            checkpoint["config"].setdefault(section, {})
        entries, name = _entries(checkpoint, key)
        entries.setdefault(name, value)


def _entries(checkpoint: dict, key: str) -> tuple[dict, str]:
    """(the map of a checkpoint's configuration that holds the dotted `key`, {} where there is none; the last name)"""
    *path, name = key.split(".")
    entries = checkpoint.get("config")
    for part in path:
        entries = entries.get(part) if isinstance(entries, dict) else None
    return entries if isinstance(entries, dict) else {}, name
