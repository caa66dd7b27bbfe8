"""The encodings in numbers: how patterns of the built-in scenes agree with what their patches show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from evaluation import clusters, encodings
from tools.demo import scenes
from tools.visualize import pages

DRAWS = 20  # masks per image behind the share of masked patches on named objects
COLUMNS = ("object", "class", "color", "background")


@dataclass
class Samples:
    """Images as the model sees them, with a caption each, and with scenes what each patch shows."""

    images: list[Image.Image]
    captions: list[str]
    scenes: list[scenes.Scene] | None = None


@dataclass
class Clustering:
    """A cluster for each patch, [B, N], and how clearly the patch belongs to it (higher is clearer)."""

    assignment: Tensor
    score: Tensor


@dataclass
class PatchLabels:
    """Of all patches, [B * N]: names of what they show, and which of them each labelling is about."""

    names: dict[str, list[str]]  # labelling -> what its numbers mean
    labels: dict[str, tuple[Tensor, Tensor]]  # labelling -> (number of each patch, whether it counts)
    named: Tensor  # 0 background, 1 an object that the caption names, 2 another object


def patch_labels(samples: Samples, grid: int) -> PatchLabels:
    """Class and color of the object that a patch shows, color of the background, and whether it shows an object."""
    shapes, colors, grounds = [*scenes.SHAPES, "sign"], list(scenes.COLOURS), list(scenes.BACKGROUNDS)
    rows, kinds = [], []
    for scene, caption, image in zip(samples.scenes, samples.captions, samples.images, strict=True):
        named = scenes.named_objects(scene, caption)
        for place in scenes.patch_objects(scene, image.width, grid):
            o = scene.objects[place] if place >= 0 else None
            shape, color = (shapes.index(o.shape), colors.index(o.colour)) if o else (0, 0)
            rows.append([shape, color, grounds.index(scene.background), int(o is not None)])
            kinds.append(0 if o is None else 1 if named[place] else 2)
    shape, color, ground, on_object = torch.tensor(rows).T
    everywhere, inside = torch.ones_like(on_object, dtype=torch.bool), on_object.bool()
    return PatchLabels(
        {"class": shapes, "color": colors, "background": grounds, "object": ["background", "object"]},
        {
            "class": (shape, inside),
            "color": (color, inside),
            "background": (ground, ~inside),
            "object": (on_object, everywhere),
        },
        torch.tensor(kinds),
    )


def scene_numbers(
    samples: Samples,
    similarity: Tensor,
    clusterings: dict[str, Clustering],
    grid: int,
    masking: dict,
    seed: int,
) -> dict:
    """Agreement of each clustering with the labels, the first one beside its shuffled self; where masked patches lie.

    similarity: [B, N] of each patch with the caption; masking: the `ratio` and `temperature` of the draw.
    """
    known = patch_labels(samples, grid)
    rows = {}
    for name, clustering in clusterings.items():
        flat = clustering.assignment.flatten()
        rows[name] = clusters.agreement(flat, known.labels)
        if name == next(iter(clusterings)):
            chance = clusters.shuffled(flat, torch.Generator().manual_seed(seed))
            rows[f"{name}, shuffled"] = clusters.agreement(chance, known.labels)
    generator = torch.Generator().manual_seed(seed)
    kinds = known.named.view(len(samples.images), -1)
    shares = {"all patches": clusters.named_share(torch.ones_like(kinds, dtype=torch.bool), kinds)}
    similarity = similarity.repeat(DRAWS, 1)
    for name, guided in (("masked at random", False), ("masked by the text", True)):
        uniform = torch.rand(similarity.shape, generator=generator)
        masks = encodings.draw_masks(similarity, masking["ratio"], masking["temperature"], uniform, guided)
        shares[name] = clusters.named_share(masks, kinds.repeat(DRAWS, 1))
    return {"images": len(samples.images), "patches": known.named.numel(), "agreement": rows, "masked": shares}


def describe(flat: Tensor, labels: PatchLabels) -> dict[int, tuple[str, float, str]]:
    """{cluster: (what its patches show, how pure it is, its most frequent label)}."""
    purities = {
        name: clusters.cluster_purity(labels.labels[name][0], flat) for name in ("class", "color", "background")
    }
    on_object = clusters.cluster_purity(labels.labels["object"][0], flat)
    result = {}
    for cluster, (is_object, share, _) in on_object.items():
        kinds = ("class", "color") if is_object else ("background",)
        if is_object:
            inside = (flat == cluster) & labels.labels["object"][0].bool()
            found = {
                kind: clusters.cluster_purity(labels.labels[kind][0][inside], flat[inside])[cluster] for kind in kinds
            }
        else:
            found = {kind: purities[kind][cluster] for kind in kinds}
        words = [f"{found[kind][1]:.0%} {labels.names[kind][found[kind][0]]}" for kind in kinds]
        best = max(found.values(), key=lambda item: item[1])
        place = f"{share:.0%} on objects, of these " if is_object else f"{share:.0%} background, of these "
        label = next(labels.names[kind][item[0]] for kind, item in found.items() if item is best)
        result[cluster] = (place + ", ".join(words), share * best[1], label)
    return result


def numbers_rows(numbers: dict) -> tuple[list[str], list[list[str]], list[str], list[list[str]]]:
    """Headings and rows of both tables, as strings."""
    head = [
        "clusters of patches",
        "in use",
        *(f"NMI {name}" for name in COLUMNS),
        *(f"purity {name}" for name in COLUMNS),
    ]
    rows = []
    for name, found in numbers["agreement"].items():
        cells = [found.get(f"{kind}_{label}") for kind in ("nmi", "purity") for label in COLUMNS]
        rows.append([name, str(found["clusters"]), *("-" if x is None else f"{x:.3f}" for x in cells)])
    shares = [
        [name, *(f"{share[kind]:.1%}" for kind in ("named", "unnamed", "background"))]
        for name, share in numbers["masked"].items()
    ]
    return head, rows, ["patches", "on named objects", "on other objects", "on the background"], shares


def numbers_text(numbers: dict) -> str:
    """Both tables, aligned."""
    lines = [f"{numbers['images']} scenes, {numbers['patches']} patches"]
    head, rows, head2, shares = numbers_rows(numbers)
    for table in ([head, *rows], [head2, *shares]):
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines += [
            "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in table
        ]
        lines.append("")
    return "\n".join(lines)


def numbers_html(numbers: dict) -> str:
    head, rows, head2, shares = numbers_rows(numbers)

    return (
        "<h2 id=numbers>The encodings in numbers</h2>"
        f"<p class=note>{numbers['images']} built-in scenes that training never shows, {numbers['patches']} patches. "
        "NMI is the normalized mutual information between clusters and labels: object or background over all patches, "
        "class and color over the patches on objects, the background's color over the others. Purity is the share of "
        "patches with the most frequent label of their cluster. Both rise with the number of clusters, so k-means has "
        "as many as the encoding head uses. Shuffled: clusters of the same sizes at random.</p>"
        f"{pages.table(head, rows)}"
        f"<p class=note>Where masked patches lie ({DRAWS} draws per image).</p>{pages.table(head2, shares)}"
    )
