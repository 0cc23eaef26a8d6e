import pytest
import torch

from tinyvit.modules.sam.transformer import Attention
from tinyvit.sam.fast_decoder import TILE, ImageToToken, TokenToImage, in_tiles, softmax

CELLS, TOKENS, CHANNELS, PROMPTS = 35, 6, 32, 3
ROUNDING = 2e-6  # fp32; the products are summed in another order


@pytest.fixture
def attention(randomise):
    return randomise(Attention(CHANNELS, num_heads=4, downsample_rate=2)).eval()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def tensors():
    tokens, cells = torch.randn(PROMPTS, TOKENS, CHANNELS), torch.randn(PROMPTS, CELLS, CHANNELS)
    return tokens, cells, torch.randn(CELLS, CHANNELS)


def test_tokens_look_at_shared_cells(attention, tensors):
    tokens, cells, positions = tensors
    fast = TokenToImage(attention)
    keys, values = fast.project(cells[0], cells[0] + positions)
    got = fast.attend_shared(tokens, keys, values)
    every = cells[:1].expand(PROMPTS, -1, -1)
    torch.testing.assert_close(
        got, attention(tokens, every + positions, every), atol=ROUNDING, rtol=0
    )


def test_tokens_look_at_own_cells(attention, tensors):
    tokens, cells, positions = tensors
    fast = TokenToImage(attention)
    got = fast.attend(tokens, list(cells), fast.project_positions(positions))
    wanted = attention(tokens, cells + positions, cells)
    torch.testing.assert_close(got, wanted, atol=ROUNDING, rtol=0)


def test_shared_cells_look_at_tokens(attention, tensors):
    tokens, cells, positions = tensors
    placed = torch.randn_like(tokens)
    fast = ImageToToken(attention)
    queries = fast.project(cells[0] + positions)
    got = [w.T @ v for w, v in fast.weigh_shared(placed, tokens, queries)]
    every = cells[:1].expand(PROMPTS, -1, -1) + positions
    wanted = attention(every, placed, tokens)
    torch.testing.assert_close(torch.stack(got), wanted, atol=ROUNDING, rtol=0)


def test_own_cells_look_at_tokens(attention, tensors):
    tokens, cells, positions = tensors
    placed = torch.randn_like(tokens)
    fast = ImageToToken(attention)
    weighed = fast.weigh(placed, tokens, list(cells), fast.project(positions))
    got = [w.T @ v for w, v in weighed]
    wanted = attention(cells + positions, placed, tokens)
    torch.testing.assert_close(torch.stack(got), wanted, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("cells", [0, 1, TILE - 1, TILE, TILE + 1, 3 * TILE])
def test_tiles_cover_every_cell_once(cells):
    assert [i for rows in in_tiles(cells) for i in range(rows.start, rows.stop)] == list(
        range(cells)
    )


def test_softmax_has_no_weights_that_only_cost_time():
    scores = torch.tensor([[0.0, -50.0, -90.0, -100.0]])
    weights = softmax(scores, 1)
    torch.testing.assert_close(weights, torch.softmax(scores.double(), 1).float())
    assert 0 < weights[0, 1] < 1e-20
    assert weights[0, 2:].tolist() == [0.0, 0.0]  # 8e-40 and 4e-44 otherwise
    tiny = torch.finfo(torch.float32).tiny
    assert not ((weights > 0) & (weights < tiny)).any()
