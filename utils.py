"""What every stage's script shares: configuration, processes, the run's folder, precision, the one training loop."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import difflib
import inspect
import json
import logging
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torchvision.utils import save_image

ROOT = Path(__file__).resolve().parent
logger = logging.getLogger("semmim")


# -------------------------------------------------------------------------------- errors, configuration, arguments


class UserError(Exception):
    """Something the user can put right: one line that names the file, entry or key, and the remedy."""


def user_message(error: UserError) -> str:
    """Its one line, also of an error in a DataLoader's worker process, which torch wraps in the worker's traceback."""
    message = str(error)
    if "DataLoader worker process" in message:
        message = message.strip().splitlines()[-1].split("UserError: ", 1)[-1]
    return message


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


def find_file(path: str | os.PathLike, what: str = "file") -> Path:
    """The existing file or folder `path`, relative to the working directory or else to the repository.

    `what` says in the error what was looked for, e.g. the configuration key.
    """
    path = Path(path).expanduser()
    for candidate in (path, ROOT / path):
        if candidate.exists():
            return candidate
    where = "" if path.is_absolute() else f" (looked in {Path.cwd()} and {ROOT})"
    raise UserError(f"{what}: {path} does not exist{where}")


def load_config(path, overrides=(), schema=None, optional=()) -> Config:
    """Read a configuration file over its bases and the schema, and check every key.

    `schema` (default: `path` itself) is the file that holds every known key with its default. A file's
    `base:` names the file that it changes, relative to itself. `overrides` are strings `a.b=value`, the value
    in YAML. A value must be of its default's kind (number, text, true/false, list, map), except that a
    default of null or {} accepts anything and the dotted keys in `optional` accept `none` too (read as None).
    Maps are merged, lists replaced.
    """
    path = find_file(path, "--config")
    known = _without_base(_read_yaml(find_file(schema or path, "schema")))
    files = [path]
    while base := _read_yaml(files[-1]).get("base"):
        following = files[-1].parent / str(base)
        if not following.is_file():
            raise UserError(f"{files[-1]}: base {base} does not exist (it is relative to this file)")
        if any(following.samefile(file) for file in files):
            raise UserError(f"{files[-1]}: base {base} leads back to this file")
        files.append(following)
    merged = copy.deepcopy(known)
    for file in reversed(files):
        _merge(merged, _without_base(_read_yaml(file)), known, str(file), optional)
    for override in overrides or ():
        _merge(merged, _parse_override(override), known, f"--override {override}", optional)
    return as_config(merged)


def checkpoint_config(checkpoint: dict, stage: str, path) -> Config:
    """The config a checkpoint was trained with, if by `stage`; else that of the file `path` with its vocabulary."""
    own = checkpoint.get("config")
    if own is not None and checkpoint.get("stage") == stage:
        return as_config(own)
    return load_config(path, [f"text.vocab={json.dumps(own['text']['vocab'])}"] if own else ())


def save_config(config: dict, path) -> None:
    """Write a configuration as YAML, in the order of its keys."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yaml.dump(config.to_dict() if isinstance(config, Config) else config, file)


def add_arguments(parser: argparse.ArgumentParser, config: str | None = None, output_dir: str | None = None) -> None:
    """The arguments that all scripts share; `config` and `output_dir` are this script's defaults."""
    add = parser.add_argument
    add("--config", default=config, required=config is None, help="YAML file (default: %(default)s)")
    add(
        "--output_dir",
        default=output_dir,
        required=output_dir is None,
        help="folder for all that the run writes",
    )
    add("--checkpoint", help="checkpoint to start from or to evaluate")
    add("--resume", action="store_true", help="continue from OUTPUT_DIR/checkpoint_last.pth")
    add("--evaluate", action="store_true", help="only evaluate")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--seed", type=int, help="replaces the configuration's seed")
    changes = {"nargs": "*", "action": "extend", "default": [], "metavar": "KEY.SUB=VALUE"}
    add("--override", help="changes to the configuration", **changes)


def lookup(config: dict, key: str):
    """config["a"]["b"] for "a.b"."""
    for name in key.split("."):
        config = config[name]
    return config


def check_choices(config: dict, choices: dict[str, tuple]) -> None:
    """Raise UserError where a dotted key's value is none of those in `choices`."""
    for key, known in choices.items():
        if lookup(config, key) not in known:
            raise UserError(f"{key}: {lookup(config, key)!r} is none of {', '.join(known)}")


def check_positive(config: dict, keys) -> None:
    """Raise UserError where the value of a dotted key is no whole number of at least 1."""
    for key in keys:
        value = lookup(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}: {value} must be a whole number of at least 1")


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path that takes the place of `path` at once when the block ends without error."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be written ({reason}); full disk or read-only folder?") from error
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


def _read_yaml(path: Path) -> dict:
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) or {}
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a map of keys to values")
    return values


def _without_base(values: dict) -> dict:
    return {key: value for key, value in values.items() if key != "base"}


def _parse_override(override: str) -> dict:
    name, found, text = override.partition("=")
    if not found or not all(name.split(".")):
        raise UserError(f"--override {override}: write it as key.sub=value")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise UserError(f"--override {override}: the value is not valid YAML; quote it") from None
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def _kind(value) -> str:
    for types, name in ((bool, "true/false"), ((int, float), "a number"), (str, "text"), (list, "a list")):
        if isinstance(value, types):
            return name
    return "null" if value is None else "a map"


def _merge(target: dict, values: dict, known: dict | None, source: str, optional, prefix: str = "") -> None:
    """Lay `values` over `target`; `known` is the schema's map here, or None where anything is accepted."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if known is not None and key not in known:
            near = difflib.get_close_matches(str(key), map(str, known), n=1, cutoff=0)
            hint = f"; the nearest known key is {prefix}{near[0]}" if near else ""
            raise UserError(f"{source}: unknown key {name}{hint}")
        default = None if known is None else known[key]
        if name in optional and value in (None, "none"):
            value = None
        elif default not in (None, {}) and _kind(value) != _kind(default):
            raise UserError(f"{source}: {name} is {_kind(value)} ({value}); {_kind(default)} is expected")
        if isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge(target[key], value, default or None, source, optional, name + ".")
        else:
            target[key] = value


# ------------------------------------------------------------------------------------------------------- processes


def init_distributed(device: str = "auto") -> torch.device:
    """Set up logging and, under torchrun, the process group; return this process's device.

    CPU tensors travel by gloo, CUDA tensors by NCCL. Without torchrun there is one process and no group.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; use --device cpu, or a torch build for your driver")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device == "cuda":
        if local >= gpus:
            raise UserError(f"process {local} has no GPU: start torchrun with --nproc_per_node={gpus}")
        torch.cuda.set_device(local)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logger.setLevel(logging.INFO if is_main() else logging.WARNING)
    return torch.device("cuda", local) if device == "cuda" else torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # by gloo: needs no device


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
    source = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).contiguous()
    parts = [torch.empty_like(source) for _ in range(world_size())]
    dist.all_gather(parts, source)
    return torch.cat(parts).to(tensor.dtype)


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


def gather_objects(item) -> list:
    """Every process's (picklable) object, in rank order, on all processes."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def eval_batches(num_items: int, batch_size: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Index lists of this rank: the items (in `order`, if given) cut into batches, every world-size-th batch.

    The cut does not depend on the number of ranks; over all ranks every item occurs exactly once.
    """
    order = list(range(num_items)) if order is None else list(order)
    batches = [order[start : start + batch_size] for start in range(0, num_items, batch_size)]
    return batches[rank() :: world_size()]


def wrap_ddp(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model in DistributedDataParallel if there are several processes; it starts from rank 0's values."""
    if world_size() == 1:
        return model
    for buffer in model.buffers():  # DDP's own start leaves them out when they are not synchronised later
        dist.broadcast(buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer, 0)
    ddp = torch.nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # in newer torch
    options = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    ids = [device.index] if device.type == "cuda" else None
    return ddp(model, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=False, **options)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


# ----------------------------------------------------------------------------------- the run's folder, checkpoints


# Files that a new run in the same folder would write over; they are renamed to `*_previous` instead.
EARLIER_RUN = ("log.jsonl", "tensorboard", "config.yaml", "checkpoint_last.pth", "checkpoint_best.pth")


class Run:
    """A run's folder: config.yaml, log.jsonl, metrics.json, TensorBoard's events; only rank 0 writes.

    With `append` (an evaluation) or `resume_from` (the checkpoint of a run that goes on) the logs go on; otherwise the
    files of an earlier run are kept as `*_previous`. What was logged after the checkpoint's step will be logged again
    and goes.
    """

    def __init__(self, output_dir, config: dict | None = None, append: bool = False, resume_from: dict | None = None):
        self.dir, self.config = Path(output_dir), config
        self.start = time.time()
        self.file = self.board = None
        resume_step = resume_from["progress"]["step"] if resume_from else None
        if not is_main():
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            for name in () if append or resume_step is not None else EARLIER_RUN:
                previous = self.dir / f"{Path(name).stem}_previous{Path(name).suffix}"
                if (self.dir / name).exists():
                    shutil.rmtree(previous, ignore_errors=True)  # a folder; os.replace takes care of a file
                    os.replace(self.dir / name, previous)
            if resume_step is not None:
                _forget_steps_after(resume_step, self.dir / "log.jsonl")
            self.file = open(self.dir / "log.jsonl", "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output_dir {self.dir}: {error.strerror or error}") from None
        if config is not None:
            save_config(config, self.dir / "config.yaml")
        purge = None if resume_step is None else resume_step + 1
        self.board = SummaryWriter(str(self.dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: dict[str, float], split: str = "train") -> None:
        """A line of log.jsonl (values that are not finite as null) and TensorBoard points `split/name`."""
        if self.file is None:
            return
        values = {key: float(value) for key, value in values.items()}
        for key, value in values.items():
            self.board.add_scalar(f"{split}/{key}", value, step)
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = {"step": step, "split": split, "seconds": round(time.time() - self.start, 1), **finite}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def image(self, step: int, name: str, image: torch.Tensor) -> None:
        """A picture [3, H, W], float in [0, 1], for TensorBoard and as pictures/NAME_STEP.png."""
        if self.board is not None:
            self.board.add_image(name, image, step)
            self.board.flush()
            (self.dir / "pictures").mkdir(exist_ok=True)
            save_image(image, self.dir / "pictures" / f"{name}_{step:07}.png")

    def write_metrics(self, metrics: dict) -> None:
        """metrics.json: the numbers of the last evaluation."""
        if is_main():
            write_json(self.dir / "metrics.json", metrics)

    def info(self, message: str) -> None:
        """A line for the console (rank 0)."""
        logger.info(message)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.board.close()
            self.file = self.board = None


def save_checkpoint(path, checkpoint: dict) -> None:
    """Write a checkpoint so that `path` always holds a whole one, the old or the new."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path, required=("model",)) -> dict:
    """Read a checkpoint to the CPU without running any code that it may hold."""
    path = find_file(path, "checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    missing = [key for key in required if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise UserError(f"{path}: not a checkpoint of this project (it has no entry {', '.join(missing)})")
    return checkpoint


# What a resumed run of any stage may change: neither the model, nor the losses, nor the order of the data.
MAY_CHANGE = (
    *(f"train.{key}" for key in ("epochs", "lr", "lr_vit", "min_lr", "warmup_steps", "weight_decay", "clip_grad")),
    *(f"train.{key}" for key in ("precision", "log_every", "checkpoint_every", "lr_scaling", "base_batch")),
    *(f"data.{key}" for key in ("image_root", "image_prefix_map", "max_bad_share", "cache_images", "num_workers")),
)


def begin(args: argparse.Namespace, cfg: Config, may_change: tuple[str, ...] = ()) -> tuple[dict | None, list[str]]:
    """What --resume and --seed ask for: (the checkpoint to go on from or None, lines for the log).

    A resumed run keeps its seed, which is put into `cfg` here; dotted keys in `may_change`, beside MAY_CHANGE, may
    differ from the checkpoint's configuration. Evaluation resumes nothing.
    """
    resume_from = load_resumable(args.output_dir) if args.resume and not args.evaluate else None
    if args.seed is not None:
        cfg.seed = args.seed
    elif resume_from:
        cfg.seed = resume_from["config"]["seed"]
    lines = check_resumable(cfg, resume_from["config"], MAY_CHANGE + may_change) if resume_from else []
    return resume_from, lines


def source_checkpoint(args: argparse.Namespace):
    """The file whose model is fine-tuned or evaluated: --checkpoint, or with --resume the run's last one."""
    if args.resume:
        return Path(args.output_dir).expanduser() / "checkpoint_last.pth"
    if args.checkpoint is None:
        raise UserError("--checkpoint is missing: name a pre-trained checkpoint, e.g. one that Pretrain.py wrote")
    return args.checkpoint


class BestCheckpoint:
    """checkpoint_best.pth: the weights of the epoch with the highest validation score.

    score: its name; notes: further entries of the file; resume_from: the checkpoint that a run continues.
    """

    def __init__(self, run: Run, score: str, notes: dict, resume_from: dict | None = None):
        self.run, self.score, self.notes = run, score, notes
        self.path = run.dir / "checkpoint_best.pth"
        self.best = dict((resume_from or {}).get("best", {}))

    def offer(self, model: torch.nn.Module, value: float, progress: Progress, **more) -> None:
        """Keep the model if its score is the best so far (the first of equals); called in all processes.

        more: what else the file's entry `best` says of that epoch.
        """
        if value > self.best.get(self.score, -math.inf):
            self.best = {self.score: value, "epoch": progress.epoch + 1, **more}
            if is_main():
                state = {"model": unwrap(model).state_dict(), "progress": {"step": progress.step}, **self.state()}
                save_checkpoint(self.path, state)
            barrier()  # no process reads the file before it is written

    def state(self) -> dict:
        """`extra_state` of `fit`."""
        return {**self.notes, "best": dict(self.best)}

    def restore(self, model: torch.nn.Module) -> None:
        """Put the best epoch's weights into the model, which keeps its own where none was offered."""
        if self.best:
            self.run.info(
                f"best epoch {self.best['epoch']}: {self.score} {self.best[self.score]:.2f} on val; {self.path}"
            )
            load_state(model, load_checkpoint(self.path)["model"], str(self.path))


def load_resumable(output_dir) -> dict:
    """The checkpoint that `--resume` continues from: checkpoint_last.pth in this very folder."""
    path = Path(output_dir).expanduser() / "checkpoint_last.pth"
    if not path.is_file():
        raise UserError(f"--resume: {path} does not exist, there is nothing to resume; leave out --resume")
    return load_checkpoint(path.resolve(), required=("model", "optimizer", "progress", "rng", "config"))


def check_resumable(config: dict, earlier: dict, may_change: tuple[str, ...]) -> list[str]:
    """Compare a run's configuration with that of the checkpoint it continues; returns a line for each difference.

    A difference outside `may_change` (dotted keys) is a UserError: the run would silently become another one.
    """
    lines = []
    for key, (before, now) in _differences(earlier, config).items():
        if key not in may_change:
            raise UserError(
                f"--resume: {key} is {now!r}, but the checkpoint was trained with {before!r}; use the same value, or "
                "start a new run in another --output_dir with --checkpoint"
            )
        lines.append(f"resumed with {key} {now!r} instead of {before!r}")
    return lines


def _differences(before: dict, now: dict, prefix: str = "") -> dict[str, tuple]:
    found = {}
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found


def _forget_steps_after(step: int, log: Path) -> None:
    """Drop the training lines after `step` from log.jsonl: a run that was killed logged steps that it did not save."""
    if not log.exists():
        return
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in lines if (entry := json.loads(line))["split"] != "train" or entry["step"] <= step]
    with replacing(log) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def load_state(module: torch.nn.Module, state: dict, source: str) -> None:
    """`module.load_state_dict(state)`; a difference is a UserError naming `source` and parameters."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
        raise UserError(f"{source}: the checkpoint is of another model; use its configuration ({reason})") from None


# --------------------------------------------------------------------------------------- the end of a script


class Stopped(Exception):
    """Training was interrupted by a signal, after its checkpoint was written."""


def run_main(main: Callable[[], object]) -> None:
    """Run a script's `main` and exit: 0; 2 after a UserError (one line, no traceback); 130 if stopped."""
    try:
        main()
        code = 0
    except UserError as error:
        print("error:" if is_main() else f"error (process {rank()}):", user_message(error), file=sys.stderr, flush=True)
        sys.exit(2)  # the process group is left as it is: another process may still wait in it
    except torch.OutOfMemoryError as error:
        advice = "lower train.batch_size and raise train.accumulation, or set checkpointing: true"
        reason = str(error).splitlines()[0][:150]
        print(f"error: out of GPU memory ({reason}); {advice}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt):
        code = 130
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


class ProgressLine:
    """A line with done/total, speed and time left, every `interval` seconds, counted on this rank."""

    def __init__(self, label: str, unit: str, total: int, log: Callable | None, interval: float = 10.0):
        self.label, self.unit, self.total, self.interval = label, unit, total, interval
        self.log = log or (lambda line: None)
        self.done, self.start = 0, time.perf_counter()
        self.last = self.start

    def advance(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if now - self.last >= self.interval:
            self.last = now
            speed = self.done / (now - self.start)
            left = max(self.total - self.done, 0) / max(speed, 1e-9)
            self.log(f"{self.label}: {self.done:,}/{self.total:,} {self.unit}, {speed:,.0f}/s, {_clock(left)} left")

    def close(self) -> None:
        seconds = time.perf_counter() - self.start
        speed = self.done / max(seconds, 1e-9)
        self.log(f"{self.label}: {self.done:,} {self.unit} in {_clock(seconds)}, {speed:,.0f}/s")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


# ---------------------------------------------------------------------------------- random state, precision


def seed_everything(seed: int, per_rank: bool = True) -> None:
    """Seed Python, NumPy and torch; with `per_rank` every process gets a stream of its own."""
    seed = seed + (rank() if per_rank else 0)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict:
    """This process's random generators, as tensors and numbers that `torch.load(weights_only=True)` reads."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *rest],
    }


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def autocast(device: torch.device, precision: str):
    """The context in which the forward pass runs; `precision` as `resolve_precision` returns it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def resolve_precision(setting: str, device: torch.device) -> str:
    """`auto | bf16 | fp32` -> `bf16 | fp32`; auto: bf16 on GPUs that have it, on CPUs where it is faster."""
    if setting not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision is {setting}; it is one of auto, bf16, fp32")
    if setting != "auto":
        return setting
    if device.type == "cuda":
        choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        logger.info("precision %s (auto)", choice)
        return choice
    seconds = {name: _time_mlp(device, name) for name in ("bf16", "fp32")}
    choice = gather_objects(min(seconds, key=seconds.get))[0]  # rank 0 decides for all
    took = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    logger.info("precision %s (auto: a small MLP's forward and backward took %s)", choice, took)
    return choice


def _time_mlp(device: torch.device, precision: str) -> float:
    """Seconds of the fastest of five forward and backward passes of a Transformer-sized MLP."""
    with torch.random.fork_rng(devices=[]):
        first, second = torch.nn.Linear(384, 1536), torch.nn.Linear(1536, 384)
        inputs, best = torch.randn(512, 384, requires_grad=True), math.inf
    for _ in range(5):
        start = time.perf_counter()
        with autocast(device, precision):
            loss = second(torch.nn.functional.gelu(first(inputs))).float().square().mean()
        loss.backward()
        best = min(best, time.perf_counter() - start)
    return best


# --------------------------------------------------------------------------------------------- training loop


@dataclasses.dataclass
class Progress:
    """How far training is: `step` optimizer steps and `epoch` epochs (with what follows one) are done."""

    step: int = 0
    epoch: int = 0
    steps_per_epoch: int = 0
    total_steps: int = 0


def fit(
    model: torch.nn.Module,
    loader,
    optimizer: torch.optim.Optimizer,
    schedule,
    *,
    train_cfg: Config,
    run: Run,
    device: torch.device,
    loss_fn: Callable,
    after_step: Callable[[Progress], object] | None = None,
    on_epoch_end: Callable[[torch.nn.Module, Progress], object] | None = None,
    extra_state: Callable[[], dict] | None = None,
    resume_from: dict | None = None,
    log_fn: Callable[[Progress, dict], dict | None] | None = None,
) -> Progress:
    """Train until `train_cfg.epochs` are done, or raise Stopped after a signal.

    `loader` yields dicts of tensors (and lists, e.g. `paths`) and has `set_epoch(epoch, start_batch)`.
    `loss_fn(model, batch, progress) -> (loss, values)` runs under autocast for each of the `accumulation`
    micro-batches; `values` are scalars (tensors or numbers; the same names in all processes), logged as means
    over the interval, on the console too where the name has no "/". `schedule.step(n)` sets the rates of step
    n. `after_step(progress)` follows every optimizer step, `on_epoch_end(model, progress)` every epoch, while
    `progress.epoch` still is that epoch's number from 0. `log_fn(progress, means)` may return further values
    to log. All of them are called in all processes. Checkpoints hold model, optimizer, position in the data,
    random state, configuration and `extra_state()`; `resume_from`, such a checkpoint, continues with the next batch and
    is emptied once it is in place. The optimizer's settings (rates, decay) come from the configuration.
    """
    accumulation, steps_per_epoch = train_cfg.accumulation, len(loader) // train_cfg.accumulation
    if steps_per_epoch == 0:
        raise UserError(
            f"{len(loader.dataset)} training entries are too few for one step: lower train.batch_size "
            f"(now {train_cfg.batch_size} per process) or train.accumulation (now {accumulation})"
        )
    progress = Progress(steps_per_epoch=steps_per_epoch, total_steps=train_cfg.epochs * steps_per_epoch)
    precision = train_cfg.precision
    if resume_from is not None:
        precision = _resume(resume_from, model, optimizer, progress, precision, device)
        run.info(f"resumed at step {progress.step} of {progress.total_steps}")
    precision = resolve_precision(precision, device)
    window = _Window(run, device)

    def save(stop: bool = False) -> None:
        window.check()
        _save(model, optimizer, progress, run, extra_state, precision=precision, device=device.type)
        if stop:
            run.info(f"stopped at step {progress.step} of {progress.total_steps}; continue with --resume")
            raise Stopped

    with _stop_signals() as stopping:
        while progress.epoch < train_cfg.epochs:
            model.train()
            first = progress.step - progress.epoch * steps_per_epoch
            batches = _batches(loader, progress.epoch, first * accumulation, device, window)
            for index in range(first, steps_per_epoch):
                schedule.step(progress.step)
                _train_step(model, batches, optimizer, loss_fn, progress, train_cfg, precision, window)
                progress.step += 1
                if after_step:
                    after_step(progress)
                last = index == steps_per_epoch - 1
                if progress.step % train_cfg.log_every == 0 or last:
                    _log(run, window, progress, optimizer, train_cfg, log_fn)
                stop = stopping()
                if stop or (not last and _due(progress.step, train_cfg.checkpoint_every)):
                    save(stop)
            batches.close()
            if on_epoch_end:
                on_epoch_end(model, progress)
            progress.epoch += 1
            save(stop=stopping() and progress.epoch < train_cfg.epochs)
            window.restart()
    return progress


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on the device (copied asynchronously from pinned memory)."""

    def move(item):
        return item.to(device, non_blocking=True) if isinstance(item, torch.Tensor) else item

    return {key: move(item) for key, item in batch.items()}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(model, optimizer, progress: Progress, run: Run, extra_state, **notes) -> None:
    """Write checkpoint_last.pth; every process contributes its random state."""
    random_states = gather_objects(random_state())
    extra = extra_state() if extra_state else {}
    if is_main():
        checkpoint = {
            "model": unwrap(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": {**dataclasses.asdict(progress), **notes},
            "rng": random_states,
            "config": run.config.to_dict() if isinstance(run.config, Config) else run.config,
            **extra,
        }
        save_checkpoint(run.dir / "checkpoint_last.pth", checkpoint)
    barrier()  # no process ends, or reads the file, before it is written


def _resume(checkpoint: dict, model, optimizer, progress: Progress, precision: str, device: torch.device) -> str:
    """Put a checkpoint's state in place; return the precision to go on with."""
    missing = [key for key in ("model", "optimizer", "progress", "rng") if key not in checkpoint]
    if missing:
        raise UserError(f"--resume: the checkpoint has no {', '.join(missing)}: it is no training checkpoint")
    position = checkpoint["progress"]
    if position["steps_per_epoch"] != progress.steps_per_epoch:
        raise UserError(
            f"--resume: the checkpoint's epoch has {position['steps_per_epoch']} steps, this run's has "
            f"{progress.steps_per_epoch}: use the same data, batch size, accumulation and number of processes"
        )
    load_state(unwrap(model), checkpoint["model"], "--resume")
    settings = [{key: item for key, item in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except ValueError as error:
        raise UserError(f"--resume: the checkpoint's optimizer has other parameter groups ({error})") from None
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    progress.step, progress.epoch = position["step"], position["epoch"]
    if len(checkpoint["rng"]) == world_size():
        set_random_state(checkpoint["rng"][rank()])
    else:
        logger.info("random state not restored: it is of %d processes", len(checkpoint["rng"]))
    same_device = position["device"] == device.type
    checkpoint.clear()  # both hold the same weights by now; at full size the copy is 5 GB a process
    return position["precision"] if precision == "auto" and same_device else precision


def _batches(loader, epoch: int, start_batch: int, device: torch.device, window: _Window):
    """The epoch's batches from `start_batch`, on the device.

    Loading leaves torch's random state as it was: DataLoader draws a seed from it when an epoch starts, and a
    run resumed within the epoch would draw it at another time.
    """
    loader.set_epoch(epoch, start_batch)
    iterator = None
    while True:
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            iterator = iter(loader) if iterator is None else iterator
            batch = next(iterator, None)
        if batch is None:
            return
        window.waited += time.perf_counter() - start
        yield to_device(batch, device)


def _train_step(model, batches, optimizer, loss_fn, progress, train_cfg, precision: str, window: _Window) -> None:
    """One optimizer step. A gradient that is not finite changes no weight; `window.check` reports it."""
    for micro in range(train_cfg.accumulation):
        batch = next(batches)
        sync = micro == train_cfg.accumulation - 1 or model is unwrap(model)
        with contextlib.nullcontext() if sync else model.no_sync():
            with autocast(window.device, precision):
                loss, values = loss_fn(model, batch, progress)
            (loss / train_cfg.accumulation).backward()
        window.add_batch(progress.step, batch, loss, values)
    # the norm is the same in all processes, since they share their gradients
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_cfg.clip_grad or math.inf)
    window.norms.append(norm.detach())
    if norm.is_cuda and optimizer.defaults.get("fused"):
        # GradScaler's hook: where it is 1 the kernel skips its update, and nothing waits for the GPU
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
    elif torch.isfinite(norm):
        optimizer.step()
    else:
        window.check()
    optimizer.zero_grad(set_to_none=True)


class _Window:
    """What the steps since the last log line gave; scalars stay on the device, so that no step waits."""

    def __init__(self, run: Run, device: torch.device):
        self.run, self.device, self.seconds_per_step = run, device, None
        self.restart()

    def restart(self) -> None:
        self.batches, self.norms, self.values = [], [], {}  # batches: (step, paths, {name: scalar})
        self.pairs, self.waited, self.start = 0, 0.0, time.perf_counter()

    def add_batch(self, step: int, batch: dict, loss: torch.Tensor, values: dict) -> None:
        scalars = {"loss": loss, **values}
        scalars = {key: item.detach() if isinstance(item, torch.Tensor) else item for key, item in scalars.items()}
        for name, item in scalars.items():
            self.values.setdefault(name, []).append(item)
        paths = list(batch.get("paths", ()))
        self.batches.append((step, paths, scalars))
        self.pairs += len(paths) or len(next(item for item in batch.values() if isinstance(item, torch.Tensor)))

    def means(self) -> dict[str, float]:
        """The means over the interval and all processes; here the device is waited for."""
        columns = {**self.values, "grad_norm": self.norms}
        means = [
            torch.stack([torch.as_tensor(item, device=self.device).float() for item in column]).mean()
            for column in columns.values()
        ]
        means = all_reduce_sum(torch.stack(means)) / world_size()
        return dict(zip(columns, means.tolist(), strict=True))

    def check(self) -> None:
        """Raise a UserError, in all processes, if a loss or gradient since the last log was not finite."""
        if not self.norms:
            return
        losses = torch.stack([scalars["loss"].float() for _, _, scalars in self.batches])
        losses = losses.view(len(self.norms), -1)  # [steps, accumulation]
        finite = torch.isfinite(losses).all(1) & torch.isfinite(torch.stack(self.norms))
        bad = all_reduce_sum((~finite).float()).nonzero().flatten().tolist()
        if not bad:
            return
        step = self.batches[0][0] + bad[0]
        mine = []  # this process's micro-batches of that step: (files, names of what is not finite)
        for at, paths, scalars in self.batches:
            if at == step:
                mine.append((paths, [key for key, item in scalars.items() if not math.isfinite(float(item))]))
        batches = [item for items in gather_objects(mine) for item in items]
        batches = [item for item in batches if item[1]] or batches
        terms = sorted({name for _, names in batches for name in names}) or ["the gradient (but no loss)"]
        files = [path for paths, _ in batches for path in paths]
        shown = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
        if is_main():
            record = json.dumps({"step": step, "not_finite": terms, "files": files}, indent=1)
            (self.run.dir / "nonfinite.json").write_text(record, encoding="utf-8")
        raise UserError(
            f"step {step}: not finite: {', '.join(terms)}; stopped, this step is not saved. The batch "
            f"(all of it in {self.run.dir / 'nonfinite.json'}): {shown}. "
            "Look at these files, or lower train.lr; --resume goes on from the last checkpoint"
        )


def _log(run: Run, window: _Window, progress: Progress, optimizer, train_cfg: Config, log_fn) -> None:
    """One line of the log and the console for the steps since the last one."""
    window.check()
    values = window.means()
    seconds = time.perf_counter() - window.start
    per_step = seconds / len(window.norms)
    window.seconds_per_step = 0.7 * (window.seconds_per_step or per_step) + 0.3 * per_step
    eta = (progress.total_steps - progress.step) * window.seconds_per_step
    rates = {f"lr_{group.get('name', index)}": group["lr"] for index, group in enumerate(optimizer.param_groups)}
    values |= rates
    values |= {
        "pairs_per_second": window.pairs * world_size() / seconds,
        "data_wait": window.waited / seconds,
    }
    values |= {"memory_gib": _peak_memory(window.device), "eta_seconds": eta}
    values |= {"epoch": progress.step / progress.steps_per_epoch}
    if log_fn:
        values |= log_fn(progress, values) or {}
    run.log(progress.step, values)
    shown = " ".join(f"{key} {values[key]:.3g}" for key in [*window.values, "grad_norm", *rates] if "/" not in key)
    place = f"epoch {progress.epoch + 1}/{train_cfg.epochs} step {progress.step}/{progress.total_steps}"
    speed = f"{values['pairs_per_second']:.1f} pairs/s, data {values['data_wait']:.0%}"
    run.info(f"{place}  {shown}  | {speed}, {values['memory_gib']:.1f} GiB, ETA {_clock(eta)}")
    window.restart()


def _peak_memory(device: torch.device) -> float:
    """GiB: the GPU's allocated memory, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@contextlib.contextmanager
def _stop_signals():
    """Give a function that tells, alike in all processes, whether one of them got SIGINT or SIGTERM.

    The third signal interrupts at once; the second does not, for torchrun passes on the Ctrl-C that the
    terminal has sent to every process already.
    """
    received = []

    def handler(number, _frame):
        received.append(number)
        if len(received) > 2:
            raise KeyboardInterrupt

    def stopping() -> bool:
        # by gloo, so that the GPU's queue is not waited for
        return bool(received) if world_size() == 1 else bool(all_reduce_sum(torch.tensor(len(received))))

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, old in previous.items():
            signal.signal(number, old or signal.SIG_DFL)
