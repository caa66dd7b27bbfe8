import json

import pytest

from dataset.annotations import Source, load_annotations
from utils import UserError

PAIR = {"image": "a.png", "caption": "a dog"}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_paths_are_relative_to_the_json_file_by_default(tmp_path):
    path = write(tmp_path / "sub" / "pairs.json", [PAIR, {"image": "/abs/b.png", "caption": ["x"], "extra": 1}])
    first, second = load_annotations(Source(path), "pretrain")
    assert first["image"] == str(tmp_path / "sub" / "a.png")
    assert second == {"image": "/abs/b.png", "caption": ["x"], "extra": 1}


def test_several_files_are_read_in_order(tmp_path):
    one, two = write(tmp_path / "1.json", [PAIR]), write(tmp_path / "2.json", [{**PAIR, "image": "b.png"}])
    images = [entry["image"] for entry in load_annotations(Source([one, two]), "pretrain")]
    assert images == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_image_root_is_one_folder_or_one_per_dataset(tmp_path):
    entries = [{**PAIR, "dataset": "vqa"}, {**PAIR, "dataset": "vg"}]
    path = write(tmp_path / "pairs.json", entries)
    for name in ("coco", "genome"):
        (tmp_path / name).mkdir()
    one = load_annotations(Source(path, tmp_path / "coco"), "pretrain")
    assert [entry["image"] for entry in one] == [str(tmp_path / "coco" / "a.png")] * 2
    roots = {"vqa": str(tmp_path / "coco"), "vg": str(tmp_path / "genome")}
    both = load_annotations(Source(path, roots), "pretrain")
    assert [entry["image"] for entry in both] == [str(tmp_path / name / "a.png") for name in ("coco", "genome")]


def test_the_longest_matching_prefix_is_rewritten(tmp_path):
    path = write(tmp_path / "p.json", [{**PAIR, "image": f"{name}/x.jpg"} for name in ("val2014", "val", "other")])
    entries = load_annotations(Source(path, tmp_path, {"val": "V", "val2014/": "images/val/"}), "pretrain")
    expected = ["images/val/x.jpg", "V/x.jpg", "other/x.jpg"]
    assert [entry["image"] for entry in entries] == [str(tmp_path / name) for name in expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", r"p.json: entry 0: not valid JSON"),
        ({"a": 1}, r"p.json: holds an object, not a list"),
        ([], r"p.json: holds no entry"),
        ([PAIR, 3], r"p.json: entry 1 is int"),
        ([PAIR, {"image": "b.png"}], r"p.json: entry 1 has no 'caption'"),
        ([{"caption": "x"}], r"p.json: entry 0 has no 'image'"),
        ([{"image": "", "caption": "x"}], r"p.json: entry 0: 'image' is empty"),
        ([{"image": 5, "caption": "x"}], r"p.json: entry 0: 'image' is int, it must be a string"),
        (
            [{**PAIR, "caption": None}],
            r"entry 0: 'caption' is NoneType, it must be a string or a list of strings",
        ),
        ([{**PAIR, "caption": []}], r"entry 0: 'caption' must be a list of strings with at least one"),
        ([{**PAIR, "caption": ["x", 1]}], r"entry 0: 'caption' must be a list of strings"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_file_entry_and_key(tmp_path, content, message):
    path = write(tmp_path / "p.json", content)
    with pytest.raises(UserError, match=message) as caught:
        load_annotations(Source(path), "pretrain")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="annotation file: .*gone.json does not exist"):
        load_annotations(Source(tmp_path / "gone.json"), "pretrain")
    path = write(tmp_path / "p.json", [{**PAIR, "dataset": "flickr"}])
    with pytest.raises(UserError, match="data.image_root: .*gone does not exist"):
        load_annotations(Source(path, tmp_path / "gone"), "pretrain")
    with pytest.raises(UserError, match="entry 0 has the dataset 'flickr', but data.image_root names only vqa"):
        load_annotations(Source(path, {"vqa": str(tmp_path)}), "pretrain")


def test_retrieval_training_entries_need_a_caption_and_may_have_an_image_id(tmp_path):
    path = write(tmp_path / "p.json", [{**PAIR, "image_id": True}])
    with pytest.raises(UserError, match="'image_id' is bool, it must be a string or a whole number"):
        load_annotations(Source(path), "retrieval_train")
    path = write(tmp_path / "p.json", [{**PAIR, "caption": [], "image_id": 1}])
    with pytest.raises(UserError, match="'caption' must be a list of strings with at least one"):
        load_annotations(Source(path), "retrieval_train")
    path = write(tmp_path / "p.json", [PAIR, {"image": "2.jpg"}])
    with pytest.raises(UserError, match="p.json: entry 1 has no 'caption'; a retrieval_train entry needs image"):
        load_annotations(Source(path), "retrieval_train")
