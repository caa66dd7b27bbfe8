"""Image-text alignment, ITC and ITM (the paper, Section 3.2.3), as pre-training and retrieval share them (after ALBEF).

Similarities and softmaxes are computed in fp32 under any autocast, because a half-precision similarity divided by a
temperature of 0.07 overflows easily. Shapes: B pairs of a micro-batch on this rank, E the width of the ITC space.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.bert import Memory
from models.losses import rank_share
from models.momentum import FeatureQueue
from models.semmim import SemMIM
from models.tensors import all_gather_with_grad, full_precision, interleave
from utils import Config, all_gather


@dataclass
class Features:
    """What alignment compares, L2-normalized."""

    image: Tensor  # [B, E] the student's
    text: Tensor  # [B, E]
    image_m: Tensor  # [B, E] of the momentum teacher; the student's own (without gradient) if there is no queue
    text_m: Tensor  # [B, E]
    image_id: Tensor  # [B] equal ids: positives of each other
    caption_id: Tensor  # [B] equal for equal captions


# ------------------------------------------------------------------------------------ ITC: image-text contrast


def alpha_at(step: int, steps_per_epoch: int, alpha: float, done: float = 0.0) -> float:
    """The weight of ITC's soft targets at an optimizer step (from 0), as ALBEF ramps it.

    It rises from 0 to `alpha` over the first epoch, while the momentum teacher is still worth little, or over a whole
    training that is shorter than an epoch, of which the share `done` is over.
    """
    return alpha * min(1.0, max(step / max(1, steps_per_epoch), done))


def contrast(
    features: Features, temperature: Tensor, queue: FeatureQueue | None, alpha: float = 0.0, remember: bool = True
) -> Tensor:
    """ITC against the momentum features of all ranks and the queue, or without queue against the batch of all ranks.

    alpha: weight of the soft targets (with a queue); remember: whether the queue takes this batch in at its `flush`.
    """
    students, all_id = (features.image, features.text), all_gather(features.image_id)
    if queue is None:
        images, texts = (all_gather_with_grad(feat) for feat in students)
        return itc_loss(*students, images, texts, features.image_id, all_id, temperature)
    images, texts = all_gather(features.image_m), all_gather(features.text_m)
    if remember:
        queue.wait(images, texts, all_id)
    images, texts = torch.cat([images, queue.image_feat]), torch.cat([texts, queue.text_feat])
    all_id = torch.cat([all_id, queue.image_id])
    momentum = features.image_m, features.text_m
    return itc_loss(*students, images, texts, features.image_id, all_id, temperature, alpha, *momentum)


@full_precision
def itc_loss(
    image_feat: Tensor,
    text_feat: Tensor,
    image_candidates: Tensor,
    text_candidates: Tensor,
    image_id: Tensor,
    candidate_id: Tensor,
    temperature: Tensor,
    alpha: float = 0.0,
    image_feat_m: Tensor | None = None,
    text_feat_m: Tensor | None = None,
) -> Tensor:
    """L_itc: mean of the image-to-text and the text-to-image contrastive loss of the local batch.

    image_feat, text_feat: [B, E] student features; *_candidates: [C, E] what they are compared with; image_id: [B];
    candidate_id: [C], negative for an empty slot of the queue, which counts for nothing. Every column of the same image
    is a positive, with equal shares. alpha > 0 mixes in the momentum features' own distribution (*_feat_m: [B, E]).
    """
    empty = candidate_id < 0  # [C]
    positive = (image_id[:, None] == candidate_id[None, :]).to(image_feat.dtype)  # [B, C]
    hard = positive / positive.sum(1, keepdim=True)

    def one_direction(query: Tensor, query_m: Tensor | None, candidates: Tensor) -> Tensor:
        logits = (query @ candidates.T / temperature).masked_fill(empty, -torch.inf)  # [B, C]
        targets = hard
        if alpha > 0:
            with torch.no_grad():
                soft = (query_m @ candidates.T / temperature).masked_fill(empty, -torch.inf).softmax(1)
                targets = alpha * soft + (1 - alpha) * hard
        log_probs = logits.log_softmax(1).masked_fill(empty, 0.0)  # 0 * -inf would be NaN
        return -(targets * log_probs).sum(1).mean()

    i2t = one_direction(image_feat, image_feat_m, text_candidates)
    t2i = one_direction(text_feat, text_feat_m, image_candidates)
    return (i2t + t2i) / 2


# ------------------------------------------------------------------- ITM: image-text matching with hard negatives


@dataclass
class Negatives:
    """The wrong partners of B pairs in ITM."""

    image: Tensor  # [B] the row whose image each text gets
    text: Tensor  # [B] the row whose text each image gets
    valid: Tensor  # [3B] bool, in the order of `match`: own pair and negative text by turns, then negative images


def negative_temperature(itm: Config, itc_temperature: Tensor, done: float) -> Tensor:
    """Temperature of the softmax that ITM's negatives are drawn from, after the share `done` of the training.

    It begins at itm.temperature and falls, by equal factors, to ITC's own within the first share itm.harden; without
    itm.temperature it is ITC's own from the beginning (ALBEF). Easy negatives first, because matching learns nothing
    from those that ITC finds most alike before it can tell any pair from another.
    """
    own = itc_temperature.detach()
    if itm.temperature is None or done >= itm.harden:
        return own
    share = done / itm.harden
    return own**share * itm.temperature ** (1 - share)


def legal_negatives(image_id: Tensor, caption_id: Tensor) -> Tensor:
    """[B, B] bool: whether row j may be a negative of row i, which shares neither its image nor its caption."""
    return (image_id[:, None] != image_id) & (caption_id[:, None] != caption_id)


def matching_rows(image_id: Tensor, caption_id: Tensor) -> Tensor:
    """How many of the 3B rows of `match` are valid, which needs no features: a scalar."""
    return len(image_id) + 2 * legal_negatives(image_id, caption_id).any(1).sum()


def hard_negatives(features: Features, temperature: Tensor, draw_image: Tensor, draw_text: Tensor) -> Negatives:
    """One hard negative image per text and one hard negative text per image, from this rank's rows.

    temperature: see `negative_temperature`; draw_image, draw_text: [B] uniform in [0, 1).
    A row without a legal negative is not valid.
    """
    legal = legal_negatives(features.image_id, features.caption_id)
    with torch.no_grad(), torch.autocast(legal.device.type, enabled=False):
        t2i = features.text @ features.image_m.T / temperature  # [B, B]
        i2t = features.image @ features.text_m.T / temperature
    image, valid_image = sample_hard_negatives(t2i, legal, draw_image)
    text, valid_text = sample_hard_negatives(i2t, legal, draw_text)
    own_and_text = interleave(torch.ones_like(valid_text), valid_text)
    return Negatives(image, text, torch.cat([own_and_text, valid_image]))


@full_precision
@torch.no_grad()
def sample_hard_negatives(similarity: Tensor, legal: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One hard negative a row, drawn with the weights softmax(similarity) + 1e-6 on the legal entries.

    similarity: [B, B] already divided by the temperature; legal: [B, B] bool; uniform: [B] in [0, 1), one draw a row.
    Returns (index [B], valid [B] bool): a row without a legal entry is not valid, its index is 0.
    Similarities that overflowed count as 0, so that the draw never fails.
    """
    similarity = torch.nan_to_num(similarity, 0.0, 0.0, 0.0).masked_fill(~legal, -torch.inf)
    weights = (torch.nan_to_num(similarity.softmax(1)) + 1e-6) * legal  # a row of -inf only has NaN as its softmax
    # Inverse transform in fp64: the first entry whose cumulative weight exceeds the draw. An illegal entry adds
    # nothing to the cumulative sum and so is never the first.
    cumulative = weights.double().cumsum(1)  # [B, B]
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    index = (cumulative <= threshold).sum(1)
    valid = legal.any(1)
    return torch.where(valid, index, 0), valid


def match(
    net: SemMIM,
    text_embeds: Tensor,
    mask: Tensor | None,
    image_memory: Memory,
    negatives: Negatives,
    everywhere: Tensor,
) -> tuple[Tensor, Tensor]:
    """L_itm on the pair itself, the image with a wrong text, the text with a wrong image -> (loss, accuracy).

    text_embeds: [B, L, D]; mask: [B, L], None if nothing is padded; image_memory: keys and values of the B images
    (`net.fusion_encoder.project_memory`), projected once and shared by all rows; everywhere: the valid rows of all
    ranks (`global_count` of `matching_rows`).
    Rows of one image stand together, so that nothing is copied for two thirds of them.
    """
    size, valid = len(text_embeds), negatives.valid
    texts = interleave(text_embeds, text_embeds[negatives.text])  # [2B, L, D]
    own_mask = None if mask is None else interleave(mask, mask[negatives.text])
    own_image = net.fusion_encoder(texts, own_mask, image_memory, keep=1)
    other_image = net.fusion_encoder(text_embeds, mask, image_memory, rows=negatives.image, keep=1)
    logits = net.itm_logits(torch.cat([own_image, other_image]))  # [3B, 2]
    target = torch.zeros(3 * size, dtype=torch.long, device=valid.device)
    target[0 : 2 * size : 2] = 1
    loss = rank_share(itm_loss(logits, target, valid), everywhere)
    with torch.no_grad():
        accuracy = ((logits.argmax(1) == target) & valid).sum() / valid.sum().clamp(min=1)
    return loss, accuracy


@full_precision
def itm_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Sum of the two-class cross-entropy over the valid rows. logits: [R, 2]; target: [R] in {0, 1}; valid: [R] bool"""
    return (F.cross_entropy(logits, target, reduction="none") * valid).sum()
