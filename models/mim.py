r"""Semantics-enhanced masked image modeling (the paper, Section 3.2): encoding head, text-guided masking, losses.

The target of a masked patch is what the momentum teacher, which sees the whole image and the text, encodes there:
a soft assignment to K patterns. `pixels` and `dvae` are the other targets of the paper's ablation.

The paper's symbols: I_1, I_2 are the views `image1`, `image2` of a batch; H_I is the student's EncodingHead (`head`),
\hat H_I the teacher's (`teacher.head`); a distribution d is the softmax of a head's logits divided by a temperature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.tensors import Linear, fp32, full_precision, linear, take
from models.weights import find_weights, load_exactly, read_architecture, read_weights
from utils import UserError, all_reduce_sum, find_file

DALLE_EPSILON = 0.1  # DALL-E's `map_pixels`: [0, 1] -> [0.1, 0.9], the input range its encoder was trained on


class EncodingHead(nn.Module):
    """MLP from a token to logits over K patterns (the paper's "encoding head", under 6M parameters).

    With `normalize` (DINO's last layer): hidden vector L2-normalized, output layer weight-normalized and without bias,
    so that logits are cosines and DINO's temperatures mean here what they mean there. Without: a plain MLP with bias,
    for targets that are no distribution over patterns (pixels, dVAE codes).
    """

    def __init__(self, width: int, hidden: int, patterns: int, normalize: bool = True):
        super().__init__()
        self.normalize = normalize
        self.hidden = Linear(width, hidden)
        self.output = Linear(hidden, patterns, bias=not normalize)
        for layer in (self.hidden, self.output):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., D] -> [..., K]"""
        hidden = F.gelu(self.hidden(tokens))
        if not self.normalize:
            return self.output(hidden)
        return linear(F.normalize(hidden, dim=-1), F.normalize(self.output.weight, dim=-1))


# ------------------------------------------------------------------------------------------------ Which patches to mask


@full_precision
def text_guided_mask(
    patch_feat: Tensor, text_feat: Tensor, ratio: float, temperature: float, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Section 3.2.2: the patches to mask, relevant ones more often -> (indices [B, M], similarity S [B, N]).

    S_i is the similarity of patch i to the global feature of the text, here their cosine in the ITC space. With the
    probabilities softmax(S / temperature) over an image's patches, M = ratio * N of them are drawn one after another.

    patch_feat: [B, N, E], the teacher's patches of I_2 projected into the ITC space; text_feat: [B, E];
    uniform: [B, N] draws in [0, 1).
    """
    similarity = torch.einsum("bne,be->bn", F.normalize(patch_feat, dim=-1), F.normalize(text_feat, dim=-1))
    logits = similarity / temperature  # of the softmax, whose normalizer `draw_patches` does not need
    return draw_patches(logits, masked_count(similarity.shape[1], ratio), uniform), similarity


def random_mask(ratio: float, uniform: Tensor) -> Tensor:
    """The ablation: all patches equally often. uniform: [B, N] draws in [0, 1) -> indices [B, M]"""
    return draw_patches(torch.zeros_like(uniform), masked_count(uniform.shape[1], ratio), uniform)


def masked_count(num_patches: int, ratio: float) -> int:
    """M = round(ratio * N), at least 1."""
    return max(1, round(ratio * num_patches))


@full_precision
def draw_patches(logits: Tensor, count: int, uniform: Tensor) -> Tensor:
    """Draw `count` patches per row one after another, without replacement, from softmax(logits).

    Gumbel top-M: adding Gumbel noise to the logits and taking the M largest is that very draw (Kool et al. 2019),
    vectorized. logits: [B, N]; uniform: [B, N] draws in [0, 1). Returns indices [B, M].
    """
    tiny = torch.finfo(uniform.dtype).tiny
    exponential = (-torch.log(uniform.clamp(min=tiny))).clamp(min=tiny)
    gumbel = -torch.log(exponential)
    return (logits + gumbel).topk(count, dim=1).indices


def as_mask(indices: Tensor, num_patches: int) -> Tensor:
    """Indices [B, M] -> bool [B, N], True at the chosen patches."""
    mask = torch.zeros(indices.shape[0], num_patches, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, indices, True)


# --------------------------------------------------------------- Self-distillation: the losses and the teacher's center


@full_precision
def cls_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:
    r"""Eq. 2: L_cls = E[CE(d_1^cls, \hat d_2^cls)], the agreement of two views at [CLS] -> (L_cls, \hat d_2^cls).

    student_logits: [B, K], H_I at the [CLS] of I_1, of which d_1^cls is the softmax; teacher_logits: [B, K],
    \hat H_I at the [CLS] of I_2 in the pass that saw no text; center: [K], see TeacherCenter. E: over the batch.
    """
    teacher = ((teacher_logits - center) / teacher_temperature).softmax(-1)  # \hat d_2^cls [B, K], a soft label
    student = (student_logits / student_temperature).log_softmax(-1)  # log d_1^cls [B, K]
    loss = -(teacher * student).sum(-1).mean()
    return loss, teacher


@full_precision
def patch_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    places: Tensor,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:
    r"""Eq. 3: L_patch = E[1/M sum_i CE(d_{2,i}^patch, \hat d_{2,i}^patch)] over masked patches i -> (L_patch, \hat d).

    student_logits: [B, M, K], H_I at the masked patches of I'_2, which is I_2 with [MASK] there; teacher_logits:
    [B, N, K], \hat H_I at all patches of the whole I_2, from the pass with the text injected; places: [B, M], which of
    them the student has to predict; center: [K], see TeacherCenter. E: over the batch. \hat d_{2,i}^patch: [B, M, K].
    """
    teacher = ((take(teacher_logits, places) - center) / teacher_temperature).softmax(-1)  # \hat d_{2,i}^patch
    student = (student_logits / student_temperature).log_softmax(-1)  # log d_{2,i}^patch [B, M, K]
    loss = -(teacher * student).sum(-1).mean()  # all images have M masked patches: one mean is both, E and 1/M sum_i
    return loss, teacher


class TeacherCenter(nn.Module):
    """EMA of the teacher's mean logits, subtracted before its softmax so that no pattern takes all (DINO's centering).

    `add` collects the logits of every micro-batch; `update` moves the center once per optimizer step by the mean over
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
        """center = m center + (1 - m) mean(logits since the last update)"""
        total = all_reduce_sum(self._sum)
        self.value.lerp_(total[:-1] / total[-1], 1 - self.momentum)
        self._sum = None


# ------------------------------------------------------------------------------------ The other targets of the ablation


def pixel_loss(prediction: Tensor, images: Tensor, patch_size: int, places: Tensor) -> Tensor:
    """Mean squared error at the predicted patches. [B, M, 3 p p], [B, 3, S, S], p, [B, M] -> scalar"""
    target = take(normalized_patch_pixels(images, patch_size), places)
    return (fp32(prediction) - target).square().mean()


def normalized_patch_pixels(images: Tensor, patch_size: int) -> Tensor:
    """Pixels of each patch with its mean and deviation taken out, as MAE does. [B, 3, S, S] -> [B, N, 3 p p]"""
    patches = F.unfold(fp32(images), patch_size, stride=patch_size).transpose(1, 2)  # [B, N, 3*p*p]
    mean = patches.mean(-1, keepdim=True)
    var = patches.var(-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


@full_precision
def code_loss(prediction: Tensor, codes: Tensor, places: Tensor) -> Tensor:
    """Mean cross-entropy with the codebook's hard codes at predicted patches. [B, M, K], [B, N], [B, M] -> scalar"""
    target = codes.gather(1, places).flatten()
    return F.cross_entropy(prediction.flatten(0, 1), target, reduction="sum") / target.numel()


class CodebookTarget(nn.Module):
    """Visual tokens of DALL-E's dVAE as FLAVA ships it (the ablation's `dvae` target), weights from a local folder."""

    def __init__(self, folder: str | None):
        super().__init__()
        # Imported late: only this ablation needs it.
        from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

        if folder is None:
            raise UserError(
                "mim.codebook: mim.target is dvae, which needs the folder of a FlavaImageCodebook "
                "(config.json and model.safetensors, e.g. facebook/flava-image-codebook downloaded)"
            )
        path = find_weights(str(find_file(folder, "mim.codebook")))
        config = FlavaImageCodebookConfig.from_dict(read_architecture(path.with_name("config.json")))
        self.codebook = FlavaImageCodebook(config)
        load_exactly(self.codebook, read_weights(path), path, "take the weights that its config.json was made for")
        self.codebook.eval().requires_grad_(False)
        self.vocab_size = self.codebook.vocab_size

    def train(self, mode: bool = True) -> nn.Module:
        """Stay in eval mode whatever the surrounding model does."""
        return super().train(False)

    @full_precision  # hard codes must not depend on autocast
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], 8 pixels per patch of the grid: [B, 3, 8g, 8g] -> codes [B, g*g]"""
        pixels = (1 - 2 * DALLE_EPSILON) * images + DALLE_EPSILON
        return self.codebook.get_codebook_indices(pixels).flatten(1)


# -------------------------------------------------------------------------------------------------------- What to watch


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
def patterns_in_use(logits: Tensor, center: Tensor) -> Tensor:
    """How many of the K patterns are the first choice of some patch of the batch. [B, N, K] -> scalar"""
    choice = (fp32(logits) - center).argmax(-1).flatten()
    return torch.zeros(logits.shape[-1], device=logits.device).index_fill_(0, choice, 1.0).sum()


@torch.no_grad()
def relevant_share(similarity: Tensor, indices: Tensor) -> Tensor:
    """Share of the masked patches that lie on the quarter most similar to the text. [B, N], [B, M] -> scalar"""
    quarter = max(1, similarity.shape[1] // 4)
    relevant = as_mask(similarity.topk(quarter, dim=1).indices, similarity.shape[1])
    return relevant.gather(1, indices).float().mean()
