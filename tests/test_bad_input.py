"""Bad configurations, checkpoints, weights and images: each is one line that names the file and what to change.

Annotations have their own list in test_dataset_bad_input.py, settings without meaning in test_engine_config.py, and
checkpoints that a run is resumed from in test_engine_checkpoint.py.
"""

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
from engine.config import CAPTION, PRETRAIN, load_config
from utils import find_file, one_line, reason

pytestmark = pytest.mark.usefixtures("no_hanging")


class Hostile:
    """A pickle of this would make a folder where it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


# ------------------------------------------------------------------------------------------------- configurations

FILES = {
    "an anchor": ("data:\n  train: &a [x]\n  val: *a", "it has an anchor (&name)"),
    "lists nested without end": ("seed: " + "[" * 3000, "a value is not what its form or tag says"),
    "a large file": ("# comment\n" * 30_000, "more than 200,000 bytes"),
    "5,000 digits": ("seed: " + "7" * 5000, "a value is not what its form or tag says"),
    "infinity": ("train: {lr: 1e999}", "train.lr: inf must be a finite number"),
    "a key that is a number": ("1: 2", "the key 1 is a number, not text"),
    "a key that is a map": ("? {a: 1}\n: 2", "line 1, column 3: found unhashable key"),
    "tabs": ("train:\n\tlr: 1.0", "line 2, column 1: found character '\\t'"),
    "UTF-16": ("seed: 1".encode("utf-16"), "not a readable YAML file: 'utf-8' codec"),
    "a zero byte": ("seed: 1\0", "not a readable YAML file: unacceptable character #x0000"),
    "half of a surrogate pair": ('text: {vocab: "\\ud83d"}', "text.vocab: '\\ud83d' holds what is no character"),
    "a Python object": ("seed: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "a date": ("seed: 2026-01-01", "seed: datetime.date(2026, 1, 1) is a date; put it in quotes"),
    "no date": ("seed: 2026-99-99", "a value is not what its form or tag says"),
    "two documents": ("seed: 1\n---\nseed: 2", "another document"),
    "a number among texts": ("data: {train: [a.json, 3]}", "data.train holds a number (3)"),
    "a folder that is a list": ("data: {image_root: [a]}", "data.image_root is a list (['a']); text or a map"),
    "a folder that is a number": ("data: {image_root: {coco: 3}}", "data.image_root: {'coco': 3} must be a folder"),
    "a prefix that is a number": (
        "data: {image_prefix_map: {a/: 3}}",
        "data.image_prefix_map: {'a/': 3} must be a map",
    ),
    "arguments that are text": ("model: {bert: {args: x}}", "model.bert.args is text (x); a map is expected"),
    "a base that is a folder": ("base: .", "base . does not exist"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_configuration_file(tmp_path, case):
    content, part = FILES[case]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(lambda: load_config(path, (), PRETRAIN), part)
    assert str(path) in line or line.startswith(("seed: ", "train.", "data.", "mim.")), line


def test_a_configuration_that_is_a_pipe_or_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path):
        refused(lambda path=path: load_config(path, (), PRETRAIN), path, "cannot be read")
    refused(lambda: load_config("a" * 5000, (), PRETRAIN), "--config: aaa", "does not exist")


OVERRIDES = {
    "seed=\0": "unacceptable character",
    'text.vocab="\\ud83d"': "holds what is no character",
    "seed=\x1b[31mred\x1b[0m": "not valid YAML",
    "data.image_prefix_map={1: a}": "the key 1 is a number, not text",
    "." * 3000 + "=1": "write it as key.sub=value",
    "x" * 3000 + "=1": "unknown key",
    "seed": "write it as key.sub=value",
    "seed.a=1": "seed is a map",
    "=1": "write it as key.sub=value",
}


@pytest.mark.parametrize("number", range(len(OVERRIDES)))
def test_an_override(number):
    override, part = list(OVERRIDES.items())[number]
    refused(lambda: load_config(PRETRAIN.schema, [override], PRETRAIN), "--override ", part)


# ------------------------------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "lacks [PAD]"), (b"\xff\xfe", "cannot be read"), (b"a\nb\n", "lacks [PAD]"), (None, "not a regular file")],
)
def test_a_vocabulary(tmp_path, content, part):
    path = tmp_path / "vocab.txt"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    refused(lambda: Tokenizer(path), path, part)


def test_a_missing_file_is_looked_for_in_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert refused(lambda: find_file("no/such", "key")).endswith(f"(looked in {ROOT})")
    monkeypatch.chdir(tmp_path)
    assert refused(lambda: find_file("no/such", "key")).endswith(f"(looked in {tmp_path} and {ROOT})")
    assert find_file("README.md") == ROOT / "README.md"
    refused(lambda: find_file("~nobody-of-that-name/x", "key"), "does not exist")


def test_torchs_page_of_advice_is_what_it_found():
    advice = (
        "Weights only load failed. This file can still be loaded, to do so you have two options, \x1b[1mdo those steps "
        "only if you trust the source of the checkpoint\x1b[0m. \n\t(1) In PyTorch 2.6, we changed the default of "
        "the `weights_only` argument ...\n\tWeightsUnpickler error: Unsupported global: GLOBAL posix.mkdir was not an "
        "allowed global by default."
    )
    assert reason(ValueError(advice)) == "it holds posix.mkdir, which is no tensor and could run code"
    assert reason(ValueError("\x1b[1mbold\x1b[0m\nnext")) == "bold" and reason(KeyError()) == "KeyError"
    assert one_line("word " * 100, 50) == ("word " * 9 + "word") + " ..." and one_line("x" * 300).endswith("xx ...")


# ------------------------------------------------------------------------------------------------- images


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


def test_the_stage_of_captions_has_these_rules_too():
    refused(lambda: load_config(CAPTION.schema, ["data.image_root={a: 3}"], CAPTION), "data.image_root")
