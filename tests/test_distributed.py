"""Two processes (gloo), of one node and of two, against one process with the same global batch, draws and negatives."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.distributed import init_distributed
from utils import gather_objects, leave_group

SCRIPT = Path(__file__).parent / "distributed_steps.py"


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def run_steps(stage: str, out: Path, processes: int, *overrides: str, nodes: int = 1) -> dict:
    """What the steps leave behind; with several `nodes`, each is an agent of torchrun's on this machine."""
    starts = [[sys.executable]]
    if nodes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=steps"]
        # as `--rdzv-endpoint` of docs/speed.md: the first node's host holds the store
        holders = [["--local-addr=localhost", "--rdzv-conf", f"is_host={node == 0}"] for node in range(nodes)]
        options = [f"--nnodes={nodes}", f"--nproc_per_node={processes // nodes}", *meeting]
        starts = [[*TORCHRUN, *options, *holder] for holder in holders]
    elif processes > 1:
        starts = [[*TORCHRUN, "--standalone", f"--nproc_per_node={processes}"]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SCRIPT.parent.parent}:{SCRIPT.parent}"}
    command = [str(SCRIPT), stage, str(out), "2", *overrides]
    agents = [
        subprocess.Popen([*start, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for start in starts
    ]
    said = [agent.communicate()[1] for agent in agents]
    assert not any(agent.returncode for agent in agents), said[0][-3000:] + said[-1][-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    return run_steps("pretrain", tmp_path_factory.mktemp("one_node") / "out.pth", 2)


@pytest.mark.parametrize(
    "stage, overrides",
    [
        ("pretrain", ()),
        ("pretrain", ("itc.negatives=batch",)),
        ("pretrain", ("mim.target=pixels",)),
        ("retrieval", ()),
        ("retrieval", ("itc.negatives=batch",)),
    ],
)
def test_two_processes_equal_one(tmp_path, stage, overrides, one_node):
    plain = (stage, overrides) == ("pretrain", ())
    two = one_node if plain else run_steps(stage, tmp_path / "two.pth", 2, *overrides)
    one = run_steps(stage, tmp_path / "one.pth", 1, *overrides)
    assert torch.allclose(two["losses"], one["losses"], atol=1e-5, rtol=0)
    for name, value in one["state"].items():  # weights, teacher, queues and centers alike
        assert torch.allclose(two["state"][name].double(), value.double(), atol=1e-5, rtol=0), name


def test_two_nodes_of_one_process_equal_one_node_of_two_to_the_last_bit(tmp_path, one_node):
    two = run_steps("pretrain", tmp_path / "out.pth", 2, nodes=2)
    assert torch.equal(one_node["losses"], two["losses"])
    for name, value in one_node["state"].items():
        assert torch.equal(two["state"][name], value), name


def test_compiled_layers_train_alike_in_two_processes(tmp_path, one_node):
    compiled = run_steps("pretrain", tmp_path / "out.pth", 2, "train.compile=true")
    assert compiled["compiled"] and not one_node["compiled"]
    torch.testing.assert_close(compiled["losses"], one_node["losses"], atol=1e-5, rtol=0)
    torch.testing.assert_close(compiled["state"], one_node["state"], atol=1e-5, rtol=0)


def join(rank: int, restarts: int, port: int) -> None:
    """A process that torchrun has started: it meets the other one, and one of the two is killed."""
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": restarts, "GROUP_WORLD_SIZE": 1}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in {**agent, **address, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        os.environ[name] = str(value)
    time.sleep(0.3 * (restarts % 2 == rank))  # the other one looks first for who is there
    init_distributed("cpu")
    assert gather_objects((rank, restarts)) == [(0, restarts), (1, restarts)]
    if rank == restarts % 2:
        os._exit(0)
    leave_group()


def test_processes_that_torchrun_restarts_do_not_wait_for_those_before_them():
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # of the agent, for all restarts
    fork = multiprocessing.get_context("fork")
    for restarts in range(6):
        ranks = [fork.Process(target=join, args=(rank, restarts, store.port)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(20)
            rank.kill()
        assert [rank.exitcode for rank in ranks] == [0, 0], restarts
