"""Entries, annotation files and data sets of three small images, for the tests of all stages."""

import json

import numpy as np
import pytest
from PIL import Image

from dataset.annotations import Source
from dataset.caption import CaptionEvalDataset, CaptionTrainDataset
from dataset.pretrain import PretrainDataset
from dataset.retrieval import RetrievalEvalDataset, RetrievalTrainDataset
from dataset.transforms import Augment, PretrainViews
from dataset.transforms import test_transform as square  # not collected as a test
from dataset.vqa import VQAEvalDataset, VQATrainDataset

TRAIN = ("pretrain", "retrieval_train", "caption_train", "vqa_train")
EVAL = ("retrieval_eval", "caption_eval", "vqa_eval")


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def entry(number=0, **changes):
    """An entry that every stage can use; a key that is None is left out."""
    values = {"image": f"{'abc'[number]}.png", "caption": f"dog {number}", "image_id": number, "dataset": "vqa"}
    values |= {"question": "is it red?", "question_id": number, "answer": "yes", "object_label": "dog&&cat", "ocr": []}
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def write(folder, content, name="split.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def make(stage, files, image_root=None, **options):
    """The data set of a stage from annotation files."""
    source = Source(files, image_root)
    if stage == "pretrain":
        return PretrainDataset(source, PretrainViews(Augment(8)), **options)
    if stage in ("caption_eval", "retrieval_eval"):
        kind = CaptionEvalDataset if stage == "caption_eval" else RetrievalEvalDataset
        return kind(source, square(8), "val", **options)
    kinds = {"retrieval": RetrievalTrainDataset, "caption": CaptionTrainDataset, "vqa": VQATrainDataset}
    if stage.endswith("train"):
        return kinds[stage.split("_")[0]](source, Augment(8), **options)
    return VQAEvalDataset(source, square(8), **options)
