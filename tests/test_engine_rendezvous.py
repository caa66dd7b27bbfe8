"""Processes that torchrun has started again find each other, not those of the attempt before: also on several nodes."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from conftest import ROOT

from engine.rendezvous import fresh_store

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
import utils

folder = Path(sys.argv[1])

def main():
    utils.init_distributed("cpu")
    assert utils.all_reduce_sum(torch.tensor(1)) == 2
    first = folder / f"first_{utils.rank()}"
    if not first.exists():
        first.touch()
        utils.barrier()
        if utils.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        utils.barrier()  # in which the other one is told that it is alone
    (folder / f"end_{utils.rank()}").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])

utils.run_main(main)
"""


def attempt(store, world: int, late: int) -> list:
    """What each of `world` processes (threads here) takes; number `late` comes after the others."""
    found = [None] * world

    def join(rank):
        time.sleep(0.3 * (rank == late))
        found[rank] = fresh_store(store, rank, world, timeout=20.0)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_attempt_has_a_store_of_its_own_whoever_comes_last():
    shared = dist.HashStore()
    for number, (world, late) in enumerate([(3, 0), (3, 1), (3, 0), (2, 0), (1, 0), (4, 3)]):
        stores = attempt(shared, world, late)
        for rank, store in enumerate(stores):
            assert not store.check([f"address_{rank}"])  # of an earlier attempt
            store.set(f"address_{rank}", f"{number}.{rank}")
        for store in stores:
            assert [store.get(f"address_{rank}").decode() for rank in range(world)] == [
                f"{number}.{rank}" for rank in range(world)
            ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stays_alone_does_not_take_what_ended_ones_left(rank):
    shared = dist.HashStore()
    attempt(shared, 2, late=0)
    with pytest.raises(TimeoutError, match=f"process {rank} waited 0.3 s for process {1 - rank}"):
        fresh_store(shared, rank, 2, timeout=0.3)


def test_two_nodes_restart_after_one_lost_its_process(tmp_path):
    """Two agents of torchrun on this machine; they share the store, and only they know how often they restarted."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=nodes", "--local-addr=127.0.0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    agents = [
        subprocess.Popen([*command, str(script), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        errors = [agent.communicate(timeout=240)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert "1" in [(tmp_path / f"end_{rank}").read_text() for rank in range(2)]
