"""What a pre-training checkpoint sees in images: patterns, masks, predictions, and where a word looks.

Shapes: B images with a caption each, N = g x g patches, L text tokens, K patterns, D the width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.mim import as_mask, draw_patches, masked_count, random_mask, text_guided_mask
from models.pretrain import PretrainModel
from models.semmim import SemMIM, project
from models.tensors import fp32, take


@dataclass
class Encodings:
    """Of B images, on the CPU."""

    similarity: Tensor  # [B, N] S_i, the cosine of each patch with the caption in the ITC space
    tokens: Tensor  # [B, N, D] the image encoder's patch tokens, without text
    probabilities: Tensor | None  # [B, N, K] the teacher's distribution over patterns, None without an encoding head


@torch.no_grad()
def encode(model: PretrainModel, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encodings:
    """The momentum teacher on images [B, 3, S, S] with their captions [B, L]; without a teacher, the student.

    The distributions are those that pre-training takes as targets: text injected (Section 3.2.2), centered, sharpened.
    """
    backbone, teacher = model.backbone, model.teacher
    encoder = getattr(teacher, "image_encoder", backbone.image_encoder)
    vision_proj = getattr(teacher, "vision_proj", backbone.vision_proj)
    text_encoder = getattr(teacher, "text_encoder", backbone.text_encoder)
    text_embeds = text_encoder(input_ids, attention_mask)
    text_feat = project(getattr(teacher, "text_proj", backbone.text_proj), text_embeds[:, 0])
    plain, injected, below = encoder.forward_twice(images, text_embeds, attention_mask, model.mim.inject_from)
    probabilities = None
    if model.mim.target == "encoding":
        logits = fp32(teacher.head(injected[:, 1:])) - model.patch_center.value
        probabilities = (logits / model.mim.teacher_temperature).softmax(-1).cpu()
    unused = plain.new_zeros(plain.shape[0], plain.shape[1] - 1)  # the draws: only the similarity is wanted
    settings = model.mim.mask_ratio, model.mim.mask_temperature
    patches = vision_proj(model.compared_patches(encoder, plain, below))
    _, similarity = text_guided_mask(patches, text_feat, *settings, unused)
    return Encodings(similarity.cpu(), fp32(plain[:, 1:]).cpu(), probabilities)


def draw_masks(similarity: Tensor, ratio: float, temperature: float, uniform: Tensor, guided: bool) -> Tensor:
    """Masks [B, N] as pre-training draws them: by the softmax over similarities [B, N], or at random.

    uniform: [B, N] draws in [0, 1).
    """
    patches = similarity.shape[1]
    if guided:
        return as_mask(draw_patches(similarity / temperature, masked_count(patches, ratio), uniform), patches)
    return as_mask(random_mask(ratio, uniform), patches)


@torch.no_grad()
def predict_masked(
    model: PretrainModel, images: Tensor, input_ids: Tensor, attention_mask: Tensor, masks: Tensor
) -> Tensor:
    """The student's head at the masked patches, from the masked image and the caption. masks: [B, N] -> [B, M, K]

    M patches of each image are masked, the same number in all. K: patterns, dVAE codes, or pixels of a patch.
    """
    text_embeds, _ = model.backbone.encode_text(input_ids, attention_mask)
    embeds = model.backbone.image_encoder(
        images, mask=masks, text=text_embeds, text_mask=attention_mask, inject_from=model.mim.inject_from
    )
    return fp32(model.head(take(embeds[:, 1:], masked_places(masks))))


def masked_places(masks: Tensor) -> Tensor:
    """[B, N] bool with equally many True in each row -> their places [B, M], ascending"""
    return masks.nonzero()[:, 1].view(masks.shape[0], -1)


def patch_pixels(images: Tensor, patch_size: int) -> Tensor:
    """The pixels of each patch. [B, 3, S, S] -> [B, N, 3 p p]"""
    return torch.nn.functional.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


def word_attention(
    backbone: SemMIM, images: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: int | None = None
) -> Tensor:
    """How much each token's cross-attention to each patch speaks for "image and text match" (Grad-CAM).

    The attention weights of a fusion layer times the positive part of the matching logit's gradient by them, averaged
    over the heads, as ALBEF visualizes its cross-attention (Li et al. 2021, Section 6.4). layer: from 0; default: the
    middle one (ALBEF's third of six). -> [B, L, N]
    """
    layers = backbone.fusion_encoder.encoder.layer
    block = layers[(len(layers) - 1) // 2 if layer is None else layer].crossattention
    number = list(layers).index(next(item for item in layers if item.crossattention is block))
    seen: dict[str, Tensor] = {}
    hooks = [
        block.self.query.register_forward_hook(lambda module, inputs, output: seen.update(query=output)),
        block.output.dense.register_forward_pre_hook(lambda module, inputs: seen.update(context=inputs[0])),
    ]
    try:
        with torch.enable_grad():
            memory = backbone.fusion_encoder.project_memory(backbone.image_encoder(images))
            fused = backbone.fusion_encoder(backbone.text_encoder(input_ids, attention_mask), attention_mask, memory)
            (gradient,) = torch.autograd.grad(backbone.itm_logits(fused)[:, 1].sum(), seen["context"])
    finally:
        for hook in hooks:
            hook.remove()
    keys, values = (part.detach() for part in memory[number])  # [B, H, 1+N, d]
    query, gradient = (block.self.split(part.detach()) for part in (seen["query"], gradient))  # [B, H, L, d]
    weights = (query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)  # [B, H, L, 1+N]
    by_weights = gradient @ values.transpose(-1, -2)  # the context is weights @ values
    return (weights * by_weights.clamp(min=0)).mean(1)[:, :, 1:].cpu()
