"""AdamW with the paper's two learning rates, and the rules that scale a rate to another batch size."""

from __future__ import annotations

import torch

from engine.length import beginning
from scheduler import WarmupCosine
from utils import UserError, logger, world_size

# Learned tokens of the image encoder; like a bias, each is one vector for every image.
TOKENS = ("mask_token", "cls_token")
LR_SCALING = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}  # exponents of global batch / base batch


def create_optimizer(
    model: torch.nn.Module,
    *,
    lr: float,
    lr_vit: float,
    weight_decay: float,
    betas=(0.9, 0.999),
    vit_prefix: str = "backbone.image_encoder.",
) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient (the paper, Section 4.1: two rates, decay 0.02).

    `lr_vit` is for the pre-trained image encoder, that is for names starting with `vit_prefix`; all else, and
    the [MASK] token, which no image encoder is published with, learns at `lr`. No decay for tensors of at
    most one dimension (biases, norms, temperature) and the [CLS] and [MASK] tokens. Every group has a `name`
    (vit or rest) and its `peak_lr`, which the schedule scales.
    """
    groups: dict[tuple[str, float], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        family = "vit" if name.startswith(vit_prefix) and last != "mask_token" else "rest"
        decay = 0.0 if parameter.ndim <= 1 or last in TOKENS else float(weight_decay)
        groups.setdefault((family, decay), []).append(parameter)
    if not groups:
        raise UserError("the model has no parameter to train")
    rates = {"vit": lr_vit, "rest": lr}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": decay,
                "lr": rates[name],
                "peak_lr": rates[name],
                "name": name,
            }
            for (name, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        betas=tuple(betas),
        fused=_can_fuse(parameter.device for group in groups.values() for parameter in group),
    )


def create_optimization(
    model: torch.nn.Module, cfg, loader, pretrained_vit: bool = True
) -> tuple[torch.optim.AdamW, WarmupCosine]:
    """-> (optimizer, schedule) of `cfg.train`, an epoch being the loader's batches; logs the effective values.

    pretrained_vit: whether the image encoder starts from trained weights, which `lr_vit` protects; else it
    learns at `lr`. Raises UserError where an epoch has no batch for a single step.
    """
    train, batches = cfg.train, len(loader)
    if batches < train.accumulation:
        raise UserError(
            f"{len(loader.dataset)} training entries are too few for one step: lower train.batch_size "
            f"(now {train.batch_size} per process) or train.accumulation (now {train.accumulation})"
        )
    global_batch = train.batch_size * train.accumulation * world_size()
    lr_vit = train.lr_vit if pretrained_vit else train.lr
    lr, lr_vit = (scaled_lr(x, global_batch, train.base_batch, train.lr_scaling) for x in (train.lr, lr_vit))
    optimizer = create_optimizer(model, lr=lr, lr_vit=lr_vit, weight_decay=train.weight_decay, betas=train.betas)
    length = beginning(train, batches)
    total_steps = length.total_steps
    if total_steps is not None and train.warmup_steps >= total_steps:
        logger.info(
            "warning: train.warmup_steps %d >= %d steps: lr never reaches its peak", train.warmup_steps, total_steps
        )
    schedule = WarmupCosine(optimizer, total_steps=total_steps, warmup_steps=train.warmup_steps, min_lr=train.min_lr)
    duration = f"{train.minutes:g} minutes" if total_steps is None else f"{total_steps} steps"
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        f"{trainable / 1e6:.1f}M trainable parameters, {batches} batches an epoch, {duration}; "
        f"global batch {global_batch}: {train.batch_size} per process, {world_size()} processes, accumulation "
        f"{train.accumulation}; learning rates {lr:.2e}, image encoder {lr_vit:.2e} (lr_scaling {train.lr_scaling})"
    )
    return optimizer, schedule


def scaled_lr(lr: float, global_batch: int, base_batch: int, rule: str) -> float:
    """The learning rate for `global_batch` pairs a step where `lr` is meant for `base_batch`.

    `rule`: none (as it is), linear (Goyal et al. 2017) or sqrt (usual with Adam).
    """
    if rule not in LR_SCALING:
        raise UserError(f"train.lr_scaling is {rule}; it is one of {', '.join(LR_SCALING)}")
    return lr * (global_batch / base_batch) ** LR_SCALING[rule]


def _can_fuse(devices) -> bool:
    """Whether one fused kernel can do the whole step (all parameters on CUDA GPUs or all on the CPU)."""
    return {device.type for device in devices} in ({"cuda"}, {"cpu"})
