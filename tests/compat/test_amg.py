"""The functions of ``utils.amg`` one by one; right values are counted by hand."""

import numpy as np
import pytest
import torch

from tinyvit.compat.segment_anything.utils import amg


@pytest.fixture
def mask():
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[0, 1:3, 2:6] = True
    return mask


def test_boxes_hold_the_first_and_the_last_pixel(mask):
    assert amg.batched_mask_to_box(mask).tolist() == [[2, 1, 5, 2], [0, 0, 0, 0]]
    assert amg.batched_mask_to_box(mask[0]).tolist() == [2, 1, 5, 2]
    assert amg.batched_mask_to_box(mask[None]).shape == (1, 2, 4)
    one = torch.zeros(3, 3, dtype=torch.bool)
    one[0, 0] = True
    assert amg.batched_mask_to_box(one).tolist() == [0, 0, 0, 0]
    assert amg.box_xyxy_to_xywh(torch.tensor([[2, 1, 5, 2]])).tolist() == [[2, 1, 3, 1]]
    given = np.array([2, 1, 5, 2])
    assert amg.box_xyxy_to_xywh(given).tolist() == [2, 1, 3, 1]
    assert given.tolist() == [2, 1, 5, 2]


def test_run_lengths(mask):
    rles = amg.mask_to_rle_pytorch(mask)
    assert rles[0] == {"size": [5, 7], "counts": [11, 2, 3, 2, 3, 2, 3, 2, 7]}
    assert rles[1] == {"size": [5, 7], "counts": [35]}
    assert np.array_equal(amg.rle_to_mask(rles[0]), mask[0].numpy())
    assert [amg.area_from_rle(rle) for rle in rles] == [8, 0]
    text = amg.coco_encode_rle(rles[0])
    assert isinstance(text["counts"], str)
    assert np.array_equal(amg.rle_to_mask(text), mask[0].numpy())


def test_stability_is_an_iou_of_two_thresholds():
    logits = torch.tensor([[[-3.0, -0.5, 0.5, 2.0]], [[5.0, 5.0, 5.0, 5.0]]])
    assert amg.calculate_stability_score(logits, 0.0, 1.0).tolist() == [pytest.approx(1 / 3), 1.0]


def test_crops_are_placed_in_the_image():
    crop = [10, 20, 40, 40]
    boxes = torch.tensor([[1, 2, 3, 4]])
    assert amg.uncrop_boxes_xyxy(boxes, crop).tolist() == [[11, 22, 13, 24]]
    assert amg.uncrop_boxes_xyxy(boxes[None], crop).tolist() == [[[11, 22, 13, 24]]]
    assert amg.uncrop_points(torch.tensor([[1.5, 2.0]]), crop).tolist() == [[11.5, 22.0]]
    placed = amg.uncrop_masks(torch.ones(1, 20, 30, dtype=torch.bool), crop, 60, 80)
    assert placed.shape == (1, 60, 80)
    assert placed[0, 20:40, 10:40].all() and placed.sum() == 600
    near = torch.tensor([[5.0, 25.0, 29.0, 35.0], [100.0, 100.0, 200.0, 200.0]])
    edge = amg.is_box_near_crop_edge(near, [100, 100, 500, 500], [0, 0, 900, 900], atol=20)
    assert edge.tolist() == [True, False]


def test_batches_and_small_regions(mask):
    assert [a for (a,) in amg.batch_iterator(2, [1, 2, 3])] == [[1, 2], [3]]
    with pytest.raises(ValueError, match="one length"):
        list(amg.batch_iterator(2, [1], [1, 2]))
    holed = np.ones((5, 5), bool)
    holed[2, 2] = False
    cleaned, is_changed = amg.remove_small_regions(holed, 2, "holes")
    assert cleaned.all() and is_changed


def test_mask_data_keeps_its_values_together():
    data = amg.MaskData(a=torch.arange(3), b=[1, 2, 3], c=np.arange(3))
    data.filter(torch.tensor([True, False, True]))
    assert data["a"].tolist() == data["c"].tolist() == [0, 2] and data["b"] == [1, 3]
    data.filter(torch.tensor([1, 0]))
    assert data["a"].tolist() == data["c"].tolist() == [2, 0] and data["b"] == [3, 1]
    both = amg.MaskData()
    both.cat(data)
    both.cat(data)
    assert both["a"].tolist() == [2, 0, 2, 0] and both["b"] == [3, 1, 3, 1]
    assert both["c"].tolist() == [2, 0, 2, 0]
    both.to_numpy()
    assert isinstance(both["a"], np.ndarray)
    del both["a"]
    assert [key for key, _ in both.items()] == ["b", "c"]
    with pytest.raises(TypeError, match="lists, arrays and tensors; a is a int"):
        amg.MaskData(a=1)
