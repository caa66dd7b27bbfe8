"""`tools.benchmark roofline`: how long a GPU would take for a pre-training step, from a trace of fake tensors."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dataset.transforms import normalized
from engine.window import peak_tflops
from optim import create_optimizer
from tools.benchmark.model import meta_model, tokenizer_of
from utils import autocast

BATCHES = (128, 64, 16)  # pairs of a GPU
BANDWIDTH = {"H200": 4.8, "H100": 3.35, "A100": 2.04}  # TB/s of the 80 GB (A100, H100) and 141 GB (H200) SXM boards
GEMM, MEMORY, LAUNCH = 0.7, 0.85, 3e-6  # shares of the peaks that kernels reach; seconds to start one
VIEWS = {"detach", "view", "_unsafe_view", "expand", "t", "transpose", "permute", "slice", "select", "unsqueeze"}
VIEWS |= {"squeeze", "split", "unbind", "as_strided", "alias", "device", "lift_fresh", "empty", "empty_like"}
VIEWS |= {"_record_function_enter_new", "_record_function_exit", "new_empty", "empty_strided"}


@dataclass
class Operation:
    name: str
    flops: float
    reads: dict[int, int] = field(default_factory=dict)  # {tensor: bytes}
    writes: dict[int, int] = field(default_factory=dict)


class Trace(TorchDispatchMode):
    """Every kernel that runs below it, with its operations and the bytes that it reads and writes; views are none."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.names: dict[int, int] = {}  # of a storage: the kernel that wrote it last

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            count = flop_registry.get(getattr(torch.ops.aten, name.replace("_for_cpu", ""), None))  # of GPUs' attention
            flops = count(*arguments, **(options or {}), out_val=result) if count else 0
            found = Operation(name, flops)
            for x in tensors((arguments, options)):
                place = x.untyped_storage()._cdata
                found.reads[self.names.get(place, -place)] = x.numel() * x.element_size()
            for x in tensors(result):
                place = x.untyped_storage()._cdata
                self.names[place] = len(self.operations) * 64 + len(found.writes) % 64
                found.writes[self.names[place]] = x.numel() * x.element_size()
            self.operations.append(found)
        return result


def tensors(values) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def predict(operations: list[Operation], device_name: str, fused: bool = False) -> dict[str, float] | None:
    """Seconds of a list of operations by a roofline, and their parts; None if nothing is known of the device.

    fused: the kernels between two matrix products are one, as a perfect compiler makes them: what is written and read
    among them never leaves the chip.
    """
    bandwidth = next((value for name, value in BANDWIDTH.items() if name in device_name), None)
    if bandwidth is None:
        return None
    gemm = sum(x.flops for x in operations) / (GEMM * peak_tflops(device_name, "bf16") * 1e12)
    kernels = join(operations) if fused else operations
    moved = sum(sum(x.reads.values()) + sum(x.writes.values()) for x in kernels if not x.flops)
    memory, launches = moved / (MEMORY * bandwidth * 1e12), LAUNCH * len(kernels)
    return {"seconds": gemm + memory + launches, "gemm": gemm, "memory": memory, "kernels": len(kernels)}


def per_second(function: Callable, count: int, device: torch.device) -> float | None:
    """What the roofline of a function that treats `count` things on this device makes of it; None on a CPU."""
    if device.type != "cuda":
        return None
    with Trace() as trace:
        function()
    found = predict(trace.operations, torch.cuda.get_device_name(device))
    return found and round(count / found["seconds"], 1)


def join(operations: list[Operation]) -> list[Operation]:
    """Neighbors without matrix products as one kernel, which keeps what only they use."""
    last_use = {name: number for number, x in enumerate(operations) for name in x.reads}
    found: list[Operation] = []
    for number, x in enumerate(operations):
        if x.flops or not found or found[-1].flops:
            found.append(Operation(x.name, x.flops, dict(x.reads), dict(x.writes)))
        else:
            group = found[-1]
            group.reads |= {name: size for name, size in x.reads.items() if name not in group.writes}
            group.writes |= x.writes
        if not found[-1].flops:  # what nobody reads later never leaves the chip
            following = number + 1 == len(operations) or operations[number + 1].flops
            if following:
                kept = {n: size for n, size in found[-1].writes.items() if last_use.get(n, -1) > number}
                found[-1].writes = kept
    return found


class LikeCuda(TorchFunctionMode):
    """What CUDA does and the CPU does not: norms in fp32 under autocast, dropout in one kernel."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is F.layer_norm and torch.is_autocast_enabled("cpu"):
            arguments = (arguments[0].float(), *arguments[1:])
        if function is F.scaled_dot_product_attention:
            return flash_attention(*arguments, **(options or {}))
        if function is F.dropout:
            x, p, training = (*arguments, *(options or {}).values(), True)[:3]
            return torch.native_dropout(x, p, training)[0] if training and p else x
        return function(*arguments, **(options or {}))


def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """One kernel, whose dropout moves nothing."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]


def attention(q, k, v, mask=None, drop=0.0, causal=False):
    """`bert.attention` as it is on a GPU."""
    return flash_attention(q, k, v, mask, drop, causal)


@contextmanager
def pretending():
    """Fake tensors on the CPU that take the ways of a GPU."""
    from models import bert, vit  # here: timm takes two seconds to import

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    texts, images = (mock.patch.object(module, "attention", attention) for module in (bert, vit))
    with texts, images, fake, LikeCuda():
        yield fake


def trace_step(config: str, overrides: list[str], pairs: int) -> list[Operation]:
    """The kernels of one whole optimizer step in bf16: forward, backward, clipping, AdamW, teacher, queue."""
    from tools.benchmark.pretrain import make_batches

    model, cfg = meta_model(config, [*overrides, f"train.batch_size={pairs}"])
    batches = make_batches(cfg, tokenizer_of(cfg), cfg.data.bucket_batches or 1)
    batch = model.prepare(batches[len(batches) // 2])  # of middle length
    with pretending() as fake:
        model.to_empty(device="cpu").train()
        rates = {key: cfg.train[key] for key in ("lr", "lr_vit", "weight_decay", "betas")}
        optimizer = create_optimizer(model, **rates)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes its moments
        optimizer.zero_grad()
        batch = {key: fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
        with Trace() as trace:
            with autocast(torch.device("cpu"), "bf16"):
                loss, _ = model(normalized(batch), cfg.itc.alpha)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_grad or 1.0, foreach=True)
            optimizer.step()
            model.after_step()
    return trace.operations


def by_bytes(operations: list[Operation], longest: int = 20) -> dict[str, dict]:
    """{operation: its calls, GB that they read and write, their share}, the largest of those that are no products."""
    calls, moved = Counter(), Counter()
    for x in operations:
        if not x.flops:
            calls[x.name] += 1
            moved[x.name] += sum(x.reads.values()) + sum(x.writes.values())
    return {
        name: {"calls": calls[name], "gb": round(size / 1e9, 2), "share": round(size / moved.total(), 3)}
        for name, size in moved.most_common(longest)
    }


def run_roofline(args: argparse.Namespace) -> dict:
    """{GPU: {pairs of a step: pairs per second, kernel by kernel (eager) and fused by a perfect compiler}}, and the
    operations of the largest step by bytes.
    """
    found: dict = {"config": args.config, **{name: {} for name in BANDWIDTH}}
    for pairs in BATCHES:
        operations = trace_step(args.config, args.override, pairs)
        found.setdefault("operations", by_bytes(operations))
        for name in BANDWIDTH:
            peak = peak_tflops(name, "bf16") * 1e12
            eager, fused = (predict(operations, name, fused) for fused in (False, True))
            found[name][pairs] = {
                "pairs_per_second": round(pairs / eager["seconds"]),
                "pairs_per_second_compiled": round(pairs / fused["seconds"]),
                "mfu": round(sum(x.flops for x in operations) / eager["seconds"] / peak, 3),
                "ms": {key: round(1e3 * eager[key], 1) for key in ("seconds", "gemm", "memory")},
                "kernels": eager["kernels"],
                "gflop_of_a_pair": round(sum(x.flops for x in operations) / pairs / 1e9, 1),
                "host_waits": sum(x.name in ("nonzero", "_local_scalar_dense") for x in operations),
            }
    return found
