"""One or several processes: their group, the model and the batches on their devices, and how they stop together."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

import utils
from dataset.transforms import normalized
from engine.checkpoint import random_state_kept
from utils import STOP_SIGNALS, Stopped, UserError, is_main, leave_group, logger, rank, stop_requests, world_size

# ------------------------------------------------------------------------------------------------------- the group


# What gloo and NCCL say if another process has ended or answers no more; whatever else they say is this one's error.
LOST = re.compile("(?is)gloo.*(by peer|broken pipe|timed out|timeout|socket closed)|ncclRemoteError")


@contextlib.contextmanager
def distributed(device: str = "auto") -> Iterator[torch.device]:
    """What a script works in: the process group, if torchrun started it, log lines and stop signals; gives the device.

    A stop signal ends the script at once, by KeyboardInterrupt, except in training (`stop_signals`): nothing is lost
    before and after it, since every file is written whole or not at all. After an error the group is left as it is:
    another process may wait in it.
    """
    chosen = init_distributed(device)
    with stop_signals(at_once=True):
        try:
            yield chosen
            leave_group()
        except Stopped:
            stop_requests.append(signal.SIGTERM)  # all is written already: signals that follow are ignored
            leave_group()
            raise
        except RuntimeError as error:
            if stop_requests:  # another process ended first, at the same signal
                raise KeyboardInterrupt from None
            if world_size() > 1 and LOST.search(str(error)):
                line = f"error (process {rank()}): another process is gone ({utils.one_line(error, 1000)})"
                print(f"{line}; start again with --resume", file=sys.stderr, flush=True)
                os._exit(2)  # without the group's farewell, which would wait for the lost process
            raise


def init_distributed(device: str = "auto") -> torch.device:
    """Set up logging and, under torchrun, the process group; return this process's device.

    CPU tensors travel by gloo, CUDA tensors by NCCL. Without torchrun there is one process and no group.
    """
    number, processes, local = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not f"{number or 0}{processes or 0}{local or 0}".isdigit() or int(number or 0) >= int(processes or 2**62):
        raise UserError(f"RANK={number} WORLD_SIZE={processes} LOCAL_RANK={local}: no process of a group; use torchrun")
    device, local = utils.choose_device(device), int(local or 0)
    if device == "cuda":
        if local >= (gpus := torch.cuda.device_count()):
            raise UserError(f"process {local} has no GPU: start torchrun with --nproc_per_node={gpus}")
        torch.cuda.set_device(local)
    if number and processes and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", **_restarted())
    if "TORCHELASTIC_RUN_ID" in os.environ:
        utils.end_with_parent(signal.SIGTERM)  # a killed torchrun would leave its processes behind, training on
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.raiseExceptions = False  # if the output's reader goes or its disk is full, training continues without it
    logger.setLevel(logging.INFO if is_main() else logging.WARNING)
    return torch.device("cuda", local) if device == "cuda" else torch.device("cpu")


def _restarted() -> dict:
    """Arguments of init_process_group by which processes that torchrun has restarted meet under keys of their own.

    torchrun keeps one store for all restarts (pytorch issue 135712): under the same keys a process may find the address
    of one that is gone, and wait for it without end. Not for several nodes, each of which counts its own restarts.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, number, processes = next(dist.rendezvous("env://"))
    return {"store": dist.PrefixStore(f"restart_{restarts}", store), "rank": number, "world_size": processes}


@contextlib.contextmanager
def stop_signals(at_once: bool = False) -> Iterator[Callable[[], bool]]:
    """Give a function that says, alike in all processes, whether one of them got a stop signal.

    Stop signals are Ctrl-C's SIGINT, the SIGTERM of schedulers, the SIGUSR1 or SIGUSR2 that they can send some time
    before, and a closed terminal's SIGHUP (which stays ignored under nohup). The third SIGINT interrupts at once; the
    second does not, for torchrun passes on the Ctrl-C that the terminal has sent to every process already.

    at_once: the first signal raises KeyboardInterrupt, and those that follow while the script ends are ignored. Without
    it, Stopped is raised at the end if a signal came after the function was called last.
    """

    def handler(number: int, _frame) -> None:
        stop_requests.append(number)
        if stop_requests.count(signal.SIGINT) > 2 or (at_once and len(stop_requests) == 1):
            raise KeyboardInterrupt("stopped outside of training; the same command with --resume continues")

    def stopping() -> bool:
        # by gloo, so that the GPU's queue is not waited for
        return bool(utils.all_reduce_sum(torch.tensor(len(stop_requests))))

    stop_requests.clear()
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not nohup]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield stopping
        if stop_requests and not at_once:
            raise Stopped
    finally:
        if not (at_once and stop_requests):
            for number, former in previous.items():
                signal.signal(number, former)
            stop_requests.clear()


# --------------------------------------------------------------------------------- the model and batches on devices


def wrap_ddp(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model in DistributedDataParallel if there are several processes, which have built it alike."""
    if world_size() == 1:
        return model
    ddp = torch.nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # in newer torch
    options = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    ids = [device.index] if device.type == "cuda" else None
    return ddp(model, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=False, **options)


def rehearse(model: torch.nn.Module, forward: Callable[[dict], tuple], batch: dict) -> None:
    """One forward and backward pass that leaves no trace but the order in which DDP packs gradients.

    DDP packs them in its own order in a process's first step and as they come in all later ones; the packing decides
    in which order three or more ranks add up. With the rehearsal the first step after a resume adds up as any other.
    """
    with random_state_kept():
        model.eval()  # no dropout, and the model remembers no features or teacher outputs of this pass
        forward(batch)[0].backward()
        for parameter in model.parameters():
            parameter.grad = None
        model.train()


class Transfer:
    """Copies batches to the device and normalizes their images there.

    To a GPU on a stream of its own: the next batch travels and is normalized while the GPU still computes the step
    before, which the process is ahead of, and the step's own stream waits for no more than that. The loader pins the
    memory of what it reads; what was added since is pinned here, or the copy would wait for the GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: dict) -> dict:
        if self.stream is None:
            return normalized(utils.to_device(batch, self.device))
        computing = torch.cuda.current_stream(self.device)
        pinned = {key: item.pin_memory() if isinstance(item, torch.Tensor) else item for key, item in batch.items()}
        with torch.cuda.stream(self.stream):
            moved = normalized(utils.to_device(pinned, self.device))
        computing.wait_stream(self.stream)
        for item in moved.values():
            if isinstance(item, torch.Tensor):
                item.record_stream(computing)  # its memory is free for the next copy when the step is done with it
        return moved


def prepare_cpu() -> None:
    """What training on a CPU sets in its process.

    Keep what the tensors of a step free for those of the next; the kernel would take it back and clear it again
    (glibc's malloc, mallopt(3); without it nothing happens). And let several threads add up gradients in one order:
    rows that are used twice, as a caption that is two images' negative, get a gradient from each use, which torch
    otherwise adds as they come, so that last bits, and after hundreds of steps recalls, differ from run to run.
    """
    trim_threshold, mmap_max = -1, -4
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(trim_threshold, -1)  # the heap never shrinks
        mallopt(mmap_max, 0)  # and every tensor lies in it
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which only finds bugs, and takes time


def compile_model(model: torch.nn.Module, backend: str | Callable = "inductor") -> None:
    """Put a step's forward pass through torch.compile, in place, as one graph (an error if it is not).

    Element-wise operations join across layers; collectives are in the graph, and DistributedDataParallel cuts it by its
    buckets of gradients. Parameters, their names and checkpoints stay what they are; lengths that vary are traced once
    as such. Validation and generation call other methods and run uncompiled.
    """
    if not getattr(model, "one_graph", False):
        raise UserError("train.compile: only a pre-training step is one graph; set it to false in this stage")
    torch._dynamo.config.recompile_limit = 64  # variants by what a batch has: padding, lengths, shares that are done
    model.compile(backend=backend, fullgraph=True)
