import json

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from tiny import TOKENIZER, noise

from dataset.annotations import Source
from dataset.loader import BatchIndices, Loader
from dataset.pretrain import PretrainCollate, PretrainDataset
from dataset.text import Tokenizer
from dataset.transforms import Augment, PretrainViews


def write_pairs(folder, entries, broken=()):
    """Writes pairs.json and a 24x20 image for every image that it names; `broken` ones get four bytes."""
    for number, name in enumerate(dict.fromkeys(entry["image"] for entry in entries)):
        if name in broken:
            (folder / name).write_bytes(b"oops")
        else:
            noise(24, 20, number).save(folder / name)
    (folder / "pairs.json").write_text(json.dumps(entries))
    return folder / "pairs.json"


def pairs(count):
    return [{"image": f"{i}.png", "caption": f"image number {i}"} for i in range(count)]


def pairs_set(path, image_size, two_views=True, codebook_size=None, ops=2, **options):
    views = PretrainViews(Augment(image_size, ops=ops, codebook_size=codebook_size), two_views)
    return PretrainDataset(Source(path), views, **options)


def test_caching_changes_no_sample(tmp_path):
    path = write_pairs(tmp_path, pairs(5), broken=("2.png",))
    plain, cached = pairs_set(path, image_size=16), pairs_set(path, image_size=16, cache_images=True)
    for i in range(5):
        assert torch.equal(plain[i]["image2"], cached[i]["image2"]) and plain[i]["bad"] == cached[i]["bad"]
    assert f"{tmp_path / '2.png'}: not an image" in plain[2]["bad"][0]  # replaced as the sample's own seed draws


def test_images_of_captions_with_left_or_right_are_not_mirrored(tmp_path):
    ramp = np.tile(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (30, 1, 3))  # dark left
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    for caption, expected in (("a dog on the left", False), ("a dog", True)):
        (tmp_path / "p.json").write_text(json.dumps([{"image": "ramp.png", "caption": caption}]))
        data = pairs_set(tmp_path / "p.json", image_size=8, ops=0)
        views = [data[(epoch, 0)][key] for epoch in range(30) for key in ("image1", "image2")]
        assert any((view[0, :, 0] > view[0, :, -1]).all() for view in views) == expected


def test_the_batch_holds_tensors_ids_and_paths(tmp_path):
    entries = [*pairs(2), {"image": "0.png", "caption": "Image number 1."}]
    data = pairs_set(write_pairs(tmp_path, entries), image_size=8, codebook_size=4)
    batch = PretrainCollate(TOKENIZER, max_tokens=25)([data[i] for i in range(3)])
    assert batch["image1"].shape == batch["image2"].shape == (3, 3, 8, 8)
    assert not torch.equal(batch["image1"], batch["image2"])
    assert batch["codebook_image"].shape == (3, 3, 4, 4)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 4)
    assert batch["padded"] is False and batch["image_id"].tolist() == [0, 1, 0]
    assert batch["caption_id"].dtype == torch.int64
    assert batch["caption_id"][1] == batch["caption_id"][2] != batch["caption_id"][0]
    assert batch["paths"] == [str(tmp_path / name) for name in ("0.png", "1.png", "0.png")]


@pytest.mark.parametrize(("max_words", "max_tokens", "sep"), [(4, 25, False), (30, 5, False), (30, 6, True)])
def test_a_caption_that_loses_words_or_pieces_is_known_as_cut(tmp_path, max_words, max_tokens, sep):
    captions = ["a red dog runs", "a red dog runs!", "a red dog runs away", "a red", "a b c d e f g h"]
    entries = [{"image": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    data = pairs_set(write_pairs(tmp_path, entries), image_size=8, max_words=max_words)
    collate = PretrainCollate(Tokenizer(TOKENIZER.vocab_file, sep=sep), max_tokens)
    batch = collate([data[i] for i in range(len(captions))])
    assert batch["padded"] is True and batch["caption_cut"].tolist() == [False, False, True, False, True]


def test_the_fingerprint_is_of_texts_and_their_order_and_not_of_where_images_lie(tmp_path):
    def fingerprint(name, entries):
        (tmp_path / name).mkdir()
        return pairs_set(write_pairs(tmp_path / name, entries), image_size=8).fingerprint()

    entries = pairs(4)
    assert fingerprint("a", entries) == fingerprint("b", entries)
    changed = [{**entries[0], "caption": "Another."}, *entries[1:]]
    again = [{**entry, "image": "0.png"} for entry in entries]
    others = [entries[::-1], entries[:3], changed, again]
    assert len({fingerprint(f"c{i}", other) for i, other in enumerate([entries, *others])}) == 5


def test_the_run_stops_past_the_allowed_share_of_bad_samples(tmp_path, caplog):
    entries = pairs(40)
    broken = [f"{i}.png" for i in range(20)]
    data = pairs_set(write_pairs(tmp_path, entries, broken), image_size=8)
    loader = Loader(BatchIndices(data, 4), PretrainCollate(TOKENIZER, 25), max_bad_share=0.3)
    line = refused(lambda: list(loader), " visited samples are unusable", ".png: not an image")
    assert 10 <= int(line.split()[0]) < 20
    assert "unusable sample 1 of" in caplog.text


def test_a_set_without_a_usable_image_stops_at_its_first_sample(tmp_path):
    data = pairs_set(write_pairs(tmp_path, pairs(4), [f"{i}.png" for i in range(4)]), image_size=8)
    refused(lambda: data[0], "21 samples drawn one after another are unusable; check data.image_root")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_pixels_also_those_that_workers_share(tmp_path, workers):
    data = pairs_set(write_pairs(tmp_path, pairs(4)), image_size=16, codebook_size=8)
    order = BatchIndices(data, 2)
    loader = Loader(order, PretrainCollate(TOKENIZER, 25), num_workers=workers)
    for batch, visits in zip(loader, order, strict=True):
        for key in ("image1", "image2", "codebook_image"):
            assert batch[key].dtype == torch.uint8
            assert torch.equal(batch[key], torch.stack([data[visit][key] for visit in visits]))
            assert not workers or batch[key].is_shared()
