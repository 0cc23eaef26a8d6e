"""The fast form of prompt encoder and mask decoder against the modules."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.modules.sam.mask_decoder import Attention, MaskDecoder, TwoWayTransformer
from tinyvit.modules.sam.prompt_encoder import PromptEncoder
from tinyvit.sam import fast_decoder
from tinyvit.sam.fast_decoder import FastMaskDecoder, ImageToToken, TokenToImage, softmax

WIDTH, STRIDE = 32, 16
CHUNK = 4  # prompts computed together here
ROUNDING = 2e-5  # relative to the largest logit: fp32 sums in another order, through three layers


def make_heads(randomise, grid=(6, 9)):
    input_size = grid[0] * STRIDE, grid[1] * STRIDE
    encoder = PromptEncoder(WIDTH, grid, input_size, mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, num_heads=4, mlp_dim=48)
    decoder = MaskDecoder(transformer_dim=WIDTH, transformer=transformer, iou_head_hidden_dim=WIDTH)
    return randomise(encoder).eval(), randomise(decoder, seed=1).eval()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(fast_decoder, "CHUNK_TOKENS", CHUNK * 6 * 9)


@pytest.fixture
def heads(randomise):
    return make_heads(randomise)


def plainly(heads, embedding, points=None, boxes=None, masks=None, multimask=True):
    encoder, decoder = heads
    size = tuple(embedding.shape[-2:])
    with torch.inference_mode():
        sparse, dense = encoder(points, boxes, masks, embedding_size=size)
        return decoder(embedding, encoder.get_dense_pe(size), sparse, dense, multimask)


def assert_same(decoded, plain):
    logits, iou = plain
    scale = float(logits.abs().max())
    got = decoded[0].reshape(logits.shape)
    torch.testing.assert_close(got, logits, atol=ROUNDING * scale, rtol=0)
    torch.testing.assert_close(decoded[1], iou, atol=ROUNDING * float(iou.abs().max()), rtol=0)


def make_points(count, each=1, input_size=(96, 144)):
    coords = torch.rand(count, each, 2) * torch.tensor([input_size[1], input_size[0]])
    return coords, torch.randint(0, 2, (count, each))


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1])
def test_points(heads, count, multimask):
    embedding, points = torch.randn(1, WIDTH, 6, 9), make_points(count, 2)
    fast = FastMaskDecoder(*heads)
    decoded = fast.decode(fast.prepare(embedding), points, multimask_output=multimask)
    assert_same(decoded, plainly(heads, embedding, points, multimask=multimask))


@given(height=st.integers(1, 9), width=st.integers(1, 12), count=st.integers(1, 4))
def test_any_grid(randomise, height, width, count):
    heads = make_heads(randomise)
    embedding, points = torch.randn(1, WIDTH, height, width), make_points(count)
    fast = FastMaskDecoder(*heads)
    assert_same(fast.decode(fast.prepare(embedding), points), plainly(heads, embedding, points))


@pytest.mark.parametrize("with_points", [True, False])
def test_boxes(heads, with_points):
    embedding = torch.randn(1, WIDTH, 6, 9)
    boxes = torch.tensor([[1.0, 2, 50, 60], [5, 5, 100, 90]])
    points = make_points(2) if with_points else None
    fast = FastMaskDecoder(*heads)
    decoded = fast.decode(fast.prepare(embedding), points, boxes, multimask_output=False)
    assert_same(decoded, plainly(heads, embedding, points, boxes, multimask=False))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("with_points", [True, False])
def test_earlier_masks(heads, count, with_points):
    embedding, masks = torch.randn(1, WIDTH, 6, 9), torch.randn(count, 1, 24, 36)
    points = make_points(count) if with_points else None
    fast = FastMaskDecoder(*heads)
    decoded = fast.decode(fast.prepare(embedding, masks), points)
    assert_same(decoded, plainly(heads, embedding, points, masks=masks))


def test_no_prompt_at_all(heads):
    embedding = torch.randn(1, WIDTH, 6, 9)
    fast = FastMaskDecoder(*heads)
    assert_same(fast.decode(fast.prepare(embedding)), plainly(heads, embedding))


def test_only_wanted_masks_are_made(heads):
    embedding, points = torch.randn(1, WIDTH, 6, 9), make_points(CHUNK + 3)
    fast = FastMaskDecoder(*heads)
    shared = fast.prepare(embedding)
    logits, iou = fast.decode(shared, points)
    middle = float(iou.median())
    few, again = fast.decode(shared, points, min_iou=middle)
    assert torch.equal(again, iou)
    wanted = logits[(iou > middle).flatten()]
    assert 0 < len(few) < len(logits)
    torch.testing.assert_close(few, wanted, atol=ROUNDING, rtol=ROUNDING)


def test_nothing_wanted(heads):
    fast = FastMaskDecoder(*heads)
    shared = fast.prepare(torch.randn(1, WIDTH, 6, 9))
    logits, iou = fast.decode(shared, make_points(2), min_iou=float("inf"))
    assert logits.shape == (0, 24, 36)
    assert iou.shape == (2, 3)


def test_the_modules_are_copied(heads):
    embedding, points = torch.randn(1, WIDTH, 6, 9), make_points(2)
    plain = plainly(heads, embedding, points)
    fast = FastMaskDecoder(*heads)
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters():
                parameter.zero_()
    assert_same(fast.decode(fast.prepare(embedding), points), plain)


def test_training_mode_stays_as_it_is(heads):
    heads[1].train()
    FastMaskDecoder(*heads)
    assert heads[1].training
    assert all(p.requires_grad for p in heads[1].parameters())


def test_masks_and_prompts_must_be_as_many(heads):
    fast = FastMaskDecoder(*heads)
    shared = fast.prepare(torch.randn(1, WIDTH, 6, 9), torch.randn(2, 1, 24, 36))
    with pytest.raises(ValueError, match="3 prompts do not go with 2 masks"):
        fast.decode(shared, make_points(3))


def test_float64_is_exact(heads):
    encoder, decoder = (copy.deepcopy(head).double() for head in heads)
    embedding, (coords, labels) = torch.randn(1, WIDTH, 6, 9), make_points(3)
    fast = FastMaskDecoder(*heads, dtype=torch.float64)
    decoded = fast.decode(fast.prepare(embedding), (coords, labels))
    logits, iou = plainly((encoder, decoder), embedding.double(), (coords.double(), labels))
    assert decoded[0].dtype == decoded[1].dtype == torch.float32
    one_digit = 1e-7 * float(logits.abs().max())  # what float32 itself rounds
    got = decoded[0].view(logits.shape)
    torch.testing.assert_close(got, logits.float(), atol=one_digit, rtol=0)
    torch.testing.assert_close(decoded[1], iou.float(), atol=1e-7, rtol=1e-7)


IMAGE_TOKENS, TOKENS, CHANNELS, PROMPTS = 35, 6, 32, 3
ROUNDING_OF_ONE = 2e-6  # fp32; the products are summed in another order


@pytest.fixture
def attention(randomise):
    return (
        randomise(Attention(CHANNELS, num_heads=4, downsample_rate=2)).eval().requires_grad_(False)
    )


@pytest.fixture
def tensors():
    tokens, image = (
        torch.randn(PROMPTS, TOKENS, CHANNELS),
        torch.randn(PROMPTS, IMAGE_TOKENS, CHANNELS),
    )
    return tokens, image, torch.randn(IMAGE_TOKENS, CHANNELS)


def test_tokens_attend_to_shared_image_tokens(attention, tensors):
    tokens, image, positions = tensors
    fast = TokenToImage(attention)
    keys, values = fast.project(image[0], image[0] + positions)
    got = fast.attend_shared(tokens, keys, values)
    every = image[:1].expand(PROMPTS, -1, -1)
    torch.testing.assert_close(
        got, attention(tokens, every + positions, every), atol=ROUNDING_OF_ONE, rtol=0
    )


def test_tokens_attend_to_own_image_tokens(attention, tensors):
    tokens, image, positions = tensors
    fast = TokenToImage(attention)
    got = fast.attend(tokens, list(image), fast.project_positions(positions))
    wanted = attention(tokens, image + positions, image)
    torch.testing.assert_close(got, wanted, atol=ROUNDING_OF_ONE, rtol=0)


def test_shared_image_tokens_attend(attention, tensors):
    tokens, image, positions = tensors
    placed = torch.randn_like(tokens)
    fast = ImageToToken(attention)
    queries = fast.project(image[0] + positions)
    got = [w.T @ v for w, v in fast.shared_attention_weights(placed, tokens, queries)]
    every = image[:1].expand(PROMPTS, -1, -1) + positions
    wanted = attention(every, placed, tokens)
    torch.testing.assert_close(torch.stack(got), wanted, atol=ROUNDING_OF_ONE, rtol=0)


def test_own_image_tokens_attend(attention, tensors):
    tokens, image, positions = tensors
    placed = torch.randn_like(tokens)
    fast = ImageToToken(attention)
    weighted = fast.attention_weights(placed, tokens, list(image), fast.project(positions))
    got = [w.T @ v for w, v in weighted]
    wanted = attention(image + positions, placed, tokens)
    torch.testing.assert_close(torch.stack(got), wanted, atol=ROUNDING_OF_ONE, rtol=0)


def test_softmax_has_no_weights_that_only_cost_time():
    scores = torch.tensor([[0.0, -50.0, -90.0, -100.0]])
    weights = softmax(scores, 1)
    torch.testing.assert_close(weights, torch.softmax(scores.double(), 1).float())
    assert 0 < weights[0, 1] < 1e-20
    assert weights[0, 2:].tolist() == [0.0, 0.0]  # 8e-40 and 4e-44 otherwise
    tiny = torch.finfo(torch.float32).tiny
    assert not ((weights > 0) & (weights < tiny)).any()
