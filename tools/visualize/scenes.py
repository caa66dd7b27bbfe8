"""The patterns in numbers: how clusters of the demo scenes' patches agree with what the patches show.

Labels are {LABELLING: the name of each of B * N patches, "" if the labelling is not about it}. The labellings: object
(object or background), class and color of the object, color of the background, and the kind of patch (KINDS).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tools.demo import scenes
from tools.visualize import encodings

DRAWS = 20  # masks per image behind the share of masked patches on named objects
KINDS = ("named", "unnamed", "background")  # of a patch: an object that the caption names, another one, none
LABELS = ("object", "class", "color", "background")
Labels = dict[str, np.ndarray]


def patch_labels(shown: Sequence[scenes.Scene], captions: Sequence[str], size: int, grid: int) -> Labels:
    rows = []
    for scene, caption in zip(shown, captions, strict=True):
        named = scenes.named_objects(scene, caption)
        for place in scenes.patch_objects(scene, size, grid):
            if place < 0:
                rows.append(("background", "", "", scene.background, "background"))
            else:
                o = scene.objects[place]
                rows.append(("object", o.shape, o.color, "", "named" if named[place] else "unnamed"))
    return dict(zip((*LABELS, "kind"), np.array(rows).T, strict=True))


def agreement(clusters: np.ndarray, known: Labels) -> dict[str, float]:
    """{"nmi_NAME", "purity_NAME"} for each labelling, and the number of clusters. clusters: [B * N]

    Normalized mutual information by scikit-learn (arithmetic mean of the entropies); purity: the share of patches that
    have the most frequent label of their cluster.
    """
    from sklearn.metrics import normalized_mutual_info_score  # here: scikit-learn takes two seconds to import
    from sklearn.metrics.cluster import contingency_matrix

    found: dict[str, float] = {"clusters": len(np.unique(clusters))}
    for name in LABELS:
        labels, group = known[name][known[name] != ""], clusters[known[name] != ""]
        if len(labels):
            found[f"nmi_{name}"] = float(normalized_mutual_info_score(labels, group))
            found[f"purity_{name}"] = float(contingency_matrix(labels, group).max(0).sum() / len(labels))
    return found


def scene_numbers(
    known: Labels, similarity: Tensor, clusterings: dict[str, Tensor], masking: tuple[float, float], seed: int
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
    kinds = known["kind"].reshape(similarity.shape)
    shares = {"all patches": kind_shares(kinds)}
    uniform = torch.rand((DRAWS, *similarity.shape), generator=torch.Generator().manual_seed(seed))
    for name, guided in (("masked at random", False), ("masked by the text", True)):
        masks = [encodings.draw_masks(similarity, *masking, draw, guided).numpy() for draw in uniform]
        shares[name] = kind_shares(np.concatenate([kinds[mask] for mask in masks]))
    return {"images": len(kinds), "patches": kinds.size, "agreement": rows, "masked": shares}


def kind_shares(kinds: np.ndarray) -> dict[str, float]:
    return {kind: float((kinds == kind).mean()) for kind in KINDS}


def number_tables(numbers: dict) -> tuple[list[list[str]], list[list[str]]]:
    """Both tables of `scene_numbers`, each with its headings as the first row."""
    head = [f"{kind} {label}" for kind in ("NMI", "purity") for label in LABELS]
    first = [["clusters of patches", "in use", *head]]
    for name, found in numbers["agreement"].items():
        cells = [found.get(f"{kind}_{label}") for kind in ("nmi", "purity") for label in LABELS]
        first.append([name, str(found["clusters"]), *("-" if x is None else f"{x:.3f}" for x in cells)])
    second = [["patches", "on named objects", "on other objects", "on the background"]]
    second += [[name, *(f"{share[kind]:.1%}" for kind in KINDS)] for name, share in numbers["masked"].items()]
    return first, second
