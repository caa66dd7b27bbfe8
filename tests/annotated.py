"""Entries, annotation files and data sets of three small images, for the tests of all stages."""

import json

import pytest
from tiny import noise

from dataset.annotations import Source
from dataset.caption import CaptionEvalDataset, CaptionTrainDataset
from dataset.pretrain import PretrainDataset
from dataset.retrieval import RetrievalEvalDataset, RetrievalTrainDataset
from dataset.transforms import Augment, PretrainViews
from dataset.transforms import test_transform as square  # not collected as a test
from dataset.vqa import VQAEvalDataset, VQATrainDataset

KINDS = {
    "pretrain": (PretrainDataset, PretrainViews(Augment(8))),
    "retrieval_train": (RetrievalTrainDataset, Augment(8)),
    "caption_train": (CaptionTrainDataset, Augment(8)),
    "vqa_train": (VQATrainDataset, Augment(8)),
    "retrieval_eval": (RetrievalEvalDataset, square(8), "val"),
    "caption_eval": (CaptionEvalDataset, square(8), "val"),
    "vqa_eval": (VQAEvalDataset, square(8)),
}
TRAIN, EVAL = tuple(KINDS)[:4], tuple(KINDS)[4:]


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        noise(30, 20, ord(name)).save(tmp_path / f"{name}.png")
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
    kind, *rest = KINDS[stage]
    return kind(Source(files, image_root), *rest, **options)
