"""tools.prepare on small files in the official layouts: COCO, Flickr30K, NoCaps, VQA, and what all sets share."""

import json
from itertools import count

import official_files as official
import pytest

from evaluation.vqa import vqa_accuracy
from tools.prepare import __main__ as prepare
from utils import UserError

TEN = ["red"] * 4 + ["dark red"] * 3 + ["maroon"] * 2 + ["Red"]
TRAIN = ["train2014/COCO_train2014_000000057870.jpg", "train2014/COCO_train2014_000000222016.jpg"]

source, run, read = official.source, official.run, official.read


# ------------------------------------------------------------------------------------------------ COCO, Flickr30K


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
    assert "odd: 1 x blank caption, left out; first: dataset_coco.json entry 3 (train2014" in out
    assert "odd: 1 x caption repeated at the same image, kept as published" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["images,", "train", "(with", "restval)", "3", "113,287"] in lines
    assert "warning: images, val: 2, 4,998 fewer than the published 5,000\n" in out


def test_flickr30k_becomes_retrieval_files(run, tmp_path):
    run("flickr30k")
    notes = tmp_path / "data/flickr30k/annotations"
    assert read(notes / "flickr30k_train.json")[0] == {
        "image": "flickr30k-images/1000092795.jpg",
        "caption": "A girl number 0.",
        "image_id": "flickr30k_0",
        "dataset": "flickr30k",
    }
    captions = [text.strip() for text in official.five("woman")]
    assert read(notes / "flickr30k_test.json") == [
        {"image": "flickr30k-images/1007129816.jpg", "caption": captions, "dataset": "flickr30k"}
    ]


def test_published_counts_that_match_raise_no_warning(run, monkeypatch):
    numbers = {"train": 2, "val": 1, "test": 1, "captions": 10}
    monkeypatch.setitem(prepare.karpathy.PUBLISHED, "flickr30k", numbers)
    assert "warning" not in run("flickr30k")
    monkeypatch.setitem(prepare.karpathy.PUBLISHED, "flickr30k", {**numbers, "captions": 12})
    assert "warning: captions, train: 10, 2 fewer than the published 12" in run("flickr30k")


def test_the_outputs_are_where_the_configurations_look_and_their_readers_take_them(run, tmp_path, monkeypatch):
    run("coco")
    run("flickr30k")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/coco/images").mkdir(parents=True)
    sets = {config: official.open_set("retrieval_train", config=f"Retrieval_{config}") for config in ("coco", "flickr")}
    assert [len(set_) for set_ in sets.values()] == [15, 10]
    for config, size in (("coco", 2), ("flickr", 1)):
        assert len(official.open_set("retrieval_eval", config=f"Retrieval_{config}", split="test")) == size
    judged = official.open_set("caption_eval", split="test")
    assert len(official.open_set("caption_train")) == 15 and judged.ids == [391895, 60623]
    official.save(tmp_path / "data/coco/images" / TRAIN[0], 1)
    pairs = official.open_set("pretrain", "data.train=[data/pretrain/coco.json]")
    own = next(i for i in range(len(pairs)) if pairs.paths[pairs.image_of_caption[i]].endswith(TRAIN[0]))
    assert pairs[own]["bad"] == []


def test_coco_without_karpathys_file_gives_pretraining_alone_and_no_validation_images(run, source, tmp_path):
    (source / "dataset_coco.json").unlink()
    official.coco_captions(source, "train2014", [57870, 222016])
    official.coco_captions(source, "val2014", [391895, 522418])
    out = run("coco")
    pairs = read(tmp_path / "data/pretrain/coco.json")
    assert [pair["image"] for pair in pairs] == [f"../coco/images/{name}" for name in TRAIN]
    assert "only train2014 is used" in out and not (tmp_path / "data/coco/annotations").exists()
    assert "odd: 1 x blank caption" in out and "image_id 999 is not among the file's images" in out


def test_cocos_own_files_of_2017_leave_karpathys_test_images_out(run, source, tmp_path):
    run("coco")  # makes them known
    (source / "dataset_coco.json").unlink()
    official.coco_captions(source, "train2017", [57870, 391895, 184613])
    out = run("coco")
    images = {pair["image"] for pair in read(tmp_path / "data/pretrain/coco.json")}
    assert images == {"../coco/images/train2017/000000057870.jpg"}
    assert "validation and test images left out, by id" in out and "= coco test" in out


def test_a_photo_of_flickr30ks_test_set_is_left_out_of_coco(run, source, tmp_path):
    run("flickr30k")
    official.coco_captions(source, "train2014", [57870, 222016], photos={57870: 1007129816})
    run("coco")
    images = {pair["image"] for pair in read(tmp_path / "data/pretrain/coco.json")}
    assert not any("57870" in image for image in images) and any("222016" in image for image in images)


# ------------------------------------------------------------------------------------------------ what sets share


def make_images(tmp_path):
    folder = tmp_path / "pictures"
    official.save(folder / TRAIN[0], 1)
    official.save(folder / "val2014/COCO_val2014_000000391895.jpg", 2)
    official.save(folder / "val2014/COCO_val2014_000000318219.jpg", 3)
    return folder


def test_only_images_on_disk_are_written_where_they_are_required(run, tmp_path):
    folder = make_images(tmp_path)
    out = run("coco", "--require-images", "--images", str(folder))
    train = read(tmp_path / "data/coco/annotations/coco_train.json")
    assert {entry["image"] for entry in train} == {TRAIN[0]}
    assert [entry["image"] for entry in read(tmp_path / "data/coco/annotations/coco_test.json")] == [
        "val2014/COCO_val2014_000000391895.jpg"
    ]
    pairs = read(tmp_path / "data/pretrain/coco.json")
    assert {pair["image"] for pair in pairs} == {str(folder / TRAIN[0])}  # outside OUTPUT: absolute
    assert "odd: 4 x image that is not on disk, left out" in out
    official.save(folder / TRAIN[1], 4)  # a new image: not the same any more
    assert "odd: 3 x image that is not on disk" in run("coco", "--require-images", "--images", str(folder))


def test_missing_official_files_are_listed_with_where_they_are_published(run, source, tmp_path):
    (source / "v2_mscoco_val2014_annotations.json.zip").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        run("vqa")
    message = str(caught.value)
    assert "v2_OpenEnded_mscoco_train2014_questions.json (https://visualqa.org/download.html)" in message
    assert "v2_mscoco_val2014_annotations.json.zip is there: unpack it" in message and "\n" not in message
    with pytest.raises(UserError, match="nocaps_val_4500_captions.json .https://nocaps"):
        run("nocaps")
    (source / "dataset_coco.json").unlink()
    with pytest.raises(UserError, match="lacks dataset_coco.json .*karpathy.*annotations_trainval2014.zip"):
        run("coco")


def test_nothing_is_left_behind_where_a_file_breaks_off(run, source, tmp_path):
    whole = (source / "dataset_flickr30k.json").read_text()
    (source / "dataset_flickr30k.json").write_text(whole[:-200])
    with pytest.raises(UserError, match="incomplete download"):
        run("flickr30k")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_broken_entries_are_counted_and_named(run, source):
    content = read(source / "dataset_flickr30k.json")
    content["images"][1:1] = [7, {"split": "train"}, {**content["images"][0], "split": "extra"}]
    official.write_json(source / "dataset_flickr30k.json", content)
    out = run("flickr30k")
    assert "odd: 3 x entry that is not as Karpathy's, left out; first: dataset_flickr30k.json entry 1 is no" in out
    assert "entry 2 has no 'sentences'" in out and "entry 3 has the split 'extra'" in out


def test_a_file_that_is_not_as_the_tool_wrote_it_is_neither_replaced_nor_removed(run, tmp_path):
    own = tmp_path / "data/coco/annotations/coco_val.json"
    official.write_json(own, "mine")
    with pytest.raises(UserError, match="coco_val.json: is not as tools.prepare wrote it; move it away"):
        run("coco")
    assert read(own) == "mine"
    own.unlink()
    run("coco")
    official.write_json(own, "changed")
    for name, message in (("coco", "coco_val.json: is not as"), ("flickr30k", None)):
        if message is None:
            run(name)  # the other files of the folder are the tool's
        else:
            with pytest.raises(UserError, match=message):
                run(name)
    assert read(own) == "changed"
    record = tmp_path / "data/prepared/written.jsonl"
    record.write_text("my notes\n")
    with pytest.raises(UserError, match="written.jsonl: not written by tools.prepare; move it away"):
        run("nocaps" if official.nocaps(tmp_path / "downloads") else "")


# ------------------------------------------------------------------------------------------------ NoCaps


def test_nocaps_becomes_captioning_evaluation(run, source, tmp_path, monkeypatch):
    official.nocaps(source)
    out = run("nocaps")
    entries = read(tmp_path / "data/nocaps/nocaps_val.json")
    assert entries[0]["img_id"] == 0 and entries[0]["image"] == "0000000000000000.jpg"
    assert len(entries[0]["caption"]) == 9 and entries[1]["domain"] == "near-domain"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/nocaps/images").mkdir()
    judged = official.open_set("caption_eval", config="Caption_nocaps", split="val")
    assert judged.ids == [0, 1, 2, 3] and judged.domains == ["in", "near", "out", "in"]
    assert "odd: 1 x blank caption" in out and "first: image 4 is missing" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["images,", "in-domain", "2", "648"] in lines and ["captions", "39", "45,000"] in lines


# ------------------------------------------------------------------------------------------------ VQA


@pytest.fixture
def vqa_source(source):
    numbers = count(1)
    train = [(next(numbers), 57870, f"What colour is kite {i}?") for i in range(11)]
    val = [(101, 184613, "What is it?"), (102, 522418, "Who is it?"), (103, 318219, "Is it red?"), (104, 318219, "?")]
    official.vqa_questions(source, "train2014", [*train, (50, 57870, "No annotation?")])
    official.vqa_questions(source, "val2014", val)
    official.vqa_questions(source, "test2015", [(201, 262144, "What is this?"), (202, 262144, "And that?")])
    official.vqa_questions(source, "test-dev2015", [(201, 262144, "What is this?")])
    answers = {(number, image): TEN for number, image, _ in train}
    answers[1, 57870] = [" "] * 10
    official.vqa_annotations(source, "train2014", answers)
    official.vqa_annotations(source, "val2014", {(number, image): TEN for number, image, _ in val})
    return source


def test_vqa_becomes_questions_with_ten_answers(run, vqa_source, tmp_path):
    run("coco")
    out = run("vqa")
    folder = tmp_path / "data/vqa"
    train, rest, minival = (read(folder / f"vqa_{part}_ocr.json") for part in ("train", "nominival", "minival"))
    assert train[0]["image"] == TRAIN[0] and train[0]["answer"] == TEN and train[0]["question_id"] == 2
    assert train[0]["answer_type"] == "other" and train[0]["dataset"] == "vqa"
    assert [entry["question_id"] for entry in rest] == [102]
    assert [entry["question_id"] for entry in minival] == [101, 103]  # Karpathy's val images
    assert [entry["question_id"] for entry in read(folder / "vqa_test_ocr.json")] == [201, 202]
    assert [entry["question_id"] for entry in read(folder / "vqa_testdev_ocr.json")] == [201]
    assert "image" in read(folder / "vqa_test_ocr.json")[0] and "answer" not in read(folder / "vqa_test_ocr.json")[0]
    assert read(folder / "answer_list.json") == ["red"]
    for text in ("question without an annotation", "answers are all blank", "question without a word"):
        assert text in out
    assert ["questions,", "train2014", "12", "443,757"] in [line.split() for line in out.splitlines()]
    assert "question 50" not in out or "v2_OpenEnded_mscoco_train2014_questions.json question 11" in out


def test_vqas_files_train_and_judge(run, vqa_source, tmp_path, monkeypatch):
    run("coco")
    official.visual_genome(vqa_source, {1: None})
    run("vqa")
    monkeypatch.chdir(tmp_path)
    for folder in ("data/coco/images", "data/visual_genome"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    trained = official.open_set("vqa_train")  # all files of the configuration, the minival's questions left out
    assert len(trained) == 12 and trained.left_out == 2
    judged = official.open_set("vqa_eval", split="val")
    assert judged.references == [TEN, TEN] and judged.answer_types == ["other"] * 2
    assert official.open_set("vqa_eval", split="test").references is None


def test_minival_scores_are_the_official_accuracy(run, vqa_source, tmp_path):
    run("coco")
    run("vqa")
    label = read(tmp_path / "data/vqa/minival.json")[0]["label"]
    assert label == {"red": 1.0, "dark red": 0.9, "maroon": 0.6, "Red": 0.3}
    for answer in ("dark red", "maroon"):
        assert label[answer] == pytest.approx(vqa_accuracy(answer, TEN, "official"))


@pytest.mark.parametrize("layout", ["lxmert", "numbers", "text", "instances"])
def test_minival_may_be_any_list_of_images(run, vqa_source, tmp_path, layout):
    content = {
        "lxmert": [{"img_id": "COCO_val2014_000000522418", "label": {"x": 1}, "question_id": 102, "sent": "Who?"}],
        "numbers": [522418],
        "text": "522418\n",
        "instances": {"images": [{"id": 522418, "file_name": "COCO_val2014_000000522418.jpg"}]},
    }[layout]
    path = vqa_source / ("minival.txt" if layout == "text" else "minival.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    run("vqa", *(["--minival", str(path)] if layout == "text" else []))
    assert [entry["question_id"] for entry in read(tmp_path / "data/vqa/vqa_minival_ocr.json")] == [102]


def test_vqa_without_a_minival_says_what_to_do(run, vqa_source):
    with pytest.raises(UserError, match="put minival.json .*or run tools.prepare coco"):
        run("vqa")


@pytest.mark.parametrize("layout", ["map", "mplug"])
def test_object_labels_and_words_are_joined_by_image(run, vqa_source, tmp_path, layout):
    run("coco")
    objects = {"COCO_train2014_000000057870.jpg": ["kite", "sky"], "184613": [{"label": "bus"}], "x": 3}
    words = {"images/train2014/COCO_train2014_000000057870.jpg": [[[0, 0, 9, 9], "STOP"], [[0, 9, 9, 9], "now"]]}
    if layout == "mplug":
        objects = [{"image": TRAIN[0], "object_label": "kite&&sky"}, {"image": "val2014/COCO_val2014_000000184613.jpg"}]
        words = [{"image": TRAIN[0], "ocr": next(iter(words.values()))}]
    paths = [official.write_json(tmp_path / name, value) for name, value in (("o.json", objects), ("w.json", words))]
    out = run("vqa", "--objects", str(paths[0]), "--ocr", str(paths[1]))
    entry = read(tmp_path / "data/vqa/vqa_train_ocr.json")[0]
    assert entry["object_label"] == "kite&&sky" and [word for _, word in entry["ocr"]] == ["STOP", "now"]
    assert ("object_label" in read(tmp_path / "data/vqa/vqa_minival_ocr.json")[0]) == (layout == "map")
    assert ("questions with OCR tokens" in out) and ("cannot be read" in out) == (layout == "map")


def test_visual_genomes_earlier_questions_lose_those_of_the_minivals_images(run, vqa_source, tmp_path):
    run("flickr30k")
    run("coco")
    official.visual_genome(vqa_source, {1: None, 2: 184613, 3: 57870, 4: 522418})  # the last is not of Karpathy's val
    run("vg")
    for name in ("image_data.json", "question_answers.json"):  # so that vqa finds only what vg made of them
        (vqa_source / name).unlink()
    official.write_json(vqa_source / "minival.json", [522418])
    out = run("vqa")
    path = tmp_path / "data/vqa/vg_qa.json"
    entries = read(path)
    assert [entry["image"] for entry in entries] == ["VG_100K_2/1.jpg", "VG_100K_2/3.jpg"]
    assert ["taken", "out", "1"] == next(line for line in out.splitlines() if "taken out" in line).split()[-3:]
    official.write_json(path, [{key: entry[key] for key in entry if key != "coco_id"} for entry in entries])
    assert f"warning: {path}: 2 questions do not say which of COCO's images they show" in run("vqa")
    assert len(read(path)) == 2  # whose images are not known is not thrown away
