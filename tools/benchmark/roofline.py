"""How long a GPU would take for what ran, by a roofline over its kernels, and fake tensors that take a GPU's ways."""

import itertools
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

from engine.loop import peak_tflops

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


def predict(operations: list[Operation], count: int, device_name: str, unit: str = "pairs") -> dict:
    """Of kernels that treat `count` pairs: pairs that a GPU treats in a second, the share of its peak in bf16, and the
    parts of its time; {} if nothing is known of the device."""
    bandwidth = next((value for name, value in BANDWIDTH.items() if name in device_name), None)
    if bandwidth is None:
        return {}
    ideal = sum(x.flops for x in operations) / peak_tflops(device_name, "bf16") / 1e12  # seconds
    traffic: Counter[str] = Counter()
    for x in operations:
        if not x.flops:
            traffic[x.name] += sum(x.reads.values()) + sum(x.writes.values())
    moved = traffic.total()
    parts = {"gemm": ideal / GEMM, "memory": moved / MEMORY / bandwidth / 1e12, "launches": LAUNCH * len(operations)}
    seconds = sum(parts.values())
    return {
        f"{unit}_per_second": round(count / seconds, 1),
        "mfu": round(ideal / seconds, 3),
        "ms": {part: round(1e3 * time, 1) for part, time in parts.items()},
        "gigabytes": round(moved / 1e9, 1),
        "most_bytes": {name: round(size / 1e9, 2) for name, size in traffic.most_common(8)},
        "kernels": len(operations),
    }


def fused(operations: list[Operation]) -> list[Operation]:
    """The kernels between two matrix products as one, as a perfect compiler makes them: what only they use never leaves
    the chip."""
    last_use = {name: number for number, x in enumerate(operations) for name in x.reads}
    found: list[Operation] = []
    for product, group in itertools.groupby(enumerate(operations), key=lambda item: bool(item[1].flops)):
        numbers, kernels = zip(*group, strict=True)
        if product:
            found += kernels
            continue
        writes = {name: size for x in kernels for name, size in x.writes.items()}
        reads = {name: size for x in kernels for name, size in x.reads.items() if name not in writes}
        kept = {name: size for name, size in writes.items() if last_use.get(name, -1) > numbers[-1]}
        found.append(Operation("fused", 0, reads, kept))
    return found


def predict_call(function: Callable, count: int, device: torch.device, unit: str = "pairs") -> dict:
    """`predict` of what a function runs on this device; {} on a CPU."""
    if device.type != "cuda":
        return {}
    with Trace() as trace:
        function()
    return predict(trace.operations, count, torch.cuda.get_device_name(device), unit)


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


@contextmanager
def pretending():
    """Fake tensors on the CPU that take the ways of a GPU."""
    from models import bert, vit  # here: timm takes two seconds to import

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    texts, images = (mock.patch.object(module, "attention", flash_attention) for module in (bert, vit))
    products = mock.patch("models.tensors.onednn_is_faster", lambda: False)  # a CPU's
    with texts, images, products, fake, LikeCuda():
        yield fake
