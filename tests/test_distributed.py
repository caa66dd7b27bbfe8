"""Two processes (gloo) against one process with the same global batch, draws and negatives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "distributed_steps.py"


def run_steps(stage: str, out: Path, processes: int, *overrides: str) -> dict:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(SCRIPT), stage, str(out), "2", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SCRIPT.parent.parent}:{SCRIPT.parent}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(out, weights_only=True)


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
def test_two_processes_equal_one(tmp_path, stage, overrides):
    two = run_steps(stage, tmp_path / "two.pth", 2, *overrides)
    one = run_steps(stage, tmp_path / "one.pth", 1, *overrides)
    assert torch.allclose(two["losses"], one["losses"], atol=1e-5, rtol=0)
    for name, value in one["state"].items():  # weights, teacher, queues and centers alike
        assert torch.allclose(two["state"][name].double(), value.double(), atol=1e-5, rtol=0), name
