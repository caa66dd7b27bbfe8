"""tools.prepare folder: a folder of images with captions becomes train, validation and test lists."""

import os
import shutil
from itertools import combinations

import official_files as official
import pytest
from conftest import refused

from dataset.annotations import Source, load_annotations, load_candidates, load_captions, load_pairs, strings

run = official.run


@pytest.fixture
def source(tmp_path):
    """Thirty images with one or two captions each, in two folders."""
    folder = tmp_path / "photos"
    for number in range(30):
        path = folder / ("more" if number % 2 else "") / f"{number:02d}.png"
        official.save(path, number)
        lines = [f"image number {number}"] + ["a second caption"] * (number % 3 == 0)
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def lists(folder):
    """{split: entries} of the files that are there."""
    return {path.stem: official.read(path) for path in folder.glob("*.json")}


def images(folder):
    """{split: the names of its images}"""
    return {name: {os.path.basename(entry["image"]) for entry in entries} for name, entries in lists(folder).items()}


def test_every_image_is_in_one_split_and_every_stage_reads_the_lists(run, source, tmp_path):
    out = run("folder", "--val", "4", "--test", "0.2")
    own = tmp_path / "data"
    found = images(own)
    assert {name: len(names) for name, names in found.items()} == {"train": 20, "val": 4, "test": 6}
    assert set.union(*found.values()) == {f"{number:02d}.png" for number in range(30)}
    assert all(not one & other for one, other in combinations(found.values(), 2))
    train = lists(own)["train"]
    assert len(train) == 20 + sum(int(name[:2]) % 3 == 0 for name in found["train"])  # an entry a caption
    assert f"{own / 'train.json'}: {len(train)} entries" in out

    for entry in load_annotations(Source(own / "train.json"), "pretrain"):
        assert os.path.samefile(entry["image"], source / os.path.relpath(entry["image"], source))
        assert entry["caption"] in ("a second caption", f"image number {int(os.path.basename(entry['image'])[:2])}")
    assert len(load_pairs(Source(own / "train.json"))) == len(train)
    for split in ("val", "test"):
        file = Source(own / f"{split}.json")
        ranked, written = load_candidates(file, split), load_captions(file, split)
        assert ranked == [(entry["image"], text) for entry in written for text in entry["captions"]]
        assert {entry["image_id"] for entry in written} <= {str(p.relative_to(source)) for p in source.rglob("*.png")}


def test_images_that_show_the_same_are_in_one_split(run, source, tmp_path):
    for number in range(0, 10, 2):
        shutil.copy(source / f"{number:02d}.png", source / f"copy {number:02d}.png")
        official.save(source / f"larger {number:02d}.jpg", number, (130, 98), quality=80)
        for name in (f"copy {number:02d}", f"larger {number:02d}"):
            (source / f"{name}.txt").write_text("the same")
    out = run("folder", "--val", "12", "--test", "12", "--seed", "5")
    assert "images that show what another shows, kept in its split: 10" in out
    for number in range(0, 10, 2):
        names = {f"{number:02d}.png", f"copy {number:02d}.png", f"larger {number:02d}.jpg"}
        assert sum(bool(names & found) for found in images(tmp_path / "data").values()) == 1


def test_the_first_line_alone_may_be_the_caption_and_drawings_are_counted(run, source, tmp_path):
    for path in source.rglob("*.txt"):
        path.write_text(f"The English words.\nde.utf8=Die deutschen.\nfr.utf8={path.stem}\n", encoding="utf-8")
    (source / "drawn.svg").write_text("<svg/>")
    (source / "drawn.txt").write_text("a drawing\n")
    official.save(source / "mirrored.png", 99)
    out = run("folder", "--captions", "first-line")
    captions = {entry["caption"] for entry in lists(tmp_path / "data")["train"]}
    assert captions == {"The English words."}
    assert "1 x caption without an image (.jpg, .jpeg, .png" in out and "drawn.txt" in out
    assert "1 x image without a caption; first: " in out and "mirrored.png" in out


def test_one_file_may_hold_the_captions_and_ids(run, source, tmp_path):
    found = sorted(source.rglob("*.png"))[:28]
    rows = [(path.relative_to(source), f"caption, {path.stem}", 100 + int(path.stem)) for path in found]
    lines = [f'{image},"{caption}",{number}' for image, caption, number in [*rows, ("gone.png", "missing", 200)]]
    (tmp_path / "list.csv").write_text("\n".join(["file,title,image_id", *lines]))
    out = run("folder", "--captions", str(tmp_path / "list.csv"), "--columns", "image=file", "caption=title")
    entries = [entry for part in lists(tmp_path / "data").values() for entry in part]
    written = {(entry["image_id"], *strings(entry["caption"])) for entry in entries}
    assert len(entries) == 28 and written == {(number, caption) for _, caption, number in rows}
    assert "1 x image that cannot be read; first: " in out and "gone.png" in out


def test_what_cannot_be_used_is_counted_and_named_in_plain_lines(run, source, tmp_path):
    broken = source / "a\x1b[31m\nwarning: b.png"
    broken.write_bytes(b"no image")
    broken.with_suffix(".txt").write_text("a caption")
    (source / "00.txt").write_text(" ...\n")
    (source / "02.txt").write_bytes("ein Käse\n".encode("latin-1"))
    out = run("folder", "--val", "0")
    assert "1 x image that cannot be read; first: " in out and " warning: b.png: not an image" in out
    assert "\x1b" not in out and "\nwarning: b" not in out
    assert "1 x caption without a word; first: " in out
    assert "1 x image whose .txt cannot be read; first: " in out and "0xe4 is not UTF-8 text" in out
    assert "no image for val: val.json is not written" in out
    assert sorted(lists(tmp_path / "data")) == ["test", "train"]


def test_splits_leave_images_for_training(run):
    refused(
        lambda: run("folder", "--val", "20", "--test", "9"), "--val 20 and --test 9 leave fewer than two of 30 images"
    )
    refused(lambda: run("folder", "--val", "-5"), "--val is -5.0; a number of at least 0")


def test_ids_are_cocos_numbers_if_all_names_have_one(run, source, tmp_path):
    for number, path in enumerate(sorted(source.rglob("*.png"))):
        new = source / f"COCO_val2014_{100 + number:012d}.png"
        path.rename(new)
        path.with_suffix(".txt").rename(new.with_suffix(".txt"))
    run("folder")
    test = tmp_path / "data/test.json"
    ids = [entry["image_id"] for entry in official.read(test)]
    assert len(ids) == 3 and all(isinstance(i, int) and 100 <= i < 130 for i in ids)
    assert [entry["image_id"] for entry in load_captions(Source(test), "test")] == ids
