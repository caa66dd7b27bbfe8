"""tools.prepare emoji on packages of a few images that are laid out as npm's."""

import json

import official_files as official
import pytest

from tools.demo.words import content_words, recall_by_words
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
IMAGES = ["0023-fe0f-20e3", "1f0cf", "1f44b-1f3fb", "1f44b"]


run = official.run


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of the three packages, of whose second artist two images are held out."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    official.pack(
        folder / emoji.NAMES[0], {"package/package.json": b"{}", emoji.NAMES[1]: json.dumps(NAMES).encode()}, "w:gz"
    )
    for number, (package, images) in enumerate(emoji.ARTISTS.values()):
        files = {f"{images}/{name}.png": f"{number} {name}".encode() for name in IMAGES}
        files |= {"package/img/other/1f0cf.png": b"x", f"{images}/deep/1f0cf.png": b"x", f"{images}/read.me": b"x"}
        files |= {f"{images}/ffff.png": b"x"} if number else {}
        official.pack(folder / package, files, "w:gz")
    (tmp_path / "held_out.txt").write_text("val 1f0cf\ntest 1f44b\n")
    monkeypatch.setattr(emoji, "HELD_OUT", tmp_path / "held_out.txt")
    return folder


def test_the_packages_become_the_lists_that_the_configurations_name(run, tmp_path):
    out, output = run("emoji"), tmp_path / "data"
    joker = ["an emoji of joker", "joker", "joker, card", "joker, game", "joker, wildcard"]
    assert official.read(output / "caption_val.json") == [
        {"image": "images/twemoji/1f0cf.png", "image_id": "twemoji/1f0cf", "caption": joker}
    ]
    assert official.read(output / "retrieval_test.json") == [
        {"image": "images/twemoji/1f44b.png", "image_id": "twemoji/1f44b", "caption": ["an emoji of waving hand"]}
    ]
    train = official.read(output / "pretrain.json")
    names = [f"noto/{name}" for name in IMAGES] + [f"twemoji/{name}" for name in (IMAGES[0], IMAGES[2])]
    assert [entry["image"] for entry in train] == [f"images/{name}.png" for name in names]
    assert train[0]["caption"] == ["an emoji of keycap: #", "keycap: #"]  # the selector is not written everywhere
    light = ["waving hand: light skin tone", "waving hand: light skin tone, bye"]  # the tags are the hand's
    assert train[2]["caption"][1:] == light
    pairs = [(entry["image"], text) for entry in train for text in entry["caption"]]
    assert [(entry["image"], entry["caption"]) for entry in official.read(output / "retrieval_train.json")] == pairs
    assert {path.stem: path.read_bytes() for path in (output / "images/twemoji").iterdir()} == {
        name: f"1 {name}".encode() for name in IMAGES
    }
    assert "left out: 1 x image whose name is not known; first: twemoji/ffff.png" in out
    assert "warning: images, noto: 4, 3,782 fewer than the published 3,786" in out


def test_a_third_artist_is_for_training_and_a_fourth_for_the_test(run, source, tmp_path):
    for package, images, _ in emoji.MORE.values():
        names = {f"{images}/1F0CF.png": b"x", f"{images}/ffff.webp": b"x", f"{images}/1f44b.webp": b"x"}
        official.pack(source / package, names, "w:gz")
    out, output = run("emoji"), tmp_path / "data"
    hand = ["an emoji of waving hand", "waving hand", "waving hand, bye"]
    entry = {"image": "images/emojione/1f44b.webp", "image_id": "emojione/1f44b", "caption": hand}
    assert official.read(output / "pretrain_emojione.json")[1] == entry
    asked = [entry["caption"] for entry in official.read(output / "retrieval_fluent.json")]
    assert asked == [["an emoji of joker"], ["an emoji of waving hand"]]
    assert (
        "left out: 3 x image whose name is not known; first: twemoji/ffff.png, emojione/ffff.webp, fluent/ffff.webp"
        in out
    )


def test_recall_by_what_a_caption_asks_for():
    texts = ("an emoji of joker", "man: medium-dark skin tone", "of the", "woman’s hat")
    assert [content_words(text) for text in texts] == [1, 3, 0, 2]
    one, two, long = "joker", "waving hand", "a red bus on a long road to an old town"
    pairs = [("1.png", one), ("2.png", two), ("3.png", long)]
    result = {
        "text_retrieval": [{"query": f"{n}.png", "ranked": [best]} for n, best in enumerate([one, one, long], 1)],
        "image_retrieval": [
            {"query": caption, "ranked": [f"{best}.png", "1.png"]}
            for (_, caption), best in zip(pairs, [3, 2, 3], strict=True)
        ],
    }
    assert recall_by_words(result, pairs) == {1: [1, 50], 2: [1, 50], 5: [1, 100]}


def test_the_list_of_held_out_names_is_the_one_of_the_published_numbers():
    splits = emoji.HELD_OUT.read_text().split()[::2]
    assert (splits.count("val"), splits.count("test")) == (emoji.COUNTS["val"], emoji.COUNTS["test"])
    assert emoji.COUNTS["train"] + len(splits) == emoji.COUNTS["noto"] + emoji.COUNTS["twemoji"]
