"""tools.check_data: what it finds in planted faults, and which of them must be mended."""

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
def check(folder):
    """Checks the folder's files as those of a stage; returns what was found."""

    def check(stage="retrieval", *overrides, splits=("train", "val", "test"), options=(), workers="1"):
        files = [f"data.{split}=[{folder / split}.json]" for split in splits]
        roots = [f"data.image_root={folder / 'images'}"] if stage != "vqa" else ["data.image_root.vqa=" + str(folder)]
        arguments = ["--config", f"configs/{STEMS[stage]}.yaml", "--workers", workers, *options]
        return check_data.check(check_data.parse_arguments([*arguments, "--override", *files, *roots, *overrides]))

    return check


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sound_data_have_no_fault(check, workers):
    found = check(workers=workers)
    assert found.faults == []
    train, val = found.numbers["train"], found.numbers["val"]
    assert train["images"]["count"] == 12 and val["items"]["count"] == 3
    shared = [line for split in found.numbers.values() for what, line in split.items() if "training has" in what]
    assert shared and all(line["count"] == 0 for line in shared)


def test_a_missing_and_a_broken_image_of_evaluation_are_faults(check, folder):
    (folder / "images/b1.jpg").unlink()
    whole = (folder / "images/c2.jpg").read_bytes()
    (folder / "images/c2.jpg").write_bytes(whole[: len(whole) // 2])
    found = check()
    faults = [line.split(": ")[:2] for line in found.faults]
    assert faults == [[split, "evaluation needs every image"] for split in ("val", "test")]
    assert found.numbers["val"]["images missing"]["first"] == [str(folder / "images/b1.jpg")]
    assert "c2.jpg (OSError: image file is truncated" in found.numbers["test"]["images unreadable"]["first"][0]


def test_training_stops_only_past_its_share(check, folder):
    entries = [pair(f"a{i}") for i in range(12)] + [pair(f"gone{i}") for i in range(10)]
    write(folder, "train", entries)
    (stop,) = check("retrieval", "data.max_bad_share=0.4").faults
    assert "train: 45.45% of the entries have no usable image" in stop
    assert not check("retrieval", "data.max_bad_share=0.5").faults
    write(folder, "train", entries[:15])  # three of fifteen: too few to say something
    found = check("retrieval", "data.max_bad_share=0.01")
    assert not found.faults and found.numbers["train"]["images missing"]["count"] == 3


def test_annotations_that_training_refuses_end_with_1_after_all_splits_are_checked(check, folder, capsys):
    write(folder, "train", [{"image": "a0.jpg"}])
    (stop,) = check().faults
    assert "train.json: entry 0 has no 'caption'" in stop and "val    images: 3" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        check_data.main(["--config", "configs/Retrieval_coco.yaml", "--override", f"data.train=[{folder}/train.json]"])
    assert end.value.code == 1 and "faults to mend before a run:\n  train: " in capsys.readouterr().out


def test_copies_between_training_and_evaluation_are_told_by_kind(check, folder):
    images = folder / "images"
    shutil.copy(images / "c0.jpg", images / "a0.jpg")
    official.save(images / "a1.jpg", 16, (100, 75), quality=60)  # c1 again, smaller
    write(folder, "train", [*(pair(f"a{i}") for i in range(12)), pair("b2")])
    found = check()
    assert found.faults == [
        "val: 1 of its 3 images are in training too: they measure memory",
        "test: 2 of its 3 images are in training too: they measure memory",
    ]
    test, val = found.numbers["test"], found.numbers["val"]
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
    found = check("pretrain", splits=("train",), options=("--against", str(config)))
    assert found.numbers["Retrieval_own test"]["images that training has too (a copy)"]["count"] == 1


def test_empty_long_and_unknown_texts_are_counted(check, folder):
    captions = ["", "?!", "dog " * 31, "unbelievably " * 20, "\u4e2d", *["a dog"] * 7]
    write(folder, "train", [pair(f"a{i}", text) for i, text in enumerate(captions)])
    found = check("retrieval", "text.max_tokens=26").numbers["train"]
    captions = "captions (data.max_words 30, text.max_tokens 26)"
    assert found[f"{captions}, empty"] == {"count": 2, "of": 12, "first": []}
    cut = found[f"{captions}, cut"]
    assert cut["count"] == 2 and cut["first"][1].startswith("'unbelievably")
    lacking = f"{captions}: word pieces that the vocabulary lacks"
    assert found[lacking]["count"] == 0 and found[lacking]["of"] > 0
    found = check("retrieval", "text.max_tokens=26", "text.vocab=configs/demo/vocab.txt").numbers["train"]
    assert found[lacking]["count"] > 0


def test_captioning_and_questions_have_their_own_texts(check, folder):
    for split in ("val", "test"):
        names = [f"{'b' if split == 'val' else 'c'}{i}" for i in range(3)]
        write(folder, split, [{**pair(name), "image_id": i} for i, name in enumerate(names)])
    for tokens, cut in ((4, 0), (3, 12)):
        found = check("caption", f"text.max_tokens={tokens}").numbers["train"]
        assert found[f"captions (text.max_tokens {tokens}), cut"]["count"] == cut
    asked = {
        "question": "what is it",
        "dataset": "vqa",
        "answer": ["a large brown dog"] * 10,
        "object_label": "dog&&cat",
    }
    for split, names in (("train", ("a0", "a1")), ("val", ("b0",)), ("test", ("c0",))):
        write(folder, split, [{"question_id": f"{split}{n}", "image": f"images/{n}.jpg", **asked} for n in names])
    found = check("vqa", "text.max_answer_tokens=4", "data.val_scores=[]", "text.max_label_tokens=1")
    train = found.numbers["train"]
    assert not found.faults and train["answers (text.max_answer_tokens 4), cut"]["count"] == 2
    assert train["labels (text.max_label_tokens 1), cut"]["count"] == 2 and not any("OCR" in what for what in train)


def test_the_stage_follows_from_the_configuration(folder):
    for stage, stem in STEMS.items():
        assert check_data.stage_config(f"configs/{stem}.yaml", [])[0] == stage
    path = folder / "bad.yaml"
    for text, message in (
        ("nonsense: 1", "unknown key nonsense"),
        ("mim: {}\nrerank: {}", "it has keys that no stage knows; name the stage with --stage"),
        ("seed: 1", "its keys fit pretrain and retrieval"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            check_data.stage_config(str(path), [])
    assert check_data.stage_config(str(path), [], "vqa")[0] == "vqa"
