"""The data sets and the training loader of a stage, made from its configuration."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import Dataset

from dataset.advice import cut_advice, size_advice, vocabulary_advice
from dataset.annotations import Source
from dataset.caption import CaptionCollate, CaptionEvalDataset, CaptionTrainDataset
from dataset.loader import BatchIndices, Loader
from dataset.pretrain import PretrainCollate, PretrainDataset
from dataset.retrieval import RetrievalEvalDataset, RetrievalTrainDataset
from dataset.transforms import Augment, PretrainViews, test_transform
from dataset.vqa import VQACollate, VQAEvalDataset, VQATrainDataset, question_parts
from utils import rank, world_size

log = logging.getLogger("semmim")


def create_dataset(kind: str, cfg, split: str | None = None, codebook_size: int | None = None) -> Dataset:
    """The data set of a stage from its configuration.

    kind: "pretrain", "retrieval_train", "caption_train", "vqa_train" (files: data.train), "pretrain_eval",
    "retrieval_eval", "caption_eval" or "vqa_eval" (data.<split>, split "val" or "test"). codebook_size: side of the
    dVAE target's image, only for pre-training with `mim.target: dvae`.
    Raises UserError naming file, entry and key where annotations are not as they should be.
    """
    data = cfg.data
    source = Source(data[split or "train"], data.image_root, data.image_prefix_map, data.get("max_bad_share", 0.01))
    if kind.endswith("_eval"):
        return _evaluation_set(kind, cfg, source, split)
    if kind == "pretrain":
        augment = _augmentation(cfg, cfg.model.image_encoder.image_size, codebook_size)
        views = PretrainViews(augment, two_views=cfg.mim.target != "none")
        options = {"max_words": data.max_words, "cache_images": data.cache_images}
        return PretrainDataset(source, views, seed=cfg.seed, **options)
    augment = _augmentation(cfg, cfg.image_size)
    if kind == "retrieval_train":
        options = {"max_words": data.max_words, "per": data.per, "cache_images": data.cache_images}
        return RetrievalTrainDataset(source, augment, seed=cfg.seed, **options)
    if kind == "caption_train":
        return CaptionTrainDataset(source, augment, seed=cfg.seed, per=data.per, **_prompt(cfg))
    if kind == "vqa_train":
        left_out = [] if data.train_on_minival else data.val
        files = {"left_out": left_out, "official": data.official}
        options = {"answer_weight": data.answer_weight, "cache_images": data.cache_images}
        return VQATrainDataset(source, augment, _question_parts(cfg), seed=cfg.seed, **files, **options)
    raise ValueError(f"unknown kind of data set: {kind}")


def _evaluation_set(kind: str, cfg, source: Source, split: str) -> Dataset:
    data = cfg.data
    transform = test_transform(cfg.model.image_encoder.image_size if kind == "pretrain_eval" else cfg.image_size)
    if kind in ("pretrain_eval", "retrieval_eval"):
        return RetrievalEvalDataset(source, transform, split, max_words=data.max_words)
    if kind == "caption_eval":
        return CaptionEvalDataset(source, transform, split, **_prompt(cfg))
    if kind == "vqa_eval":
        references = {"official": data.official, "score_files": data.val_scores if split == "val" else []}
        return VQAEvalDataset(source, transform, _question_parts(cfg), **references)
    raise ValueError(f"unknown kind of data set: {kind}")


def _augmentation(cfg, image_size: int, codebook_size: int | None = None) -> Augment:
    augment = cfg.augment
    return Augment(
        image_size,
        augment.crop_scale,
        augment.flip,
        augment.randaugment_ops,
        augment.randaugment_magnitude,
        codebook_size,
        augment.resize,
    )


def _prompt(cfg) -> dict:
    return {"prompt": cfg.text.prompt, "object_labels": cfg.text.object_labels}


def _question_parts(cfg) -> Callable:
    data = cfg.data
    return partial(question_parts, ocr=data.ocr, labels=data.labels, max_ocr_words=cfg.text.max_ocr_words)


def create_train_loader(
    dataset: Dataset, cfg, collate: PretrainCollate | CaptionCollate | VQACollate, device: torch.device
) -> Loader:
    """This process's loader of a stage's training set, with the configuration's `data`, `train` and `seed`.

    collate: a PretrainCollate, CaptionCollate or VQACollate; what it cuts of the texts is logged, and where the texts,
    their number and the settings do not fit, a warning says so.
    """
    cut = collate.cut(dataset)
    shares = [f"{share:.1%} of {what}" for what, share in cut.items()]
    log.info("training texts that are longer than their limits and cut: %s", ", ".join(shares))
    global_batch = cfg.train.batch_size * cfg.train.accumulation * world_size()
    sizes = size_advice(len(dataset), len(dataset.paths), global_batch, cfg)
    for line in [*cut_advice(cut), *vocabulary_advice(collate.tokenizer, collate.texts(dataset)), *sizes]:
        log.warning("warning: %s", line)
    batches = BatchIndices(
        dataset,
        cfg.train.batch_size,
        seed=cfg.seed,
        rank=rank(),
        world_size=world_size(),
        bucket_batches=cfg.data.bucket_batches,
    )
    return Loader(
        batches,
        collate,
        num_workers=cfg.data.num_workers,
        pin_memory=device.type == "cuda",
        max_bad_share=cfg.data.max_bad_share,
    )
