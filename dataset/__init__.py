"""Data sets by name and the loader that every stage uses.

The loader's order is a function of (seed, epoch), and data sets with `takes_epoch` receive (epoch, index):
what a run sees does not depend on the number of workers or on where it was resumed.
"""

import logging
import sys
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils import UserError, init_worker, rank, user_message, world_size

log = logging.getLogger("semmim")

MIN_BAD = 10  # a share of very few samples says nothing


def create_dataset(kind: str, cfg, split: str | None = None, codebook_size: int | None = None) -> Dataset:
    """The data set of a stage from its configuration.

    kind: "pretrain", "retrieval_train", "caption_train", "vqa_train" (files: data.train), "retrieval_eval",
    "caption_eval" or "vqa_eval" (data.<split>, split "val" or "test"). codebook_size: side of the dVAE target's
    picture, only for pre-training with `mim.target: dvae`.
    """
    data = cfg.data
    if kind.startswith("vqa"):
        return _create_vqa_dataset(kind, cfg, split)
    common = {"image_root": data.image_root, "image_prefix_map": data.image_prefix_map}
    if kind.startswith("caption"):
        from dataset.caption import CaptionEvalDataset, CaptionTrainDataset

        common |= {
            "image_size": cfg.image_size,
            "prompt": cfg.text.prompt,
            "object_labels": cfg.text.object_labels,
        }
        if kind == "caption_eval":
            return CaptionEvalDataset(getattr(data, split), split, **common)
        return CaptionTrainDataset(data.train, per=data.per, seed=cfg.seed, **common, **_augmentation(cfg))
    common["max_words"] = data.max_words
    if kind == "retrieval_eval":
        from dataset.retrieval import RetrievalEvalDataset

        return RetrievalEvalDataset(getattr(data, split), image_size=cfg.image_size, **common)
    common |= {"seed": cfg.seed, **_augmentation(cfg)}
    if kind == "pretrain":
        from dataset.pretrain import PretrainDataset

        return PretrainDataset(
            data.train,
            image_size=cfg.model.image_encoder.image_size,
            cache_images=data.cache_images,
            two_views=cfg.mim.target != "none",
            codebook_size=codebook_size,
            **common,
        )
    if kind == "retrieval_train":
        from dataset.retrieval import RetrievalTrainDataset

        return RetrievalTrainDataset(
            data.train, image_size=cfg.image_size, per=data.per, cache_images=data.cache_images, **common
        )
    raise ValueError(f"unknown kind of data set: {kind}")


def _create_vqa_dataset(kind: str, cfg, split: str | None) -> Dataset:
    from dataset.vqa import VQAEvalDataset, VQATrainDataset

    data = cfg.data
    common = {
        "image_size": cfg.image_size,
        "image_root": data.image_root,
        "image_prefix_map": data.image_prefix_map,
        "ocr": data.ocr,
        "labels": data.labels,
        "max_ocr_words": cfg.text.max_ocr_words,
    }
    if kind == "vqa_eval":
        score_files = data.val_scores if split == "val" else []
        return VQAEvalDataset(getattr(data, split), official=data.official, score_files=score_files, **common)
    return VQATrainDataset(
        data.train,
        seed=cfg.seed,
        answer_weight=data.answer_weight,
        left_out=[] if data.train_on_minival else data.val,
        cache_images=data.cache_images,
        **common,
        **_augmentation(cfg),
    )


def _augmentation(cfg) -> dict:
    augment = cfg.augment
    return {
        "crop_scale": tuple(augment.crop_scale),
        "flip": augment.flip,
        "ops": augment.randaugment_ops,
        "magnitude": augment.randaugment_magnitude,
    }


def create_train_loader(dataset: Dataset, cfg, collate: Callable, device: torch.device) -> "Loader":
    """This process's loader of a stage's training set, with the configuration's `data`, `train` and `seed`."""
    return create_loader(
        dataset,
        cfg.train.batch_size,
        collate=collate,
        num_workers=cfg.data.num_workers,
        rank=rank(),
        world_size=world_size(),
        seed=cfg.seed,
        pin_memory=device.type == "cuda",
        max_bad_share=cfg.data.max_bad_share,
        bucket_batches=cfg.data.bucket_batches,
    )


def create_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    collate: Callable | None = None,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    pin_memory: bool = False,
    max_bad_share: float = 0.01,
    bucket_batches: int = 0,
) -> "Loader":
    """A loader of this rank's batches.

    drop_last=True (training): batch g of rank r is slice r of the g-th global batch of batch_size *
    world_size indices, so that N ranks see together what one process with the N-fold batch sees; the last
    incomplete global batch is dropped and every rank has the same number of batches. drop_last=False
    (evaluation): rank r gets every world_size-th index, each index exactly once over all ranks.
    bucket_batches: sort the captions by length within this many global batches, so that a batch holds
    captions of similar length and little padding; needs `dataset.caption_length(epoch, index)`. 0: do not
    sort. max_bad_share: share of unusable pictures or captions above which the run stops (for batches with
    `bad`).
    """
    batches = BatchIndices(
        len(dataset),
        batch_size,
        shuffle,
        drop_last,
        rank,
        world_size,
        seed,
        getattr(dataset, "takes_epoch", False),
        bucket_batches,
        getattr(dataset, "caption_length", None),
    )
    return Loader(dataset, batches, collate, num_workers, pin_memory, max_bad_share)


class BatchIndices(Sampler):
    """The index lists of one rank's batches in an epoch; items are (epoch, index) where the data set takes
    them."""

    def __init__(
        self,
        size: int,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        rank: int,
        world_size: int,
        seed: int,
        with_epoch: bool,
        bucket_batches: int = 0,
        caption_length: Callable[[int, int], int] | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: it must be at least 1")
        if drop_last and size < batch_size * world_size:
            raise UserError(
                f"the training set has {size} entries, fewer than one batch of {batch_size} on each of "
                f"{world_size} process(es); lower train.batch_size"
            )
        self.size, self.batch_size, self.shuffle, self.drop_last = size, batch_size, shuffle, drop_last
        self.rank, self.world_size, self.seed, self.with_epoch = rank, world_size, seed, with_epoch
        self.caption_length, self.bucket = caption_length, bucket_batches * batch_size * world_size
        self.epoch = self.start_batch = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the next iteration starts."""
        if self.drop_last:
            return self.size // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, self.size, self.world_size)) // self.batch_size)

    def __iter__(self) -> Iterator[list]:
        epoch, order = self.epoch, self._order()
        for g in range(self.start_batch, len(self)):
            if self.drop_last:
                first = (g * self.world_size + self.rank) * self.batch_size
                batch = order[first : first + self.batch_size]
            else:
                batch = order[self.rank :: self.world_size][g * self.batch_size : (g + 1) * self.batch_size]
            yield [(epoch, i) if self.with_epoch else i for i in batch.tolist()]

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        # Mixed by multiplication: seed + epoch would give run 43 the orders of run 42, one epoch later.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.size, generator=generator)
        return self._bucketed(order, generator) if self.bucket else order

    def _bucketed(self, order: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Sorted by caption length within windows; the batches of a window and the entries of a batch are
        shuffled."""
        step, parts = self.batch_size * self.world_size, []
        for window in order[: len(self) * step].split(self.bucket):
            lengths = torch.tensor([self.caption_length(self.epoch, i) for i in window.tolist()])
            batches = window[lengths.argsort(stable=True)].view(-1, step)  # [batches, step]
            within = torch.rand(batches.shape, generator=generator).argsort(1)
            parts.append(batches.gather(1, within)[torch.randperm(len(batches), generator=generator)].flatten())
        return torch.cat(parts)


class Loader:
    """Iterates over the batches of one epoch; `set_epoch` chooses which, and where to start in it.

    Counts the unusable samples that the batches report (key `bad`), warns of the first ten and then of every
    hundredth, and stops the run with a UserError when more than `max_bad_share` of those visited are bad.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: BatchIndices,
        collate: Callable | None,
        num_workers: int,
        pin_memory: bool,
        max_bad_share: float,
    ):
        self.dataset = dataset
        self.batches = batches
        self.max_bad_share = max_bad_share
        self.visited, self.bad = 0, 0
        self.first_bad: list[str] = []
        options = {}
        if num_workers > 0:
            # Forked workers share the annotations and the picture cache; other start methods copy them.
            options = {
                "persistent_workers": True,
                "multiprocessing_context": "fork" if sys.platform == "linux" else None,
            }
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=init_worker,
            **options,
        )

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The next iteration yields this epoch's batches from `start_batch` on."""
        self.batches.epoch, self.batches.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank (also when `start_batch` skips some)."""
        return len(self.batches)

    def __iter__(self) -> Iterator:
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except UserError as error:
                raise UserError(user_message(error)) from None
            if isinstance(batch, dict) and "bad" in batch:
                self._count(batch)
            yield batch

    def _count(self, batch: dict) -> None:
        self.visited += len(batch["paths"]) + len(batch["bad"])
        for line in batch["bad"]:
            self.bad += 1
            if self.bad <= 10:
                self.first_bad.append(line)
            if self.bad <= 10 or self.bad % 100 == 0:
                log.warning("unusable sample %d of %d visited, replaced: %s", self.bad, self.visited, line)
        too_many = self.bad >= MIN_BAD and self.bad > self.max_bad_share * self.visited
        if too_many or batch.get("unusable"):
            raise UserError(
                f"{self.bad} of {self.visited} visited samples are unusable, data.max_bad_share allows "
                f"{self.max_bad_share:g}; check data.image_root and files: {'; '.join(self.first_bad[:3])}"
            )
