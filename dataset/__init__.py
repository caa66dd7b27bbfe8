"""The data sets and the training loader of a stage, made from its configuration."""

from collections.abc import Mapping
from functools import partial

import torch
from torch.utils.data import Dataset

from dataset.advice import report_texts, warn_of_shared_images
from dataset.annotations import Source, file_list
from dataset.caption import CaptionEvalDataset, CaptionTrainDataset, entry_prompt
from dataset.common import Collate
from dataset.loader import BatchIndices, Loader
from dataset.pretrain import PretrainDataset
from dataset.retrieval import RetrievalEvalDataset, RetrievalTrainDataset
from dataset.text import Language, Tokenizer
from dataset.transforms import Augment, PretrainViews, test_transform
from dataset.vqa import VQAEvalDataset, VQATrainDataset, question_parts
from utils import UserError, rank, world_size


def create_dataset(kind: str, cfg, split: str | None = None, codebook_size: int | None = None) -> Dataset:
    """The data set of a stage from its configuration.

    kind: "pretrain", "retrieval_train", "caption_train", "vqa_train" (files: data.train), "pretrain_eval",
    "retrieval_eval", "caption_eval" or "vqa_eval" (data.<split>, split "val" or "test"). codebook_size: side of the
    dVAE target's image, only for pre-training with `mim.target: dvae`.
    Raises UserError naming file, entry and key if annotations are not as they should be.
    """
    data, stage, key = cfg.data, kind.partition("_")[0], split or "train"
    if not data[key] or "" in file_list(data[key]):
        raise UserError(f"data.{key}: names no file; name annotation files, folders of images or tar shards")
    source = Source(data[key], data.image_root, data.image_prefix_map, data.get("max_bad_share", 0.01))
    language = Language(Tokenizer(cfg.text.vocab).lower, tuple(cfg.augment.direction_words))
    size = cfg.model.image_encoder.image_size if stage == "pretrain" else cfg.image_size
    if stage == "caption":
        text = {"prompt": cfg.text.prompt, "object_labels": cfg.text.object_labels, "lower": language.lower}
        prompt = partial(entry_prompt, **text)
    if stage == "vqa":
        limits = {"max_ocr_words": cfg.text.max_ocr_words, "lower": language.lower}
        parts = partial(question_parts, ocr=data.ocr, labels=data.labels, **limits)
    if kind.endswith("_eval"):
        transform = test_transform(size)
        if stage == "caption":
            return CaptionEvalDataset(source, transform, split, prompt)
        if stage == "vqa":
            scores = data.val_scores if split == "val" else []
            return VQAEvalDataset(source, transform, parts, official=data.official, score_files=scores)
        return RetrievalEvalDataset(source, transform, split, max_words=data.max_words, language=language)
    a = cfg.augment
    augment = Augment(size, a.crop_scale, a.flip, a.randaugment_ops, a.randaugment_magnitude, codebook_size, a.resize)
    options = {"seed": cfg.seed, "language": language}
    if stage == "caption":
        return CaptionTrainDataset(source, augment, prompt, per=data.per, **options)
    options["cache_images"] = data.cache_images
    if stage == "vqa":
        files = {"left_out": [] if data.train_on_minival else data.val, "official": data.official}
        return VQATrainDataset(source, augment, parts, answer_weight=data.answer_weight, **files, **options)
    options["max_words"] = data.max_words
    if stage == "retrieval":
        return RetrievalTrainDataset(source, augment, per=data.per, **options)
    return PretrainDataset(source, PretrainViews(augment, two_views=cfg.mim.target != "none"), **options)


def create_train_loader(
    dataset: Dataset, cfg, collate: Collate, device: torch.device, held_out: Mapping[str, Dataset] | None = None
) -> Loader:
    """This process's loader of a stage's training set, with the configuration's `data`, `train` and `seed`.

    It logs how many texts `collate` cuts or the vocabulary cannot write, and warns if splits of `held_out` {split: data
    set} have images of training.
    """
    report_texts(dataset, cfg, collate.tokenizer)
    warn_of_shared_images(dataset, held_out or {})
    data, ranks = cfg.data, {"rank": rank(), "world_size": world_size()}
    sorting = {"bucket_batches": data.bucket_batches, "length_workers": min(1, data.num_workers)}
    batches = BatchIndices(dataset, cfg.train.batch_size, seed=cfg.seed, **sorting, **ranks)
    workers = {"num_workers": data.num_workers, "pin_memory": device.type == "cuda"}
    return Loader(batches, collate, max_bad_share=data.max_bad_share, **workers)
