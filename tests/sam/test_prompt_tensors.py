from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyvit.image_spec import ImageSpec
from tinyvit.sam.decoder import PromptTensors, group_prompts, stack_prompts
from tinyvit.sam.prompts import Prompt

PLACEMENT = ImageSpec.sam(64).place(24, 32)  # twice the size
LOW_RES, FRAME = (16, 16), (64, 64)
POINTS = torch.zeros(3, 2, 2)


def test_prompts_are_moved_to_the_model_and_stacked():
    prompts = [
        Prompt([[1, 2], [3, 4]], [1, 0], [0, 0, 10, 20], np.full(LOW_RES, 5.0)),
        Prompt([[5, 6], [7, 8]], [0, 0], [1, 2, 3, 4], np.full(LOW_RES, 7.0)),
    ]
    tensors = stack_prompts(prompts, PLACEMENT, LOW_RES, FRAME)
    coords, labels = tensors.points
    assert coords.tolist() == [[[2, 4], [6, 8]], [[10, 12], [14, 16]]]
    assert coords.dtype == tensors.boxes.dtype == tensors.masks.dtype == torch.float32
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
    tensors = stack_prompts([prompt], PLACEMENT, LOW_RES, FRAME)
    parts = tensors.points, tensors.boxes, tensors.masks
    assert tuple(part is not None for part in parts) == given
    assert len(tensors) == 1


def test_groups_are_of_one_number_of_points_with_or_without_box_and_mask():
    one, two = Prompt([[1, 2]]), Prompt([[1, 2], [3, 4]])
    box, both = Prompt(box=[0, 0, 1, 1]), Prompt([[1, 2]], box=[0, 0, 1, 1])
    mask = Prompt([[1, 2]], mask=np.zeros(LOW_RES))
    groups = group_prompts([one, box, two, one, both, mask, box])
    assert groups == {
        (1, False, False): [0, 3],
        (0, True, False): [1, 6],
        (2, False, False): [2],
        (1, True, False): [4],
        (1, False, True): [5],
    }
    assert group_prompts([]) == {}
    with pytest.raises(ValueError, match="only prompts of one kind can be stacked"):
        stack_prompts([one, two], PLACEMENT, LOW_RES, FRAME)


def test_a_part_has_some_of_the_prompts():
    labels = torch.tensor([[1, 0], [1, 1], [0, -1]])
    tensors = PromptTensors((POINTS, labels), torch.arange(12.0).view(3, 4), None)
    part = tensors.part(1, 9)
    assert len(part) == 2
    assert part.points[1].tolist() == [[1, 1], [0, -1]]
    assert part.boxes[0].tolist() == [4, 5, 6, 7]
    assert part.masks is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "nothing is prompted; give points, boxes or masks"),
        ({"points": (torch.zeros(2, 2), torch.ones(2))}, r"point_coords .* \[B, N, 2\]; came"),
        ({"points": (POINTS, torch.ones(3))}, r"point_labels .* \[3, 2\]; came \[3\]"),
        ({"points": (POINTS, torch.full((3, 2), 2))}, r"1, 0, or -1 .*; came \[2\]"),
        ({"points": (POINTS / 0, torch.ones(3, 2))}, "point_coords must be finite"),
        ({"boxes": torch.zeros(4)}, r"boxes must have the shape \[B, 4\]; came \[4\]"),
        ({"boxes": np.zeros((1, 4))}, "boxes must be a tensor, came ndarray"),
        ({"masks": torch.zeros(1, 4, 4)}, r"mask_input .* \[B, 1, h4, w4\]; came \[1, 4, 4\]"),
        ({"masks": torch.zeros(1, 2, 4, 4)}, r"mask_input .*; came \[1, 2, 4, 4\]"),
        (
            {"points": (POINTS, torch.ones(3, 2)), "boxes": torch.zeros(2, 4)},
            "the same objects; came 3 in point_coords, 2 in boxes",
        ),
    ],
)
def test_wrong_tensors_say_what_was_wanted(arguments, words):
    with pytest.raises(ValueError, match=words):
        PromptTensors(**arguments)
