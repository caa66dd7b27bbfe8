"""How a batch gets to the device."""

from __future__ import annotations

import torch

from dataset.transforms import normalised
from utils import to_device


class Transfer:
    """Copies batches to the device and normalises their images there.

    To a GPU on a stream of its own: the next batch travels while the GPU still computes the step before, which the
    process is ahead of, and the step's own stream waits for no more than the copy. (The loader pins the memory.)
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: dict) -> dict:
        if self.stream is None:
            return normalised(to_device(batch, self.device))
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            moved = to_device(batch, self.device)
        computing.wait_stream(self.stream)
        for item in moved.values():
            if isinstance(item, torch.Tensor):
                item.record_stream(computing)  # its memory is free for the next copy when the step is done with it
        return normalised(moved)
