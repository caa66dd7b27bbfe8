"""How a batch gets to the device."""

import pytest
import torch

from dataset.transforms import normalized
from engine.distributed import Transfer


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return {"image1": pixels, "input_ids": torch.arange(8).view(4, 2) + seed, "padded": False, "paths": ["a"] * 4}


def test_on_the_cpu_a_batch_is_normalised_and_nothing_else():
    moved, expected = Transfer(torch.device("cpu"))(batch()), normalized(batch())
    assert moved.keys() == expected.keys() and moved["padded"] is False and moved["paths"] == ["a"] * 4
    assert torch.equal(moved["image1"], expected["image1"]) and moved["image1"].dtype == torch.float32


@pytest.mark.gpu
def test_on_a_gpu_every_batch_arrives_whole_however_busy_its_stream_is():
    transfer, busy = Transfer(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    sums = []
    for seed in range(20):
        pinned = {key: x.pin_memory() if isinstance(x, torch.Tensor) else x for key, x in batch(seed).items()}
        moved = transfer(pinned)
        for _ in range(5):
            busy = (busy @ busy).clamp(-1, 1)
        sums.append(moved["image1"].double().sum() + moved["input_ids"].sum())
        del moved
    expected = [normalized(batch(seed))["image1"].double().sum() + batch(seed)["input_ids"].sum() for seed in range(20)]
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack(expected))
