"""Positions by hand, the rules for points, boxes and masks, and any grid."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.modules.sam.prompt_encoder import PositionEmbeddingRandom, PromptEncoder

C = 8
# float32 against math.sin of doubles: angles of up to 30 rounded to 2e-6 each
NEAR = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def encoder(randomise):
    return randomise(PromptEncoder(C, (3, 5), (48, 80), 16))


def position(matrix, x, y):
    """PE of a point given in parts of the frame."""
    u, v = 2 * x - 1, 2 * y - 1
    angles = [2 * math.pi * (u * float(a) + v * float(b)) for a, b in zip(*matrix, strict=True)]
    return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])


def matrix_of(encoder):
    return encoder.pe_layer.positional_encoding_gaussian_matrix.tolist()


def test_positions_of_cells_by_hand(encoder):
    dense = encoder.get_dense_pe()
    assert dense.shape == (1, C, 3, 5)
    for row in range(3):
        for column in range(5):
            wanted = position(matrix_of(encoder), (column + 0.5) / 5, (row + 0.5) / 3)
            torch.testing.assert_close(dense[0, :, row, column], wanted, **NEAR)


def test_a_cells_centre_and_the_point_there_have_one_position(encoder):
    # the pixel whose centre is the cell's centre begins half a pixel before it
    points = torch.tensor([[[2.5 * 16 - 0.5, 1.5 * 16 - 0.5]]])
    sparse, _ = encoder((points, torch.tensor([[5]])), torch.zeros(1, 4), None)
    torch.testing.assert_close(sparse[0, 0], encoder.get_dense_pe()[0, :, 1, 2], **NEAR)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_a_smaller_grid_is_the_upper_left_part(height, width, rows, columns):
    layer = PositionEmbeddingRandom(C // 2)
    rows, columns = min(rows, height), min(columns, width)
    whole = layer((height, width))
    part = layer((rows, columns), (height, width))
    torch.testing.assert_close(part, whole[:, :rows, :columns], rtol=0, atol=0)


def test_dense_pe_of_a_larger_grid_goes_on_at_the_same_pitch(encoder):
    larger = encoder.get_dense_pe((4, 6))
    torch.testing.assert_close(larger[..., :3, :5], encoder.get_dense_pe(), rtol=0, atol=0)
    wanted = position(matrix_of(encoder), 5.5 / 5, 3.5 / 3)
    torch.testing.assert_close(larger[0, :, 3, 5], wanted, **NEAR)


def test_points_get_their_labels_vector_and_a_padding_point(encoder):
    points = torch.tensor([[[10.0, 20.0], [30.0, 40.0], [50.0, 1.0]]])
    sparse, _ = encoder((points, torch.tensor([[1, 0, -1]])), None, None)
    object_, background = (encoder.point_embeddings[i].weight[0] for i in (1, 0))
    none = encoder.not_a_point_embed.weight[0]
    places = [
        position(matrix_of(encoder), *at) for at in ((10.5 / 80, 20.5 / 48), (30.5 / 80, 40.5 / 48))
    ]
    wanted = torch.stack([places[0] + object_, places[1] + background, none, none])
    torch.testing.assert_close(sparse[0], wanted, **NEAR)


def test_box_corners_and_no_padding_beside_a_box(encoder):
    points = (torch.tensor([[[10.0, 20.0]]]), torch.tensor([[1]]))
    box = torch.tensor([[4.0, 6.0, 60.0, 30.0]])
    both, _ = encoder(points, box, None)
    alone, _ = encoder(None, box, None)
    clicks, _ = encoder(points, None, None)
    assert (both.shape[1], alone.shape[1], clicks.shape[1]) == (3, 2, 2)
    torch.testing.assert_close(both, torch.cat((clicks[:, :1], alone), dim=1))
    first = position(matrix_of(encoder), 4.5 / 80, 6.5 / 48) + encoder.point_embeddings[2].weight[0]
    second = position(matrix_of(encoder), 60.5 / 80, 30.5 / 48)
    second = second + encoder.point_embeddings[3].weight[0]
    torch.testing.assert_close(alone[0], torch.stack((first, second)), **NEAR)
    as_rows, _ = encoder(None, box[:, None], None)
    assert torch.equal(as_rows, alone)


def test_no_prompt_at_all(encoder):
    sparse, dense = encoder(None, None, None)
    assert sparse.shape == (1, 0, C)
    assert dense.shape == (1, C, 3, 5)
    assert torch.equal(dense[0, :, 2, 4], encoder.no_mask_embed.weight[0])


@pytest.mark.parametrize("count", [0, 3])
def test_any_number_of_prompts(encoder, count):
    points = (torch.rand(count, 2, 2), torch.ones(count, 2))
    sparse, dense = encoder(points, torch.rand(count, 4), None, embedding_size=(2, 4))
    assert sparse.shape == (count, 4, C)
    assert dense.shape == (count, C, 2, 4)


def test_masks_become_the_dense_embedding(encoder):
    masks = torch.randn(2, 1, 12, 20)
    sparse, dense = encoder(None, None, masks)
    assert sparse.shape == (2, 0, C)
    assert torch.equal(dense, encoder.mask_downscaling(masks))
    assert dense.shape == (2, C, 3, 5)
    # each cell sees its own 4x4 logits and no others
    masks[:, :, 4:8, 8:12] += 1
    changed = (encoder(None, None, masks)[1] != dense).any(1)
    assert changed.nonzero().tolist() == [[0, 1, 2], [1, 1, 2]]


def test_masks_of_an_unpadded_image(encoder):
    _, dense = encoder(None, None, torch.randn(1, 1, 8, 4), embedding_size=(2, 1))
    assert dense.shape == (1, C, 2, 1)


def test_half_precision_keeps_exact_positions(encoder):
    exact = encoder.get_dense_pe()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.get_dense_pe(), exact)
    # the matrix itself is rounded to 8 bits: angles of up to 10 move by 0.02
    half = encoder.bfloat16().get_dense_pe()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.1)


def test_gradients(encoder):
    points = (torch.rand(1, 3, 2), torch.tensor([[1, 0, -1]]))
    sparse, _ = encoder(points, torch.rand(1, 4), None)
    _, dense = encoder(None, None, torch.randn(1, 1, 12, 20))
    _, bare = encoder(None, None, None)
    (sparse.sum() + dense.square().sum() + bare.sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert all(float(p.grad.abs().max()) > 0 for p in encoder.parameters())


def test_scale():
    torch.manual_seed(3)
    plain = PositionEmbeddingRandom(4).positional_encoding_gaussian_matrix
    torch.manual_seed(3)
    scaled = PositionEmbeddingRandom(4, scale=2.5).positional_encoding_gaussian_matrix
    torch.testing.assert_close(scaled, 2.5 * plain)
    torch.manual_seed(3)
    assert torch.equal(PositionEmbeddingRandom(4, -1.0).positional_encoding_gaussian_matrix, plain)


@pytest.mark.parametrize(
    "prompts, words",
    [
        (
            {"points": (torch.zeros(1, 2), torch.zeros(1))},
            r"\[B, P, 2\] with labels \[B, P\], got \[1, 2\]",
        ),
        ({"points": (torch.zeros(1, 2, 2), torch.zeros(1, 1))}, r"got \[1, 2, 2\] and \[1, 1\]"),
        ({"boxes": torch.zeros(4)}, r"boxes must be \[B, 4\].*got \[4\]"),
        ({"boxes": torch.zeros(1, 2, 4)}, r"boxes must be \[B, 4\].*got \[1, 2, 4\]"),
        ({"masks": torch.zeros(1, 1, 12, 16)}, r"\[B, 1, 12, 20\].*got \[1, 1, 12, 16\]; low_res"),
        (
            {"boxes": torch.zeros(2, 4), "masks": torch.zeros(1, 1, 12, 20)},
            "same number of objects, got 2 boxes, 1 masks",
        ),
    ],
)
def test_wrong_prompts(encoder, prompts, words):
    with pytest.raises(ValueError, match=words):
        encoder(**{"points": None, "boxes": None, "masks": None, **prompts})
