"""Small tensor functions that the models share."""

from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils import all_gather, all_reduce_sum, rank, world_size

T = TypeVar("T")
ONEDNN_PRODUCTS = 2**21  # of two numbers: below, its calls cost more than they save


def fp32(x: T) -> T:
    """Half-precision tensors in fp32, everything else as it is."""
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def full_precision(function: Callable) -> Callable:
    """Run `function` outside autocast, with every half-precision tensor argument in fp32."""

    @wraps(function)
    def wrapped(*args, **kwargs):
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*(fp32(x) for x in args), **{name: fp32(x) for name, x in kwargs.items()})

    return wrapped


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Some rows of each sequence. [B, N, D], [B, M] -> [B, M, D]"""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def sum_written(values: Tensor, written: Tensor) -> Tensor:
    """The sum of each row's values, of N tokens in all. [N], [R, T] bool with N entries True -> [R]"""
    return values.new_zeros(written.shape).masked_scatter(written, values).sum(1)


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Rows of two tensors by turns: [B, ...], [B, ...] -> [2B, ...], so that rows of one image stand together."""
    return torch.stack([first, second], 1).flatten(0, 1)


def text_mask(batch: dict) -> Tensor | None:
    """The attention mask [B, L] of a batch's texts; None if its collate function saw that nothing is padded."""
    return batch["attention_mask"] if batch.get("padded", True) else None


class _QuickGELU(torch.autograd.Function):
    """x sigmoid(c x), c = 1.702: softplus's derivative times x, one kernel, which keeps x alone. Its own derivative is
    silu's at c x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.aten.softplus_backward(x, x, 1.702, 20)  # from c x = 20 on its sigmoid is 1

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, x * 1.702)


class QuickGELU(nn.Module):
    """The activation of OpenAI's CLIP, x sigmoid(1.702 x). [...] -> [...]"""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies large fp32 matrices faster than MKL, which torch takes: MKL leaves AVX-512 unused on
    AMD's processors (docs/speed.md)."""
    processor = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not processor.is_file():
        return False
    return torch.backends.mkldnn.is_available() and "AuthenticAMD" in processor.read_text(encoding="utf-8")


class OneDNNLinear(torch.autograd.Function):
    """F.linear of fp32 tensors on a CPU by oneDNN. [..., I], [O, I], [O] or None -> [..., O]"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # [R, O]
        return (
            onednn_product(grad, weight.t()) if of_x else None,
            onednn_product(rows.t(), x.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., I], [O, I] -> a @ b.T + bias, [..., O]"""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, of large fp32 matrices on a CPU by the faster library. [..., I], [O, I], [O] -> [..., O]"""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    exact = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if traced or not exact or torch.is_autocast_enabled("cpu") or not onednn_is_faster():
        return F.linear(x, weight, bias)
    fits = x.dim() > 1 and x.shape[-1] == weight.shape[-1] and (bias is None or bias.is_contiguous())
    large = x.numel() * len(weight) >= ONEDNN_PRODUCTS
    return OneDNNLinear.apply(x, weight, bias) if fits and large else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        ctx.rows = len(tensor)
        return all_gather(tensor)

    @staticmethod
    def backward(ctx, grad):
        first = rank() * ctx.rows
        return all_reduce_sum(grad)[first : first + ctx.rows]


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """`all_gather` through which every process's loss sends its gradient to the process that a row came from.

    A row's gradient is the sum over the processes' losses; DistributedDataParallel then averages over them.
    """
    return _AllGather.apply(tensor) if world_size() > 1 else tensor
