"""Image-text alignment, ITC and ITM, as pre-training and retrieval fine-tuning share it (ALBEF, Section 3.2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.losses import global_mean, itc_loss, itm_loss, sample_hard_negatives
from models.momentum import FeatureQueue
from models.semmim import SemMIM
from utils import UserError, all_gather, all_gather_with_grad, world_size

STUCK = 0.98  # matching has learned next to nothing while its loss is above this share of what constant answers give
PATIENCE = 10_000  # pairs after which that is worth a warning


@dataclass
class Features:
    """What alignment compares, of the B pairs of a micro-batch on this rank."""

    image: Tensor  # [B, E] the student's, L2-normalised
    text: Tensor  # [B, E]
    image_m: Tensor  # [B, E] of the momentum twins; the student's own (without gradient) where there is no queue
    text_m: Tensor  # [B, E]
    image_id: Tensor  # [B] equal ids: positives of each other
    caption_id: Tensor  # [B] equal for equal captions


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


def check_itm(itm) -> None:
    """Raise UserError for a value of the configuration's `itm` that has no meaning, naming its key."""
    for key, (low, high) in {"temperature": (0.001, 10**6), "harden": (0.001, 1)}.items():
        value = itm[key]
        if value is None and key == "temperature":
            continue  # ITC's own
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise UserError(f"itm.{key}: {value!r} is not a number from {low} to {high}")


def negative_temperature(itm, itc_temperature: Tensor, done: float) -> Tensor:
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
    """Says once in a run, after some thousand pairs, that matching has learned next to nothing, with the remedy."""

    def __init__(self, train_cfg):
        self.pairs_a_step = train_cfg.batch_size * train_cfg.accumulation * world_size()
        self.said = False

    def line(self, progress, means: dict[str, float]) -> str | None:
        """progress: `step` optimizer steps are done; means: of the last interval, with `loss/itm`. -> a line or None

        Two of three rows are negatives: the constant answer "no match, 2 to 1" is right on 66.7% of them and costs
        0.6365, the entropy of one third.
        """
        constant, loss = math.log(3) - 2 / 3 * math.log(2), means["loss/itm"]
        pairs = progress.step * self.pairs_a_step
        if self.said or pairs < PATIENCE or loss < STUCK * constant:
            return None
        self.said = True
        return (
            f"warning: matching has learned next to nothing from {pairs} pairs (loss {loss:.3f}, a constant answer has "
            f"{constant:.3f}): its negatives are those that ITC finds most alike. Begin with easier ones "
            "(itm.temperature=1.0), and re-rank with rerank.score=itm+itc/t, which loses nothing meanwhile"
        )


def hard_negatives(
    features: Features, temperature: Tensor, draw_image: Tensor, draw_text: Tensor, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(negative image of each text [B], negative text of each image [B], valid [3B]) for ITM.

    A negative never shares the image or the caption with the pair it replaces. temperature: of the softmax that it is
    drawn from, see `negative_temperature`; draw_image, draw_text: [B] uniform;
    groups: negatives are drawn within this many equal groups of consecutive rows, as they would be on that many ranks.
    valid: of the rows in the order of `match`: own pair and negative text by turns, then negative images.
    """
    image_id, caption_id = features.image_id, features.caption_id
    size = image_id.shape[0]
    group = torch.arange(size, device=image_id.device) * groups // size
    legal = (image_id[:, None] != image_id) & (caption_id[:, None] != caption_id) & (group[:, None] == group)
    with torch.no_grad(), torch.autocast(image_id.device.type, enabled=False):
        t2i = features.text @ features.image_m.T / temperature  # [B, B]
        i2t = features.image @ features.text_m.T / temperature
    negative_image, valid_image = sample_hard_negatives(t2i, legal, draw_image)
    negative_text, valid_text = sample_hard_negatives(i2t, legal, draw_text)
    own_and_text = interleave(torch.ones_like(valid_text), valid_text)
    return negative_image, negative_text, torch.cat([own_and_text, valid_image])


def match(
    net: SemMIM, text_embeds: Tensor, mask: Tensor, image_memory: list, negatives: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """ITM: the pair itself, the image with a wrong text, the text with a wrong image -> (loss, accuracy).

    text_embeds: [B, L, D]; mask: [B, L]; image_memory: keys and values of the B images
    (`net.fusion_encoder.project_memory`), projected once and shared by all rows; negatives: from `hard_negatives`.
    Rows of one image stand together, so that nothing is copied for two thirds of them.
    """
    negative_image, negative_text, valid = negatives
    size = mask.shape[0]
    texts = interleave(text_embeds, text_embeds[negative_text])  # [2B, L, D]
    own_image = net.fuse(texts, interleave(mask, mask[negative_text]), image_memory, keep=1)
    other_image = net.fuse(text_embeds, mask, image_memory, rows=negative_image, keep=1)
    logits = net.itm_logits(torch.cat([own_image, other_image]))  # [3B, 2]
    target = torch.zeros(3 * size, dtype=torch.long, device=mask.device)
    target[0 : 2 * size : 2] = 1
    loss = global_mean(itm_loss(logits, target, valid), valid.sum())
    with torch.no_grad():
        accuracy = ((logits.argmax(1) == target) & valid).sum() / valid.sum().clamp(min=1)
    return loss, accuracy


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Rows of two tensors by turns: [B, ...], [B, ...] -> [2B, ...], so that rows of one image stand together."""
    return torch.stack([first, second], 1).flatten(0, 1)
