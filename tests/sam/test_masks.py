from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tinyvit.image_spec import ImageSpec
from tinyvit.sam.prompts import Prompt
from tinyvit.sam.segmenter import Masks, enlarge
from tinyvit.sam.upscale import upscale

PLACEMENT = ImageSpec.sam(64).place(32, 64)
PITCH = 4.0


def block(top, bottom, left, right, size=16):
    """Logits of a block of cells: +6 in it, -6 elsewhere."""
    logits = torch.full((size, size), -6.0)
    logits[top:bottom, left:right] = 6.0
    return logits


EMPTY = torch.full((16, 16), -6.0)
LOW_RES = (
    torch.stack([block(0, 2, 0, 4), block(2, 6, 4, 12), EMPTY]),
    block(0, 8, 0, 16)[None],
    EMPTY[None],
)
IOUS = tuple(np.array(v, np.float32) for v in ([0.5, 0.9, 0.1], [0.7], [0.2]))


@pytest.fixture
def masks():
    prompts = Prompt([[1, 2]], name="cat"), Prompt(box=[0, 0, 3, 4]), Prompt([[1, 2], [3, 4]])
    return Masks(prompts, LOW_RES, IOUS, PLACEMENT, PITCH)


def test_scores_of_masks_that_a_prompt_does_not_have_are_nan(masks):
    assert masks.shape == (3, 3, 32, 64)
    assert len(masks) == 3
    nan = np.nan
    wanted = np.array([[0.5, 0.9, 0.1], [0.7, nan, nan], [0.2, nan, nan]], np.float32)
    np.testing.assert_array_equal(masks.scores, wanted)
    assert masks.best().tolist() == [1, 0, 0]
    assert "3 prompts, up to 3 masks each, image 32x64" in repr(masks)


def test_a_mask_is_its_logits_above_the_threshold(masks):
    for prompt, token in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0)):
        wanted = upscale(LOW_RES[prompt][token][None], PLACEMENT)[0].numpy()
        np.testing.assert_array_equal(masks.logits(prompt, token), wanted)
        np.testing.assert_array_equal(masks.mask(prompt, token), wanted > 0)
    strict = Masks(masks.prompts, LOW_RES, IOUS, PLACEMENT, PITCH, threshold=3.0)
    np.testing.assert_array_equal(strict.mask(0), strict.logits(0) > 3)


def test_the_best_is_what_comes_when_nothing_else_is_said(masks):
    np.testing.assert_array_equal(masks.mask(0), masks.mask(0, 1))
    for number, mask in enumerate(masks):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, masks.mask(number))


def test_all_at_once(masks):
    found = masks.to_numpy()
    assert found.shape == (3, 3, 32, 64)
    np.testing.assert_array_equal(found[0, 1], masks.mask(0))
    np.testing.assert_array_equal(found[1, 0], masks.mask(1))
    assert not found[1, 1:].any()


def test_boxes_are_around_the_best(masks):
    # cells are 4 pixels and the logits of neighbours are each other's negative, so that an edge
    # lies exactly between two cells; the image ends at row 32
    assert masks.boxes.tolist() == [[16, 8, 48, 24], [0, 0, 64, 32], [0, 0, 0, 0]]


def test_coco_has_what_its_tools_read(masks):
    annotations = masks.to_coco(image_id=7, category_id=3)
    assert json.loads(json.dumps(annotations)) == annotations
    first = annotations[0]
    assert first["image_id"] == 7
    assert first["category_id"] == 3
    assert first["bbox"] == [16, 8, 32, 16]
    assert first["area"] == masks.mask(0).sum() == 32 * 16 - 4  # bilinear rounds the corners
    assert first["score"] == first["predicted_iou"] == pytest.approx(0.9)
    assert first["iscrowd"] == 0
    assert first["prompt"] == {"points": [[1, 2]], "labels": [1], "name": "cat"}
    assert first["segmentation"]["size"] == [32, 64]
    assert isinstance(first["segmentation"]["counts"], str)
    assert annotations[2]["bbox"] == [0, 0, 0, 0]
    assert annotations[2]["area"] == 0


def test_no_prompts_have_no_masks():
    masks = Masks((), (), (), PLACEMENT, PITCH)
    assert masks.shape == (0, 0, 32, 64)
    assert masks.scores.shape == (0, 0)
    assert masks.boxes.shape == (0, 4)
    assert masks.best().shape == (0,)
    assert masks.to_numpy().shape == (0, 0, 32, 64)
    assert masks.to_coco(1) == list(masks) == []


def test_what_is_not_there(masks):
    with pytest.raises(IndexError, match="there are 3 prompts; there is no prompt 3"):
        masks.mask(3)
    with pytest.raises(IndexError, match="prompt 1 has 1 masks; there is no mask 1"):
        masks.mask(1, 1)
    assert np.array_equal(masks.mask(-2), masks.mask(1))


def test_many_are_enlarged_one_by_one():
    stack = torch.stack([LOW_RES[0], LOW_RES[0].flip(0)])
    logits = enlarge(stack, PLACEMENT, PITCH, None)
    assert logits.shape == (2, 3, 32, 64)
    wanted = upscale(stack.flatten(0, 1), PLACEMENT).view(2, 3, 32, 64)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
    assert torch.equal(enlarge(stack, PLACEMENT, PITCH, 0.5), wanted > 0.5)
    assert enlarge(stack[:0], PLACEMENT, PITCH, 0.0).shape == (0, 3, 32, 64)
