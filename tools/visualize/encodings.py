"""What a pre-training checkpoint sees in images: patterns and masks.

Shapes: B images with a caption each, N = g x g patches, L text tokens, K patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dataset.transforms import to_pixels, to_unit
from models.mim import CodebookTarget, as_mask, draw_patches, masked_count, random_mask, text_guided_mask
from models.pretrain import PretrainModel
from models.semmim import project
from models.tensors import fp32

BATCH = 50  # images at once


@dataclass
class Clustering:
    """A cluster for each patch, [B, N], and how clearly the patch belongs to it (higher is clearer)."""

    assignment: Tensor
    score: Tensor

    def examples(self, cluster: int, count: int) -> list[tuple[int, int]]:
        """(image, place) of the patches that belong to a cluster most clearly, at most two of an image."""
        numbers, places = (self.assignment == cluster).nonzero().T
        order = self.score[numbers, places].argsort(descending=True, stable=True)
        chosen: list[tuple[int, int]] = []
        for number, place in zip(numbers[order].tolist(), places[order].tolist(), strict=True):
            if sum(number == other for other, _ in chosen) < 2:
                chosen.append((number, place))
        return chosen[:count]


@torch.no_grad()
def encode(
    model: PretrainModel, images: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Clustering | None]:
    """The momentum teacher on images [B, 3, S, S] with their captions [B, L]; without a teacher, the student.

    -> (similarity [B, N], the cosine of each patch with the caption in the ITC space; each patch's pattern, None
    without an encoding head). The patterns' distributions are those that pre-training takes as targets: text injected
    (Section 3.2.2), centered, sharpened.
    """
    encoder, vision_proj, text_encoder, text_proj = (
        getattr(model.teacher, part, getattr(model.backbone, part))
        for part in ("image_encoder", "vision_proj", "text_encoder", "text_proj")
    )
    mim, device, similarity, scores, patterns = model.mim, next(model.parameters()).device, [], [], []
    for rows in zip(*(part.to(device).split(BATCH) for part in (images, input_ids, attention_mask)), strict=True):
        text_embeds = text_encoder(*rows[1:])
        plain, injected, below = encoder.forward_twice(rows[0], text_embeds, rows[2], mim.inject_from)
        patches = vision_proj(model.compared_patches(encoder, plain, below))  # [b, N, E]
        text_feat, unused = project(text_proj, text_embeds[:, 0]), torch.zeros(patches.shape[:2], device=device)
        similarity.append(text_guided_mask(patches, text_feat, mim.mask_ratio, mim.mask_temperature, unused)[1].cpu())
        if mim.target == "encoding":
            logits = fp32(model.teacher.head(injected[:, 1:])) - model.patch_center.value  # [b, N, K]
            score, pattern = (logits / mim.teacher_temperature).softmax(-1).max(-1)
            scores.append(score.cpu())
            patterns.append(pattern.cpu())
    return torch.cat(similarity), Clustering(torch.cat(patterns), torch.cat(scores)) if patterns else None


def kmeans_of_pixels(images: Sequence[Image.Image], patch_size: int, count: int, seed: int) -> Clustering:
    """Patches clustered by their pixels."""
    from sklearn.cluster import KMeans  # here: scikit-learn takes two seconds to import

    pixels = torch.stack([to_unit(to_pixels(image)) for image in images])
    points = torch.nn.functional.unfold(pixels, patch_size, stride=patch_size).transpose(1, 2)  # [B, N, 3 p p]
    flat = points.flatten(0, 1).numpy()
    kmeans = KMeans(min(count, len(flat)), n_init=1, random_state=seed).fit(flat)
    distance = torch.from_numpy(kmeans.transform(flat)).min(1).values
    clusters = torch.from_numpy(kmeans.labels_).long()
    return Clustering(clusters.view(points.shape[:2]), -distance.view(points.shape[:2]))


def dvae_codes(target: CodebookTarget, images: Sequence[Image.Image], grid: int) -> Clustering:
    """The code of each patch, and 0 as score of all: codes are hard."""
    side = 8 * grid  # the dVAE makes one code of 8 x 8 pixels
    pixels = [to_unit(to_pixels(image.resize((side, side), Image.Resampling.BICUBIC))) for image in images]
    codes = torch.cat([target(torch.stack(pixels[i : i + BATCH])) for i in range(0, len(pixels), BATCH)])
    return Clustering(codes, torch.zeros(codes.shape))


def draw_masks(similarity: Tensor, ratio: float, temperature: float, uniform: Tensor, guided: bool) -> Tensor:
    """Masks [B, N] as pre-training draws them: by the softmax over similarities [B, N], or at random.

    uniform: [B, N] draws in [0, 1).
    """
    patches = similarity.shape[1]
    if guided:
        return as_mask(draw_patches(similarity / temperature, masked_count(patches, ratio), uniform), patches)
    return as_mask(random_mask(ratio, uniform), patches)
