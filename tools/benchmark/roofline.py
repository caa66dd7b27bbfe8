"""`tools.benchmark roofline`: how long a GPU would take for a pre-training step, from a trace of fake tensors."""

import argparse
import itertools
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
from tools.benchmark.model import meta_model, tokenizer_of
from tools.benchmark.pretrain import make_batches, make_optimizer, train_step

BATCHES = (128, 64, 16)  # pairs of a GPU
BANDWIDTH = {"H200": 4.8, "H100": 3.35, "A100": 2.04}  # TB/s of the 80 GB (A100, H100) and 141 GB (H200) SXM boards
GEMM, MEMORY, LAUNCH = 0.7, 0.85, 3e-6  # shares of the peaks that kernels reach; seconds to start one
VIEWS = {"detach", "view", "_unsafe_view", "expand", "t", "transpose", "permute", "slice", "select", "unsqueeze"}
VIEWS |= {"squeeze", "split", "unbind", "as_strided", "alias", "device", "lift_fresh", "empty", "empty_like"}
VIEWS |= {"_record_function_enter_new", "_record_function_exit", "new_empty", "empty_strided"}


def run_roofline(args: argparse.Namespace, device: torch.device) -> dict:
    """{GPU: {pairs of a step: pairs per second, kernel by kernel (eager) and fused by a perfect compiler}}"""
    found: dict = {name: {} for name in BANDWIDTH}
    for pairs in BATCHES:
        operations = trace_step(args.config, args.override, pairs)
        for name, of_device in found.items():
            eager, compiled = predict(operations, name), predict(fused(operations), name)
            of_device[pairs] = {
                "pairs_per_second": round(pairs / eager["seconds"]),
                "pairs_per_second_compiled": round(pairs / compiled["seconds"]),
                "mfu": round(GEMM * eager["gemm"] / eager["seconds"], 3),
                "ms": {key: round(1e3 * eager[key], 1) for key in ("seconds", "gemm", "memory")},
                "gigabytes": round(eager["moved"] / 1e9, 1),
                "gflop_of_a_pair": round(sum(x.flops for x in operations) / pairs / 1e9, 1),
                "kernels": len(operations),
            }
    return found


# ---------------------------------------------------------------- kernels and their time


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
            found = Operation(name, count(*arguments, **(options or {}), out_val=result) if count else 0)
            for x in tensors((arguments, options)):
                place = x.untyped_storage()._cdata
                found.reads[self.names.get(place, -place)] = x.numel() * x.element_size()
            for x in tensors(result):
                number = self.names[x.untyped_storage()._cdata] = 64 * len(self.operations) + len(found.writes) % 64
                found.writes[number] = x.numel() * x.element_size()
            self.operations.append(found)
        return result


def tensors(values) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def predict(operations: list[Operation], device_name: str) -> dict[str, float] | None:
    """Seconds of a list of operations by a roofline, and their parts; None if nothing is known of the device."""
    bandwidth = next((value for name, value in BANDWIDTH.items() if name in device_name), None)
    if bandwidth is None:
        return None
    gemm = sum(x.flops for x in operations) / (GEMM * peak_tflops(device_name, "bf16") * 1e12)
    moved = sum(sum(x.reads.values()) + sum(x.writes.values()) for x in operations if not x.flops)
    memory = moved / (MEMORY * bandwidth * 1e12)
    return {"seconds": gemm + memory + LAUNCH * len(operations), "gemm": gemm, "memory": memory, "moved": moved}


def fused(operations: list[Operation]) -> list[Operation]:
    """The kernels between two matrix products as one, as a perfect compiler makes them: what only they use never leaves
    the chip."""
    last_use = {name: number for number, x in enumerate(operations) for name in x.reads}
    found: list[Operation] = []
    number = 0
    for product, group in itertools.groupby(operations, key=lambda x: bool(x.flops)):
        group = list(group)
        number += len(group)
        if product:
            found += group
            continue
        whole = Operation("fused", 0)
        for x in group:
            whole.reads |= {name: size for name, size in x.reads.items() if name not in whole.writes}
            whole.writes |= x.writes
        whole.writes = {name: size for name, size in whole.writes.items() if last_use.get(name, -1) >= number}
        found.append(whole)
    return found


def per_second(function: Callable, count: int, device: torch.device) -> float | None:
    """What the roofline of a function that treats `count` things on this device makes of it; None on a CPU."""
    if device.type != "cuda":
        return None
    with Trace() as trace:
        function()
    found = predict(trace.operations, torch.cuda.get_device_name(device))
    return found and round(count / found["seconds"], 1)


# ---------------------------------------------------------------- a step as on a GPU, without one


def trace_step(config: str, overrides: list[str], pairs: int) -> list[Operation]:
    """The kernels of one whole optimizer step in bf16."""
    model, cfg = meta_model(config, [*overrides, f"train.batch_size={pairs}"])
    batches = make_batches(cfg, tokenizer_of(cfg), cfg.data.bucket_batches or 1)
    batch = model.prepare(batches[len(batches) // 2])  # of middle length
    with pretending() as fake:
        model.to_empty(device="cpu").train()
        optimizer = make_optimizer(model, cfg)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes its moments
        optimizer.zero_grad()
        batch = {key: fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
        with Trace() as trace:
            train_step(model, optimizer, normalized(batch), cfg, "bf16")
    return trace.operations


@contextmanager
def pretending():
    """Fake tensors on the CPU that take the ways of a GPU."""
    from models import bert, vit  # here: timm takes two seconds to import

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    texts, images = (mock.patch.object(module, "attention", flash_attention) for module in (bert, vit))
    with texts, images, fake, LikeCuda():
        yield fake


class LikeCuda(TorchFunctionMode):
    """What CUDA does and the CPU does not: norms in fp32 under autocast, dropout in one kernel."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is F.layer_norm and torch.is_autocast_enabled("cpu"):
            arguments = (arguments[0].float(), *arguments[1:])
        if function is F.dropout:
            x, p, training = (*arguments, *(options or {}).values(), True)[:3]
            return torch.native_dropout(x, p, training)[0] if training and p else x
        return function(*arguments, **(options or {}))


def flash_attention(q, k, v, mask=None, drop=0.0, causal=False):
    """`bert.attention` as one kernel, whose dropout moves nothing."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)[0]
