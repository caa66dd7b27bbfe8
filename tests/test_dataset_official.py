"""Official files read directly: the same samples as from the files that tools.prepare makes of them."""

import json
import shutil
from functools import partial
from itertools import count

import numpy as np
import official_files as official
import pytest
import torch
from conftest import refused

from dataset.cache import StringTable
from tools.prepare import __main__ as prepare

TEN = ["red"] * 6 + ["dark red"] * 3 + ["maroon"]
SMALL = "image_size=16"
QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"


@pytest.fixture(scope="module")
def prepared_project(tmp_path_factory):
    """A folder with the downloads, what prepare.py makes of them in `data`, and all images."""
    folder = tmp_path_factory.mktemp("project")
    source, data = folder / "downloads", folder / "data"
    official.karpathy_coco(source)
    official.karpathy_flickr(source)
    parts = {"train2014": [(n, 57870, f"What colour is kite {n}?") for n in range(1, 10)]}
    parts["val2014"] = [(102, 522418, "What?"), (101, 184613, "Who is &quot;it&quot;?"), (103, 318219, "Is it red?")]
    for split, questions in parts.items():
        official.vqa_questions(source, split, questions)
        official.vqa_annotations(source, split, {(number, image): TEN for number, image, _ in questions})
    official.vqa_questions(source, "test2015", [(201, 262144, "What is this?")])
    for name in ("coco", "flickr30k", "vqa"):
        prepare.main([name, "--source", str(source), "--output", str(data), "--workers", "1"])
    numbers = count()
    for name, root in (("coco", "coco/images"), ("flickr30k", "flickr30k")):
        for path in sorted((data / name / "annotations").glob("*.json")):
            for image in dict.fromkeys(entry["image"] for entry in json.loads(path.read_text())):
                official.save(data / root / image, next(numbers))
    official.save(data / "coco/images/test2015/COCO_test2015_000000262144.jpg", next(numbers))
    return folder


@pytest.fixture
def project(prepared_project, tmp_path, monkeypatch):
    """The downloads in a copy of that folder, which is the working directory."""
    shutil.copytree(prepared_project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "downloads"


def files(key, *names):
    return f"data.{key}=[{', '.join(map(str, names))}]"


def content(dataset):
    """All texts, numbers and paths of a data set."""
    return {key: listed(x) for key, x in vars(dataset).items() if isinstance(x, StringTable | np.ndarray | list)}


def listed(value):
    if isinstance(value, np.ndarray):
        return value.tolist()
    items = (value[i] for i in range(len(value)))
    return [listed(item) if isinstance(item, StringTable) else item for item in items]


IMAGES, NO_VAL = "data.image_root=data/coco/images", "data.val=[]"
VQA_PARTS = "data/vqa/vqa_nominival_ocr.json", "data/vqa/vqa_minival_ocr.json"
TRAIN, VAL, TEST = (QUESTIONS.format(split) for split in ("train2014", "val2014", "test2015"))
SAME = [  # kind, split, configuration, options for both, for what was prepared, and the official file
    *(
        (kind, split, f"Retrieval_{config}", [per], [], f"dataset_{name}.json")
        for config, name in (("coco", "coco"), ("flickr", "flickr30k"))
        for kind, split in (("retrieval_train", None), ("retrieval_eval", "val"), ("retrieval_eval", "test"))
        for per in ("data.per=caption", "data.per=image")[: 2 if split is None else 1]
    ),
    ("caption_train", None, None, ["data.per=caption"], [], "dataset_coco.json"),
    ("caption_train", None, None, ["data.per=image"], [], "dataset_coco.json"),
    ("caption_eval", "val", None, [], [], "dataset_coco.json"),
    ("vqa_train", None, None, [IMAGES, NO_VAL], [files("train", "data/vqa/vqa_train_ocr.json")], TRAIN),
    ("vqa_train", None, None, ["data.image_root={vqa: data/coco/images}", NO_VAL], [], TRAIN),
    ("vqa_eval", "val", None, [IMAGES, "data.val_scores=[]"], [files("val", *VQA_PARTS)], VAL),
    ("vqa_eval", "test", None, [IMAGES], [], TEST),
]


@pytest.mark.parametrize(("kind", "split", "config", "options", "prepared", "file"), SAME)
def test_official_files_give_what_the_prepared_lists_give(project, kind, split, config, options, prepared, file):
    if kind == "vqa_train" and not prepared:
        prepared = [files("train", "data/vqa/vqa_train_ocr.json")]
    open_it = partial(official.open_set, kind, SMALL, *options, split=split, **({"config": config} if config else {}))
    expected, found = open_it(*prepared), open_it(files(split or "train", project / file))
    assert content(found) == content(expected) and len(found) == len(expected) > 0
    assert not split or all(map(torch.equal, (found[0][0],), (expected[0][0],)))


def test_annotations_elsewhere_are_named_by_data_official(project):
    elsewhere = project / "answers.json"
    (project / ANNOTATIONS.format("train2014")).rename(elsewhere)
    options = [IMAGES, NO_VAL, files("train", project / TRAIN)]
    missing = "train2014_questions.json: entry 0 has no 'answer'"
    refused(lambda: official.open_set("vqa_train", *options), missing)
    assert len(official.open_set("vqa_train", *options, files("official", elsewhere))) == 9


WRONG = [  # file, its list, what is changed in the second entry, message
    (QUESTIONS, "questions", {"question_id": 77}, "entry 1 has no 'answer'"),
    (QUESTIONS, "questions", {"image_id": "x9"}, "entry 1 is not as expected (ValueError: "),
    (ANNOTATIONS, "annotations", {"answers": None}, "entry 1 is not as expected"),
]


@pytest.mark.parametrize(("name", "key", "change", "message"), WRONG)
def test_what_is_wrong_in_a_pair_is_one_line_that_names_file_and_entry(project, name, key, change, message):
    path = project / name.format("train2014")
    content = json.loads(path.read_text())
    content[key][1].update(change)
    path.write_text(json.dumps(content))
    refused(lambda: official.open_set("vqa_train", IMAGES, files("train", project / TRAIN), NO_VAL), path, message)
