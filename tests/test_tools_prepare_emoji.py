"""tools.prepare emoji on packages of a few images that are laid out as npm's."""

import io
import json

import official_files as official
import pytest
from conftest import refused
from PIL import Image

from tools.prepare import __main__ as prepare
from tools.prepare import emoji

NAMES = [
    {"hexcode": "1F0CF", "label": "joker", "tags": ["card", "game", "joker", "wildcard", "more"]},
    {"hexcode": "0023-FE0F-20E3", "label": "keycap: #", "tags": ["keycap"]},
    {
        "hexcode": "1F44B",
        "label": "waving hand",
        "tags": ["bye", "hand"],
        "skins": [{"hexcode": "1F44B-1F3FB", "label": "waving hand: light skin tone"}],
    },
]
IMAGES = ["1f0cf", "0023-fe0f-20e3", "1f44b", "1f44b-1f3fb"]
HELD_OUT = "val 1f0cf\ntest 1f44b\n"


def png(color):
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The three packages, and a list of what is held out of them."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    official.pack(
        folder / emoji.NAMES[0], {"package/package.json": b"{}", emoji.NAMES[1]: json.dumps(NAMES).encode()}, "w:gz"
    )
    for number, (package, images) in enumerate(emoji.ARTISTS.values()):
        files = {f"{images}{name}.png": png((50 * number, 9 * place, 0, 255)) for place, name in enumerate(IMAGES)}
        files |= {"package/img/other/1f0cf.png": b"x", f"{images}deep/1f0cf.png": b"x", f"{images}read.me": b"x"}
        files |= {f"{images}ffff.png": png("red")} if number else {}
        official.pack(folder / package, files, "w:gz")
    (tmp_path / "held_out.txt").write_text(HELD_OUT)
    monkeypatch.setattr(emoji, "HELD_OUT", tmp_path / "held_out.txt")
    return folder


def test_the_packages_become_the_lists_that_the_configurations_name(source, tmp_path, capsys):
    output = tmp_path / "emoji"
    prepare.main(["emoji", "--source", str(source), "--output", str(output)])
    out = capsys.readouterr().out
    joker = ["an emoji of joker", "joker", "joker, card", "joker, game", "joker, wildcard"]
    assert official.read(output / "caption_val.json") == [
        {"image": "images/twemoji/1f0cf.png", "image_id": "twemoji/1f0cf", "caption": joker}
    ]
    assert official.read(output / "retrieval_test.json") == [
        {"image": "images/twemoji/1f44b.png", "image_id": "twemoji/1f44b", "caption": ["an emoji of waving hand"]}
    ]
    train = official.read(output / "pretrain.json")
    noto, twemoji = (sorted(f"{name}.png" for name in names) for names in (IMAGES, [IMAGES[1], IMAGES[3]]))
    names = [f"images/noto/{name}" for name in noto] + [f"images/twemoji/{name}" for name in twemoji]
    assert [entry["image"] for entry in train] == names
    assert train[0]["caption"] == ["an emoji of keycap: #", "keycap: #"]  # the selector is not written everywhere
    light = ["waving hand: light skin tone", "waving hand: light skin tone, bye"]  # the tags are the hand's
    assert next(entry["caption"] for entry in train if "1f3fb" in entry["image"])[1:] == light
    pairs = [(entry["image"], text) for entry in train for text in entry["caption"]]
    assert [(entry["image"], entry["caption"]) for entry in official.read(output / "retrieval_train.json")] == pairs
    assert sorted(path.name for path in (output / "images/twemoji").iterdir()) == sorted(
        f"{name}.png" for name in IMAGES
    )
    assert (output / "images/noto/1f0cf.png").read_bytes() == png((0, 0, 0, 255))
    assert "left out: 1 x image whose name is not known; first: twemoji/ffff.png" in out
    assert "warning: images, noto: 4, 3,782 fewer than the published 3,786" in out


def test_the_list_of_held_out_names_is_the_one_of_the_published_numbers():
    names = emoji.held_out()
    splits = list(names.values())
    assert (splits.count("val"), splits.count("test")) == (emoji.COUNTS["val"], emoji.COUNTS["test"])
    assert emoji.COUNTS["train"] + len(names) == emoji.COUNTS["noto"] + emoji.COUNTS["twemoji"]


def test_a_damaged_package_is_said(source, tmp_path):
    path = source / emoji.ARTISTS["noto"][0]
    path.write_bytes(path.read_bytes()[:200])
    command = ["emoji", "--source", str(source), "--output", str(tmp_path / "emoji")]
    refused(lambda: prepare.main(command), "emoji-datasource-google-16.0.0.tgz: not a whole .tgz", "get it again")
