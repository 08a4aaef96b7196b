"""Pictures as cameras and programs write them: turned, of 16 bits, in ink colours, animated, cut off."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.data.pictures import BadPicture, decode


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_picture_is_turned_as_its_camera_says() -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for kind in ("PNG", "JPEG"):
        image = decode(encoded(Image.fromarray(pixels), kind, exif=exif))
        assert image.shape == (16, 8, 3)
        assert image[:6].min() > 240 and image[10:].max() < 15, "what was left is above"


def test_sixteen_bits_become_eight() -> None:
    values = np.array([[0, 257 * 10, 257 * 200, 65535]], np.uint16)
    image = decode(encoded(Image.fromarray(values), "PNG"))
    assert image.tolist() == [[[0] * 3, [10] * 3, [200] * 3, [255] * 3]]


def test_ink_colours_become_rgb() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    image = decode(encoded(ink, "JPEG", quality=95))
    assert image.shape == (8, 8, 3) and image[..., 0].min() > 240 and image[..., 1:].max() < 15


def test_a_palette_keeps_its_colours_and_its_transparency() -> None:
    picture = Image.new("RGB", (4, 4), (200, 30, 60)).quantize(2)
    assert decode(encoded(picture, "PNG"))[0, 0].tolist() == [200, 30, 60]
    index = picture.getpixel((0, 0))
    assert decode(encoded(picture, "PNG", transparency=index))[0, 0].tolist() == [200, 30, 60, 0]


def test_a_grey_picture_has_three_channels() -> None:
    assert decode(encoded(Image.new("L", (4, 4), 7), "PNG"))[0, 0].tolist() == [7, 7, 7]
    assert decode(encoded(Image.new("LA", (4, 4), (7, 9)), "PNG"))[0, 0].tolist() == [7, 7, 7, 9]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    image = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert image.shape[:2] == (8, 8) and np.abs(image[..., :3].astype(int) - (255, 0, 0)).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_file_that_is_cut_off_is_bad(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    whole = encoded(noise, kind)
    assert decode(whole).shape == (64, 64, 3)
    for length in (0, 1, 20, len(whole) // 2):
        with pytest.raises(BadPicture) as caught:
            decode(whole[:length])
        assert str(caught.value) and "\n" not in str(caught.value) and "0x" not in str(caught.value)
