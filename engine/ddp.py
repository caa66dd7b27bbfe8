"""The model of several processes: PyTorch's DistributedDataParallel, so that a resumed run adds up as it did before."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from engine.checkpoint import random_state, set_random_state
from utils import world_size


def wrap_ddp(model: torch.nn.Module, device: torch.device, bf16_gradients: bool = False) -> torch.nn.Module:
    """The model in DistributedDataParallel if there are several processes; it starts from rank 0's values.

    bf16_gradients: they are averaged in bf16, which halves what travels and rounds them to 8 bits.
    """
    if world_size() == 1:
        return model
    for buffer in model.buffers():  # DDP's own start leaves them out when they are not synchronised later
        dist.broadcast(buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer, 0)
    ddp = torch.nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # in newer torch
    options = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    ids = [device.index] if device.type == "cuda" else None
    wrapped = ddp(model, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=False, **options)
    if bf16_gradients:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def rehearse(model: torch.nn.Module, loss_fn: Callable[[], torch.Tensor]) -> None:
    """One forward and backward pass that leaves no trace but the order in which DDP packs gradients.

    DDP packs them in its own order in a process's first step and as they come in all later ones; the packing decides
    in which order three or more ranks add up. With the rehearsal the first step after a resume adds up as any other.
    """
    state = random_state()
    model.eval()  # no dropout, and the model remembers no features or teacher outputs of this pass
    loss_fn().backward()
    for parameter in model.parameters():
        parameter.grad = None
    model.train()
    set_random_state(state)
