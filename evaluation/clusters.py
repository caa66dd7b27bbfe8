"""How well clusters of patches agree with labels: normalized mutual information, purity; k-means to compare with."""

from __future__ import annotations

import torch
from torch import Tensor


def contingency(labels: Tensor, clusters: Tensor) -> Tensor:
    """How often each label meets each cluster. labels, clusters: [P] integers of any kind -> [labels, clusters]"""
    if labels.shape != clusters.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"labels {tuple(labels.shape)} and clusters {tuple(clusters.shape)}: one each per item, not none"
        )
    rows = labels.unique(return_inverse=True)[1]
    columns = clusters.unique(return_inverse=True)[1]
    width = int(columns.max()) + 1
    counts = (rows * width + columns).bincount(minlength=(int(rows.max()) + 1) * width)
    return counts.view(-1, width)


def normalized_mutual_information(labels: Tensor, clusters: Tensor) -> float:
    """I(labels; clusters) / mean of both entropies, 0 to 1; 1 where neither varies.

    It rises with the number of clusters by chance alone, so compare it at equal numbers, or with shuffled clusters.
    """
    joint = contingency(labels, clusters).double() / len(labels)
    rows, columns = joint.sum(1), joint.sum(0)
    entropies = float(torch.special.entr(rows).sum()), float(torch.special.entr(columns).sum())
    if sum(entropies) == 0:
        return 1.0
    information = sum(entropies) - float(torch.special.entr(joint).sum())
    return max(0.0, information) / (sum(entropies) / 2)


def purity(labels: Tensor, clusters: Tensor) -> float:
    """Share of items that have the most frequent label of their cluster, 0 to 1."""
    return float(contingency(labels, clusters).max(0).values.sum()) / len(labels)


def cluster_purity(labels: Tensor, clusters: Tensor) -> dict[int, tuple[int, float, int]]:
    """{cluster: (its most frequent label, that label's share, number of items)}."""
    counts = contingency(labels, clusters)
    names, kinds = clusters.unique().tolist(), labels.unique().tolist()
    sizes = counts.sum(0)
    best = counts.max(0)
    return {
        name: (kinds[int(best.indices[i])], float(best.values[i]) / int(sizes[i]), int(sizes[i]))
        for i, name in enumerate(names)
    }


def shuffled(clusters: Tensor, generator: torch.Generator) -> Tensor:
    """The same clusters, of the same sizes, on random items: what chance alone reaches."""
    return clusters[torch.randperm(len(clusters), generator=generator)]


def kmeans(points: Tensor, count: int, generator: torch.Generator, iterations: int = 50) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ centers, until nothing changes or for `iterations` rounds.

    points: [P, D] -> (cluster of each point [P], centers [count, D]). A cluster that loses all its points takes the
    point that lies farthest from its center. Raises ValueError with fewer points than clusters.
    """
    if not 1 <= count <= len(points):
        raise ValueError(f"{count} clusters of {len(points)} points")
    return lloyd(points, spread_centers(points, count, generator), iterations)


def spread_centers(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each next center with probability squared distance to the nearest."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        weights = nearest.double()
        if not float(weights.sum()) > 0:  # fewer distinct points than centers
            weights = torch.ones_like(weights)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen].clone()


def lloyd(points: Tensor, centers: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Assign each point to its nearest center and move the centers to the means, in turn."""
    previous = None
    for _ in range(iterations):
        distance, clusters = nearest_center(points, centers)
        if previous is not None and torch.equal(clusters, previous):
            break
        sizes = clusters.bincount(minlength=len(centers))
        sums = torch.zeros_like(centers).index_add_(0, clusters, points)
        centers = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centers)
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty):
            centers[empty] = points[distance.topk(len(empty)).indices]
        previous = clusters
    return nearest_center(points, centers)[1], centers


def nearest_center(points: Tensor, centers: Tensor, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """(squared distance [P], index [P]) of each point's nearest center."""
    parts = []
    for part in points.split(chunk):
        squared = part.square().sum(1, keepdim=True) - 2 * part @ centers.T + centers.square().sum(1)
        parts.append(squared.min(1))
    return torch.cat([part.values for part in parts]).clamp(min=0), torch.cat([part.indices for part in parts])


def named_share(masks: Tensor, kinds: Tensor) -> dict[str, float]:
    """Where the masked patches lie: the share of each kind of patch among them.

    masks: [B, N] bool; kinds: [B, N] of 0 background, 1 an object that the caption names, 2 another object.
    """
    masked = kinds[masks]
    names = ("background", "named", "unnamed")
    return {name: float((masked == kind).float().mean()) for kind, name in enumerate(names)}


def agreement(clusters: Tensor, labels: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """{"nmi_NAME": ..., "purity_NAME": ...} for each labelling, and the number of clusters.

    clusters: [P]; labels: {NAME: (label of each patch [P], whether the patch counts [P] bool)}.
    """
    found: dict[str, float] = {"clusters": len(clusters.unique())}
    for name, (label, counts) in labels.items():
        if counts.any():
            found[f"nmi_{name}"] = normalized_mutual_information(label[counts], clusters[counts])
            found[f"purity_{name}"] = purity(label[counts], clusters[counts])
    return found
