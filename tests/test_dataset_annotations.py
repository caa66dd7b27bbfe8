import json

from dataset.annotations import Source, load_annotations

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
