import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from hypothesis.extra.numpy import arrays as hypothesis_arrays

from tinyvit.sam import mask_ops as b

COORDS = st.lists(st.tuples(*[st.integers(0, 12)] * 4), max_size=12)


def make_boxes(numbers):
    rows = [(min(x, u), min(y, v), max(x, u), max(y, v)) for x, y, u, v in numbers]
    return np.array(rows, np.float64).reshape(-1, 4)


def iou_of(one, other):
    x = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    y = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - x * y
    return x * y / union if union else 0.0


def test_boxes_around_masks():
    masks = torch.zeros(2, 2, 6, 9, dtype=torch.bool)
    masks[0, 0, 2:5, 3:8] = True
    masks[0, 1, 5, 0] = True
    masks[1, 0] = True
    found = b.batched_mask_to_box(masks)
    assert found.tolist() == [[[3, 2, 7, 4], [0, 5, 0, 5]], [[0, 0, 8, 5], [0, 0, 0, 0]]]
    assert b.box_xyxy_to_xywh(found)[0, 0].tolist() == [3, 2, 4, 2]


def test_no_masks_have_no_boxes():
    assert b.batched_mask_to_box(torch.zeros(0, 4, 4, dtype=torch.bool)).shape == (0, 4)
    assert b.batched_mask_to_box(torch.zeros(2, 0, 4, dtype=torch.bool)).tolist() == [[0] * 4] * 2


@given(COORDS, COORDS)
def test_overlaps(one, other):
    one, other = make_boxes(one), make_boxes(other)
    wanted = np.array([[iou_of(x, y) for y in other] for x in one]).reshape(len(one), len(other))
    np.testing.assert_allclose(b.box_iou(one, other), wanted)


@given(COORDS, st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.randoms(use_true_random=False))
def test_suppression_is_greedy(numbers, threshold, random):
    boxes = make_boxes(numbers)
    scores = [random.choice([0.1, 0.5, 0.9]) for _ in boxes]
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou_of(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    assert b.non_maximum_suppression(boxes, scores, threshold).tolist() == kept


def test_suppression_across_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    corner = generator.uniform(0, 40, (100, 2))
    boxes = np.concatenate([corner, corner + generator.uniform(5, 20, (100, 2))], axis=1)
    scores = generator.uniform(size=100)
    at_once = b.non_maximum_suppression(boxes, scores, 0.3)
    monkeypatch.setattr(b, "BLOCK", 7)
    assert 5 < len(at_once) < 95
    assert np.array_equal(b.non_maximum_suppression(boxes, scores, 0.3), at_once)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"wanted boxes \[N, 4\] as x0, y0, x1, y1; came \[3\]"):
        b.box_iou([1, 2, 3], np.zeros((1, 4)))
    with pytest.raises(ValueError, match="a score for each of 2 boxes"):
        b.non_maximum_suppression(np.zeros((2, 4)), [1.0], 0.5)
    with pytest.raises(ValueError, match=r"of bool; came \[4, 4\] torch.uint8"):
        b.batched_mask_to_box(torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a category for each of 1 boxes; came"):
        b.non_maximum_suppression(np.zeros((1, 4)), [1.0], 0.5, [])
    with pytest.raises(ValueError, match=r"box 1 is not finite: \[0.0, inf, 0.0, 0.0\]"):
        b.non_maximum_suppression([[0, 0, 1, 1], [0, np.inf, 0, 0]], [1.0, 2.0], 0.5)
    with pytest.raises(ValueError, match="score 1 is not a number"):
        b.non_maximum_suppression(np.zeros((2, 4)), [1.0, np.nan], 0.5)
    with pytest.raises(ValueError, match=r"wanted a mask \[H, W\] of bool; came \[2\] of float64"):
        b.box_of(np.zeros(2))
    for convert in (b.box_xyxy_to_xywh, b.box_xywh_to_xyxy):
        with pytest.raises(ValueError, match=r"wanted boxes \[..., 4\]; came \[2, 3\]"):
            convert(torch.zeros(2, 3))


@given(hypothesis_arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)))
def test_the_box_of_one_mask(mask):
    rows, columns = np.nonzero(mask)
    wanted = (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else (0, 0, 0, 0)
    assert b.box_of(mask) == wanted
    assert b.batched_mask_to_box(torch.from_numpy(mask)).tolist() == list(wanted)


def test_notations_there_and_back():
    corners = torch.tensor([[[1.0, 2.0, 4.0, 8.0]], [[0.5, 0.0, 0.5, 3.0]]])
    sizes = b.box_xyxy_to_xywh(corners)
    assert sizes.tolist() == [[[1, 2, 3, 6]], [[0.5, 0, 0, 3]]]
    assert torch.equal(b.box_xywh_to_xyxy(sizes), corners)
    assert corners[0, 0].tolist() == [1, 2, 4, 8]  # not changed


def test_torchvisions_names():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60.0]])
    scores = torch.tensor([0.5, 0.9, 0.5, 0.1], dtype=torch.float16)
    assert b.nms(boxes, scores, 0.8).tolist() == [1, 3]
    assert b.nms(boxes, scores, 0.9).tolist() == [1, 0, 3]  # 0.9 does not exceed 0.9 in float32
    assert b.nms(boxes, scores, 0.95).tolist() == [1, 0, 3]  # of equal ones the first
    kinds = torch.tensor([7, 7, -2, 7])
    assert b.batched_nms(boxes, scores, kinds, 0.8).tolist() == [1, 2, 3]
    assert b.batched_nms(boxes, scores, torch.zeros(4), 0.8).tolist() == [1, 3]
    none = b.nms(boxes[:0], scores[:0], 0.5)
    assert (none.shape, none.dtype) == ((0,), torch.int64)


def test_categories_across_blocks(monkeypatch):
    generator = np.random.default_rng(1)
    corner = generator.uniform(0, 30, (90, 2))
    boxes = np.concatenate([corner, corner + generator.uniform(5, 20, (90, 2))], axis=1)
    scores, kinds = generator.uniform(size=90), generator.integers(0, 3, 90)
    monkeypatch.setattr(b, "BLOCK", 8)
    each = [np.flatnonzero(kinds == kind) for kind in range(3)]
    wanted = np.concatenate(
        [one[b.non_maximum_suppression(boxes[one], scores[one], 0.4)] for one in each]
    )
    kept = b.non_maximum_suppression(boxes, scores, 0.4, kinds)
    assert kept.tolist() == wanted[np.argsort(-scores[wanted])].tolist()


def test_boxes_of_no_area_leave_each_other_alone():
    points = np.array([[3, 3, 3, 3], [3, 3, 3, 3], [0, 0, 9, 9]], np.float32)
    assert b.non_maximum_suppression(points, [3, 2, 1], 0.0).tolist() == [0, 1, 2]
    overlaps = b.box_iou(points, points)
    assert overlaps.dtype == np.float32
    assert overlaps.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


class TestUncrop:
    crop = (3, 1, 7, 4)

    def test_places(self):
        boxes = torch.tensor([[0, 0, 3, 2], [1.5, 1, 2, 2]])
        assert b.uncrop_boxes(boxes, self.crop).tolist() == [[3, 1, 6, 3], [4.5, 2, 5, 3]]
        points = torch.tensor([[[0, 0], [2.5, 1]]])
        assert b.uncrop_points(points, self.crop).tolist() == [[[3, 1], [5.5, 2]]]
        assert b.uncrop_boxes(boxes[:0], self.crop).shape == (0, 4)

    def test_masks(self):
        masks = torch.rand(2, 3, 4) > 0.5
        placed = b.uncrop_masks(masks, self.crop, 5, 9)
        assert (placed.shape, placed.dtype) == ((2, 5, 9), torch.bool)
        assert torch.equal(placed[:, 1:4, 3:7], masks)
        assert placed.sum() == masks.sum()

    def test_wrong_input(self):
        masks = torch.zeros(1, 3, 4)
        with pytest.raises(ValueError, match=r"\[..., 3, 4\], of the size of the crop .*; came"):
            b.uncrop_masks(masks.mT, self.crop, 5, 9)
        with pytest.raises(ValueError, match=r"crop \[3, 1, 7, 4\] does not lie within .* 5 x 6"):
            b.uncrop_masks(masks, self.crop, 5, 6)
        with pytest.raises(ValueError, match=r"wanted points \[..., 2\]; came \[3\]"):
            b.uncrop_points(torch.zeros(3), self.crop)
