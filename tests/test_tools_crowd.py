"""Crowded scenes: what their captions name, and the measures on scores whose answer is known."""

import json

import pytest
import torch
from tiny import tiny_config, tiny_model

from tools.demo import crowd, scenes
from utils import ROOT, save_checkpoint

SHOWN = [crowd.make_scene(3, index, size=96) for index in range(100)]
TRUE = crowd.true_descriptions(SHOWN)


def test_every_caption_names_one_object_of_five_and_says_what_it_is():
    known = set((ROOT / "configs/demo/vocab.txt").read_text(encoding="utf-8").split())
    for scene in SHOWN:
        for number, caption in enumerate(crowd.captions(scene)):
            assert scenes.named_objects(scene, caption) == [other == number for other in range(crowd.OBJECTS)]
            assert caption.endswith(crowd.describe(*crowd.description(scene.objects[number])))
            assert set(caption.split()) <= known


@pytest.mark.parametrize(("size", "grid"), [(96, 8), (144, 12)])
def test_objects_keep_their_pixels_and_lie_apart_on_every_grid(size, grid):
    for index in range(50):
        scene = crowd.make_scene(3, index, size)
        for o in scene.objects:
            x0, y0, x1, y1 = o.pixel_box(size)
            assert abs(x1 - x0 - crowd.PIXELS[o.size]) <= 1 and 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
        assert {-1, *range(crowd.OBJECTS)} == set(scenes.patch_objects(scene, size, grid, crowd.LEAST))


def test_recall_and_attributes_of_perfect_and_of_color_blind_scores():
    assert TRUE.sum(1).eq(crowd.OBJECTS).all()
    scores = TRUE.float()
    assert crowd.recall(scores, TRUE) == 100 and set(crowd.attribute_accuracy(scores, TRUE).values()) == {100}
    shape = (-1, *map(len, crowd.ATTRIBUTES.values()))
    blind = scores.view(shape).amax(2, keepdim=True).expand(-1, -1, 4, -1, -1)  # as high for each color
    noise = torch.rand(blind.shape, generator=torch.Generator().manual_seed(0))
    found = crowd.attribute_accuracy((blind + 0.1 * noise).flatten(1), TRUE)
    assert found["color"] == pytest.approx(25, abs=6) and found["shape"] > 95 and found["place"] > 85


def test_masked_shares_count_patches_of_the_named_object():
    named = torch.tensor([[1, 1, 0, 0, 0, 0]]).bool()
    masks = torch.tensor([[[1, 0, 1, 0, 0, 0]], [[1, 1, 0, 0, 0, 0]]]).bool()  # two draws of two patches
    assert crowd.masked_shares(masks, named) == {"of the named": 75, "on the named": 75}


def test_random_weights_measure_chance_on_scenes_that_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(crowd, "TRAIN", 3)
    monkeypatch.setattr(crowd, "SHOWN", 30)
    crowd.main(["write", "--output", str(tmp_path / "crowd"), "--size", "96"])
    entries = json.loads((tmp_path / "crowd/pretrain.json").read_text())
    assert [entry["caption"] for entry in entries] == [crowd.captions(crowd.make_scene(0, i, 96)) for i in range(3)]
    assert all((tmp_path / "crowd" / entry["image"]).is_file() for entry in entries)
    overrides = "model.image_encoder.image_size=96", "mim.masking=random"
    model, config = tiny_model(*overrides), tiny_config(*overrides)
    content = {"model": model.state_dict(), "config": config.to_dict(), "stage": "pretrain"}
    save_checkpoint(tmp_path / "last.pth", {**content, "description": model.backbone.description})
    crowd.main(["measure", "--checkpoint", str(tmp_path / "last.pth")])
    found = json.loads((tmp_path / "crowd.json").read_text())
    assert max(found["recall"].values()) < 10
    for name, values in crowd.ATTRIBUTES.items():
        assert found[name] == pytest.approx(100 / len(values), abs=12)
    assert found["masked"]["of the named"] == pytest.approx(30, abs=4)
