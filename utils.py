"""What every room stands on: errors, files, processes, seeds, precision, progress lines."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import errno
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent
logger = logging.getLogger("semmim")
IGNORE = -100  # target of a token that counts for no loss, torch's own convention
HALF_SURROGATE = re.compile("[\ud800-\udfff]")  # what JSON and YAML can write, and no text encoder takes


# --------------------------------------------------------------------------------------- errors, the end of a script


class UserError(Exception):
    """Something the user can put right: one line that names the file, entry or key, and the remedy."""

    def __str__(self) -> str:
        """The line alone: torch puts the traceback before it if a DataLoader's worker raised it."""
        return super().__str__().rstrip().rpartition("UserError: ")[2]


class Stopped(Exception):
    """Training was asked by a signal to stop; its checkpoint is written, or is about to be."""


def one_line(text: object, length: int = 200) -> str:
    """A text in one line, cut if it is long, with its control characters, which a terminal could obey, as escapes."""
    text = " ".join(str(text).split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= length else f"{text[:length]} ..."


def shown(value) -> str:
    """The value as it is named in an error."""
    return one_line(repr(value), 80)


def reason(error: Exception) -> str:
    """What other people's code says of a file, in one line; of torch's page about unsafe files, what it found."""
    message = str(error)
    if "TorchScript" in message:
        return "it is a TorchScript archive, a program; docs/training.md makes a state dict of OpenAI's"
    if found := re.search(r"GLOBAL ([\w.]+)", message):
        return f"it holds {found[1]}, which is no tensor and could run code"
    message = message.partition("WeightsUnpickler error:")[2].strip() or message.strip() or type(error).__name__
    return one_line(message.splitlines()[0])


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
stop_requests: list[int] = []  # stop signals that have come, see engine.distributed; long work looks here now and then


def run_main(main: Callable[[], object]) -> None:
    """Run a script's `main` and exit: 0; 130 if stopped; 2, with one line instead of a traceback, after a UserError or
    if the disk refuses.
    """
    code = 0
    try:
        main()
    except (Stopped, KeyboardInterrupt) as stop:
        code = 130  # training has written its checkpoint, and --resume continues
        if str(stop):
            logger.info("%s", stop)
    except BrokenPipeError:  # whoever read the output, such as `head`, has gone
        code = 141
    except (UserError, OSError) as error:
        code, line = 2, one_line(error, 4000)
        if isinstance(error, OSError):
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            line += "; make room, permit it, or write to another place"
        print("error:" if is_main() else f"error (process {rank()}):", line, file=sys.stderr, flush=True)
    finally:
        end_children()  # or torch, at Python's end, would wait ten seconds for each
    try:
        sys.stdout.flush()
    except OSError:  # the same, or its disk is full: Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


class Config(dict):
    """A dict whose entries are also attributes: `config.train.lr`."""

    def __getattr__(self, key: str):
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None

    def __setattr__(self, key: str, value) -> None:
        self[key] = value

    def to_dict(self) -> dict:
        """A copy in plain dicts, as checkpoints hold it."""
        return {key: value.to_dict() if isinstance(value, Config) else value for key, value in self.items()}


def as_config(value):
    """Turn the dicts inside `value` into Configs."""
    return Config({key: as_config(item) for key, item in value.items()}) if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------------- files, checkpoint files


def find_file(path: str | os.PathLike, what: str = "file") -> Path:
    """The existing file or folder `path`, relative to the working directory or else to the repository.

    `what` says in the error what was looked for, e.g. the configuration key.
    """
    path = Path(os.path.expanduser(path))
    for folder in (Path(), ROOT):
        if os.path.exists(folder / path):
            return folder / path
    places = " and ".join(dict.fromkeys(map(str, (Path.cwd(), ROOT))))
    raise UserError(f"{what}: {one_line(path, 1000)} does not exist (looked in {places})")


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A user's file, open for reading its bytes. UserError if it cannot be read, or is no regular file: a pipe or a
    device may never end."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # a pipe would wait
    except OSError as error:
        raise UserError(f"{one_line(path, 1000)}: cannot be read ({error.strerror or error})") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{one_line(path, 1000)}: cannot be read (not a regular file)")
    return file


def make_folder(path: Path) -> Path:
    """The folder, made if it is missing. Raises UserError if it cannot be made or be written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{path}: no folder to write into ({error.strerror or error}); name another") from None
    return path


def own_folder(folder: Path, program: str) -> Path:
    """The folder for what a program writes: new, empty, or one that holds the program's mark. UserError otherwise."""
    mark = make_folder(folder) / f".{program}"
    if not mark.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds files that {program} did not write; name another folder, or empty this one")
    mark.touch()
    return folder


def new_file(path: str | os.PathLike, what: str) -> Path:
    """The path of a file that a tool is asked to write. Raises UserError, which begins with `what`, if one is there:
    whose it is cannot be told."""
    path = Path(path).expanduser()
    if os.path.lexists(path):
        raise UserError(f"{what} {path}: exists already; name a new file, or remove it first")
    return path


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path that takes the place of `path` at once when the block ends without error."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a device or a pipe
        raise UserError(f"{path}: cannot be written, it is no regular file; name another")
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"{path}: cannot be written ({one_line(error)}); full disk or read-only folder?") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value) -> None:
    """Write `value` so that `path` always holds a whole file; a list gets a line an entry."""
    if isinstance(value, list):
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in value)
        text = f"[\n{lines}\n]"
    else:
        text = json.dumps(value, indent=2, ensure_ascii=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def save_checkpoint(path, checkpoint: dict) -> None:
    """Write a checkpoint so that `path` always holds a whole one, the old or the new."""
    with replacing(path) as temporary:
        write_checkpoint(temporary, checkpoint)


def write_checkpoint(path, checkpoint: dict) -> None:
    """Write a checkpoint that is on the disk when this returns."""
    with open(path, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path, required=("model",)) -> dict:
    """Read a checkpoint to the CPU without running any code that it may hold.

    torch writes a checksum (CRC-32) with every record and does not compare it when it reads: that is done here.
    """
    path = find_file(path, "checkpoint")
    with open_file(path) as file:
        try:
            if zipfile.is_zipfile(file) and (record := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"damaged: the checksum of its record {record!r} is wrong")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the bytes of a file that no run wrote make zipfile, torch or pickle raise
            raise UserError(f"{path}: not a readable checkpoint ({reason(error)}); take another") from None
    if missing := [key for key in required if not isinstance(checkpoint, dict) or key not in checkpoint]:
        raise UserError(f"{path}: not a checkpoint of this project (it has no entry {', '.join(missing)})")
    return checkpoint


# ------------------------------------------------------------------------------------------------------- processes


def choose_device(device: str) -> str:
    """`device` as torch takes it; auto: a GPU if there is one. UserError for a GPU if torch sees none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no GPU; use --device cpu, or a torch build for your driver")
    return device


def end_with_parent(number: int) -> None:
    """Ask Linux to send this process a signal when the one that started it ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(number))


def child_signals(*_) -> None:
    """How every worker process begins, of a DataLoader or of `in_processes`: stop signals, which terminals and
    schedulers send to all processes, are for its parent, which still needs it; it ends when its parent does.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


@atexit.register
def end_children() -> None:
    """Kill the workers that are left when Python ends: multiprocessing asks them by a SIGTERM and waits for ever."""
    children = multiprocessing.active_children()
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler calls a killed worker an error
    for child in children:
        child.kill()


def in_processes(work: Callable, items: Iterable, workers: int) -> Iterator:
    """`map(work, items)` over worker processes, in order; in this process alone if there is one worker."""
    if workers <= 1:
        yield from map(work, items)
        return
    fork = multiprocessing.get_context("fork")  # a forked process need not import everything again
    with ProcessPoolExecutor(workers, fork, initializer=child_signals) as pool:
        yield from pool.map(work, items, chunksize=16)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def leave_group() -> bool:
    """End the process group, called in all processes; whether this one was the main one, which may still work long."""
    main = is_main()
    if dist.is_initialized():
        dist.destroy_process_group()
    return main


def on_main(function: Callable[[], object]):
    """What `function` returns in the main process, in all of them; its error, too."""
    result = error = None
    if is_main():
        try:
            result = function()
        except Exception as caught:
            error = caught
    result, error = gather_objects((result, error))[0]
    if error is not None:
        raise error
    return result


@torch.no_grad()
def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, as a new tensor without gradient."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Tensors of one shape [B, ...] from all processes, in rank order: [world * B, ...], without gradient."""
    tensor = tensor.detach()
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_objects(item) -> list:
    """Every process's (picklable) object, in rank order, on all processes."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on the device (copied asynchronously from pinned memory)."""
    return {key: x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}


# ------------------------------------------------------------------------------------------ random state, precision


def seed_everything(seed: int, per_rank: bool = True) -> None:
    """Seed Python, NumPy and torch; with `per_rank` every process gets a stream of its own."""
    seed = seed + (rank() if per_rank else 0)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def autocast(device: torch.device, precision: str):
    """The context in which the forward pass runs; `precision` as `resolve_precision` returns it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def resolve_precision(setting: str, device: torch.device) -> str:
    """`auto | bf16 | fp32` -> `bf16 | fp32`; auto: bf16 on GPUs and CPUs whose matrix products have it in hardware."""
    if setting not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision is {setting}; it is one of auto, bf16, fp32")
    if setting != "auto":
        return setting
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = gather_objects(cpu_has_bf16())[0]  # rank 0 decides for all
    return "bf16" if has_bf16 else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16, AMX or Arm's BF16), faster than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # torch before 2.12


# ---------------------------------------------------------------------------------------------------- progress lines


def clock(seconds: float) -> str:
    """Hours, minutes and seconds; days before them."""
    return str(datetime.timedelta(seconds=round(seconds)))
