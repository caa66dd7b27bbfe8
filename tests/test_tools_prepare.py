"""tools.prepare on small files in the official layouts: COCO, Flickr30K, NoCaps, VQA, and what all sets share."""

import official_files as official
import pytest
from conftest import refused

from evaluation.vqa import vqa_accuracy

TEN = ["red"] * 4 + ["dark red"] * 3 + ["maroon"] * 2 + ["Red"]
TRAIN = ["train2014/COCO_train2014_000000057870.jpg", "train2014/COCO_train2014_000000222016.jpg"]

source, run, read = official.source, official.run, official.read


def test_coco_becomes_retrieval_captioning_and_pretraining_files(run, tmp_path):
    out = run("coco")
    notes = tmp_path / "data/coco/annotations"
    train, test = read(notes / "coco_train.json"), read(notes / "coco_test.json")
    assert [entry["image_id"] for entry in train] == ["coco_522418"] * 6 + ["coco_57870"] * 4 + ["coco_222016"] * 5
    assert train[0] == {
        "image": "val2014/COCO_val2014_000000522418.jpg",
        "caption": "A cat number 0.",
        "image_id": "coco_522418",
        "dataset": "coco",
    }
    assert train[5]["caption"] == "A cat & a mat"  # restval is trained on, HTML entities are resolved
    assert test[0]["caption"] == [text.strip() for text in official.five("dog")]
    assert [len(read(notes / f"coco_{split}.json")) for split in ("val", "test")] == [2, 2]
    pairs = read(tmp_path / "data/pretrain/coco.json")
    assert len(pairs) == 15 and not any("391895" in pair["image"] or "184613" in pair["image"] for pair in pairs)
    assert pairs[0]["image"] == "../coco/images/val2014/COCO_val2014_000000522418.jpg"
    assert f"left out: 1 x blank caption; first: {TRAIN[0]}\n" in out
    assert "warning: images, val: 2, 4,998 fewer than the published 5,000\n" in out


def test_cocos_own_files_give_pretraining_alone_without_karpathys_validation_and_test_images(run, source, tmp_path):
    karpathy = (source / "dataset_coco.json").rename(tmp_path / "dataset_coco.json")
    official.coco_captions(source, "train2014", [57870, 222016])
    official.coco_captions(source, "val2014", [391895, 522418])
    out = run("coco")
    pairs = read(tmp_path / "data/pretrain/coco.json")
    assert [pair["image"] for pair in pairs] == [f"../coco/images/{name}" for name in TRAIN]
    assert "only train2014 is used" in out and not (tmp_path / "data/coco/annotations").exists()
    assert "left out: 1 x blank caption" in out
    karpathy.rename(source / "dataset_coco.json")
    run("coco")  # makes them known
    (source / "dataset_coco.json").unlink()
    official.coco_captions(source, "train2017", [57870, 391895, 184613])
    assert "= coco test" in run("coco")
    images = [pair["image"].removeprefix("../coco/images/") for pair in read(tmp_path / "data/pretrain/coco.json")]
    assert images == [*TRAIN, "val2014/COCO_val2014_000000522418.jpg", "train2017/000000057870.jpg"]


def test_a_photo_of_flickr30ks_test_set_is_left_out_of_coco(run, source, tmp_path):
    run("flickr30k")
    official.coco_captions(source, "train2014", [57870, 222016], photos={57870: 1007129816})
    run("coco")
    images = {pair["image"] for pair in read(tmp_path / "data/pretrain/coco.json")}
    assert not any("57870" in image for image in images) and any("222016" in image for image in images)


def test_only_images_on_disk_are_written_where_they_are_required(run, tmp_path):
    for number, name in enumerate((TRAIN[0], "val2014/COCO_val2014_000000391895.jpg")):
        official.save(tmp_path / "data/coco/images" / name, number)
    official.save(tmp_path / "data/coco/images/val2014/COCO_val2014_000000318219.jpg", 3)
    out = run("coco", "--require_images")
    notes = tmp_path / "data/coco/annotations"
    assert {entry["image"] for entry in read(notes / "coco_train.json")} == {TRAIN[0]}
    assert [entry["image"] for entry in read(notes / "coco_test.json")] == ["val2014/COCO_val2014_000000391895.jpg"]
    pairs = read(tmp_path / "data/pretrain/coco.json")
    assert {pair["image"] for pair in pairs} == {f"../coco/images/{TRAIN[0]}"}
    assert "left out: 4 x image that is not on disk" in out


def test_what_a_preparation_needs_first_is_named_with_where_to_get_it(run, source, tmp_path):
    line = refused(lambda: run("vqa"), "annotations.json (https://visualqa.org/download.html)")
    assert "v2_OpenEnded_mscoco_train2014_questions.json (https://visualqa.org" in line
    assert not (tmp_path / "data").exists()
    official.visual_genome(source, {1: None})
    refused(lambda: run("vg"), "run tools.prepare coco with --output")
    (source / "dataset_coco.json").unlink()
    refused(lambda: run("coco"), "lacks dataset_coco.json", "karpathy")
    for name in ("train2014", "val2014", "test2015"):
        official.vqa_questions(source, name, [])
        official.vqa_annotations(source, name, {})
    refused(lambda: run("vqa"), "put minival.json", "or run tools.prepare coco")


def test_a_file_that_is_not_as_the_tool_wrote_it_is_not_replaced(run, tmp_path):
    own = tmp_path / "data/coco/annotations/coco_val.json"
    for content in ("mine", "changed"):
        official.write_json(own, content)
        refused(lambda: run("coco"), "coco_val.json: is not as tools.prepare wrote it; move it away")
        assert read(own) == content
        own.unlink()
        run("coco")
    run("flickr30k")  # the other files of the folder are the tool's


def test_nocaps_becomes_captioning_evaluation(run, source, tmp_path):
    official.nocaps(source)
    out = run("nocaps")
    entries = read(tmp_path / "data/nocaps/nocaps_val.json")
    assert [len(entry["caption"]) for entry in entries] == [9, 10, 10, 10]
    assert [entry["img_id"] for entry in entries] == [0, 1, 2, 3]
    assert [entry["domain"][:3] for entry in entries] == ["in-", "nea", "out", "in-"]
    assert "captions: 39, 44,961 fewer than the published 45,000" in out
    assert "left out: 1 x blank caption" in out


@pytest.fixture
def vqa_source(source, run):
    """VQA's files in a folder of downloads; COCO is prepared."""
    run("coco")
    train = [*((i, 57870, f"What colour is kite {i}?") for i in range(1, 12)), (12, 57870, "?!")]
    val = [(101, 184613, "What is it?"), (102, 522418, "Who is it?"), (103, 318219, "Is it red?"), (104, 318219, "?")]
    official.vqa_questions(source, "train2014", train)
    official.vqa_questions(source, "val2014", val)
    official.vqa_questions(source, "test2015", [(201, 262144, "What is this?"), (202, 262144, "And that?")])
    official.vqa_questions(source, "test-dev2015", [(201, 262144, "What is this?")])
    answers = {(number, image): TEN for number, image, _ in train}
    answers[1, 57870] = [" "] * 10
    official.vqa_annotations(source, "train2014", answers)
    official.vqa_annotations(source, "val2014", {(number, image): TEN for number, image, _ in val})
    return source


def test_vqa_becomes_questions_with_ten_answers_and_visual_genomes(run, vqa_source, tmp_path):
    official.visual_genome(vqa_source, {1: None, 2: 184613, 3: 522418})  # the second is a validation image
    out = run("vqa")
    folder = tmp_path / "data/vqa"
    names = ("train", "nominival", "minival", "test", "testdev")
    parts = {name: read(folder / f"vqa_{name}_ocr.json") for name in names}
    train, test = parts["train"], parts["test"]
    assert train[0]["image"] == TRAIN[0] and train[0]["answer"] == TEN and train[0]["question_id"] == 2
    assert train[0]["answer_type"] == "other" and train[0]["dataset"] == "vqa"
    ids = {name: [entry["question_id"] for entry in entries] for name, entries in parts.items()}
    assert ids["nominival"] == [102] and ids["minival"] == [101, 103, 104]  # Karpathy's val images
    assert ids["test"] == [201, 202] and ids["testdev"] == [201] and "answer" not in test[0]
    genome = [(entry["image"], entry["answer"]) for entry in read(folder / "vg_qa.json")]
    assert genome == [("VG_100K_2/1.jpg", "green"), ("VG_100K_2/3.jpg", "green")]
    assert read(folder / "answer_list.json") == ["red"]
    assert "2 x question of training without a word in it or its answers; first: 1, 12" in out
    label = read(folder / "minival.json")[0]["label"]
    assert label == {"red": 1.0, "dark red": 0.9, "maroon": 0.6, "Red": 0.3}
    for answer in ("dark red", "maroon"):
        assert label[answer] == pytest.approx(vqa_accuracy(answer, TEN, "official"))


@pytest.mark.parametrize("layout", ["map", "mplug"])
def test_object_labels_and_words_are_joined_by_image(run, vqa_source, tmp_path, layout):
    objects = {"COCO_train2014_000000057870.jpg": ["kite", "sky"], "COCO_val2014_000000184613.jpg": ["bus"]}
    words = {"images/train2014/COCO_train2014_000000057870.jpg": [[[0, 0, 9, 9], "STOP"], [[0, 9, 9, 9], "now"]]}
    if layout == "mplug":
        objects = [{"image": TRAIN[0], "object_label": "kite&&sky"}, {"image": "val2014/COCO_val2014_000000184613.jpg"}]
        words = [{"image": TRAIN[0], "ocr": next(iter(words.values()))}]
    paths = [official.write_json(tmp_path / name, value) for name, value in (("o.json", objects), ("w.json", words))]
    run("vqa", "--objects", str(paths[0]), "--ocr", str(paths[1]))
    entry = read(tmp_path / "data/vqa/vqa_train_ocr.json")[0]
    assert entry["object_label"] == "kite&&sky" and [word for _, word in entry["ocr"]] == ["STOP", "now"]
    assert ("object_label" in read(tmp_path / "data/vqa/vqa_minival_ocr.json")[0]) == (layout == "map")
    official.write_json(paths[0], {"391895": ["dog"]})
    refused(lambda: run("vqa", "--objects", str(paths[0])), "o.json: 391895 names no image of COCO's")
