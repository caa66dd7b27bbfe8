"""Official files read directly: the same samples as from the files that tools.prepare makes of them."""

import json
import shutil
from itertools import count

import official_files as official
import pytest
import torch
from tiny import TOKENIZER

from dataset.caption import CaptionCollate
from dataset.pretrain import PretrainCollate
from dataset.vqa import VQACollate
from tools.prepare import __main__ as prepare
from utils import UserError

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


def equal(one, other):
    """Whether two batches, lists or samples hold the same."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def batch(dataset, collate):
    """Every visit of the first two epochs, as training gets them."""
    found = collate([dataset[epoch, index] for epoch in range(2) for index in range(len(dataset))])
    assert not any(found["bad"])
    return found


# ------------------------------------------------------------------------------------------------ Karpathy's files


@pytest.mark.parametrize("config, name, pairs", [("coco", "coco", 15), ("flickr", "flickr30k", 10)])
@pytest.mark.parametrize("per", ["caption", "image"])
def test_retrieval_trains_on_the_same_batches(project, config, name, pairs, per):
    options = [SMALL, f"data.per={per}"]
    prepared = official.open_set("retrieval_train", *options, config=f"Retrieval_{config}")
    own = [files("train", project / f"dataset_{name}.json"), *options]
    direct = official.open_set("retrieval_train", *own, config=f"Retrieval_{config}")
    assert len(direct.captions) == pairs
    collate = PretrainCollate(TOKENIZER, 30)
    assert equal(batch(direct, collate), batch(prepared, collate))


@pytest.mark.parametrize("config, name", [("coco", "coco"), ("flickr", "flickr30k")])
@pytest.mark.parametrize("split", ["val", "test"])
def test_retrieval_ranks_the_same_candidates(project, config, name, split):
    prepared = official.open_set("retrieval_eval", SMALL, split=split, config=f"Retrieval_{config}")
    own = files(split, project / f"dataset_{name}.json")
    direct = official.open_set("retrieval_eval", SMALL, own, split=split, config=f"Retrieval_{config}")
    for key in ("images", "captions", "image_of_caption"):
        assert getattr(direct, key) == getattr(prepared, key)
    assert equal([direct[i] for i in range(len(direct))], [prepared[i] for i in range(len(prepared))])


@pytest.mark.parametrize("per", ["caption", "image"])
def test_captioning_trains_on_the_same_batches(project, per):
    prepared = official.open_set("caption_train", SMALL, f"data.per={per}")  # data/coco/dataset_coco.json
    direct = official.open_set("caption_train", SMALL, f"data.per={per}", files("train", project / "dataset_coco.json"))
    assert len(direct.captions) == 15  # a blank one is none
    collate = CaptionCollate(TOKENIZER, 25, 25)
    assert equal(batch(direct, collate), batch(prepared, collate))


# ------------------------------------------------------------------------------------------------ VQA's pairs


def vqa_batch(dataset):
    return batch(dataset, VQACollate(TOKENIZER, (30, 25, 22), 10))


@pytest.mark.parametrize("root", ["data/coco/images", "{vqa: data/coco/images}"])
def test_vqa_trains_on_the_same_samples(project, root):
    options = [SMALL, f"data.image_root={root}", "data.val=[]"]
    prepared = official.open_set("vqa_train", *options, files("train", "data/vqa/vqa_train_ocr.json"))
    direct = official.open_set("vqa_train", *options, files("train", project / QUESTIONS.format("train2014")))
    assert len(direct) == 9
    assert equal(vqa_batch(direct), vqa_batch(prepared))


def test_vqa_is_judged_by_the_same_questions_and_references(project):
    options = [SMALL, "data.image_root=data/coco/images"]
    prepared = files("val", "data/vqa/vqa_nominival_ocr.json", "data/vqa/vqa_minival_ocr.json")
    sets = [official.open_set("vqa_eval", *options, prepared, split="val")]
    own = files("val", project / QUESTIONS.format("val2014"))
    annotations = project / ANNOTATIONS.format("val2014")
    sets += [official.open_set("vqa_eval", *options, own, "data.val_scores=[]", split="val")]
    sets += [official.open_set("vqa_eval", *options, own, files("official", annotations), split="val")]
    assert sets[0].references == [TEN] * 3 and "quot" not in sets[0].parts[1][0]
    for key in ("ids", "paths", "parts", "references", "answer_types", "question_types"):
        assert [getattr(data, key) for data in sets] == [getattr(sets[0], key)] * 3, key
    assert equal(sets[1][0], sets[0][0])


def test_the_test_questions_have_no_answers_and_test_dev_shares_their_images(project):
    prepared = official.open_set("vqa_eval", SMALL, "data.image_root=data/coco/images", split="test")
    official.vqa_questions(project, "test-dev2015", [(201, 262144, "What is this?")])
    for part in ("test2015", "test-dev2015"):
        own = files("test", project / QUESTIONS.format(part))
        direct = official.open_set("vqa_eval", SMALL, own, "data.image_root=data/coco/images", split="test")
        assert direct.references is None and direct.ids == [201]
        assert direct.paths == prepared.paths and equal(direct[0], prepared[0])


def test_annotations_elsewhere_are_named_by_data_official(project):
    elsewhere = project / "answers.json"
    (project / ANNOTATIONS.format("train2014")).rename(elsewhere)
    options = [
        "data.image_root=data/coco/images",
        files("train", project / QUESTIONS.format("train2014")),
        "data.val=[]",
    ]
    with pytest.raises(UserError, match="train2014_questions.json: its answers are not there; put v2_mscoco_train2014"):
        official.open_set("vqa_train", *options)
    assert len(official.open_set("vqa_train", *options, files("official", elsewhere))) == 9


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "of, change, message",
    [
        ("questions", lambda c: c["questions"][1].pop("question_id"), "entry 1: 'question_id' is NoneType"),
        ("questions", lambda c: c["questions"][1].update(question_id=77), "entry 1: question_id 77 has no annotation"),
        ("questions", lambda c: c["questions"][1].update(image_id="9"), "entry 1: 'image_id' is str"),
        ("questions", lambda c: c.update(data_type="abstract_v002"), "entry 0: is about abstract_v002"),
        ("annotations", lambda c: c["annotations"][1].pop("answers"), "entry 1 is not as expected"),
        ("annotations", lambda c: c["annotations"][1].update(image_id=9), "entry 1: question and annotation name"),
    ],
)
def test_what_is_wrong_in_a_pair_is_one_line_that_names_file_and_entry(project, of, change, message):
    name = {"questions": QUESTIONS, "annotations": ANNOTATIONS}[of].format("train2014")
    changed(project / name, change)
    own = files("train", project / QUESTIONS.format("train2014"))
    with pytest.raises(UserError) as error:
        official.open_set("vqa_train", "data.image_root=data/coco/images", own, "data.val=[]")
    assert str(project) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
