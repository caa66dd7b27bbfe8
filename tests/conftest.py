"""Before any test: one thread (the machine may be shared), no network, signals as a terminal gives them."""

import os
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402

from engine.distributed import init_distributed  # noqa: E402
from utils import UserError, leave_group, seed_everything  # noqa: E402

torch.set_num_threads(1)
# Background jobs of a shell ignore SIGINT, and under nohup SIGHUP; the processes of tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    from stages import make_demo  # imports all scripts

    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(autouse=True)
def same_draws():
    """Every test begins with the same random state, whichever tests ran before it."""
    seed_everything(0)


@pytest.fixture
def no_hanging():
    """Ends the test run if something waits or computes without end."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def refused(call, *parts):
    """The line that the user sees; `parts` must be in it."""
    with pytest.raises(UserError) as caught:
        call()
    line = one_line(caught.value, most=700)
    assert all(str(part) in line for part in parts), line
    return line


def one_line(error: UserError, *parts: str, most: int = 2000) -> str:
    """The line that the user sees; one of `parts`, if there are any, must be in it."""
    line = str(error)
    assert len(line.splitlines()) == 1 and len(line) < most and line.isprintable(), line
    assert not parts or any(part in line for part in parts), line
    return line


def keys_of(config: dict, prefix: str = "") -> list[str]:
    """All dotted keys of a configuration, those of maps too."""
    found = []
    for key, value in config.items():
        found += [prefix + key, *(keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else ())]
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def contents(folder: Path, without: str = "") -> dict[str, bytes]:
    """{file: its bytes} of the files below a folder, but for those of one name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != without)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def in_ranks(count: int, function, *arguments) -> None:
    """function(rank, *arguments) in `count` processes of one group (gloo); an error in one of them is raised here.

    They are forked from this process, which has imported everything already, if it uses no GPU.
    """
    port = free_port()
    method = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    torch.multiprocessing.start_processes(_rank, (count, port, function, arguments), count, start_method=method)


def _rank(rank: int, count: int, port: int, function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**address, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}.items():
        os.environ[name] = str(value)
    init_distributed("cpu")
    function(rank, *arguments)
    leave_group()


def pytest_configure():
    """SIGTERM and SIGHUP end the tests as Ctrl-C does: by an exception, at which the processes of a test are ended."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in ("test_drill.py", "test_distributed.py"))  # the longest first
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
