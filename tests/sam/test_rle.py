import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from tinyvit.sam import mask_ops as rle

masks = arrays.arrays(
    np.bool_,
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    fill=st.nothing(),
)
numbers = st.lists(st.integers(0, 2**31), max_size=20)


def of_coco(mask):
    made = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(made["size"]), "counts": made["counts"].decode()}


def blob(height, width, seed=0):
    """A disc with a hole, that touches the edges of the image."""
    rows, columns = np.mgrid[:height, :width]
    square = (2 * rows / height - 1) ** 2 + (2 * columns / width - 1.2) ** 2
    return (square < 1.1) & (square > 0.05 * seed)


class TestAgainstCoco:
    @given(masks)
    def test_text_numbers_and_back(self, mask):
        text, plain = rle.encode(mask), rle.encode(mask, compressed=False)
        assert text == of_coco(mask)
        packed = coco.frPyObjects({**plain}, *mask.shape)  # it changes what it gets
        assert packed["counts"].decode() == text["counts"]
        assert rle.decompress(text["counts"]) == plain["counts"]
        assert rle.coco_encode_rle(plain) == rle.coco_encode_rle(text) == text
        for one in (text, plain, {**text, "counts": text["counts"].encode()}):
            found = rle.decode(one)
            assert found.dtype == np.bool_
            np.testing.assert_array_equal(found, mask)
            assert rle.area(one) == mask.sum() == coco.area(of_coco(mask))
            assert rle.to_box(one) == tuple(coco.toBbox(of_coco(mask)))

    @given(st.data())
    def test_iou(self, data):
        first = data.draw(masks)
        second = data.draw(arrays.arrays(np.bool_, first.shape, fill=st.nothing()))
        wanted = coco.iou([of_coco(first)], [of_coco(second)], [0])[0, 0]
        assert rle.iou(rle.encode(first), rle.encode(second)) == wanted

    @pytest.mark.parametrize("seed", range(3))
    def test_a_larger_mask(self, seed):
        mask = blob(301, 217, seed)
        noise = np.random.default_rng(seed).random(mask.shape) < 0.5
        for one in (mask, noise, mask & noise, mask[::-1].T, np.asfortranarray(mask)):
            assert rle.encode(one) == of_coco(one)
            np.testing.assert_array_equal(rle.decode(rle.encode(one)), one)
        wanted = coco.iou([of_coco(mask)], [of_coco(noise)], [0])[0, 0]
        assert rle.iou(rle.encode(mask), rle.encode(noise)) == wanted

    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3)])
    @pytest.mark.parametrize("value", [False, True])
    def test_empty_and_full(self, size, value):
        mask = np.full(size, value)
        assert rle.encode(mask) == of_coco(mask)
        pixels = size[0] * size[1]
        assert rle.encode(mask, compressed=False)["counts"] == ([0, pixels] if value else [pixels])
        np.testing.assert_array_equal(rle.decode(rle.encode(mask)), mask)
        assert rle.to_box(rle.encode(mask)) == ((0, 0, size[1], size[0]) if value else (0, 0, 0, 0))

    def test_a_large_image(self):
        mask = np.zeros((6000, 8000), bool)
        mask[5990:, 10:300] = mask[:4, 11:301] = True  # runs that go on in the next column
        made = rle.encode(mask)
        assert made == of_coco(mask)
        assert rle.to_box(made) == (10, 0, 291, 6000)
        np.testing.assert_array_equal(rle.decode(made), mask)


class TestText:
    @given(numbers)
    def test_any_numbers_come_back(self, counts):
        assert rle.decompress(rle.compress(counts)) == counts
        assert rle.decompress(rle.compress(np.array(counts, np.int64)).encode()) == counts

    def test_none(self):
        assert rle.compress([]) == ""
        assert rle.decompress("") == []

    @pytest.mark.parametrize(
        "text, words",
        [
            ("61 X", "from '0' to 'o' only, but byte 2 is b' '"),
            ("p", "byte 0 is b'p'"),
            ("6é", r"byte 1 is b'\\xc3'"),
            ("61X", "end within a number; are they cut off"),
            ("o" * 20 + "0", "has 21 characters, more than 12"),
            ("O", "counts must not be negative, but number 0 is -1"),
        ],
    )
    def test_junk(self, text, words):
        with pytest.raises(ValueError, match=words):
            rle.decompress(text)
        with pytest.raises(ValueError, match=words):
            rle.decode({"size": [2, 3], "counts": text})


class TestRegion:
    @given(masks, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
    def test_as_the_whole_image(self, part, above, below, before, after):
        whole = np.pad(part, ((above, below), (before, after)))
        for compressed in (True, False):
            made = rle.encode_region(part, above, before, *whole.shape, compressed)
            assert made == rle.encode(whole, compressed)
        found, top, left = rle.decode_region(made)
        x, y, width, height = rle.to_box(made)
        assert (found.shape, top, left) == ((height, width), y, x)
        again = rle.encode_region(found, top, left, *whole.shape, compressed=False)
        assert again == made

    @pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0)])
    def test_a_part_of_no_pixels_is_an_empty_mask(self, shape):
        made = rle.encode_region(np.zeros(shape, bool), 2, 3, 10, 20)
        assert made == rle.encode(np.zeros((10, 20), bool))
        part, top, left = rle.decode_region(made)
        assert (part.shape, part.dtype, top, left) == ((0, 0), np.bool_, 0, 0)

    def test_the_image_is_never_made(self):
        side = 10**6  # an image of this size would not fit
        made = rle.encode_region(np.eye(3, dtype=bool), side - 3, 5, side, side)
        assert (rle.area(made), rle.to_box(made)) == (3, (5, side - 3, 3, 3))
        part, top, left = rle.decode_region(made)
        np.testing.assert_array_equal(part, np.eye(3, dtype=bool))
        assert (top, left) == (side - 3, 5)
        assert rle.iou(made, made) == 1.0

    @pytest.mark.parametrize("top, left", [(-1, 0), (0, -1), (8, 0), (0, 17)])
    def test_outside(self, top, left):
        with pytest.raises(ValueError, match=r"part of 3 x 4 pixels at row .* 10 x 20"):
            rle.encode_region(np.ones((3, 4), bool), top, left, 10, 20)


class TestSegmentAnythingsNames:
    def test_they_give_the_same(self):
        tensor = torch.from_numpy(np.stack([blob(9, 7), ~blob(9, 7)]))
        made = rle.mask_to_rle_pytorch(tensor)
        assert made == [rle.encode(mask, compressed=False) for mask in tensor.numpy()]
        np.testing.assert_array_equal(rle.rle_to_mask(made[1]), tensor[1].numpy())
        assert rle.mask_to_rle_pytorch(tensor[:0]) == []
        with pytest.raises(ValueError, match=r"wanted masks \[B, H, W\]; came \[9, 7\]"):
            rle.mask_to_rle_pytorch(tensor[0])


def test_ready_for_json():
    for compressed in (True, False):
        made = rle.encode(blob(5, 6), compressed)
        assert json.loads(json.dumps(made)) == made


def test_runs_of_no_pixels_are_read():
    runs = {"size": np.array([2, 3]), "counts": [1, 0, 1, 2, 0, 0, 2]}
    np.testing.assert_array_equal(rle.decode(runs), [[False, True, False]] * 2)
    assert rle.to_box(runs) == (1, 0, 1, 2)
    assert rle.iou(runs, {"size": [2, 3], "counts": [2, 2, 2]}) == 1.0


@pytest.mark.parametrize(
    "mask, words",
    [
        (np.ones((2, 2), np.uint8), r"wanted a mask \[H, W\] bool; came \[2, 2\] uint8"),
        (np.ones((1, 2, 2), bool), r"came \[1, 2, 2\] bool"),
        ([[True]], "came list"),
        (np.ones((0, 2), bool), "at least one pixel; came 0 x 2"),
    ],
)
def test_wrong_masks(mask, words):
    with pytest.raises(ValueError, match=words):
        rle.encode(mask)


@pytest.mark.parametrize(
    "runs, words",
    [
        ({"counts": [6]}, r'"size": \[height, width\].*with size None'),
        ({"size": [2, 3]}, "came .'size'. with size"),
        ({"size": [2], "counts": [6]}, r"with size \[2\]"),
        ({"size": [2.0, 3], "counts": [6]}, "size must be whole numbers"),
        ({"size": [0, 3], "counts": [0]}, r"at least one pixel; came size \[0, 3\]"),
        ({"size": [2, 3], "counts": [5]}, "sum to height x width = 2 x 3 = 6, but sum to 5"),
        ({"size": [2, 3], "counts": []}, "but sum to 0"),
        ({"size": [2, 3], "counts": [2**62] * 5}, "but hold 4611686018427387904"),
        ({"size": [2, 3], "counts": [7, -1]}, "not be negative, but number 1 is -1"),
        ({"size": [2, 3], "counts": [5.5, 0.5]}, "must be whole numbers; came list of float64"),
        ({"size": [2, 3], "counts": [[6]]}, r"must be whole numbers; came list of int64 \[1, 1\]"),
        ({"size": [2, 3], "counts": 6}, "must be whole numbers; came int"),
    ],
)
def test_wrong_run_lengths(runs, words):
    for use in (rle.decode, rle.decode_region, rle.area, rle.to_box, rle.coco_encode_rle):
        with pytest.raises(ValueError, match=words):
            use(runs)


def test_masks_of_other_images_have_no_iou():
    with pytest.raises(ValueError, match="different sizes: 2 x 3 and 3 x 2"):
        rle.iou(rle.encode(np.ones((2, 3), bool)), rle.encode(np.ones((3, 2), bool)))
