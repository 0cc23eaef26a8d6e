from __future__ import annotations

import pytest
import torch

from tinyvit.checkpoints.resize import resize_bias_table, resize_bias_tables
from tinyvit.errors import CheckpointError


def keys_weight(distance: float) -> float:
    """Keys' cubic kernel with a = -0.75, torch's plain bicubic."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def plain(table: torch.Tensor, side: int) -> torch.Tensor:
    """Bicubic resizing written out: half-pixel centres, clamped borders."""
    old = round(table.shape[1] ** 0.5)
    rows = torch.zeros(side, old, dtype=torch.float64)
    for i in range(side):
        centre = (i + 0.5) * old / side - 0.5
        for tap in range(int(centre // 1) - 1, int(centre // 1) + 3):
            rows[i, min(max(tap, 0), old - 1)] += keys_weight(centre - tap)
    image = table.double().view(-1, old, old)
    return (rows @ image @ rows.T).reshape(table.shape[0], side * side)


@pytest.mark.parametrize(("old", "new"), [(7, 12), (14, 24), (7, 16), (14, 7), (3, 8)])
def test_plain_resizing_is_keys_cubic(old: int, new: int) -> None:
    table = torch.randn(3, old * old, generator=torch.Generator().manual_seed(old))
    resized = resize_bias_table(table, new)
    # float32 arithmetic on numbers of size one
    torch.testing.assert_close(resized.double(), plain(table, new), rtol=0, atol=5e-6)


def test_antialias_matters_only_when_the_table_shrinks() -> None:
    table = torch.randn(2, 14 * 14, generator=torch.Generator().manual_seed(0))
    shrunk = resize_bias_table(table, 7), resize_bias_table(table, 7, antialias=True)
    assert (shrunk[0] - shrunk[1]).abs().max() > 0.1
    constant = torch.full((2, 49), 0.25)
    torch.testing.assert_close(resize_bias_table(constant, 5, antialias=True), constant[:, :25])


def test_same_window_is_the_same_tensor() -> None:
    table = torch.randn(2, 49)
    assert resize_bias_table(table, 7) is table
    assert resize_bias_table(table, (7, 7), antialias=True) is table


def test_rectangle_and_dtypes() -> None:
    table = torch.randn(2, 49)
    assert resize_bias_table(table, (3, 5)).shape == (2, 15)
    half = resize_bias_table(table.half(), 9)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, resize_bias_table(table.half().float(), 9).half())
    assert resize_bias_table(table.double(), 9).dtype == torch.float64


@pytest.mark.parametrize("table", [torch.zeros(2, 50), torch.zeros(49), torch.zeros(2, 0)])
def test_tables_of_the_wrong_shape(table: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"must be \[heads, side \* side\]"):
        resize_bias_table(table, 7)


def test_whole_numbers_are_no_biases() -> None:
    with pytest.raises(CheckpointError, match=r"torch\.int64"):
        resize_bias_table(torch.zeros(2, 49, dtype=torch.int64), 8)


def test_empty_window() -> None:
    with pytest.raises(ValueError, match="at least 1 by 1 token, got 0 by 0"):
        resize_bias_table(torch.zeros(2, 49), 0)


def test_a_state_dict() -> None:
    first, second = (
        "layers.1.blocks.0.attn.attention_biases",
        "layers.2.blocks.1.attn.attention_biases",
    )
    state = {first: torch.randn(2, 49), second: torch.randn(2, 196), "head.bias": torch.zeros(3)}
    fitted, resized = resize_bias_tables(state, (12, 12, 14, 12))
    assert resized == [first]
    assert fitted[first].shape == (2, 144)
    assert fitted[second] is state[second]
    assert fitted["head.bias"] is state["head.bias"]
    assert state[first].shape == (2, 49)
    with pytest.raises(ValueError, match="belongs to stage 3, but window_sizes names 2 stages"):
        resize_bias_tables(state, (7, 7))
