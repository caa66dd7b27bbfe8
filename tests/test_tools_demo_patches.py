"""Which object a patch of a scene shows, judged from the rendered pixels alone, and which objects a caption names."""

import dataclasses

import numpy as np
import pytest

from tools.demo import scenes

MANY = [scenes.make_scene(5, index) for index in range(60)]


@pytest.mark.parametrize("size, grid", [(64, 8), (96, 6)])
def test_a_patch_belongs_to_the_object_whose_pixels_fill_it(size, grid):
    compared = 0
    for scene in MANY:
        bare = dataclasses.replace(scene, objects=())
        with_objects, without = (np.asarray(scenes.render(s, size), int) for s in (scene, bare))
        differs = np.abs(with_objects - without).max(-1) > 12
        shares = np.zeros((len(scene.objects), grid, grid))
        for number, o in enumerate(scene.objects):
            x0, y0, x1, y1 = o.pixel_box(size)
            inside = np.zeros_like(differs)
            inside[y0:y1, x0:x1] = differs[y0:y1, x0:x1]  # boxes do not overlap
            shares[number] = inside.reshape(grid, size // grid, grid, size // grid).mean((1, 3))
        clear = np.abs(shares.max(0) - 0.25) > 0.12  # outlines are mixed with the background
        expected = np.where(shares.max(0) >= 0.25, shares.argmax(0), -1)
        found = np.array(scenes.patch_objects(scene, size, grid)).reshape(grid, grid)
        assert (found == expected)[clear].all(), scene
        compared += clear.sum()
    assert compared > 0.8 * len(MANY) * grid**2


def test_the_hole_of_a_ring_is_background():
    o = scenes.SceneObject("ring", "red", "large", "", "middle", (0.25, 0.25, 0.75, 0.75))
    scene = scenes.Scene(0, 0, "gray", "plain", (o,))
    found = np.array(scenes.patch_objects(scene, 128, 16)).reshape(16, 16)
    assert (found[7:9, 7:9] == -1).all() and (found[7:9, 4:6] == 0).all()


def test_a_caption_names_what_its_words_say():
    for scene, other in zip(MANY, MANY[1:] + MANY[:1], strict=True):
        for caption in scenes.captions(scene) + scenes.captions(other):  # its own name all objects, another's few
            named = scenes.named_objects(scene, caption)
            words = caption.replace(",", "").split()
            pairs = set(zip(words, words[1:], strict=False))
            assert named == [(o.colour, o.shape) in pairs for o in scene.objects]
            assert all(named) or caption not in scenes.captions(scene)
    listing = [c for scene in MANY for c in scenes.captions(scene) if c.startswith(("an image of", "we see"))]
    assert listing and all(
        all(scenes.named_objects(scene, c)) for scene in MANY for c in scenes.captions(scene) if c in listing
    )
