"""tools.check_data: what it finds in planted faults, and which of them must be mended."""

import shutil

import official_files as official
import pytest
from conftest import refused

from tools import check_data
from utils import ROOT

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
    """Checks the folder's files as those of a stage -> (faults, the report)."""

    def check(stage="retrieval", *overrides, splits=("train", "val", "test"), options=(), workers="1"):
        files = [f"data.{split}=[{folder / split}.json]" for split in splits]
        arguments = ["--config", f"configs/{STEMS[stage]}.yaml", "--workers", workers, *options]
        arguments += ["--override", *files, f"data.image_root={folder / 'images'}", *overrides]
        faults = [": ".join(fault) for fault in check_data.check(check_data.parse_arguments(arguments))]
        return faults, capsys.readouterr().out

    return check


def test_sound_data_have_no_fault(check):
    faults, report = check(workers="2")
    assert faults == [] and "train  images: 12\n" in report and "val    items: 3\n" in report
    assert report.count("images that training has too: 0 (0.00% of 3)") == 2


def test_a_missing_and_a_broken_image_of_evaluation_are_faults(check, folder):
    (folder / "images/b1.jpg").unlink()
    whole = (folder / "images/c2.jpg").read_bytes()
    (folder / "images/c2.jpg").write_bytes(whole[: len(whole) // 2])
    faults, report = check()
    found = [line.split(": ")[:2] for line in faults]
    assert found == [[split, "evaluation needs every image"] for split in ("val", "test")]
    assert f"val    images missing or unreadable: 1 (33.33% of 3); first: {folder}/images/b1.jpg: No such" in report
    assert f"test   images missing or unreadable: 1 (33.33% of 3); first: {folder}/images/c2.jpg: OSError" in report


def test_training_stops_only_past_its_share(check, folder):
    entries = [pair(f"a{i}") for i in range(12)] + [pair(f"gone{i}") for i in range(10)]
    write(folder, "train", entries)
    (stop,), _ = check("retrieval", "data.max_bad_share=0.4")
    assert "train: 45.45% of the entries have no usable image" in stop
    assert not check("retrieval", "data.max_bad_share=0.5")[0]
    write(folder, "train", entries[:15])  # three of fifteen: too few to say something
    faults, report = check("retrieval", "data.max_bad_share=0.01")
    assert not faults and "train  images missing or unreadable: 3 " in report


def test_annotations_that_training_refuses_end_with_1_after_all_splits_are_checked(check, folder, capsys):
    write(folder, "train", [{"image": "a0.jpg"}])
    (stop,), report = check()
    assert "train.json: entry 0 has no 'caption'" in stop and "val    images: 3" in report
    with pytest.raises(SystemExit) as end:
        check_data.main(["--config", "configs/Retrieval_coco.yaml", "--override", f"data.train=[{folder}/train.json]"])
    assert end.value.code == 1 and "faults to mend before a run:\n  train: " in capsys.readouterr().out


def test_copies_between_training_and_evaluation_also_of_another_stage_are_told_by_kind(check, folder):
    images = folder / "images"
    shutil.copy(images / "c0.jpg", images / "a0.jpg")
    official.save(images / "a1.jpg", 16, (100, 75), quality=60)  # c1 again, smaller
    write(folder, "train", [*(pair(f"a{i}") for i in range(12)), pair("b2")])
    faults, report = check()
    assert faults == [
        "val: 1 of its 3 images are in training too: they measure memory",
        "test: 2 of its 3 images are in training too: they measure memory",
    ]
    assert f"has too: 1 (33.33% of 3); first: {images}/b2.jpg (the same path)\n" in report
    copies = f"{images}/c0.jpg (a copy of it: {images}/a0.jpg), {images}/c1.jpg (a look-alike of it: {images}/a1.jpg)"
    assert f"has too: 2 (66.67% of 3); first: {copies}\n" in report
    config = folder / "Retrieval_own.yaml"
    config.write_text(
        f"base: {ROOT}/configs/Retrieval_coco.yaml\n"
        f"data: {{val: [{folder}/val.json], test: [{folder}/test.json], image_root: {images}}}\n"
    )
    faults, report = check("pretrain", splits=("train",), options=("--against", str(config)))
    assert "Retrieval_own test images that training has too: 2 (66.67% of 3)" in report and len(faults) == 2


def test_the_stage_follows_from_the_configuration(folder):
    for stage, stem in STEMS.items():
        assert check_data.stage_config(f"configs/{stem}.yaml", [])[0] == stage
    path = folder / "bad.yaml"
    path.write_text("mim: {}\nrerank: {}")
    refused(lambda: check_data.stage_config(str(path), []), "fits no stage; as pretrain: ", "unknown key rerank")
