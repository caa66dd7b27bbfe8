"""The losses on text, MLM and PLM (the paper, Section 3.2.3), as pure functions: tensors in, tensors out.

(models/mim.py has MIM's, models/alignment.py has ITC's and ITM's.) A loss that averages over a number of rows which
differs between ranks (MLM, PLM, ITM) is `rank_share` of its local sum and the `global_count` of its rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.tensors import full_precision
from utils import IGNORE, all_reduce_sum, world_size


def global_count(count: Tensor) -> Tensor:
    """Sums over all ranks, at least 1; several counts in one tensor travel together. [...] -> [...]"""
    return all_reduce_sum(count).clamp(min=1)


def rank_share(total: Tensor, everywhere: Tensor) -> Tensor:
    """Local sum with gradient -> a loss whose average over the ranks is the mean over the rows of all ranks.

    DDP averages gradients over ranks, so the sum is divided by the *average* count of a rank. everywhere: the count of
    all ranks, a scalar.
    """
    return total * world_size() / everywhere


@full_precision
def token_mean(logits: Tensor, target: Tensor, everywhere: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy over the tokens of all ranks. [R, V], [R] -> scalar

    MLM has the masked tokens, PLM and captioning the written ones; everywhere: how many all ranks have, a scalar;
    label_smoothing: the share of probability spread over all V words.
    """
    total = F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)
    return rank_share(total, everywhere)


def mask_tokens(
    input_ids: Tensor,
    maskable: Tensor,
    probability: float,
    select: Tensor,
    replace: Tensor,
    random_ids: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor]:
    """MLM masks as BERT does: `probability` of the maskable tokens, 80% [MASK], 10% a random token, 10% unchanged.

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
    input_ids: Tensor,
    attention_mask: Tensor,
    pieces: Tensor,
    uniform: Tensor,
    cls_id: int,
    sep_id: int,
    cut: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """PLM cuts each caption at a random place: the encoders read the prefix T^p, the decoder writes the suffix T^s.

    k, the length of the prefix in word pieces, is uniform in 0..n-1 for a caption of n pieces (k = 0 trains captioning
    from the image alone). input_ids: [B, L] = [CLS] X ..., pieces: [B] = n, uniform: [B] draws, cut: [B] bool, captions
    of which only the beginning is there (None: none): they are not taught to end, as in mPLUG's captioning.
    Returns (prefix mask [B, L]: [CLS] and the first k pieces; decoder input [B, L]: [CLS] and the suffix;
    decoder target [B, L]: the suffix and [SEP], IGNORE elsewhere).
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
    end = position == remaining
    target = torch.where(end if cut is None else end & ~cut[:, None], sep_id, target)
    return prefix_mask, decoder_input, target
