"""How the processes of one attempt find each other in a store that still holds what an earlier attempt left there.

torchrun keeps one store for all its attempts, and the processes that it starts again would find the addresses of those
that have ended. It tells them no number that all of them share and no earlier attempt had: a node that only follows
another one's restart does not count it. So they agree on a name.
"""

from __future__ import annotations

import os
import time

import torch.distributed as dist


def join_group(backend: str) -> None:
    """`dist.init_process_group` by the environment's addresses; TimeoutError, or torch's own, where one is missing."""
    store, rank, world = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=fresh_store(store, rank, world), rank=rank, world_size=world)


def fresh_store(store: dist.Store, rank: int, world: int, timeout: float = 1800.0) -> dist.Store:
    """The part of `store` in which nobody but the processes of this attempt reads and writes; called in all of them.

    Rank 0 draws a name and every other process a word. A process answers the name that it finds with its word, and
    takes the name once its word has been repeated, which the rank 0 of an earlier attempt cannot have done. Rank 0
    repeats the words that answer its own name. Raises TimeoutError after `timeout` seconds.
    """
    agreement, mine = dist.PrefixStore("agreement", store), os.urandom(8).hex()
    deadline, pause = time.monotonic() + timeout, 0.01 + world / 2000

    def read(key: str) -> str:
        return agreement.get(key).decode() if agreement.check([key]) else ""

    def wait(others: str) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {rank} waited {timeout:g} s for {others}")
        time.sleep(pause)

    if rank == 0:
        agreement.set("name", mine)
        for other in range(1, world):
            while not (answer := read(f"answer_{other}")).startswith(f"{mine} "):
                wait(f"process {other}")
            agreement.set(f"repeated_{other}", answer.split()[1])
        return dist.PrefixStore(f"attempt_{mine}", store)
    name = ""
    while read(f"repeated_{rank}") != mine:
        if (found := read("name")) != name:
            name = found
            agreement.set(f"answer_{rank}", f"{name} {mine}")
        wait("process 0")
    return dist.PrefixStore(f"attempt_{name}", store)
