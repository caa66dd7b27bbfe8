"""`tools/benchmark.py memory`: what a pre-training step keeps in memory, counted anywhere and measured on a GPU."""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import utils
from dataset.text import Tokenizer
from engine.config import Config
from models import bert, vit
from models.pretrain import MaskedText, PretrainModel, SplitText, build_pretrain_model
from tools.benchmark_pretrain import Case, machine, model_arguments, random_config

WAYS = {
    "as configured": (),
    "image layers recomputed": ("model.image_encoder.checkpointing=true",),
    "all layers recomputed": ("model.image_encoder.checkpointing=true", "model.bert.checkpointing=true"),
}


def add_memory(commands) -> None:
    parser = commands.add_parser("memory", help="memory of a pre-training step, with and without checkpointing")
    model_arguments(parser)
    parser.add_argument("--tokens", type=int, default=25, help="of a caption (default: %(default)s)")
    parser.set_defaults(run=run_memory)


def run_memory(args: argparse.Namespace) -> dict:
    """GiB of states and of activations at the configuration's batch size, in bf16; on a GPU the peak of steps, too."""
    if args.tokens < 3:
        raise utils.UserError(f"--tokens is {args.tokens}; it must be at least 3")
    device = utils.init_distributed(args.device)
    result = {"machine": machine(device), "config": str(args.config), "override": args.override, "tokens": args.tokens}
    for name, switches in WAYS.items():
        cfg = random_config(args.config, [*args.override, *switches])
        result["pairs"] = cfg.train.batch_size
        result[name] = count(cfg, args.tokens)
        if device.type == "cuda":
            result[name] |= measure(args, switches, device)
    return result


def count(cfg: Config, tokens: int) -> dict[str, float]:
    """GiB by shapes alone: tensors are fake, nothing is computed and no memory taken.

    states: weights, gradients and AdamW's two moments in fp32, teacher, queue; activations: what a forward pass under
    bf16 autocast leaves for the backward pass, with attention as GPUs compute it.
    """
    tokenizer = Tokenizer(utils.find_file(cfg.text.vocab, "text.vocab"), cfg.text.sep)
    with torch.device("meta"):
        model = build_pretrain_model(cfg, tokenizer)[0].train()
    with FakeTensorMode(allow_non_fake_inputs=True), gpu_attention():
        model.to_empty(device="cpu")
        batch = fake_batch(cfg, tokens)
        with fixed_places(model, tokens), Living() as living, utils.autocast(torch.device("cpu"), "bf16"):
            loss, _ = model(batch, 0.4)
            kept = living.bytes()
        del loss
    states = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    states += sum(b.numel() * b.element_size() for b in model.buffers())
    return {
        "states_gib": round(states / 2**30, 2),
        "activations_gib": round(kept / 2**30, 2),
        "sum_gib": round((states + kept) / 2**30, 2),
    }


class Living(TorchDispatchMode):
    """Watches all storages that operations make, and tells how many bytes of them are still in use."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages.setdefault(reference.cdata, (reference, storage.nbytes()))
        return result

    def bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@contextmanager
def gpu_attention() -> Iterator[None]:
    """Let attention take the fused kernel, as on GPUs, whatever this machine would choose."""
    with ExitStack() as stack:
        for module in (bert, vit):
            stack.enter_context(mock.patch.object(module, "fused_attention_pays", lambda x: True))
        yield


@contextmanager
def fixed_places(model: PretrainModel, tokens: int) -> Iterator[None]:
    """As many tokens for MLM and PLM as are expected: fake tensors do not tell where a mask is set."""
    pieces = tokens - 1

    def places(ids: torch.Tensor, share: float) -> torch.Tensor:
        return torch.zeros(max(1, round(len(ids) * share)), dtype=torch.int64)

    def prepare_mlm(ids, maskable, draws):
        at = places(ids, max(1.0, model.mlm.probability * pieces))
        return MaskedText(torch.zeros_like(ids), at, at.clone())

    def prepare_plm(ids, mask, maskable, draws):
        at = places(ids, (pieces + 1) / 2 + 1)
        return SplitText(torch.ones_like(mask), torch.zeros_like(ids), at, at.clone())

    with mock.patch.object(model, "prepare_mlm", prepare_mlm), mock.patch.object(model, "prepare_plm", prepare_plm):
        yield


def fake_batch(cfg: Config, tokens: int) -> dict:
    size, side = cfg.train.batch_size, cfg.model.image_encoder.image_size
    numbers = torch.zeros(size, dtype=torch.int64)
    images = {name: torch.zeros(size, 3, side, side) for name in ("image1", "image2")}
    ids = torch.zeros(size, tokens, dtype=torch.int64)
    return {**images, "input_ids": ids, "attention_mask": ids + 1, "image_id": numbers, "caption_id": numbers}


def measure(args: argparse.Namespace, switches: tuple[str, ...], device: torch.device) -> dict:
    """The peak of two steps with the longest captions on this GPU."""
    longest = f"text.max_tokens={args.tokens}"
    try:
        case = Case(args.config, [*args.override, *switches, longest, "data.bucket_batches=0"], "", 1, device)
        for _ in range(3):
            case.step(0, timed=False)
        return {"measured_peak_gib": round(case.peak / 2**30, 2)}
    except torch.OutOfMemoryError:
        return {"measured_peak_gib": "out of memory"}
    finally:
        torch.cuda.empty_cache()
