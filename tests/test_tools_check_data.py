"""tools.check_data: what it finds in planted faults, and when it says that training would stop."""

import json
import shutil

import official_files as official
import pytest

from tools import check_data
from utils import ROOT, UserError

STEMS = {"pretrain": "Pretrain", "retrieval": "Retrieval_coco", "caption": "Caption_coco", "vqa": "VQA"}


@pytest.fixture
def folder(tmp_path):
    """Images a0..a11 for training, b0..b2 for validation, c0..c2 for test, all different."""
    for number, name in enumerate([*(f"a{i}" for i in range(12)), *(f"{s}{i}" for s in "bc" for i in range(3))]):
        official.save(tmp_path / "images" / f"{name}.jpg", number, (160, 120))
    write(tmp_path, "train", [pair(f"a{i}") for i in range(12)])
    write(tmp_path, "val", [{"image": f"b{i}.jpg", "caption": ["a dog", "two dogs"]} for i in range(3)])
    write(tmp_path, "test", [{"image": f"c{i}.jpg", "caption": ["a cat"]} for i in range(3)])
    return tmp_path


def pair(name, caption="a small dog"):
    return {"image": f"{name}.jpg", "caption": caption, "image_id": name}


def write(folder, name, entries):
    return official.write_json(folder / f"{name}.json", entries)


@pytest.fixture
def check(folder, capsys):
    """Checks the folder's files as those of a stage; returns (exit code, what was printed, the report)."""

    def check(stage="retrieval", *overrides, splits=("train", "val", "test"), options=(), workers="1"):
        files = [f"data.{split}=[{folder / split}.json]" for split in splits]
        roots = [f"data.image_root={folder / 'images'}"] if stage != "vqa" else ["data.image_root.vqa=" + str(folder)]
        report = str(folder / "report.json")
        arguments = ["--config", f"configs/{STEMS[stage]}.yaml", "--workers", workers, "--json", report, *options]
        code = 0
        try:
            check_data.main([*arguments, "--override", *files, *roots, *overrides])
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out, json.loads((folder / "report.json").read_text())

    return check


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sound_data_end_with_0(check, workers):
    code, out, report = check(workers=workers)
    assert code == 0 and "nothing would stop a run" in out and report["would_stop"] == []
    found = report["splits"]
    assert found["train"]["images"]["count"] == 12 and found["val"]["items"]["count"] == 3
    assert all(line["count"] == 0 for split in found.values() for name, line in split.items() if "training has" in name)


def test_a_missing_and_a_broken_image_of_evaluation_stop(check, folder):
    (folder / "images/b1.jpg").unlink()
    whole = (folder / "images/c2.jpg").read_bytes()
    (folder / "images/c2.jpg").write_bytes(whole[: len(whole) // 2])
    code, out, report = check()
    assert code == 1 and len(report["would_stop"]) == 2
    assert report["splits"]["val"]["images missing"]["first"] == [str(folder / "images/b1.jpg")]
    assert "c2.jpg (OSError: image file is truncated" in report["splits"]["test"]["images unreadable"]["first"][0]
    assert "val: evaluation needs every image" in out


def test_training_stops_only_past_its_share(check, folder):
    entries = [pair(f"a{i}") for i in range(12)] + [pair(f"gone{i}") for i in range(10)]
    write(folder, "train", entries)
    code, _, report = check("retrieval", "data.max_bad_share=0.4")
    assert code == 1 and "train: 45.45% of the entries have no usable image" in report["would_stop"][0]
    assert check("retrieval", "data.max_bad_share=0.5")[0] == 0
    write(folder, "train", entries[:15])  # three of fifteen: too few to say something
    code, _, report = check("retrieval", "data.max_bad_share=0.01")
    assert code == 0 and report["splits"]["train"]["images missing"]["count"] == 3


def test_annotations_that_training_refuses_stop(check, folder):
    write(folder, "train", [{"image": "a0.jpg"}])
    code, out, report = check()
    assert code == 1 and "train.json: entry 0 has no 'caption'" in report["would_stop"][0]
    assert "val    images: 3" in out  # the other splits are checked all the same


def test_copies_between_training_and_evaluation_are_told_by_kind(check, folder):
    images = folder / "images"
    shutil.copy(images / "c0.jpg", images / "a0.jpg")
    official.save(images / "a1.jpg", 16, (100, 75), quality=60)  # c1 again, smaller
    write(folder, "train", [*(pair(f"a{i}") for i in range(12)), pair("b2")])
    code, out, report = check()
    assert code == 0  # no reason to stop, but told
    test, val = report["splits"]["test"], report["splits"]["val"]
    assert test["images that training has too (a copy)"]["first"] == [f"{images}/c0.jpg = {images}/a0.jpg"]
    assert test["images that training has too (a look-alike)"]["first"] == [f"{images}/c1.jpg = {images}/a1.jpg"]
    assert val["images that training has too (the same path)"]["count"] == 1


def test_pretraining_is_compared_with_another_stages_test_set(check, folder):
    shutil.copy(folder / "images/c0.jpg", folder / "images/a5.jpg")
    config = folder / "Retrieval_own.yaml"
    config.write_text(
        f"base: {ROOT}/configs/Retrieval_coco.yaml\n"
        f"data: {{val: [{folder}/val.json], test: [{folder}/test.json], image_root: {folder}/images}}\n"
    )
    code, _, report = check("pretrain", splits=("train",), options=("--against", str(config)))
    assert code == 0
    assert report["splits"]["Retrieval_own test"]["images that training has too (a copy)"]["count"] == 1


def test_empty_long_and_unknown_texts_are_counted(check, folder):
    captions = ["", "?!", "dog " * 31, "unbelievably " * 20, "\u4e2d", *["a dog"] * 7]
    write(folder, "train", [pair(f"a{i}", text) for i, text in enumerate(captions)])
    found = check("retrieval", "text.max_tokens=26")[2]["splits"]["train"]
    assert found["captions, empty"] == {"count": 2, "of": 12, "first": []}
    assert found["captions of more than 30 words, cut"]["count"] == 1
    cut = found["captions of more than 25 word pieces, cut"]
    assert cut["count"] == 2 and cut["first"][1].startswith("'unbelievably")
    lacking = found["captions: word pieces that the vocabulary lacks"]
    assert lacking["count"] == 0 and lacking["of"] > 0
    found = check("retrieval", "text.vocab=configs/demo/vocab.txt")[2]["splits"]["train"]
    assert found["captions: word pieces that the vocabulary lacks"]["count"] > 0


def test_captioning_and_questions_have_their_own_texts(check, folder):
    write(folder, "val", [{**pair(f"b{i}"), "image_id": i} for i in range(3)])
    write(folder, "test", [{**pair(f"c{i}"), "image_id": i} for i in range(3)])
    assert check("caption", "text.max_tokens=4")[2]["splits"]["train"]["captions of more than 3 word pieces, cut"] == {
        "count": 0,
        "of": 12,
        "first": [],
    }
    assert (
        check("caption", "text.max_tokens=3")[2]["splits"]["train"]["captions of more than 2 word pieces, cut"]["count"]
        == 12
    )
    for split, names in (("train", "aa"), ("val", "b"), ("test", "c")):
        write(
            folder,
            split,
            [
                {
                    "question_id": f"{split}{i}",
                    "question": "what is it",
                    "image": f"images/{name}{i}.jpg",
                    "dataset": "vqa",
                    "answer": ["a large brown dog"] * 10,
                    "object_label": "dog&&cat",
                }
                for i, name in enumerate(names)
            ],
        )
    code, _, report = check("vqa", "text.max_answer_tokens=4", "data.val_scores=[]", "text.max_label_tokens=1")
    found = report["splits"]["train"]
    assert code == 0 and found["answers of more than 3 word pieces, cut"]["count"] == 2
    assert found["object labels of more than 1 word pieces, cut"]["count"] == 2
    assert "OCR tokens, empty" not in found


def test_the_stage_follows_from_the_configuration(folder):
    for stage, stem in STEMS.items():
        assert check_data.stage_config(f"configs/{stem}.yaml", [])[0] == stage
    assert check_data.stage_config("configs/demo/VQA.yaml", [])[0] == "vqa"
    (folder / "bad.yaml").write_text("nonsense: 1\n")
    with pytest.raises(UserError, match="unknown key nonsense"):
        check_data.stage_config(str(folder / "bad.yaml"), [])
    (folder / "bad.yaml").write_text("mim: {}\nrerank: {}\n")
    with pytest.raises(UserError, match="it has keys that no stage knows; name the stage with --stage"):
        check_data.stage_config(str(folder / "bad.yaml"), [])
    (folder / "bad.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="its keys fit pretrain and retrieval"):
        check_data.stage_config(str(folder / "bad.yaml"), [])
    assert check_data.stage_config(str(folder / "bad.yaml"), [], "vqa")[0] == "vqa"
    with pytest.raises(UserError, match="gone.yaml does not exist"):
        check_data.stage_config("gone.yaml", [])
