"""Image-text alignment, ITC and ITM, as pre-training and retrieval fine-tuning share it (after ALBEF)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.bert import Memory
from models.losses import global_count, itc_loss, itm_loss, rank_share, sample_hard_negatives
from models.momentum import FeatureQueue
from models.semmim import SemMIM
from models.tensors import all_gather_with_grad, interleave
from utils import Config, all_gather

STUCK = 0.98  # matching has learned next to nothing while its loss is above this share of what constant answers give
PATIENCE = 10_000  # pairs after which that is worth a warning


@dataclass
class Features:
    """What alignment compares, of the B pairs of a micro-batch on this rank."""

    image: Tensor  # [B, E] the student's, L2-normalised
    text: Tensor  # [B, E]
    image_m: Tensor  # [B, E] of the momentum teacher; the student's own (without gradient) where there is no queue
    text_m: Tensor  # [B, E]
    image_id: Tensor  # [B] equal ids: positives of each other
    caption_id: Tensor  # [B] equal for equal captions


def alpha_at(step: int, steps_per_epoch: int, alpha: float, done: float = 0.0) -> float:
    """The weight of ITC's soft targets at an optimizer step (from 0), as ALBEF ramps it.

    It rises from 0 to `alpha` over the first epoch, while the momentum teacher is still worth little; in a training
    that is shorter than an epoch over the whole of it, with the share `done` that is over.
    """
    return alpha * min(1.0, max(step / max(1, steps_per_epoch), done))


def contrast(
    features: Features, temperature: Tensor, queue: FeatureQueue | None, alpha: float = 0.0, remember: bool = True
) -> Tensor:
    """ITC against the momentum features of all ranks and the queue, or without queue against the batch of all ranks.

    alpha: weight of the soft targets (with a queue); remember: whether the queue takes this batch in at its `flush`.
    """
    all_id = all_gather(features.image_id)
    if queue is None:
        images, texts = all_gather_with_grad(features.image), all_gather_with_grad(features.text)
        return itc_loss(features.image, features.text, images, texts, features.image_id, all_id, temperature)
    images, texts = all_gather(features.image_m), all_gather(features.text_m)
    if remember:
        queue.wait(images, texts, all_id)
    return itc_loss(
        features.image,
        features.text,
        torch.cat([images, queue.image_feat]),
        torch.cat([texts, queue.text_feat]),
        features.image_id,
        torch.cat([all_id, queue.image_id]),
        temperature,
        alpha,
        features.image_m,
        features.text_m,
    )


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


class MatchingWatch:
    """Says once in a run, after some thousand pairs, that matching has learned next to nothing, with the remedy.

    itm: the configuration's `itm`; pairs_per_step: of all ranks, in one optimizer step.
    """

    def __init__(self, itm: Config, pairs_per_step: int):
        self.easy_first, self.pairs_per_step = itm.temperature is not None, pairs_per_step
        self.said = False

    def line(self, step: int, loss: float) -> str | None:
        """A line of warning or None; `loss`: the mean ITM loss of the last steps, when `step` of them are done.

        Two of three rows are negatives: the constant answer "no match, 2 to 1" is right on 66.7% of them and costs
        0.6365, the entropy of one third.
        """
        constant, pairs = math.log(3) - 2 / 3 * math.log(2), step * self.pairs_per_step
        if self.said or pairs < PATIENCE or loss < STUCK * constant:
            return None
        self.said = True
        remedy = "its negatives are those that ITC finds most alike. Begin with easier ones (itm.temperature=1.0)"
        if self.easy_first:
            remedy = "take more steps with fewer pairs each (train.batch_size), or harden later (itm.harden)"
        return (
            f"warning: matching has learned next to nothing from {pairs} pairs (loss {loss:.3f}, a constant answer has "
            f"{constant:.3f}): {remedy}, and re-rank with rerank.score=itm+itc/t, which loses nothing meanwhile"
        )


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


def match(
    net: SemMIM,
    text_embeds: Tensor,
    mask: Tensor | None,
    image_memory: Memory,
    negatives: Negatives,
    everywhere: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ITM: the pair itself, the image with a wrong text, the text with a wrong image -> (loss, accuracy).

    text_embeds: [B, L, D]; mask: [B, L], None where nothing is padded; image_memory: keys and values of the B images
    (`net.fusion_encoder.project_memory`), projected once and shared by all rows; everywhere: the valid rows of all
    ranks, where they are known (`global_count` of `matching_rows`).
    Rows of one image stand together, so that nothing is copied for two thirds of them.
    """
    size, valid = len(text_embeds), negatives.valid
    texts = interleave(text_embeds, text_embeds[negatives.text])  # [2B, L, D]
    own_mask = None if mask is None else interleave(mask, mask[negatives.text])
    own_image = net.fuse(texts, own_mask, image_memory, keep=1)
    other_image = net.fuse(text_embeds, mask, image_memory, rows=negatives.image, keep=1)
    logits = net.itm_logits(torch.cat([own_image, other_image]))  # [3B, 2]
    target = torch.zeros(3 * size, dtype=torch.long, device=valid.device)
    target[0 : 2 * size : 2] = 1
    if everywhere is None:
        everywhere = global_count(valid.sum())
    loss = rank_share(itm_loss(logits, target, valid), everywhere)
    with torch.no_grad():
        accuracy = ((logits.argmax(1) == target) & valid).sum() / valid.sum().clamp(min=1)
    return loss, accuracy
