import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyvit.image_spec import ImageSpec
from tinyvit.images import preprocess
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import (
    ResizeLongestSide,
    normalise_and_pad,
    prepare,
    resize,
    to_input,
)

PHOTO = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
MEAN = np.array([123.675, 116.28, 103.53])
STD = np.array([58.395, 57.12, 57.375])
SPECS = [
    ImageSpec.sam(32),
    ImageSpec.sam(32, pad=False),
    ImageSpec.sam((16, 48)),
    ImageSpec.timm(24),
    ImageSpec.cream(24),
    ImageSpec((20, 28), "squash", "bicubic"),
    ImageSpec((20, 28), "crop", "bicubic", shorter_side=31),
    ImageSpec.litemedsam(32),
]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_preparing_a_file_is_decoding_and_preparing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode, form in (("RGB", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("I;16", "PNG")):
        grey = PHOTO[:, :, 0].astype(np.uint16) << 8
        image = Image.fromarray(grey if mode == "I;16" else PHOTO)
        file = io.BytesIO()
        (image if image.mode == mode else image.convert(mode)).save(file, form, exif=exif)
        for spec in SPECS:
            wanted, place = to_input(decode(file), spec)
            for source in (file, file.getvalue(), decode(file), Image.fromarray(decode(file))):
                found, there = prepare(source, spec)
                assert there == place
                assert np.array_equal(found, wanted)


def by_hand(image, spec):
    """The rule of the specification in float64 and plain steps."""
    height, width = image.shape[:2]
    place = spec.place(height, width)
    method = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[spec.interpolation]
    small = Image.fromarray(image).resize(place.resized_size[::-1], method)
    if spec.resize == "crop":
        top, left = place.crop_offset
        small = small.crop((left, top, left + spec.size[1], top + spec.size[0]))
    x = np.asarray(small).astype(np.float64)
    if spec.normalise == "min_max":
        x = (x - x.min()) / max(x.max() - x.min(), 1e-8)
    else:
        x = (x - MEAN) / STD
    out = np.zeros((*place.model_size, 3))
    out[: x.shape[0], : x.shape[1]] = x
    return out.transpose(2, 0, 1)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(30, 41), (41, 30), (32, 32), (5, 7), (20, 28)])
def test_to_input_follows_the_rule(spec, shape):
    image = np.resize(PHOTO, (*shape, 3))
    got, place = to_input(image, spec)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert got.flags.writeable
    assert place == spec.place(*shape)
    # one subtraction and one division in float32, of numbers up to 255
    np.testing.assert_allclose(got, by_hand(image, spec), atol=2e-6)


def test_it_is_exactly_minus_mean_over_std():
    got, _ = to_input(PHOTO, ImageSpec.sam((30, 41)))
    mean, std = torch.tensor(MEAN).float(), torch.tensor(STD).float()
    wanted = ((torch.from_numpy(PHOTO).float() - mean) / std).permute(2, 0, 1)
    np.testing.assert_array_equal(got, wanted)


def test_padding_is_zero_after_normalising():
    got, place = to_input(PHOTO, ImageSpec.sam(64))
    assert place.resized_size == (47, 64)
    assert (got[:, 47:] == 0).all()
    assert (got[:, :47] != 0).all()


def test_an_image_of_one_colour_has_no_range():
    got, _ = to_input(np.full((4, 4, 3), 77, np.uint8), ImageSpec.litemedsam(8))
    assert (got == 0).all()


def test_min_max_reaches_both_ends():
    got, place = to_input(PHOTO // 2 + 9, ImageSpec.litemedsam(64))
    h, w = place.resized_size
    assert got[:, :h, :w].min() == 0
    assert got.max() == 1


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(SPECS))
def test_every_size_gives_the_models_size(height, width, spec):
    image = np.full((height, width, 3), 200, np.uint8)
    got, place = to_input(image, spec)
    assert got.shape == (3, *place.model_size)
    if spec.normalise == "mean_std":
        # resizing one colour gives that colour
        np.testing.assert_allclose(got[:, 0, 0], (200 - MEAN) / STD, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (2, 900)])
def test_a_thin_strip_does_not_explode(shape, monkeypatch):
    asked = []
    monkeypatch.setattr(preprocess, "resize", lambda *a: asked.append(a))
    got, _ = to_input(np.full((*shape, 3), 50, np.uint8), ImageSpec.timm(24))
    assert not asked
    assert got.shape == (3, 24, 24)


@pytest.mark.parametrize("shape", [(30, 41), (41, 30), (200, 90)])
def test_the_strip_and_the_whole_image_agree(shape, monkeypatch):
    rows, columns = np.indices(shape)
    image = np.stack([rows, columns, rows + columns], axis=2).astype(np.uint8) * 2 // 3
    whole, _ = to_input(image, ImageSpec.cream(24))
    monkeypatch.setattr(preprocess, "LONGEST_WHOLE", 0)
    crop, _ = to_input(image, ImageSpec.cream(24))
    # each of Pillow's two passes rounds, and their order may differ: one level of 255
    np.testing.assert_allclose(crop, whole, rtol=0, atol=1.01 / STD.min())


def test_read_only_images_give_no_warning():
    image = np.frombuffer(b"\7" * 48, np.uint8).reshape(4, 4, 3)
    got, _ = to_input(image, ImageSpec.sam(4))
    assert got.shape == (3, 4, 4)
    assert (image == 7).all()


def test_resize():
    assert resize(PHOTO, (30, 41)) is PHOTO
    assert resize(PHOTO, (7, 9)).shape == (7, 9, 3)
    assert resize(PHOTO[:, ::-1], (7, 9)).flags.writeable
    # antialiasing: shrinking a checkerboard gives its mean
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    board = np.repeat(board[:, :, None], 3, 2).astype(np.uint8)
    np.testing.assert_allclose(resize(board, (4, 4)).astype(int), 127.5, atol=4)
    assert (resize(PHOTO, (7, 9), "bicubic") != resize(PHOTO, (7, 9))).any()


@pytest.mark.parametrize(
    ("image", "came"),
    [
        (PHOTO[:, :, 0], r"\[30, 41\] uint8"),
        (PHOTO[:, :, :2], r"\[30, 41, 2\] uint8"),
        (PHOTO / 255, r"\[30, 41, 3\] float64"),
        (torch.from_numpy(PHOTO), "Tensor"),
    ],
)
def test_other_things_are_no_images(image, came):
    for call in (
        lambda: to_input(image, ImageSpec.sam(8)),
        lambda: resize(image, (4, 4)),
        lambda: ResizeLongestSide(8).apply_image(image),
    ):
        with pytest.raises(ValueError, match=rf"image must be an image \[H, W, 3\].*came {came}"):
            call()


def test_wrong_sizes_and_filters():
    with pytest.raises(ValueError, match=r"each at least 1, but is \(0, 4\)"):
        resize(PHOTO, (0, 4))
    with pytest.raises(ValueError, match="must be one of bilinear, bicubic, but is 'area'"):
        resize(PHOTO, (4, 4), "area")
    with pytest.raises(ValueError, match=r"came \[0, 41, 3\] uint8"):
        to_input(PHOTO[:0], ImageSpec.sam(8))


@pytest.mark.parametrize("spec", SPECS[:1] + SPECS[-1:])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_normalise_and_pad_agrees_with_to_input(spec, dtype):
    wanted, place = to_input(PHOTO, spec)
    small = resize(PHOTO, place.resized_size)
    pixels = torch.from_numpy(small).permute(2, 0, 1).to(dtype)
    got = normalise_and_pad(pixels, spec)
    assert got.shape == (1, 3, 32, 32)
    assert got.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    np.testing.assert_allclose(got[0].float(), wanted, rtol=0, atol=2e-6)  # float32 rounding


def test_normalise_and_pad_takes_batches_and_passes_gradients():
    spec = ImageSpec.litemedsam(8)
    batch = torch.stack([torch.full((3, 4, 8), 9.0), torch.arange(96.0).view(3, 4, 8)])
    got = normalise_and_pad(batch.requires_grad_(), spec)
    assert got.shape == (2, 3, 8, 8)
    assert (got[0] == 0).all()
    assert got[1].max() == 1  # each image by its own range
    got.sum().backward()
    assert batch.grad.isfinite().all()
    assert normalise_and_pad(batch, ImageSpec.sam(8, pad=False)).shape == (2, 3, 4, 8)
    assert normalise_and_pad(batch[:, :, :, :4], ImageSpec.timm(4)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("shape", "spec", "words"),
    [
        ((4, 4), ImageSpec.sam(8), r"wanted RGB pixels \[3, h, w\].*came \[4, 4\]"),
        ((4, 4, 3), ImageSpec.sam(8), r"came \[4, 4, 3\]"),
        ((3, 9, 8), ImageSpec.sam(8), "is 9 x 8 .* does not fit the model's 8 x 8"),
        ((3, 8, 9), ImageSpec.sam(8, pad=False), "is 8 x 9"),
        ((3, 4, 8), ImageSpec.timm(8), "is 4 x 8 .*resize it first"),
    ],
)
def test_pixels_that_do_not_fit(shape, spec, words):
    with pytest.raises(ValueError, match=words):
        normalise_and_pad(torch.zeros(shape), spec)


class TestResizeLongestSide:
    transform = ResizeLongestSide(1024)
    coords = np.array([[0.0, 0.0], [10.5, 20.25], [96, 59]])

    def test_sizes(self):
        shape = ResizeLongestSide.get_preprocess_shape
        assert [shape(*s, 1024) for s in ((480, 640), (60, 97), (1, 3000), (3, 7))] == [
            (768, 1024),
            (633, 1024),
            (1, 1024),
            (439, 1024),
        ]

    def test_image(self):
        got = ResizeLongestSide(64).apply_image(PHOTO)
        wanted = np.asarray(Image.fromarray(PHOTO).resize((64, 47), Image.BILINEAR))
        np.testing.assert_array_equal(got, wanted)

    def test_coords(self):
        before = self.coords.copy()
        got = self.transform.apply_coords(self.coords, (60, 97))
        wanted = [[0, 0], [10.5 * (1024 / 97), 20.25 * (633 / 60)], [96 * (1024 / 97), 622.45]]
        # each axis by its own ratio, because 633 is rounded
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
        np.testing.assert_array_equal(self.coords, before)
        whole = self.transform.apply_coords(np.array([[[1, 2]]]), (60, 97))
        np.testing.assert_allclose(whole, [[[1024 / 97, 633 / 30]]], rtol=1e-12)

    def test_boxes(self):
        got = self.transform.apply_boxes(np.array([1, 2, 30, 40]), (60, 97))
        wanted = [[1024 / 97, 633 / 30, 30 * 1024 / 97, 422]]
        np.testing.assert_allclose(got, wanted, rtol=1e-12)

    def test_torch_twins(self):
        size = (60, 97)
        coords = self.transform.apply_coords_torch(torch.from_numpy(self.coords), size)
        assert coords.dtype == torch.float32
        # float32
        np.testing.assert_allclose(
            coords, self.transform.apply_coords(self.coords, size), rtol=1e-6
        )
        boxes = torch.tensor([[[1, 2, 30, 40]]])
        np.testing.assert_allclose(
            self.transform.apply_boxes_torch(boxes, size),
            self.transform.apply_boxes(boxes.numpy(), size),
            rtol=1e-6,
        )

    def test_image_torch(self):
        transform = ResizeLongestSide(20)
        batch = torch.from_numpy(PHOTO).permute(2, 0, 1)[None].float()
        got = transform.apply_image_torch(batch)
        wanted = transform.apply_image(PHOTO).transpose(2, 0, 1)
        # PIL rounds after each of its two passes
        np.testing.assert_allclose(got[0], wanted, atol=1.5)

    def test_wrong_input(self):
        with pytest.raises(ValueError, match=r"batch \[N, C, H, W\]; came \[3, 4, 4\]"):
            self.transform.apply_image_torch(torch.zeros(3, 4, 4))
        with pytest.raises(ValueError, match=r"came \[1, 3, 4, 4\] of torch.uint8"):
            self.transform.apply_image_torch(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
        with pytest.raises(ValueError, match="at least 1, but is 0"):
            ResizeLongestSide(0)
        with pytest.raises(ValueError, match="wanted points"):
            self.transform.apply_coords(np.zeros((2, 3)), (4, 4))
        with pytest.raises(ValueError, match="wanted boxes"):
            self.transform.apply_boxes_torch(torch.zeros(2, 3), (4, 4))
