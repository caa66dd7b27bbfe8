"""Stop signals: a run that is asked to stop ends after its step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import torch

from utils import STOP_SIGNALS, all_reduce_sum, stop_requests, world_size


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Give a function that tells, alike in all processes, whether one of them got a stop signal.

    Stop signals are Ctrl-C's SIGINT, the SIGTERM of schedulers, the SIGUSR1 or SIGUSR2 that they can send some time
    before, and a closed terminal's SIGHUP (which stays ignored under nohup). The third SIGINT interrupts at once; the
    second does not, for torchrun passes on the Ctrl-C that the terminal has sent to every process already.
    """

    def handler(number: int, _frame) -> None:
        stop_requests.append(number)
        if stop_requests.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt

    def stopping() -> bool:
        # by gloo, so that the GPU's queue is not waited for
        asked = len(stop_requests)
        return bool(asked) if world_size() == 1 else bool(all_reduce_sum(torch.tensor(asked)))

    stop_requests.clear()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield stopping
    finally:
        for number, old in previous.items():
            signal.signal(number, old or signal.SIG_DFL)
        stop_requests.clear()
