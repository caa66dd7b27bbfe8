"""engine/drawing.py and engine/figures.py: the right pixels in the right places."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine import drawing, figures

BLUE = (40, 60, 200)


def plain(color=BLUE, side=64) -> Image.Image:
    return Image.new("RGB", (side, side), color)


def test_hidden_patches_are_gray_and_the_others_untouched():
    mask = np.zeros((4, 4), bool)
    mask[0, 3] = True
    shown = drawing.hide(plain(), mask)
    assert shown.getpixel((56, 8)) == (128, 128, 128) and shown.getpixel((8, 56)) == BLUE


def test_colors_cover_their_patches_with_their_strength():
    colors = np.zeros((2, 2, 3))
    colors[1, 0] = (200, 0, 0)
    strength = np.array([[0.0, 0.0], [0.5, 0.0]])
    painted = drawing.paint(plain((0, 0, 100), 9), colors, strength)  # a size that the grid does not divide
    assert painted.getpixel((0, 8)) == (100, 0, 50) and painted.getpixel((8, 8)) == (0, 0, 100)


def test_heat_goes_from_dark_to_light_and_survives_equal_values():
    ends = drawing.heat_color(np.array([0.0, 1.0]))
    assert ends[0].sum() < ends[1].sum() - 200
    shown = drawing.heat(plain((128, 128, 128)), np.arange(16.0).reshape(4, 4))
    assert sum(shown.getpixel((4, 4))) < sum(shown.getpixel((60, 60)))
    drawing.heat(plain(), np.ones((4, 4)))


@pytest.mark.parametrize("place, corner", [(0, (0, 0)), (27, (16, 16)), (63, (40, 40))])
def test_a_crop_shows_the_patch_in_its_context_and_outlines_it(place, corner):
    pixels = np.arange(64 * 64).reshape(64, 64) // 16
    image = Image.fromarray(np.repeat(pixels[..., None].astype(np.uint8), 3, -1))
    crop = np.asarray(drawing.crop_patch(image, place, grid=8, context=1, side=24))
    left, top = corner
    expected = np.asarray(image)[top : top + 24, left : left + 24]
    row, column = (place // 8 * 8 - top, place % 8 * 8 - left)
    red = (crop == drawing.ACCENT).all(-1)
    assert red[row, column] and red[row + 7, column + 7] and not red[row + 3, column + 4]
    far = np.ones((24, 24), bool)
    far[max(row - 1, 0) : row + 9, max(column - 1, 0) : column + 9] = False
    assert (crop[far] == expected[far]).all()


def test_patterns_have_colors_of_their_own():
    colors = drawing.colors_of(range(36))
    assert len(set(colors.values())) == 36
    assert drawing.colors_of([5, 5, 9]) == {5: drawing.colors_of([0])[0], 9: drawing.colors_of([0, 1])[1]}


def test_lines_are_wrapped_at_the_width():
    lines = drawing.wrap("one two three " * 20, 200, 16)
    assert " ".join(lines).split() == ("one two three " * 20).split()
    assert max(drawing.font(16).getlength(line) for line in lines) <= 200
    assert drawing.wrap("", 10, 16) == [""] and drawing.wrap("incomprehensibility", 10, 16) == ["incomprehensibility"]


def test_the_masking_figure_has_a_column_per_view_and_a_caption_per_row():
    masks = torch.zeros(2, 16, dtype=torch.bool)
    arguments = ([plain(), plain()], {"masked at random": masks}, ["a red ring", "a dog"])
    small = figures.masking_figure(*arguments)
    large = figures.masking_figure(
        *arguments, similarity=torch.rand(2, 16), patterns=torch.arange(32).view(2, 16), clean=[plain(), plain()]
    )
    assert 5 * figures.SIDE < large.width < 6 * figures.SIDE < 2 * small.width and small.height > 2 * figures.SIDE
    assert figures.by_frequency(torch.tensor([[3, 3, 1], [1, 3, 7]])) == [3, 1, 7]


def test_the_masking_figures_legend_names_the_most_frequent_patterns_in_their_colors():
    patterns = torch.tensor([[7] * 9 + [3] * 5 + [1, 2]])
    masks = {"masked at random": torch.zeros(1, 16, dtype=torch.bool)}
    figure = np.asarray(figures.masking_figure([plain()], masks, ["a dog"], patterns=patterns))
    colors = drawing.colors_of([7, 3, 1, 2])
    for color in [*colors.values(), drawing.HIDDEN]:  # a whole swatch of each, which no patch over an image is
        found = (figure == color).all(-1)
        assert found.sum() == figures.KEY**2 and np.ptp(found.nonzero()[0]) == figures.KEY - 1


def test_a_legends_entries_are_wrapped_at_the_width():
    entries = [(drawing.swatch((9, 9, 9), 20), word) for word in ("one", "two", "three", "a much longer meaning")]
    narrow, wide = drawing.key(entries, 160), drawing.key(entries, 2000)
    assert narrow.width <= 160 and wide.height < narrow.height and wide.width > 300


def test_a_swatchs_label_can_be_read_on_dark_and_light():
    for color, ink in (((255, 255, 0), drawing.INK), ((10, 10, 90), drawing.PAPER)):
        pixels = np.asarray(drawing.swatch(color, 68, "1022"))
        assert (pixels == ink).all(-1).sum() > 20 and tuple(pixels[0, 0]) == color


def test_an_image_survives_the_way_to_pillow():
    pixels = torch.rand(3, 5, 7)
    image = drawing.to_image(pixels)
    assert image.size == (7, 5)
    assert np.abs(np.asarray(image) / 255 - pixels.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
