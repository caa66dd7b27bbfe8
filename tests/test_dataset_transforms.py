import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from tiny import noise
from torchvision.transforms import v2

from dataset import transforms
from dataset.transforms import CLIP_MEAN, CLIP_STD, Augment, ImageError, open_image, to_rgb


def pixel(image, x=0, y=0):
    assert image.mode == "RGB"
    return image.getpixel((x, y))


# ------------------------------------------------------------------------------------------ to_rgb


def test_transparent_pixels_are_composited_on_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))  # red under full transparency
    image.putpixel((1, 0), (0, 0, 0, 128))
    assert pixel(to_rgb(image)) == (255, 255, 255)
    assert all(abs(value - 127) <= 1 for value in pixel(to_rgb(image), 1))
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert pixel(open_image(tmp_path / "opaque.png")) == (10, 20, 30)
    clear = open_image(tmp_path / "clear.png")
    assert pixel(clear) == (255, 255, 255) and pixel(clear, 1) == (200, 100, 50)


GRAYS = [  # gray values of more than 8 bits, and what they are of 255
    (np.array([[0, 200, 32768, 65535]], dtype=np.uint16), [0, 1, 128, 255]),
    (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
    (np.array([[0.0, 100.0, 255.0]], dtype=np.float32), [0, 100, 255]),
    (np.array([[-5.0, 1e6]], dtype=np.float32), [0, 255]),
    (np.array([[0, 100, 255]], dtype=np.int32), [0, 100, 255]),
    (np.array([[0, 65535]], dtype=np.int32), [0, 255]),
]


@pytest.mark.parametrize(("values", "expected"), GRAYS)
def test_gray_of_more_than_8_bits_is_scaled_to_its_range_and_not_clipped(tmp_path, values, expected):
    images = [to_rgb(Image.fromarray(values))]
    if values.dtype == np.uint16:
        for name in ("gray.png", "gray.tif"):
            Image.fromarray(values).save(tmp_path / name)
            images.append(open_image(tmp_path / name))
    for image in images:
        assert [pixel(image, x)[0] for x in range(image.width)] == expected


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    noise(32, 16).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (16, 32)


# ------------------------------------------------------------------------------------------ views


def test_normalization_and_the_test_transform_are_torchvisions():
    image = noise(50, 30)
    to_unit = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    oracle = v2.Compose([to_unit, v2.Normalize(CLIP_MEAN, CLIP_STD)])
    torch.testing.assert_close(transforms.to_tensor(image), oracle(image), rtol=0, atol=1e-5)
    resized = v2.Resize((32, 32), v2.InterpolationMode.BICUBIC)(image)
    torch.testing.assert_close(transforms.test_transform(32)(image), transforms.to_tensor(resized))


def test_normalizing_on_the_device_gives_what_normalizing_an_image_gives_to_the_last_digit():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    for group in ([levels], [noise(40, 24), noise(40, 24).point(lambda value: 255 - value)]):
        pixels = [transforms.to_pixels(image) for image in group]
        batch = transforms.stack_pixels(pixels)
        made = transforms.normalized({"image1": batch, "codebook_image": batch, "input_ids": torch.ones(2)})
        assert torch.equal(made["image1"], torch.stack([transforms.to_tensor(image) for image in group]))
        assert torch.equal(made["codebook_image"], torch.stack([transforms.to_unit(image) for image in pixels]))
        assert made["image1"].is_contiguous() and torch.equal(made["input_ids"], torch.ones(2))


def test_a_crop_of_the_whole_image_without_operations_is_the_plain_resize_or_its_mirror():
    image = noise(40, 40)
    augment = Augment(32, crop_scale=(1.0, 1.0), ops=0)
    plain = transforms.test_transform(32)(image)
    views = [transforms.normalize(augment(image, random.Random(seed))) for seed in range(20)]
    same = sum(torch.equal(view, plain) for view in views)
    assert 0 < same < 20 and same + sum(torch.equal(view, plain.flip(2)) for view in views) == 20


def test_crops_have_the_asked_area_and_aspect_ratio():
    rng = random.Random(0)
    boxes = np.array([transforms.random_crop(300, 200, (0.2, 0.6), rng) for _ in range(1000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = width * height / (300 * 200)
    assert (boxes >= 0).all() and (boxes[:, 2] <= 300).all() and (boxes[:, 3] <= 200).all()
    assert 0.19 < area.min() and area.max() < 0.61 and 0.37 < area.mean() < 0.43
    assert 0.72 < (width / height).min() and (width / height).max() < 1.36
    assert boxes[:, 0].min() == 0 and boxes[:, 1].min() == 0


def test_operations_are_drawn_uniformly_half_of_the_time_with_albefs_values_at_magnitude_seven():
    rng = random.Random(0)
    drawn = [(name, round(value, 6)) for _ in range(5000) for name, value in transforms.draw_operations(rng, 2, 7, 256)]
    values = {name: [value for other, value in drawn if other == name] for name in transforms.OPERATIONS}
    assert abs(len(drawn) - 5000) < 200
    assert len(values) == 10 and all(abs(len(found) - 500) < 90 for found in values.values())
    seen = {name: set(found) for name, found in values.items()}
    assert seen["Brightness"] == seen["Sharpness"] == {1.36}
    assert seen["ShearX"] == seen["ShearY"] == {-0.21, 0.21}
    assert seen["TranslateX"] == seen["TranslateY"] == {-0.027344, 0.027344}  # 7 of 256 pixels
    assert seen["Rotate"] == {-21.0, 21.0}


@pytest.mark.parametrize("side", [224, 256, 384])
def test_translations_move_by_seven_whole_pixels_as_albefs(side):
    image, rng = noise(side, side), random.Random(0)
    drawn = {each for _ in range(200) for each in transforms.draw_operations(rng, 2, 7, side) if "Translate" in each[0]}
    assert len(drawn) == 4
    for name, value in drawn:
        axis, shift = int(name == "TranslateX"), int(np.copysign(7, value))
        expected = np.roll(np.array(image), -shift, axis)
        np.moveaxis(expected, axis, 0)[slice(-7, None) if shift > 0 else slice(7)] = 128
        assert np.array_equal(np.array(transforms.apply_operations(image, [(name, value)])), expected)


PILLOWS = {  # operation: what Pillow makes of an image and a value
    "ShearX": lambda image, value: transforms._affine(image, 1, value, 0, 0, 1, 0),
    "ShearY": lambda image, value: transforms._affine(image, 1, 0, 0, value, 1, 0),
    "Sharpness": lambda image, value: ImageEnhance.Sharpness(image).enhance(value),
}


@pytest.mark.parametrize("name", PILLOWS)
@pytest.mark.parametrize("size", [(224, 224), (97, 41), (2, 1)], ids=str)
def test_shears_and_sharpness_are_pillows_to_the_last_bit(name, size):
    coarse = noise(*size).point(lambda value: value // 40 * 40)  # many values between two are integers
    values = (0.21, -0.21, 0.5, -0.3, 0, 1.36)
    for image in (noise(*size), coarse):
        for value in values:
            assert transforms.OPERATIONS[name](image, value).tobytes() == PILLOWS[name](image, value).tobytes()
            if name != "Sharpness":  # and it was not Pillow's own
                assert transforms._shear_origins(size, *((value, 0) if name == "ShearX" else (0, value)))


def test_pillow_shears_if_ours_differs_from_it(monkeypatch):
    monkeypatch.setattr(transforms, "_between", lambda image, places, share: image)
    image = noise(30, 20)
    assert transforms.OPERATIONS["ShearX"](image, 0.2).tobytes() == PILLOWS["ShearX"](image, 0.2).tobytes()


def test_the_codebook_image_shares_crop_flip_and_geometry_with_the_second_view():
    spot = Image.new("RGB", (64, 64), (0, 0, 0))
    spot.paste((255, 255, 255), (10, 30, 22, 42))

    def center(image):  # [3,H,W] in any scale -> center of the bright spot as shares of the side
        weight = (image[0] - image[0].min()) > 0.5 * (image[0].max() - image[0].min())
        places = weight.nonzero().float().mean(0)
        return (places + 0.5) / image.shape[-1]

    checked = 0
    for seed in range(60):
        view, codebook = Augment(64, (0.7, 1.0), codebook_size=32).with_codebook(spot, random.Random(seed))
        codebook = transforms.normalized({"codebook_image": codebook})["codebook_image"]
        assert codebook.shape == (3, 32, 32) and 0 <= codebook.min() and codebook.max() <= 1
        if codebook.max() > 0.9 and not ((codebook[0] > 0.45) & (codebook[0] < 0.55)).any():  # no gray filling
            torch.testing.assert_close(center(view), center(codebook), rtol=0, atol=0.03)
            checked += 1
    assert checked > 15


# ------------------------------------------------------------------------------------------ what is opened at all


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n/x 5 def\n%%EOF\n"


@pytest.mark.parametrize("name", ["image.jpg", "image.eps"])
def test_postscript_is_no_image_whatever_it_is_called_and_starts_no_program(tmp_path, monkeypatch, name):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    (tmp_path / name).write_bytes(EPS)
    with Image.open(tmp_path / name) as image, pytest.raises(pytest.fail.Exception):
        image.load()  # PIL itself would
    with pytest.raises(ImageError, match=f"{name}: not an image in JPEG, PNG, WEBP, GIF, BMP, TIFF or PPM format"):
        open_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"])
def test_the_formats_of_image_data_sets_are_read_under_any_name(tmp_path, suffix):
    noise(20, 10).save(tmp_path / f"image.{suffix}")
    (tmp_path / "plain").write_bytes((tmp_path / f"image.{suffix}").read_bytes())
    assert open_image(tmp_path / "plain").size == (20, 10)


@pytest.mark.parametrize("size", [(200, 150), (90, 160), (40, 30)], ids=["smaller", "on its side", "enlarged"])
def test_within_a_crop_torch_resizes_as_pillow_does_to_a_level(size):
    """At its border Pillow sees what lies beyond the crop, torch does not: left out here, two pixels of the source."""
    grain = Image.blend(noise(8, 6).resize(size, Image.Resampling.BICUBIC), noise(*size), 0.1)
    by_torch, by_pillow = (
        torch.stack([Augment(48, ops=0, resize=name)(grain, random.Random(seed)) for seed in range(40)]).int()
        for name in ("torch", "pillow")
    )
    inside = (by_torch - by_pillow).abs()[..., 8:-8, 8:-8]
    assert inside.max() <= 2 and (inside > 1).float().mean() < 2e-4 and (inside > 0).float().mean() < 0.25


@pytest.mark.parametrize(("size", "scale"), [((200, 150), (0.2, 1.0)), ((2300, 2000), (0.99, 1.0))])
def test_torch_resizes_as_torchvisions_transform_of_bytes(size, scale):
    """Also a crop of more than 16 MiB, which PIL keeps in several blocks."""
    image = noise(*size)
    for seed in range(8):
        view = Augment(48, scale, flip=False, ops=0, resize="torch")(image, random.Random(seed))
        left, upper, right, lower = transforms.random_crop(*size, scale, random.Random(seed))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, upper:lower, left:right]
        expected = v2.functional.resize(pixels, [48, 48], v2.InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(view, expected)
