"""The losses on text, and on images with text, as pure functions: tensors in, one scalar out (models/mim.py has MIM's).

Similarities and softmaxes are computed in fp32 whatever the surrounding autocast, because a half-precision
similarity divided by a temperature of 0.07 overflows easily. Loss functions that average over a number of rows
which differs between ranks (MLM, PLM, ITM) return the sum over the local rows; `global_mean` turns sum and
count into the mean over all ranks, as `token_mean` does for tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.tensors import full_precision
from utils import IGNORE, all_reduce_sum, world_size


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Local sum and count -> a loss whose average over the ranks is the mean over the rows of all ranks.

    DDP averages gradients over ranks, so the local sum is divided by the *average* count of a rank.
    total: scalar with gradient; count: scalar; a rank with 0 adds nothing, 0 on all ranks give loss 0.
    """
    return rank_share(total, global_count(count))


def global_count(count: Tensor) -> Tensor:
    """Sums over all ranks, at least 1; several counts in one tensor travel together. [...] -> [...]"""
    return all_reduce_sum(count).clamp(min=1)


def rank_share(total: Tensor, everywhere: Tensor) -> Tensor:
    """`global_mean` where the count of all ranks, `everywhere`, is known."""
    return total * world_size() / everywhere


# ---------------------------------------------------------------------------------------------------------------
# ITC: image-text contrastive loss (as ALBEF: momentum features, queue, soft targets)
# ---------------------------------------------------------------------------------------------------------------


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
    """Mean of the image-to-text and the text-to-image contrastive loss of the local batch.

    image_feat, text_feat: [B, E] student features (L2-normalised); *_candidates: [C, E] what they are compared with
    (momentum features of the current batch of all ranks, then the queue); image_id: [B]; candidate_id: [C], negative
    for an empty slot of the queue, which counts for nothing. Every column of the same image is a positive, with equal
    shares. alpha > 0 mixes in the momentum features' own distribution (image_feat_m, text_feat_m: [B, E]).
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


# ---------------------------------------------------------------------------------------------------------------
# ITM: image-text matching with hard negatives (as ALBEF)
# ---------------------------------------------------------------------------------------------------------------


@full_precision
@torch.no_grad()
def sample_hard_negatives(similarity: Tensor, legal: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One hard negative a row, drawn with the weights softmax(similarity) + 1e-6 on the legal entries.

    similarity: [B, C] already divided by the temperature; legal: [B, C] bool; uniform: [B] in [0, 1), one draw a row.
    Returns (index [B], valid [B] bool): a row without a legal entry is not valid, its index is 0.
    Similarities that overflowed count as 0, so that the draw never fails.
    """
    similarity = torch.nan_to_num(similarity, 0.0, 0.0, 0.0).masked_fill(~legal, -torch.inf)
    weights = (torch.nan_to_num(similarity.softmax(1)) + 1e-6) * legal  # a row of -inf only has NaN as its softmax
    # Inverse transform in fp64: the first entry whose cumulative weight exceeds the draw. An illegal entry adds
    # nothing to the cumulative sum and so is never the first.
    cumulative = weights.double().cumsum(1)  # [B, C]
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    index = (cumulative <= threshold).sum(1)
    valid = legal.any(1)
    return torch.where(valid, index, 0), valid


@full_precision
def itm_loss(logits: Tensor, match: Tensor, valid: Tensor) -> Tensor:
    """Sum of the two-class cross-entropy over the valid rows. logits: [R, 2]; match: [R] in {0, 1}; valid: [R] bool."""
    return (F.cross_entropy(logits, match, reduction="none") * valid).sum()


# ---------------------------------------------------------------------------------------------------------------
# MLM and PLM: the two text losses (BERT; prefix language modelling as mPLUG)
# ---------------------------------------------------------------------------------------------------------------


def mask_tokens(
    input_ids: Tensor,
    maskable: Tensor,
    probability: float,
    select: Tensor,
    replace: Tensor,
    random_ids: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor]:
    """BERT's masking: `probability` of the maskable tokens, of these 80% [MASK], 10% a random token, 10% unchanged.

    At least one token per row is chosen. input_ids, random_ids: [B, L]; maskable: [B, L] bool (no [CLS], [SEP], [PAD]);
    select, replace: [B, L] uniform draws. Returns (masked ids [B, L], chosen [B, L] bool).
    """
    select = select.masked_fill(~maskable, torch.inf)
    chosen = select < probability
    lowest = F.one_hot(select.argmin(1), select.shape[1]).bool()
    chosen = (chosen | (lowest & ~chosen.any(1, keepdim=True))) & maskable
    masked = torch.where(chosen & (replace < 0.8), mask_id, input_ids)
    masked = torch.where(chosen & (replace >= 0.9), random_ids, masked)
    return masked, chosen


def split_prefix(
    input_ids: Tensor, attention_mask: Tensor, pieces: Tensor, uniform: Tensor, cls_id: int, sep_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each caption at a random place: the prefix goes to the encoders, the suffix is what the decoder writes.

    k, the length of the prefix in word pieces, is uniform in 0..n-1 for a caption of n pieces (k = 0 trains captioning
    from the image alone). input_ids: [B, L] = [CLS] X ..., pieces: [B] = n, uniform: [B] draws.
    Returns (prefix mask [B, L]: [CLS] and the first k pieces; decoder input [B, T]: [CLS] and the suffix;
    decoder target [B, T]: the suffix and [SEP], IGNORE elsewhere). T is L where one caption may keep all its pieces.
    """
    length = input_ids.shape[1]
    k = (uniform * pieces).long().clamp(max=(pieces - 1).clamp(min=0))  # [B]
    position = torch.arange(length, device=input_ids.device)  # [L]
    prefix_mask = (position <= k[:, None]).to(attention_mask.dtype)
    # Row b of the suffix starts at its own k: position j of the decoder holds token k + j of the caption.
    shifted = input_ids.gather(1, (position + k[:, None]).clamp(max=length - 1))
    remaining = (pieces - k)[:, None]
    decoder_input = torch.where(position == 0, cls_id, shifted)
    following = torch.cat([shifted[:, 1:], shifted[:, -1:]], 1)
    target = torch.where(position < remaining, following, IGNORE)
    target = torch.where(position == remaining, sep_id, target)
    return prefix_mask, decoder_input, target


@full_precision
def token_loss(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropy over tokens (MLM at the masked positions, PLM over the suffix). [R, V], [R] -> scalar"""
    return F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)


def token_mean(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, everywhere: Tensor | None = None
) -> Tensor:
    """The mean of `token_loss` over the tokens of all ranks. [R, V], [R] without IGNORE -> scalar

    everywhere: how many tokens these are, where it is known (see `global_count`).
    """
    if everywhere is None:
        everywhere = global_count(target.new_full((), len(target)))
    return rank_share(token_loss(logits, target, label_smoothing), everywhere)
