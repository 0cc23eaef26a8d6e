from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.image_spec import ImageSpec
from tinyvit.sam.prompts import SURE, mask_to_logits
from tinyvit.sam.upscale import upscale


def test_logits_are_given_back():
    logits = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    found = mask_to_logits(logits, ImageSpec.sam(64).place(48, 64), (16, 16), (64, 64))
    assert torch.equal(found, torch.from_numpy(logits))


def test_a_cell_has_what_is_covered_of_it():
    mask = np.zeros((64, 64), bool)
    mask[:8, :6] = True  # two rows of cells; one and a half columns
    found = mask_to_logits(mask, ImageSpec.sam(64).place(64, 64), (16, 16), (64, 64))
    # the pixels are counted exactly: no resizing here
    assert found[:2, :3].tolist() == [[SURE, 0, -SURE]] * 2
    assert (found[2:] == -SURE).all()


def test_padding_is_not_the_object():
    found = mask_to_logits(
        np.ones((24, 32), bool), ImageSpec.sam(64).place(24, 32), (16, 16), (64, 64)
    )
    assert (found[:12] == SURE).all()
    assert (found[12:] == -SURE).all()


def test_an_unpadded_image_has_a_smaller_grid():
    placement = ImageSpec.sam(64, pad=False).place(24, 32)  # 48 x 64, which is 3 x 4 cells
    found = mask_to_logits(np.ones((24, 32), bool), placement, (12, 16), (48, 64))
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
    logits = mask_to_logits(mask, placement, (32, 32), (128, 128))
    again = upscale(logits[None], placement)[0].numpy() > 0
    # In the first row, away from the padding. A cell is 4 pixels of 128 on the longer side; an
    # edge moves by less than half of one, in whole pixels, and there are two edges.
    cell = max(height, width) / 32
    assert (again != mask)[0].sum() <= 2 * np.ceil(cell / 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_the_thinnest_images_will_do(size):
    placement = ImageSpec.sam(64).place(*size)
    found = mask_to_logits(np.ones(size, bool), placement, (16, 16), (64, 64))
    assert found.isfinite().all()
    assert found.max() > -SURE
