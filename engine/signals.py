"""Stop signals: a run that is asked to stop ends within seconds, in training after its step and with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import torch

from utils import STOP_SIGNALS, Stopped, all_reduce_sum, stop_requests, world_size


@contextlib.contextmanager
def ending_at_stop_signals() -> Iterator[None]:
    """Within, a stop signal ends a script at once, by KeyboardInterrupt, except where `stop_signals` waits.

    For what comes before training and after it: nothing is lost there, since every file is written whole or not at
    all. The signals that follow are ignored while the script ends, as several senders may pass on one stop, up to the
    third Ctrl-C. A script that ends otherwise gives the signals back.
    """

    def handler(number: int, _frame) -> None:
        stop_requests.append(number)
        if len(stop_requests) == 1 or stop_requests.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt("stopped outside of training; the same command with --resume goes on")

    stop_requests.clear()
    previous = _listen(handler)
    try:
        yield
        _give_back(previous)
    except BaseException as error:
        if isinstance(error, RuntimeError) and stop_requests:  # another process ended first, at the same signal
            raise KeyboardInterrupt from None
        if not isinstance(error, KeyboardInterrupt | Stopped):
            _give_back(previous)
        raise


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Give a function that tells, alike in all processes, whether one of them got a stop signal.

    Stop signals are Ctrl-C's SIGINT, the SIGTERM of schedulers, the SIGUSR1 or SIGUSR2 that they can send some time
    before, and a closed terminal's SIGHUP (which stays ignored under nohup). The third SIGINT interrupts at once; the
    second does not, for torchrun passes on the Ctrl-C that the terminal has sent to every process already.

    Raises Stopped at its end where a signal came after the function was called last.
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
    previous = _listen(handler)
    try:
        yield stopping
        if stop_requests:
            raise Stopped
    finally:
        _give_back(previous)


def _listen(handler: Callable) -> dict[int, object]:
    """Give the stop signals a handler; returns the handlers that they had."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    return previous


def _give_back(previous: dict[int, object]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler or signal.SIG_DFL)
    stop_requests.clear()
