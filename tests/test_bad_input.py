"""Bad vocabularies, paths and images: each is one line that names the file and what to change."""

import json
import os
import struct
import zlib

import pytest
from conftest import ROOT, refused
from PIL import Image

from dataset.annotations import Source
from dataset.caption import CaptionEvalDataset
from dataset.text import Tokenizer
from dataset.transforms import test_transform as square  # not collected as a test
from utils import find_file

pytestmark = pytest.mark.usefixtures("no_hanging")


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "lacks [PAD]"), (b"\xff\xfe", "is not UTF-8"), (b"a\nb\n", "lacks [PAD]"), (None, "not a regular file")],
)
def test_a_vocabulary(tmp_path, content, part):
    path = tmp_path / "vocab.txt"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    refused(lambda: Tokenizer(path), path, part)


def test_a_missing_file_is_looked_for_in_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(lambda: find_file("no/such", "key")).endswith(f"(looked in {tmp_path} and {ROOT})")
    assert find_file("README.md") == ROOT / "README.md"


def png(path, **options):
    Image.new("RGB", (30, 20), "red").save(path, "PNG", **options)


def truncated(path):
    png(path)
    path.write_bytes(path.read_bytes()[:60])


def oversized(path):
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    png(path)
    content = bytearray(path.read_bytes())
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    content[12:33] = header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(bytes(content))


IMAGES = {
    "absent": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "truncated": truncated,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "EPS": lambda path: Image.new("RGB", (30, 20)).save(path, "EPS"),
    "PDF": lambda path: Image.new("RGB", (30, 20)).save(path, "PDF"),
    "SVG": lambda path: path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
    "a decompression bomb": oversized,
    "a link to itself": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", IMAGES)
def test_an_image(tmp_path, case):
    png(tmp_path / "a.png")
    IMAGES[case](tmp_path / "b.jpg")
    entries = [{"image": name, "caption": "red", "image_id": name} for name in ("a.png", "b.jpg")]
    (tmp_path / "split.json").write_text(json.dumps(entries))

    def read():
        data = CaptionEvalDataset(Source(tmp_path / "split.json"), square(8), "val")
        return [data[i] for i in range(2)]

    refused(read, tmp_path / "b.jpg", "evaluation needs every image")
