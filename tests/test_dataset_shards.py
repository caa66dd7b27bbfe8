"""Tar shards against the tarfile module and against the same entries as annotation files and images."""

import io
import os
import tarfile

import pytest
from conftest import refused
from official_files import img2dataset_sample, jpeg, pack
from PIL import Image

from dataset.annotations import Source
from dataset.pretrain import PretrainDataset
from dataset.transforms import Augment, ImageError, PretrainViews, open_image


def samples(first, count):
    """Files of samples as img2dataset writes them."""
    files = {}
    for i in range(first, first + count):
        files |= img2dataset_sample(f"{i:09d}", f"caption {i}", f"http://x/{i}", jpeg(i))
    return files


@pytest.fixture
def folder(tmp_path):
    """Five shards of ten samples."""
    for n in range(5):
        pack(tmp_path / f"{n:05d}.tar", samples(10 * n, 10))
    return tmp_path


def dataset(files, **options):
    return PretrainDataset(Source(files, **options), PretrainViews(Augment(8)), seed=3)


def captions(data):
    return [data.captions[i] for i in range(len(data))]


def test_shards_as_img2dataset_writes_them_are_entries_like_all_others(folder):
    data = dataset(folder)
    assert captions(data) == [f"caption {i}" for i in range(50)] and len(data.paths) == 50
    for i in (0, 27, 49):
        assert open_image(data.paths[i]).tobytes() == Image.open(io.BytesIO(jpeg(i))).convert("RGB").tobytes()
        assert data[i]["caption"] == f"caption {i}" and data[i]["bad"] == []
    assert captions(dataset([folder / "00003.tar", folder / "00001.tar"]))[9:11] == ["caption 39", "caption 10"]


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_a_shard_that_is_cut_gives_the_samples_before_the_cut(folder, caplog):
    cut(folder / "00002.tar", 0.45)
    refused(lambda: dataset(folder), "1 of 5 shard(s) cannot be used", "00002.tar: damaged (ends within")
    data = dataset(folder, max_bad_share=0.2)
    kept = [text for text in captions(data) if 20 <= int(text.split()[1]) < 30]
    assert 2 <= len(kept) < 8 and kept == [f"caption {i}" for i in range(20, 20 + len(kept))]
    assert len(data) == 40 + len(kept) and all(data[i]["bad"] == [] for i in range(len(data)))
    assert "00002.tar: damaged (ends within a file that begins at byte" in caplog.text


def header(kind, size):
    """A tar header that says that its file has `size` (bytes as they stand there) bytes."""
    member = tarfile.TarInfo("x")
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[148:156] = size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HOSTILE = {
    **{f"a negative size, {kind!r}": header(kind, b"-0000001000\0") for kind in (b"0", b"L", b"K", b"x", b"g", b"S")},
    "a name of 6 GiB": header(b"L", b"60000000000\0"),
    "attributes of 2 MB": header(b"x", b"00010000000\0") + b"1" * (1 << 21),
    "names of names": header(b"x", b"00000000000\0") * 5000,
}


@pytest.mark.parametrize("headers", HOSTILE.values(), ids=HOSTILE)
def test_headers_that_would_be_read_without_end_are_damage(tmp_path, headers, caplog, no_hanging):
    path = pack(tmp_path / "x.tar", samples(0, 2))
    with open(path, "r+b") as file, tarfile.open(path) as tar:
        tar.getmembers()
        file.seek(tar.offset)
        file.write(headers)
        file.truncate(tar.offset + (6 << 30) + (1 << 20))  # of which the disk holds nothing
    data = dataset(path, max_bad_share=1.0)
    assert captions(data) == ["caption 0"]  # the last sample may be incomplete
    assert f"{path}: damaged (" in caplog.text


def test_damage_after_the_headers_were_read_is_a_bad_sample(folder, no_hanging):
    data = dataset(folder)
    path = folder / "00001.tar"
    content = bytearray(path.read_bytes())
    at = int(data.paths[12].rpartition("@")[2].partition("+")[0])
    content[at : at + 100] = bytes(100)
    path.write_bytes(content[: len(content) * 3 // 4])
    assert "00001.tar/000000012.jpg" in data[12]["bad"][0] and data[13]["bad"] == []
    ended = "the shard ends within this image"
    for image in (data.paths[19], f"{path}/0.jpg@0+{1 << 40}"):
        with pytest.raises(ImageError, match=ended):
            open_image(image)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(data.paths[13])


NAMES = [  # files of a shard (images are named by their ending), captions of its samples, how many are lost
    ("0.jpg 0.txt IMG_2.1.jpg IMG_2.1.txt IMG_2.2.jpg IMG_2.2.txt", ["0.txt"], 1),
    ("001.image.jpg 001.caption.txt 002.image.jpg 002.caption.txt", ["001.caption.txt", "002.caption.txt"], 0),
    ("0.jpg 0.txt 0.cls 001.jpg 001.txt 001.mask.png", ["0.txt"], 1),
    ("a/b.c/001.jpg a/b.c/001.txt .DS_Store 002.JPEG 002.TXT", ["a/b.c/001.txt", "002.TXT"], 0),
    ("0.jpg 0.txt 001.jpg 001.png 001.txt", ["0.txt"], 1),  # which is the mask?
    ("0.jpg 0.txt 001.a.txt 001.b.txt 001.jpg", ["0.txt"], 1),
    ("0.jpg 0.txt 001.heic 001.txt 002.heic only.jpg", ["0.txt"], 3),
    ("0.jpg 0.txt 1.jpg 2.jpg 1.txt 2.txt", ["0.txt"], 4),  # the files of a sample are not side by side
]


@pytest.mark.parametrize(("names", "kept", "lost"), NAMES)
def test_names_with_several_dots_and_images_lose_no_sample_uncounted(tmp_path, caplog, names, kept, lost):
    content = {"txt": str.encode, "json": lambda name: b"{}"}
    files = {name: content.get(name.lower().rpartition(".")[2], lambda name: jpeg(0))(name) for name in names.split()}
    path = pack(tmp_path / "x.tar", files)
    data = dataset(path, max_bad_share=1.0)
    assert captions(data) == kept and not any("mask" in data.paths[i] for i in range(len(data.paths)))
    line = f"{lost} of {lost + len(kept)} samples and 0 of 1 shard(s) cannot be used, left out"
    assert (line in caplog.text) == (lost > 0)
    if lost:
        refused(lambda: dataset(path), f"{lost} of {lost + len(kept)} samples")
