"""Two processes (gloo) against one process with the same global batch, draws and negatives.

Everything is in fp64: AdamW divides by the root of the squared gradient, which blows rounding noise up to whole steps
where the exact gradient is zero (the biases of attention keys).
"""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import in_ranks
from tiny import NO_DROPOUT, draws_part, make_batch, make_draws, tiny_config, tiny_model

from engine.distributed import compile_model, init_distributed, wrap_ddp
from models import alignment
from models.retrieval import RetrievalModel
from optim import create_optimizer
from utils import all_reduce_sum, gather_objects, is_main, leave_group, rank, world_size

GLOBAL_BATCH = 8
CASES = {
    "pretrain": ("pretrain", 5),
    "negatives of the batch": ("pretrain", 5, "itc.negatives=batch"),
    "pixels": ("pretrain", 5, "mim.target=pixels"),
    "retrieval": ("retrieval", 5),
    "retrieval, negatives of the batch": ("retrieval", 5, "itc.negatives=batch"),
    "compiled": ("pretrain", 2, "train.compile=true"),
}


def train(out: Path, stage: str, steps: int, *overrides: str) -> None:
    """Optimizer steps of a tiny model on fixed data and draws, in one process or several; what they leave."""
    cfg, cpu = tiny_config(*overrides), torch.device("cpu")
    model = tiny_model(*NO_DROPOUT, *overrides).double()
    if stage == "retrieval":
        model.backbone.decoder = model.backbone.mlm_head = None
        model = RetrievalModel(model.backbone, cfg).double()
    if cfg.train.compile:  # traced as ever, and run without the minutes that a C++ compiler takes
        compile_model(model, "eager")
    wrapped = wrap_ddp(model, cpu)
    optimizer = create_optimizer(model, lr=1e-3, lr_vit=1e-4, weight_decay=0.02)
    history = []
    for step in range(steps):
        batch = make_batch(GLOBAL_BATCH, seed=step)
        draws = make_draws(batch, seed=step)
        size = GLOBAL_BATCH // world_size()
        rows = slice(rank() * size, (rank() + 1) * size)
        length = int(batch["attention_mask"][rows].sum(1).max())  # each rank pads to its own longest caption
        mine = {name: value[rows] for name, value in batch.items()}
        for name in ("input_ids", "attention_mask"):
            mine[name] = mine[name][:, :length]
        mine = {name: x.double() if x.is_floating_point() else x for name, x in mine.items()}
        if stage == "retrieval":
            mine["image"], drawn = mine["image1"], [torch.stack([draws.itm_image, draws.itm_text])[:, rows]]
        else:
            mine, drawn = model.prepare(mine, draws_part(draws, rows, length)), []
        loss, logs = wrapped(mine, 0.4, *drawn)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.after_step()
        losses = [value for name, value in sorted(logs.items()) if name.startswith("loss/")]
        history.append(all_reduce_sum(torch.stack(losses)) / world_size())
    if is_main():
        compiled = sum(module._compiled_call_impl is not None for module in model.modules())
        torch.save({"losses": torch.stack(history), "state": model.state_dict(), "compiled": compiled}, out)


def train_all(_rank: int, folder: Path) -> None:
    for name, case in CASES.items():
        train(folder / f"{name}.pth", *case)


def results(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The results of all cases in two processes."""
    folder = tmp_path_factory.mktemp("two")
    tiny_model()  # the processes to come have what this imports
    torch.compiler.reset()
    in_ranks(2, train_all, folder)
    return {name: results(folder / f"{name}.pth") for name in CASES}


@pytest.mark.parametrize("name", [name for name in CASES if name != "compiled"])
def test_two_processes_equal_one(tmp_path, monkeypatch, two_ranks, name):
    everywhere = alignment.legal_negatives

    def on_the_same_rank(image_id, caption_id):
        owner = torch.arange(len(image_id)) * 2 // len(image_id)
        return everywhere(image_id, caption_id) & (owner[:, None] == owner)

    monkeypatch.setattr(alignment, "legal_negatives", on_the_same_rank)
    train(tmp_path / "one.pth", *CASES[name])
    one, two = results(tmp_path / "one.pth"), two_ranks[name]
    assert torch.allclose(two["losses"], one["losses"], atol=1e-5, rtol=0)
    for name, value in one["state"].items():  # weights, teacher, queues and centers alike
        assert torch.allclose(two["state"][name].double(), value.double(), atol=1e-5, rtol=0), name


def test_a_step_of_one_graph_trains_alike_in_two_processes(two_ranks):
    compiled, plain = two_ranks["compiled"], two_ranks["pretrain"]
    assert compiled["compiled"] and not plain["compiled"]
    torch.testing.assert_close(compiled["losses"], plain["losses"][:2], atol=1e-5, rtol=0)


def join(number: int, restarts: int, port: int) -> None:
    """A process that torchrun has started: it meets the other one, and one of the two is killed."""
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": restarts, "GROUP_WORLD_SIZE": 1}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in {**agent, **address, "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2}.items():
        os.environ[name] = str(value)
    time.sleep(0.3 * (restarts % 2 == number))  # the other one looks first for who is there
    init_distributed("cpu")
    assert gather_objects((number, restarts)) == [(0, restarts), (1, restarts)]
    if number == restarts % 2:
        os._exit(0)
    leave_group()


def test_processes_that_torchrun_restarts_do_not_wait_for_those_before_them():
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # of the agent, for all restarts
    fork = multiprocessing.get_context("fork")
    for restarts in range(6):
        processes = [fork.Process(target=join, args=(number, restarts, store.port)) for number in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(20)
            process.kill()
        assert [process.exitcode for process in processes] == [0, 0], restarts
