"""One-pass window copies against the plain ones of the modules room."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.inference.fast_encoder import copy_from_windows, copy_to_windows
from tinyvit.modules.functional import partition, unpartition

sizes = st.integers(1, 17)


@given(st.integers(0, 3), sizes, sizes, st.integers(1, 8))
def test_zero_padding_gives_the_plain_windows_and_the_way_back_gives_the_map(b, h, w, side):
    x = torch.randn(b, h, w, 3)
    windows = copy_to_windows(x, side, torch.zeros(3))
    assert torch.equal(windows, partition(x, side))
    assert torch.equal(copy_from_windows(windows, side, x), x)
    assert torch.equal(unpartition(windows, side, b, (h, w)), x)


def test_padding_stands_wherever_a_window_leaves_the_map():
    padding = torch.tensor([7.0, -1.0])
    x = torch.randn(1, 4, 5, 2)
    windows = copy_to_windows(x, 3, padding).view(2, 2, 3, 3, 2)
    as_map = windows.transpose(1, 2).reshape(6, 6, 2)
    assert torch.equal(as_map[:4, :5], x[0])
    assert (as_map[4:] == padding).all()
    assert (as_map[:, 5:] == padding).all()
