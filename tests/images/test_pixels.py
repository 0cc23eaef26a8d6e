import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tinyvit.errors import ImageError
from tinyvit.images.decode import decode

# 3 x 4 pixels, all different
RGB = np.arange(36, dtype=np.uint8).reshape(3, 4, 3) * 7
GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
BIG = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)


def encoded(image, form, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def repeated(grey):
    return np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)


def test_transparency_is_laid_over_white():
    alpha = np.array([[0, 255, 128, 0]] * 3, dtype=np.uint8)
    rgba = np.dstack([RGB, alpha])
    wanted = RGB.copy()
    wanted[:, [0, 3]] = 255
    part = 128 / 255
    wanted[:, 2] = np.rint(RGB[:, 2] * part + 255 * (1 - part))
    for source in (rgba, encoded(rgba, "PNG"), encoded(rgba, "TIFF"), Image.fromarray(rgba)):
        # 1 of 255: Pillow's integer arithmetic
        np.testing.assert_allclose(decode(source).astype(int), wanted, atol=1)
        np.testing.assert_array_equal(decode(source)[:, 1], RGB[:, 1])
        np.testing.assert_array_equal(decode(source)[:, 0], 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_every_transparent_mode(mode):
    image = Image.new("RGBA", (2, 1), (10, 10, 10, 255))
    image.putpixel((1, 0), (10, 10, 10, 0))
    steps = {"La": ["LA", "La"], "PA": ["P", "PA"]}.get(mode, [mode])
    for step in steps:
        image = image.convert(step)
    if mode == "PA":
        image.putpixel((1, 0), (image.getpixel((0, 0))[0], 0))
    np.testing.assert_array_equal(decode(image), [[[10] * 3, [255] * 3]])


def test_transparent_palettes_and_colours():
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    palette = palette.convert("P")
    palette.putpalette([9, 9, 9, 50, 60, 70, 1, 2, 3])
    np.testing.assert_array_equal(decode(palette), [[[9] * 3, [50, 60, 70], [1, 2, 3]]])
    for form in ("PNG", "GIF"):
        data = encoded(palette, form, transparency=1)
        np.testing.assert_array_equal(decode(data), [[[9] * 3, [255] * 3, [1, 2, 3]]])
    data = encoded(palette, "PNG", transparency=bytes([255, 0, 255]))
    np.testing.assert_array_equal(decode(data), [[[9] * 3, [255] * 3, [1, 2, 3]]])
    data = encoded(RGB, "PNG", transparency=tuple(int(v) for v in RGB[0, 0]))
    assert (decode(data)[0, 0] == 255).all()
    np.testing.assert_array_equal(decode(data)[1:], RGB[1:])


def test_grey_and_one_bit():
    np.testing.assert_array_equal(decode(encoded(GREY, "PNG")), repeated(GREY))
    bits = GREY > 100
    wanted = repeated(bits * np.uint8(255))
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits), "PNG")), wanted)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits), "TIFF")), wanted)


SIXTEEN = np.array([[0, 255, 256], [511, 512, 65535]], dtype=np.uint16)
EIGHT = repeated(np.array([[0, 0, 1], [1, 2, 255]], dtype=np.uint8))


def test_sixteen_bits_lose_their_lower_byte():
    image = Image.fromarray(SIXTEEN)
    assert image.mode == "I;16"
    big_endian = Image.frombytes("I;16B", (3, 2), SIXTEEN.astype(">u2").tobytes())
    whole = Image.fromarray(SIXTEEN.astype(np.int32))
    assert whole.mode == "I"
    for source in (image, big_endian, whole, SIXTEEN, SIXTEEN.astype(">u2")):
        np.testing.assert_array_equal(decode(source), EIGHT)
    pgm = b"P5 3 2 65535\n" + SIXTEEN.astype(">u2").tobytes()
    for data in (encoded(image, "PNG"), encoded(image, "TIFF"), pgm):
        np.testing.assert_array_equal(decode(data), EIGHT)


def test_sixteen_bits_of_eight_come_back():
    every = np.arange(256, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(decode(every * 257), repeated(every))


def test_a_transparent_grey_of_sixteen_bits():
    image = Image.fromarray(SIXTEEN)
    image.info["transparency"] = 256  # as Pillow gives it for a PNG
    wanted = EIGHT.copy()
    wanted[0, 2] = 255
    np.testing.assert_array_equal(decode(image), wanted)


@pytest.mark.parametrize("value", [-1, 65536])
def test_whole_numbers_beyond_sixteen_bits(value):
    image = Image.fromarray(np.array([[5, value]], np.int32))
    with pytest.raises(ImageError, match=rf"whole numbers from .*{value}.*wanted 0 to 65535"):
        decode(image)


def test_floating_point_files():
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    np.testing.assert_array_equal(decode(encoded(image, "TIFF")), repeated([[0, 128, 255]]))
    with pytest.raises(ImageError, match="from 0 to 80; wanted 0 to 1; divide"):
        decode(encoded(Image.fromarray(np.array([[0, 80]], np.float32)), "TIFF"))


def test_print_colours():
    grey = Image.new("CMYK", (2, 2), (0, 0, 0, 155))
    assert (decode(grey) == 100).all()
    data = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)  # as Adobe's
    np.testing.assert_allclose(decode(data)[0, 0].astype(int), [0, 255, 255], atol=3)  # JPEG loss
    for mode in ("YCbCr", "HSV"):
        # colour spaces of 8 bits lose a few levels on the way there
        got = decode(Image.fromarray(BIG).convert(mode)).astype(int)
        np.testing.assert_allclose(got, BIG, atol=8)


@pytest.mark.skipif(not hasattr(ImageCms, "core"), reason="Pillow without LittleCMS")
def test_lab():
    lab = Image.new("LAB", (2, 2), (128, 128, 128))  # half as light as white, no colour
    # L* 50.2 is 119 in sRGB; a level of rounding in the conversion
    for source in (lab, encoded(lab, "TIFF")):
        np.testing.assert_allclose(decode(source).astype(int), 119, atol=2)


def test_arrays():
    np.testing.assert_array_equal(decode(RGB), RGB)
    np.testing.assert_array_equal(decode(GREY), repeated(GREY))
    np.testing.assert_array_equal(decode(GREY[:, :, None]), repeated(GREY))
    np.testing.assert_array_equal(decode(GREY > 100), repeated(GREY > 100) * 255)
    np.testing.assert_array_equal(decode(RGB[::-1, ::2]), RGB[::-1, ::2])
    for dtype in (np.float16, np.float32, np.float64):
        # every level survives: rounding is to the nearest, and float16 has 11 bits
        np.testing.assert_array_equal(decode((RGB / 255).astype(dtype)), RGB)
    np.testing.assert_array_equal(decode(np.array([[-1e-6, 1 + 1e-6]])), repeated([[0, 255]]))


def test_tensors():
    tensor = torch.from_numpy(RGB.copy()).permute(2, 0, 1)
    np.testing.assert_array_equal(decode(tensor), RGB)
    np.testing.assert_array_equal(decode((tensor / 255).requires_grad_()), RGB)
    np.testing.assert_array_equal(decode(tensor[:1]), repeated(RGB[:, :, 0]))
    np.testing.assert_array_equal(decode(torch.ones(1, 1, 2).bfloat16()), [[[255] * 3] * 2])
    np.testing.assert_array_equal(decode(torch.tensor([[[True, False]]])), repeated([[255, 0]]))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((0, 4, 3), np.uint8), r"no pixels: its shape is \[0, 4, 3\]"),
        (np.zeros((0, 0), np.uint8), "no pixels"),
        (np.zeros(4, np.uint8), r"wanted an array \[H, W\].*came \[4\]"),
        (np.zeros((3, 8, 9), np.uint8), r"came \[3, 8, 9\]; move the channels last"),
        (np.zeros((8, 9, 2), np.uint8), r"came \[8, 9, 2\]$"),
        (np.zeros((1, 8, 9, 3), np.uint8), r"of one image; came \[1, 8, 9, 3\]"),
        (np.zeros((8, 9), np.int64), "type int64; wanted uint8, uint16, bool or floats"),
        (np.zeros((8, 9), np.uint32), "type uint32; wanted uint8"),
        (np.zeros((8, 9), complex), "type complex128; wanted uint8"),
        (np.array([["a"]]), "type <U1; wanted uint8"),
        (np.array([[0.5, np.nan]]), "NaN or infinite"),
        (np.array([[0.5, np.inf]]), "NaN or infinite"),
        (np.array([[0.0, 255.0]]), "from 0 to 255; wanted 0 to 1"),
        (np.array([[-1.0, 1.0]]), "from -1 to 1; wanted 0 to 1"),
        (torch.zeros(8, 9), r"wanted a tensor \[3, H, W\].*came \[8, 9\]"),
        (torch.zeros(8, 9, 3), r"wanted a tensor \[3, H, W\].*came \[8, 9, 3\]"),
        (torch.zeros(3, 0, 3), "no pixels"),
        (torch.full((3, 1, 1), torch.nan), "NaN or infinite"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), "type int64"),
        (Image.new("RGB", (0, 5)), r"the PIL image has no pixels: it is 0 x 5"),
    ],
)
def test_pixels_without_a_rule(array, words):
    with pytest.raises(ImageError, match=words):
        decode(array)
