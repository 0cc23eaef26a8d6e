"""Prompts, their checks, batches of one kind, and masks as logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.image_spec import ImageSpec
from tinyvit.sam.prompts import (
    SURE,
    Prompt,
    PromptBatch,
    mask_to_logits,
    stack_prompts,
    to_prompt,
)
from tinyvit.sam.upscale import upscale

LOGITS = np.zeros((16, 16), np.float32)
MASK = np.zeros((48, 64), bool)


def test_what_is_given_becomes_arrays():
    prompt = Prompt([[1, 2], [3, 4]], [1, 0], box=(1, 2, 3, 4), mask=LOGITS[None], name="cat")
    assert prompt.points.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert prompt.labels.tolist() == [1, 0]
    assert prompt.box.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert prompt.mask.shape == (16, 16)
    assert prompt.name == "cat"
    assert prompt.kind == (2, True, True)


def test_labels_are_1_unless_said_otherwise():
    assert Prompt(points=[[1, 2], [3, 4]]).labels.tolist() == [1, 1]
    assert Prompt(box=[0, 0, 1, 1]).labels is None


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor])
def test_any_container_of_numbers_will_do(convert):
    prompt = Prompt(convert([[1.5, 2.5]]), convert([0]), convert([0, 0, 1, 1]))
    assert (prompt.points.tolist(), prompt.labels.tolist()) == ([[1.5, 2.5]], [0])


def test_a_prompt_is_a_value_of_its_own():
    points = np.array([[1.0, 2.0]])
    prompt = Prompt(points)
    points[0, 0] = 9
    assert prompt.points[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        prompt.points[0, 0] = 9
    with pytest.raises(AttributeError):
        prompt.name = "another"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "nothing is prompted; give points, a box or a mask"),
        ({"labels": [1]}, "labels came without points"),
        ({"points": []}, "but are empty; leave them out"),
        ({"points": np.zeros((0, 2))}, "but are empty; leave them out"),
        ({"points": [1, 2]}, r"in the shape \[P, 2\]; came \[2\]"),
        ({"points": [[1, 2, 3]]}, r"in the shape \[P, 2\]; came \[1, 3\]"),
        ({"points": [[1, 2], [3]]}, "points must be .* of numbers; came"),
        ({"points": "here"}, "points must be .* of numbers; came 'here'"),
        ({"points": [[1, float("nan")]]}, "points must be finite numbers; came"),
        ({"points": [[1, float("inf")]]}, "points must be finite numbers; came"),
        ({"points": [[1, 2]], "labels": [1, 1]}, r"1 points, so \[1\]; came \[2\]"),
        ({"points": [[1, 2]], "labels": 1}, r"1 points, so \[1\]; came \[\]"),
        ({"points": [[1, 2]], "labels": [2]}, r"must be 1 .* or 0 .*; came \[2"),
        ({"points": [[1, 2]], "labels": [-1]}, r"must be 1 .* or 0 .*; came \[-1"),
        ({"points": [[1, 2]], "labels": [0.5]}, r"must be 1 .* or 0 .*; came \[0.5\]"),
        ({"points": [[1, 2]], "labels": [float("nan")]}, "labels must be finite"),
        ({"box": [1, 2, 3]}, r"one box \(x0, y0, x1, y1\), \[4\]; came \[3\]"),
        ({"box": [[0, 0, 1, 1], [0, 0, 1, 1]]}, r"one box .* came \[2, 4\]"),
        ({"box": [3, 2, 1, 4]}, "with x1 < x0; a box .x, y, width, height. is"),
        ({"box": [1, 4, 3, 2]}, "with y1 < y0"),
        ({"box": [1, 2, 1, 4]}, "with x1 = x0"),
        ({"box": [1, 2, float("nan"), 4]}, "box must be finite numbers"),
        ({"mask": np.zeros((2, 16, 16), np.float32)}, r"came \[2, 16, 16\] of float32"),
        ({"mask": np.zeros((16, 16), np.uint8)}, r"of uint8; mask.astype\(bool\)"),
        ({"mask": np.zeros((0, 16), bool)}, r"came \[0, 16\] of bool"),
        ({"mask": np.full((16, 16), np.nan)}, "mask must be finite logits"),
    ],
)
def test_wrong_prompts_say_what_was_wanted(arguments, words):
    with pytest.raises(ValueError, match=words):
        Prompt(**arguments)


@pytest.mark.parametrize(
    "prompt, words",
    [
        (Prompt([[65, 10]]), r"point 0 at \(x, y\) = \(65, 10\) .* width 64 and height 48"),
        (Prompt([[1, 1], [10, 70]]), "point 1 at .* 0 <= x <= 64 and 0 <= y <= 48$"),
        (Prompt([[10, 60]]), "are x and y swapped"),
        (Prompt([[-1.1, 10]]), "point 0 at"),
        (Prompt(box=[0, 0, 65, 10]), r"the box's corner .* \(65, 10\)"),
        (Prompt(box=[-1, 0, 6, 10]), r"the box's corner .* \(-1, 0\)"),
        (Prompt(mask=np.zeros((64, 48), bool)), r"\[48, 64\], or .* came \[64, 48\] of bool"),
        (Prompt(mask=np.zeros((8, 8))), r"\[16, 16\] of floats; came \[8, 8\] of float32"),
        (Prompt(mask=np.zeros((48, 64))), r"\[16, 16\] of floats; came \[48, 64\]"),
    ],
)
def test_a_prompt_must_lie_in_the_image(prompt, words):
    with pytest.raises(ValueError, match=words):
        prompt.check_in((48, 64), (16, 16))


def test_the_edges_belong_to_the_image():
    Prompt([[0, 0], [64, 48]], box=[0, 0, 64, 48], mask=MASK).check_in((48, 64), (16, 16))
    Prompt([[0, 0]], mask=LOGITS).check_in((48, 64), (16, 16))


def test_it_describes_itself_for_json():
    prompt = Prompt([[1, 2]], box=[0, 0, 3, 4], mask=MASK, name="cat")
    described = json.loads(json.dumps(prompt.describe()))
    assert described == {
        "points": [[1, 2]],
        "labels": [1],
        "box": [0, 0, 3, 4],
        "mask": True,
        "name": "cat",
    }
    assert Prompt(box=[0, 0, 3, 4]).describe() == {"box": [0, 0, 3, 4]}


def test_a_dictionary_is_a_prompt_too():
    prompt = Prompt([[1, 2]])
    assert to_prompt(prompt) is prompt
    assert to_prompt({"points": [[1, 2]], "labels": [0]}).labels.tolist() == [0]
    with pytest.raises(ValueError, match=r"a prompt has the keys points, .*; came \['point'\]"):
        to_prompt({"point": [[1, 2]]})
    with pytest.raises(TypeError, match=r"wanted a Prompt or a dictionary .* came list"):
        to_prompt([[1, 2]])


PLACEMENT = ImageSpec.sam(64).place(24, 32)  # twice the size
LOW_RES, STRIDE = (16, 16), 4.0
POINTS = np.zeros((3, 2, 2), np.float32)


def test_prompts_are_moved_to_the_model_and_stacked():
    prompts = [
        Prompt([[1, 2], [3, 4]], [1, 0], [0, 0, 10, 20], np.full(LOW_RES, 5.0)),
        Prompt([[5, 6], [7, 8]], [0, 0], [1, 2, 3, 4], np.full(LOW_RES, 7.0)),
    ]
    tensors = stack_prompts(prompts, PLACEMENT, LOW_RES, STRIDE)
    coords, labels = tensors.points
    assert coords.tolist() == [[[2, 4], [6, 8]], [[10, 12], [14, 16]]]
    assert coords.dtype == tensors.boxes.dtype == tensors.masks.dtype == np.float32
    assert labels.tolist() == [[1, 0], [0, 0]]
    assert tensors.boxes.tolist() == [[0, 0, 20, 40], [2, 4, 6, 8]]
    assert tensors.masks.shape == (2, 1, 16, 16)
    assert tensors.masks[:, 0, 0, 0].tolist() == [5, 7]
    assert len(tensors) == 2


@pytest.mark.parametrize(
    "prompt, given",
    [
        (Prompt([[1, 2]]), (True, False, False)),
        (Prompt(box=[0, 0, 1, 1]), (False, True, False)),
        (Prompt(mask=np.zeros(LOW_RES)), (False, False, True)),
    ],
)
def test_what_is_not_prompted_is_none(prompt, given):
    tensors = stack_prompts([prompt], PLACEMENT, LOW_RES, STRIDE)
    parts = tensors.points, tensors.boxes, tensors.masks
    assert tuple(part is not None for part in parts) == given
    assert len(tensors) == 1


def test_a_part_has_some_of_the_prompts():
    labels = np.array([[1, 0], [1, 1], [0, -1]])
    tensors = PromptBatch((POINTS, labels), np.arange(12.0).reshape(3, 4), None)
    part = tensors.part(1, 9)
    assert len(part) == 2
    assert part.points[1].tolist() == [[1, 1], [0, -1]]
    assert part.boxes[0].tolist() == [4, 5, 6, 7]
    assert part.masks is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "nothing is prompted; give points, boxes or masks"),
        (
            {"points": (POINTS, np.ones((3, 2))), "boxes": np.zeros((2, 4))},
            "the same objects; came 3 in point_coords, 2 in boxes",
        ),
    ],
)
def test_wrong_arrays_say_what_was_wanted(arguments, words):
    with pytest.raises(ValueError, match=words):
        PromptBatch(**arguments)


def test_logits_are_given_back():
    logits = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    found = mask_to_logits(logits, ImageSpec.sam(64).place(48, 64), (16, 16), 4.0)
    assert np.array_equal(found, logits)


def test_a_low_res_pixel_has_what_is_covered_of_it():
    mask = np.zeros((64, 64), bool)
    mask[:8, :6] = True  # two rows of cells; one and a half columns
    found = mask_to_logits(mask, ImageSpec.sam(64).place(64, 64), (16, 16), 4.0)
    # the pixels are counted exactly: no resizing here
    assert found[:2, :3].tolist() == [[SURE, 0, -SURE]] * 2
    assert (found[2:] == -SURE).all()


def test_padding_is_not_the_object():
    found = mask_to_logits(np.ones((24, 32), bool), ImageSpec.sam(64).place(24, 32), (16, 16), 4.0)
    assert (found[:12] == SURE).all()
    assert (found[12:] == -SURE).all()


def test_an_unpadded_image_has_a_smaller_grid():
    placement = ImageSpec.sam(64, pad=False).place(24, 32)  # 48 x 64, which is 3 x 4 cells
    found = mask_to_logits(np.ones((24, 32), bool), placement, (12, 16), 4.0)
    assert found.shape == (12, 16)
    assert (found == SURE).all()


@given(
    height=st.integers(20, 200),
    width=st.integers(20, 200),
    left=st.floats(0, 0.4),
    right=st.floats(0.6, 1),
)
def test_the_outline_stays_where_it_was(height, width, left, right):
    placement = ImageSpec.sam(128).place(height, width)
    mask = np.zeros((height, width), bool)
    mask[:, round(left * width) : round(right * width)] = True
    logits = mask_to_logits(mask, placement, (32, 32), 4.0)
    again = upscale(logits, placement) > 0
    # In the first row, away from the padding. A low-res pixel is 4 of 128 on the longer side; an
    # edge moves by less than half of one, in whole pixels, and there are two edges.
    side = max(height, width) / 32
    assert (again != mask)[0].sum() <= 2 * np.ceil(side / 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_the_thinnest_images_will_do(size):
    placement = ImageSpec.sam(64).place(*size)
    found = mask_to_logits(np.ones(size, bool), placement, (16, 16), 4.0)
    assert np.isfinite(found).all()
    assert found.max() > -SURE
