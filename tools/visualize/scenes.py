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
    """Adjusted mutual information (0 by chance, 1 if equal) with each labelling; the number of clusters, [B * N]."""
    from sklearn.metrics import adjusted_mutual_info_score  # here: scikit-learn takes two seconds to import

    found: dict[str, float] = {"clusters": len(np.unique(clusters))}
    for name in LABELS:
        counts = known[name] != ""
        found[name] = float(adjusted_mutual_info_score(known[name][counts], clusters[counts]))
    return found


def scene_numbers(
    known: Labels, similarity: Tensor, clusterings: dict[str, Tensor], masking: tuple[float, float], seed: int
) -> dict:
    """Agreement of each clustering with the labels; where masked patches lie.

    similarity: [B, N] of each patch with the caption; clusterings: {name: [B, N]}; masking: ratio and temperature of
    the draw.
    """
    rows = {name: agreement(clusters.flatten().numpy(), known) for name, clusters in clusterings.items()}
    kinds = known["kind"].reshape(similarity.shape)
    shares = {"all patches": kind_shares(kinds)}
    uniform = torch.rand((DRAWS, *similarity.shape), generator=torch.Generator().manual_seed(seed))
    for name, guided in (("masked at random", False), ("masked by the text", True)):
        masks = [encodings.draw_masks(similarity, *masking, draw, guided).numpy() for draw in uniform]
        shares[name] = kind_shares(np.concatenate([kinds[mask] for mask in masks]))
    return {"images": len(kinds), "patches": kinds.size, "agreement": rows, "masked": shares}


def kind_shares(kinds: np.ndarray) -> dict[str, float]:
    return {kind: float((kinds == kind).mean()) for kind in KINDS}
