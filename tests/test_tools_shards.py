"""Parquet files packed into tar shards, against the same images and captions as files."""

import json
import tarfile

import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from tiny import encoded, noise

from dataset.annotations import Source
from dataset.files import IMAGES
from dataset.pretrain import PretrainDataset
from dataset.transforms import FORMATS, Augment, PretrainViews
from tools import shards as make_shards
from utils import UserError

CAPTIONS = ["a dog", ["a cat", "une très grande bête"], "left of it", ["one"], "ünï 'x'", "six", "seven"]


pytestmark = pytest.mark.usefixtures("no_hanging")


def picture(number=0, kind="JPEG", side=20):
    return encoded(noise(side + 4, side, number), kind)


def write(path, images, captions, image="image", caption="caption", **options):
    """A parquet file; `images` as they are (bytes, None or {bytes, path}), `captions` likewise."""
    pq.write_table(pyarrow.table({"id": range(len(images)), image: images, caption: captions}), path, **options)
    return path


def pack(folder, *files, **options):
    """make_shards into a new folder, which is returned."""
    output = folder / f"shards{len(list(folder.iterdir()))}"
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    make_shards.main(["--data", *map(str, files), "--output", str(output), *given])
    return output


def refused(folder, message, *files, **options):
    """Nothing that could be taken for the whole is left."""
    before = set(folder.glob("shards*"))
    with pytest.raises(UserError, match=message):
        pack(folder, *files, **options)
    assert all(path.suffix == ".partial" for path in set(folder.glob("shards*")) - before)


def dataset(files):
    return PretrainDataset(Source(files), PretrainViews(Augment(8)), seed=3)


def listed(folder):
    """The annotation file of seven images with CAPTIONS."""
    entries = [{"image": f"{i}.jpg", "caption": caption} for i, caption in enumerate(CAPTIONS)]
    for i in range(len(CAPTIONS)):
        (folder / f"{i}.jpg").write_bytes(picture(i))
    (folder / "pairs.json").write_text(json.dumps(entries))
    return folder / "pairs.json"


def structs(contents):
    return [{"bytes": content, "path": f"{i}.jpg"} for i, content in enumerate(contents)]


@pytest.mark.parametrize(("image", "images", "caption"), [("image", structs, "caption"), ("jpg", list, "captions")])
def test_training_from_packed_parquet_is_training_from_the_same_files(tmp_path, image, images, caption):
    lists = [[text] if isinstance(text, str) else text for text in CAPTIONS]
    (tmp_path / "parts").mkdir()
    for name, part in {"b": slice(4, 7), "a": slice(0, 4)}.items():
        contents = images([picture(i) for i in range(7)][part])
        write(tmp_path / f"parts/{name}.parquet", contents, lists[part], image, caption, row_group_size=2)
    plain = dataset(listed(tmp_path))
    packed = dataset(pack(tmp_path, *sorted((tmp_path / "parts").iterdir()), per_shard=3))
    assert len(packed) == len(plain) == 7 and len(packed.paths) == 7
    for item in [(epoch, index) for epoch in (0, 1) for index in range(7)]:
        one, other = plain[item], packed[item]
        assert one["bad"] == other["bad"] == [] and one["caption"] == other["caption"]
        assert all(torch.equal(one[key], other[key]) for key in ("image1", "image2"))
    assert [packed.captions[i] for i in range(8)] == [plain.captions[i] for i in range(8)]


def test_an_images_file_is_kept_as_it_is_under_the_ending_of_its_format(tmp_path):
    contents = [picture(3, kind) for kind in (*FORMATS, "MPO")]
    output = pack(tmp_path, write(tmp_path / "x.parquet", contents, ["a dog"] * len(contents)), per_shard=6)
    found = []
    for shard in sorted(output.iterdir()):
        with tarfile.open(shard) as tar:
            files = [member for member in tar.getmembers() if not member.name.endswith(".json")]
            found += [(member.name.partition(".")[2], tar.extractfile(member).read()) for member in files]
    assert [content for _, content in found] == contents
    assert [ending for ending, _ in found] == ["jpg", "png", "webp", "gif", "bmp", "tiff", "ppm", "jpg"]
    assert {ending for ending, _ in found} <= set(IMAGES) and len(dataset(output)) == 8


def test_columns_of_other_names_are_named(tmp_path):
    path = write(tmp_path / "x.parquet", [picture()], ["a dog"], "thumb", "title")
    refused(tmp_path, "pack parquet files and others into a folder each", path, listed(tmp_path))
    refused(tmp_path, "x.parquet: has no column image or .*, its columns are id, thumb, title; --image_column", path)
    refused(tmp_path, "no column caption or .*--caption_column", path, image_column="thumb")
    packed = dataset(pack(tmp_path, path, image_column="thumb", caption_column="title"))
    assert packed[0]["caption"] == "a dog"


def test_neighboring_rows_of_an_image_are_one(tmp_path):
    numbers = [0, 0, 0, 1, 2, 2, 0, 1, 1]
    texts = [["a"], ["b", "c"], ["..."], ["e"], ["f"], ["g"], ["h"], ["i"], ["j"]]
    path = write(tmp_path / "x.parquet", structs(picture(i) for i in numbers), texts, row_group_size=2)
    with tarfile.open(pack(tmp_path, path, max_bad_share=0.2) / "00000.tar") as tar:
        found = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    several = [["a", ["b", "c"]], "e", ["f", "g"], "h", ["i", "j"]]
    assert found == [{"caption": text} if isinstance(text, str) else {"captions": text} for text in several]


def test_bad_rows_are_left_out_within_the_share_and_failed_downloads_are_no_bad_rows(tmp_path, capsys):
    images, texts = [picture(i) for i in range(14)], [[f"caption {i}"] for i in range(14)]
    images[1], images[2], images[3] = None, b"", b"no image"
    texts[5], texts[6], texts[7], texts[8] = None, [], [None, " ", "..."], [None, "caption 8", ""]
    statuses = [*["success"] * 10, "failed_to_download", "success", "failed_to_resize", None]  # img2dataset's
    path = tmp_path / "x.parquet"
    pq.write_table(pyarrow.table({"jpg": images, "caption": texts, "status": statuses}), path, row_group_size=4)
    packed = dataset(pack(tmp_path, path, max_bad_share=6 / 11, per_shard=4))
    shown = capsys.readouterr()
    assert "6 unreadable or without caption left out, 3 failed downloads; " in shown.out
    for reason in ("1: holds no image", "2: holds no image", "3: not an image in"):
        assert f"{path}: row {reason}" in shown.out
    assert [packed[i]["caption"] for i in range(5)] == [f"caption {i}" for i in (0, 4, 8, 9, 11)]
    refused(tmp_path, "6 unreadable or without caption left out.* --max_bad_share allows 0.5", path, max_bad_share=0.5)


def test_parquet_that_is_cut_or_none_is_named_before_the_work(tmp_path):
    whole = write(tmp_path / "a.parquet", [picture()], ["a dog"])
    for name, content in {"cut": whole.read_bytes()[:-20], "none": b"PAR1 no table"}.items():
        other = tmp_path / f"{name}.parquet"
        other.write_bytes(content)
        refused(tmp_path, f"{name}.parquet: not a readable .*; an incomplete download", whole, other)
    refused(tmp_path, "--data: .*gone.parquet does not exist", whole, tmp_path / "gone.parquet")
    assert not list(tmp_path.glob("shards*"))
