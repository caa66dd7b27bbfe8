"""AdamW with the paper's two learning rates."""

from __future__ import annotations

import torch

VIT = "backbone.image_encoder."
# Learned tokens of the image encoder; like a bias, each is one vector for every image.
TOKENS = ("mask_token", "cls_token")


def create_optimizer(
    model: torch.nn.Module, *, lr: float, lr_vit: float, weight_decay: float, betas=(0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient (the paper, Section 4.2: two rates, decay 0.02).

    `lr_vit` is for the pre-trained image encoder, that is for names starting with `VIT`; all else, and
    the [MASK] token, which no image encoder is published with, learns at `lr`. No decay for tensors of at
    most one dimension (biases, norms, temperature) and the [CLS] and [MASK] tokens. Every group has a `name`
    (vit or rest) and its `peak_lr`, which the schedule scales.
    """
    groups: dict[tuple[str, float], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        family = "vit" if name.startswith(VIT) and last != "mask_token" else "rest"
        decay = 0.0 if parameter.ndim <= 1 or last in TOKENS else float(weight_decay)
        groups.setdefault((family, decay), []).append(parameter)
    rates = {"vit": lr_vit, "rest": lr}
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": rates[name], "peak_lr": rates[name], "name": name}
            for (name, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        betas=tuple(betas),
        fused=True,  # one kernel for the whole step, on CUDA GPUs and on the CPU
    )
