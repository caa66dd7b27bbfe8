"""The encodings in numbers: how clusters of the demo scenes' patches agree with what the patches show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from tools.demo import scenes
from tools.visualize import encodings

DRAWS = 20  # masks per image behind the share of masked patches on named objects
KINDS = ("background", "named", "unnamed")  # of a patch: no object, one that the caption names, another one
LABELS = ("object", "class", "color", "background")


@dataclass
class Samples:
    """Images as the model sees them, with a caption each, and with scenes what each patch shows."""

    images: list[Image.Image]
    captions: list[str]
    scenes: list[scenes.Scene] | None = None


@dataclass
class PatchLabels:
    """What all patches show, [B * N] each: names, and which patches the labelling is about."""

    labels: dict[str, tuple[np.ndarray, np.ndarray]]  # labelling -> (name of each patch, whether it counts)
    kinds: Tensor  # index into KINDS


def patch_labels(samples: Samples, grid: int) -> PatchLabels:
    """Class and color of the object that a patch shows, color of the background, and whether it shows an object."""
    rows, kinds = [], []
    for scene, caption, image in zip(samples.scenes, samples.captions, samples.images, strict=True):
        named = scenes.named_objects(scene, caption)
        for place in scenes.patch_objects(scene, image.width, grid):
            shown = scene.objects[place] if place >= 0 else None
            rows.append(("object", shown.shape, shown.color, "") if shown else ("background", "", "", scene.background))
            kinds.append(0 if shown is None else 1 if named[place] else 2)
    columns = dict(zip(LABELS, np.array(rows).T, strict=True))
    return PatchLabels({name: (values, values != "") for name, values in columns.items()}, torch.tensor(kinds))


def agreement(clusters: np.ndarray, known: PatchLabels) -> dict[str, float]:
    """{"nmi_NAME", "purity_NAME"} for each labelling, and the number of clusters. clusters: [B * N]

    Normalized mutual information by scikit-learn (arithmetic mean of the entropies); purity: the share of patches that
    have the most frequent label of their cluster.
    """
    found: dict[str, float] = {"clusters": len(np.unique(clusters))}
    for name, (labels, counts) in known.labels.items():
        if counts.any():
            labels, group = labels[counts], clusters[counts]
            found[f"nmi_{name}"] = float(normalized_mutual_info_score(labels, group))
            found[f"purity_{name}"] = float(contingency_matrix(labels, group).max(0).sum() / len(labels))
    return found


def named_share(masks: Tensor, kinds: Tensor) -> dict[str, float]:
    """The share of each kind of patch among the masked ones. masks: [B, N] bool; kinds: [B, N]"""
    return {name: float((kinds[masks] == kind).float().mean()) for kind, name in enumerate(KINDS)}


def scene_numbers(
    known: PatchLabels, similarity: Tensor, clusterings: dict[str, Tensor], masking: tuple[float, float], seed: int
) -> dict:
    """Agreement of each clustering with the labels, the first one beside its shuffled self; where masked patches lie.

    similarity: [B, N] of each patch with the caption; clusterings: {name: [B, N]}; masking: ratio and temperature of
    the draw.
    """
    rows = {}
    for name, clusters in clusterings.items():
        flat = clusters.flatten()
        rows[name] = agreement(flat.numpy(), known)
        if len(rows) == 1:
            order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
            rows[f"{name}, shuffled"] = agreement(flat[order].numpy(), known)
    generator = torch.Generator().manual_seed(seed)
    kinds = known.kinds.view(len(similarity), -1)
    shares = {"all patches": named_share(torch.ones_like(kinds, dtype=torch.bool), kinds)}
    similarity = similarity.repeat(DRAWS, 1)
    for name, guided in (("masked at random", False), ("masked by the text", True)):
        uniform = torch.rand(similarity.shape, generator=generator)
        masks = encodings.draw_masks(similarity, *masking, uniform, guided)
        shares[name] = named_share(masks, kinds.repeat(DRAWS, 1))
    return {"images": len(kinds), "patches": kinds.numel(), "agreement": rows, "masked": shares}


def describe(clusters: np.ndarray, known: PatchLabels) -> dict[int, tuple[str, float, str]]:
    """{cluster: (what its patches show, how pure it is, its most frequent label)}."""
    result = {}
    for cluster in np.unique(clusters).tolist():
        mine = clusters == cluster
        place, share = most_frequent(known.labels["object"][0][mine])
        names = ("class", "color") if place == "object" else ("background",)
        found = [most_frequent(labels[mine & counts]) for labels, counts in (known.labels[name] for name in names)]
        label, purity = max(found, key=lambda item: item[1])
        words = ", ".join(f"{part:.0%} {name}" for name, part in found)
        where = "on objects" if place == "object" else "background"
        result[cluster] = f"{share:.0%} {where}, of these {words}", share * purity, label
    return result


def most_frequent(labels: np.ndarray) -> tuple[str, float]:
    """The most frequent label, and its share."""
    names, counts = np.unique(labels, return_counts=True)
    return str(names[counts.argmax()]), float(counts.max() / len(labels))


def number_tables(numbers: dict) -> tuple[list[list[str]], list[list[str]]]:
    """Both tables of `scene_numbers`, each with its headings as the first row."""
    head = [f"{kind} {label}" for kind in ("NMI", "purity") for label in LABELS]
    first = [["clusters of patches", "in use", *head]]
    for name, found in numbers["agreement"].items():
        cells = [found.get(f"{kind}_{label}") for kind in ("nmi", "purity") for label in LABELS]
        first.append([name, str(found["clusters"]), *("-" if x is None else f"{x:.3f}" for x in cells)])
    second = [["patches", "on named objects", "on other objects", "on the background"]]
    for name, share in numbers["masked"].items():
        second.append([name, *(f"{share[kind]:.1%}" for kind in ("named", "unnamed", "background"))])
    return first, second
