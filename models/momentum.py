"""The momentum teacher, slowly moving copies of the encoders, and the queue of their features (MoCo, ALBEF)."""

import copy

import torch
from torch import Tensor, nn


class MomentumTeacher(nn.Module):
    """Slowly moving copies of some modules: no gradient, always in eval mode (no dropout).

    students: name -> module. The copies are attributes of the same name, so that the teacher reads as the student
    does: `teacher.image_encoder(images)`. The students themselves are not registered here.
    """

    def __init__(self, students: dict[str, nn.Module]):
        super().__init__()
        for name, module in students.items():
            self.add_module(name, copy.deepcopy(module).requires_grad_(False))
        self.eval()

    def train(self, mode: bool = True) -> nn.Module:
        """Stay in eval mode whatever the surrounding model does."""
        return super().train(False)

    @torch.no_grad()
    def update(self, students: dict[str, nn.Module], momentum: float) -> None:
        r"""Eq. 1: \theta_{\hat E_I} = m \theta_{\hat E_I} + (1 - m) \theta_{E_I}, all tensors in one multi-tensor call.

        E_I is the image encoder among `students`, \hat E_I its copy here, m `momentum`; the head (H_I, \hat H_I) and
        what ITC needs move alike. The paper prints \theta_{E_I} twice on the right, a misprint: nothing would move.
        """
        pairs = [
            (mine, theirs)
            for name, module in students.items()
            for mine, theirs in zip(getattr(self, name).parameters(), module.parameters(), strict=True)
        ]
        if not pairs:  # some configurations need no teacher
            return
        torch._foreach_lerp_([mine for mine, _ in pairs], [theirs for _, theirs in pairs], 1 - momentum)


class FeatureQueue(nn.Module):
    """The last `size` momentum features of images and texts, with the image id each pair belongs to.

    A ring of any size (0: no queue); a batch may be of any size too, also larger than the ring. Id -1 marks a slot
    that was never filled. All ranks enqueue the same gathered features, so the copies stay equal.
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        self.size = size
        self.register_buffer("image_feat", torch.zeros(size, width))
        self.register_buffer("text_feat", torch.zeros(size, width))
        self.register_buffer("image_id", torch.full((size,), -1, dtype=torch.long))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))  # on the device: no synchronisation
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def wait(self, image_feat: Tensor, text_feat: Tensor, image_id: Tensor) -> None:
        """Keep a batch until `flush`: all micro-batches of an optimizer step see the same ring."""
        self._waiting.append((image_feat, text_feat, image_id))

    def flush(self) -> None:
        """Enqueue what waits, in order."""
        for features in self._waiting:
            self.enqueue(*features)
        self._waiting.clear()

    @torch.no_grad()
    def enqueue(self, image_feat: Tensor, text_feat: Tensor, image_id: Tensor) -> None:
        """Replace the oldest entries. image_feat, text_feat: [B, E]; image_id: [B] >= 0."""
        if self.size == 0:
            return
        skipped = max(0, image_id.shape[0] - self.size)  # a batch larger than the ring leaves its last `size` rows
        slots = (self.next + torch.arange(skipped, image_id.shape[0], device=image_id.device)) % self.size
        self.image_feat[slots] = image_feat[skipped:].to(self.image_feat.dtype)
        self.text_feat[slots] = text_feat[skipped:].to(self.text_feat.dtype)
        self.image_id[slots] = image_id[skipped:]
        self.next.copy_((self.next + image_id.shape[0]) % self.size)
