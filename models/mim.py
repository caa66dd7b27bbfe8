"""Semantics-enhanced masked image modeling (the paper, Section 3.2): encoding head, text-guided masking, targets.

The target of a masked patch is what the momentum teacher, which sees the whole picture and the text, encodes there:
a soft assignment to K patterns. `pixels` and `dvae` are the other targets of the paper's ablation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import fp32, full_precision
from utils import UserError, all_reduce_sum, find_file

DALLE_EPSILON = 0.1  # DALL-E's `map_pixels`: [0, 1] -> [0.1, 0.9], the input range its encoder was trained on


class EncodingHead(nn.Module):
    """MLP from a token to logits over K patterns ("encoding head", the paper, Section 3.2; under 6M parameters).

    With `normalize` (DINO's last layer): hidden vector L2-normalised, output layer weight-normalised and without bias,
    so that logits are cosines and DINO's temperatures mean here what they mean there. Without: a plain MLP with bias,
    for targets that are no distribution over patterns (pixels, dVAE codes).
    """

    def __init__(self, width: int, hidden: int, patterns: int, normalize: bool = True):
        super().__init__()
        self.normalize = normalize
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, patterns, bias=not normalize)
        for layer in (self.hidden, self.output):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., D] -> [..., K]"""
        hidden = F.gelu(self.hidden(tokens))
        if not self.normalize:
            return self.output(hidden)
        return F.linear(F.normalize(hidden, dim=-1), F.normalize(self.output.weight, dim=-1))


# ---------------------------------------------------------------------------------------------------------------
# Which patches to mask
# ---------------------------------------------------------------------------------------------------------------


@full_precision
def patch_similarity(patch_feat: Tensor, text_feat: Tensor) -> Tensor:
    """S_i: cosine of every patch, projected into the ITC space, with the caption. [B, N, E], [B, E] -> [B, N]"""
    return torch.einsum("bne,be->bn", F.normalize(patch_feat, dim=-1), F.normalize(text_feat, dim=-1))


def masked_count(num_patches: int, ratio: float) -> int:
    """M = round(ratio * N), at least 1."""
    return max(1, round(ratio * num_patches))


@full_precision
def sample_patches(similarity: Tensor, count: int, temperature: float, uniform: Tensor) -> Tensor:
    """Draw `count` patches a row one after another, without replacement, from softmax(similarity / temperature).

    Gumbel top-M: adding Gumbel noise to the logits and taking the M largest is that very draw (Kool et al. 2019),
    vectorised. similarity: [B, N] (all equal: random masking); uniform: [B, N] draws in [0, 1). Returns indices [B, M].
    """
    tiny = torch.finfo(uniform.dtype).tiny
    exponential = (-torch.log(uniform.clamp(min=tiny))).clamp(min=tiny)
    gumbel = -torch.log(exponential)
    return (similarity / temperature + gumbel).topk(count, dim=1).indices


def as_mask(indices: Tensor, num_patches: int) -> Tensor:
    """Indices [B, M] -> bool [B, N], True at the chosen patches."""
    mask = torch.zeros(indices.shape[0], num_patches, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, indices, True)


# ---------------------------------------------------------------------------------------------------------------
# What the masked patches should become
# ---------------------------------------------------------------------------------------------------------------


class TeacherCentre(nn.Module):
    """EMA of the teacher's mean logits, subtracted before its softmax so that no pattern takes all (DINO, Eq. 4).

    `add` collects the logits of every micro-batch; `update` moves the centre once per optimizer step by the mean over
    all ranks and micro-batches.
    """

    def __init__(self, patterns: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(patterns))
        self._sum: Tensor | None = None

    @torch.no_grad()
    def add(self, logits: Tensor) -> None:
        """logits: [..., K] of the teacher"""
        rows = fp32(logits).flatten(0, -2)
        total = torch.cat([rows.sum(0), rows.new_full((1,), rows.shape[0])])  # sum and count travel together
        self._sum = total if self._sum is None else self._sum + total

    @torch.no_grad()
    def update(self) -> None:
        """centre = m centre + (1 - m) mean(logits since the last update)"""
        total = all_reduce_sum(self._sum)
        self.value.lerp_(total[:-1] / total[-1], 1 - self.momentum)
        self._sum = None


def normalised_patch_pixels(images: Tensor, patch_size: int) -> Tensor:
    """Pixels of each patch with its mean and deviation taken out (MAE, Section 4.1). [B, 3, S, S] -> [B, N, 3 p p]"""
    patches = F.unfold(fp32(images), patch_size, stride=patch_size).transpose(1, 2)  # [B, N, 3*p*p]
    mean = patches.mean(-1, keepdim=True)
    var = patches.var(-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


class CodebookTarget(nn.Module):
    """Visual tokens of DALL-E's dVAE as FLAVA ships it (the ablation's `dvae` target), weights from a local folder."""

    def __init__(self, folder: str | None):
        super().__init__()
        from transformers import FlavaImageCodebook  # imported late: only this ablation needs it

        if folder is None:
            raise UserError(
                "mim.codebook: mim.target is dvae, which needs the folder of a FlavaImageCodebook "
                "(config.json and model.safetensors, e.g. facebook/flava-image-codebook downloaded)"
            )
        path = find_file(folder, "mim.codebook")
        try:
            self.codebook = FlavaImageCodebook.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"mim.codebook: {path} is no FlavaImageCodebook folder: {reason}") from error
        self.codebook.eval().requires_grad_(False)
        self.vocab_size = self.codebook.vocab_size

    def train(self, mode: bool = True):
        return super().train(False)

    @full_precision  # hard codes must not depend on autocast
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], 8 pixels a patch of the grid: [B, 3, 8g, 8g] -> codes [B, g*g]"""
        pixels = (1 - 2 * DALLE_EPSILON) * images + DALLE_EPSILON
        return self.codebook.get_codebook_indices(pixels).flatten(1)


# ---------------------------------------------------------------------------------------------------------------
# What to watch
# ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def collapse_monitors(name: str, teacher_probs: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Signs of a collapsed teacher, from its distributions [R, K] and the cross-entropy (mean over the same rows).

    entropy: of single distributions, falls towards 0 in a healthy run too; kl = cross-entropy - entropy;
    batch_entropy: of the batch-mean distribution (ln K at most): the alarm, near 0 when all rows use one pattern.
    """
    probs = teacher_probs.flatten(0, -2)
    entropy = torch.special.entr(probs).sum(-1).mean()
    return {
        f"teacher/{name}_entropy": entropy,
        f"teacher/{name}_kl": loss.detach() - entropy,
        f"teacher/{name}_batch_entropy": torch.special.entr(probs.mean(0)).sum(),
    }


@torch.no_grad()
def patterns_in_use(logits: Tensor, centre: Tensor) -> Tensor:
    """How many of the K patterns are the first choice of some patch of the batch. [B, N, K] -> scalar"""
    choice = (fp32(logits) - centre).argmax(-1).flatten()
    return torch.zeros(logits.shape[-1], device=logits.device).index_fill_(0, choice, 1.0).sum()


@torch.no_grad()
def relevant_share(similarity: Tensor, indices: Tensor) -> Tensor:
    """Share of the masked patches that lie on the quarter most similar to the text. [B, N], [B, M] -> scalar"""
    quarter = max(1, similarity.shape[1] // 4)
    relevant = as_mask(similarity.topk(quarter, dim=1).indices, similarity.shape[1])
    return relevant.gather(1, indices).float().mean()
