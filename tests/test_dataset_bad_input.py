"""What no stage may stumble over: each of these is one line that names file, entry and key, before the work."""

import json
import os

import annotated
import conftest
import pytest
from annotated import TRAIN, entry, make, write
from official_files import open_set
from pycocotools.coco import COCO

folder = annotated.folder
pytestmark = pytest.mark.usefixtures("no_hanging")

HALF = "a dog \ud83d"


def refused(stage, files, *parts, **options):
    return conftest.refused(lambda: make(stage, files, **options), *parts)


# ------------------------------------------------------------------------------------------------- files


NO_LISTS = {
    "[" * 100_000 + "]" * 100_000: "cannot be read as JSON (maximum recursion",
    '[{"image": "a.png"': "not valid JSON (Expecting ',' delimiter: line 1",
    '[{"image": "\xe9.png"}]': "cannot be read as JSON ('utf-8' codec",
    "[]": "holds no entry",
    '{"a": 1}': "holds no list of entries",
    "[null]": "entry 0 is NoneType, not an object",
}


@pytest.mark.parametrize(("content", "message"), NO_LISTS.items(), ids=range(len(NO_LISTS)))
def test_json_that_is_no_list_of_entries(folder, content, message):
    (folder / "split.json").write_bytes(content.encode("latin-1"))
    refused("pretrain", folder / "split.json", f"split.json: {message}")


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.csv", "p.token", "p.tar"])
def test_a_pipe_and_a_device_are_waited_for_in_no_format(folder, name):
    for make_it in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        make_it(folder / name)
        refused("pretrain", folder / name, f"{name}: cannot be read (not a regular file)")
        (folder / name).unlink()


@pytest.mark.parametrize("names", ["[]", "[a.json, '']"])
def test_a_list_without_a_file_s_name_is_refused(names):
    conftest.refused(lambda: open_set("pretrain", f"data.train={names}"), "data.train: names no file; name")


def test_files_and_folders_that_are_missing(folder):
    refused("pretrain", folder / "gone.json", "annotation file: ", "gone.json does not exist")
    split = write(folder, [entry(0)])
    refused("pretrain", split, "data.image_root: ", "gone does not exist", image_root=folder / "gone")
    refused("vqa_eval", split, "data.image_root.vqa: ", "does not exist", image_root={"vqa": str(folder / "gone")})


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("text", ["", "\x00\x1b", "\u200b \ufeff", "\ufffd"])
def test_captions_without_a_word_are_replaced_and_named(folder, text):
    for stage in TRAIN[:3]:
        sample = make(stage, write(folder, [entry(0), entry(1, caption=text), entry(2)]))[1]
        assert sample["caption"] in ("dog 0", "dog 2") and f"{folder / 'b.png'}: " in sample["bad"][0]


VALUES = [
    ("pretrain", {"image": None}, " has no 'image'; a pretrain entry needs image, caption"),
    ("pretrain", {"image": "a\0/b.png"}, ": 'image' is empty or holds a zero byte"),
    ("pretrain", {"image": 5}, ": 'image' is int, it must be a string"),
    ("retrieval_eval", {"caption": []}, " has no 'caption'"),
    ("retrieval_eval", {"caption": ["x", HALF]}, ": a text holds '\\ud83d', half of a surrogate"),
    ("caption_eval", {"image_id": True}, ": 'image_id' is bool, it must be a string or a whole number"),
    ("caption_eval", {"filename": "b.png", "sentences": [{"raw": 3}]}, " is not as expected (AttributeError: "),
    ("caption_eval", {"domain": "inside"}, ": 'domain' is 'inside', it must be one of in, near, out"),
    ("vqa_train", {"answer": [" ", "\x00"]}, ": 'answer' is blank"),
    ("vqa_train", {"ocr": "stop"}, ": 'ocr' must be a list"),
    ("vqa_eval", {"question_id": None}, " has no 'question_id'"),
    ("vqa_eval", {"answer": ["yes"] * 9}, "has 9 answers"),
    ("vqa_eval", {"question_id": 0}, ": question_id 0 occurs more than once, first in"),
]


@pytest.mark.parametrize(("stage", "changes", "message"), VALUES)
def test_values_of_another_kind_are_named(folder, stage, changes, message):
    refused(stage, write(folder, [entry(0), entry(1, **changes)]), "split.json: entry 1", message)


@pytest.mark.parametrize("name", [["vqa"], None, "gqa"])
def test_a_data_set_that_image_root_does_not_know(folder, name):
    file = write(folder, [entry(0), entry(1, dataset=name)])
    refused("retrieval_train", file, "split.json: entry 1", "dataset", image_root={"vqa": str(folder)})


@pytest.mark.parametrize("stage", ["retrieval_train", "caption_eval"])
def test_a_file_without_the_asked_split_is_refused(folder, stage):
    split, wanted = ("test", "train or restval") if stage.endswith("train") else ("train", "val")
    refused(stage, write(folder, [entry(0, split=split)]), f"split.json: no entry has the split {wanted}")


# ------------------------------------------------------------------------------------------------- ids


def test_an_id_stands_for_one_image_and_an_image_has_one(folder):
    one, two = write(folder, [entry(0), entry(1)], "one.json"), write(folder, [entry(2, image_id=0)], "two.json")
    line = refused("caption_eval", [one, two], f"{two}: entry 0: {folder / 'c.png'} has the image_id 0")
    assert f"but {folder / 'a.png'} has 0 in {one}: entry 0;" in line
    file = write(folder, [entry(0), entry(1), entry(0, image_id=5)])
    refused("caption_eval", file, "entry 2: ", "has the image_id 5, but ", "entry 0;")


SPELLINGS = (
    *("a.png", "./a.png", "../{0}/a.png", "//{1}/a.png", "b/../a.png", "{1}/./a.png"),
    *("link/a.png", "{1}/link/link/a.png", "link/../{0}/a.png"),  # as open() follows them
)


def spelled(folder, **changes):
    """Entries of one image, each with its own spelling of the path and its own caption."""
    if not (folder / "link").exists():
        (folder / "link").symlink_to(folder)
    for number, name in enumerate(SPELLINGS):
        values = {"image": name.format(folder.name, folder), "caption": f"dog {number}", "image_id": None}
        yield entry(number=0, **{**values, "question_id": number, **changes})


def test_an_image_is_one_however_its_path_is_spelled(folder):
    count = len(SPELLINGS)
    file = write(folder, [*spelled(folder), entry(1, image_id=None, question_id=count)])
    for stage in TRAIN:
        data = make(stage, file)
        assert [data.paths[i] for i in range(len(data.paths))] == [str(folder / name) for name in ("a.png", "b.png")]
    assert make("pretrain", file).image_of_caption.tolist() == [0] * count + [1]
    ranked, written = make("retrieval_eval", file), make("caption_eval", file)
    assert ranked.image_of_caption == [0] * count + [1] and written.ids == ["a.png", "b.png"]
    assert [len(references) for references in written.references] == [count, 1]
    assert set(make("vqa_eval", file).paths) == set(ranked.images)
    roots = {"vqa": str(folder / "link"), "vg": str(folder)}
    data = make("retrieval_train", write(folder, [entry(0), entry(0, dataset="vg"), entry(1)]), image_root=roots)
    assert data.image_of_caption.tolist() == [0, 0, 1]


def test_validation_is_left_out_of_training_however_its_paths_are_spelled(folder):
    data = held(folder, [*spelled(folder), entry(1, question_id=77)], list(spelled(folder)))
    assert len(data) == 1 and data.left_out == len(SPELLINGS)


def test_files_and_entries_that_stand_there_twice_are_not_evaluated(folder):
    entries = [entry(0, caption=["a dog", "a dog", "two"]), entry(1), entry(1, caption="another")]
    file = write(folder, [*entries, entry(1)])  # as published, one repeated
    (folder / "link").symlink_to(folder)
    spaced = write(folder, [entry(1), entry(1, caption="dog 1 ")], "spaced.json")
    for stage in ("retrieval_eval", "caption_eval"):
        assert len(make(stage, file)) == 2
        for twice in ([file] * 2, [file, folder / "link/split.json"], spaced):
            refused(stage, twice, "stand in ", "already; evaluate each entry once")


IDS = [
    ("val2017/000000000139.png", 139),
    ("COCO_val2014_000000391895.jpg", 391895),
    ("000000000140.webp", 140),
    ("./sub/18.png", "sub/18.png"),
    ("0013ea2087020901.jpg", "0013ea2087020901.jpg"),
]


def test_without_an_id_an_image_has_cocos_number_or_its_name(folder):
    ids = make("caption_eval", write(folder, [{"image": name} for name, _ in IDS])).ids
    assert ids == [number for _, number in IDS]
    numbers = [number for number in ids if isinstance(number, int)]
    coco = COCO()
    coco.dataset = {"images": [{"id": number} for number in numbers], "annotations": []}
    coco.createIndex()
    assert coco.loadRes([{"image_id": number, "caption": "x"} for number in numbers]).getImgIds() == numbers


def test_ids_are_numbers_also_if_they_are_written_as_text_or_as_pandas_does(folder):
    cells = {"139": 139, "140.0": 140, " 141": 141, "000000000142": 142, 143.0: 143}
    cells |= {"007": "007", "1e3": "1e3", "142.5": "142.5", None: "8.png"}
    lines = [{"image": f"{number}.png", "image_id": cell} for number, cell in enumerate(cells)]
    ids = make("caption_eval", write(folder, "\n".join(map(json.dumps, lines)), "t.jsonl")).ids
    assert ids == list(cells.values()) and [type(i) for i in ids[:5]] == [int] * 5


# ------------------------------------------------------------------------------------------------- validation


def held(folder, train, val):
    """The data set to train on, with the questions of `val` left out."""
    files = write(folder, train, "train.json")
    return make("vqa_train", files, image_root=str(folder), left_out=[write(folder, val, "val.json")])


HELD_OUT = [  # an entry of training, one of validation, whether the first is left out
    ({"question_id": 7}, {"question_id": 7, "dataset": None}, True),
    ({"question_id": 7}, {"question_id": 7, "dataset": "vg", "image": "b.png"}, False),
    ({"question_id": None}, {"question_id": 0}, False),
]


@pytest.mark.parametrize(("train", "val", "is_left_out"), HELD_OUT)
def test_a_question_of_validation_is_known_by_its_id_and_image(folder, train, val, is_left_out):
    data = held(folder, [entry(0, **train), entry(2, question_id=99)], [entry(0, **val)])
    assert data.left_out == is_left_out == 2 - len(data)


def test_an_id_of_a_data_set_names_one_image_in_training_and_validation(folder):
    train, val = [entry(0), entry(1)], [entry(2, question_id=1)]
    line = conftest.refused(lambda: held(folder, train, val), "train.json: entry 1: question_id 1 asks")
    assert "b.png, but about " in line and "c.png in " in line
