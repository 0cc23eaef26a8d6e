import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder
from tinyvit.modules.sam.prompt_encoder import PromptEncoder
from tinyvit.modules.sam.transformer import TwoWayTransformer
from tinyvit.sam import fast_decoder as deployed_decoder
from tinyvit.sam.fast_decoder import DeployedMaskDecoder

WIDTH, PITCH = 32, 16
CHUNK = 4  # prompts computed together here
ROUNDING = 2e-5  # relative to the largest logit: fp32 sums in another order, through three layers


def make_heads(randomise, grid=(6, 9)):
    frame = grid[0] * PITCH, grid[1] * PITCH
    encoder = PromptEncoder(WIDTH, grid, frame, mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, num_heads=4, mlp_dim=48)
    decoder = MaskDecoder(transformer_dim=WIDTH, transformer=transformer, iou_head_hidden_dim=WIDTH)
    return randomise(encoder).eval(), randomise(decoder, seed=1).eval()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(deployed_decoder, "CHUNK_CELLS", CHUNK * 6 * 9)


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
    got = decoded.low_res_logits.reshape(logits.shape)
    torch.testing.assert_close(got, logits, atol=ROUNDING * scale, rtol=0)
    got = decoded.iou_predictions.reshape(iou.shape)
    torch.testing.assert_close(got, iou, atol=ROUNDING * float(iou.abs().max()), rtol=0)


def make_points(count, each=1, frame=(96, 144)):
    coords = torch.rand(count, each, 2) * torch.tensor([frame[1], frame[0]])
    return coords, torch.randint(0, 2, (count, each))


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1])
def test_points(heads, count, multimask):
    embedding, points = torch.randn(1, WIDTH, 6, 9), make_points(count, 2)
    fast = DeployedMaskDecoder(*heads)
    decoded = fast.decode(fast.look(embedding), points, multimask_output=multimask)
    assert_same(decoded, plainly(heads, embedding, points, multimask=multimask))
    kinds = 3 if multimask else 1
    assert decoded.prompts.tolist() == [i for i in range(count) for _ in range(kinds)]
    assert decoded.tokens.tolist() == list(range(kinds)) * count


@given(height=st.integers(1, 9), width=st.integers(1, 12), count=st.integers(1, 4))
def test_any_grid(randomise, height, width, count):
    heads = make_heads(randomise)
    embedding, points = torch.randn(1, WIDTH, height, width), make_points(count)
    fast = DeployedMaskDecoder(*heads)
    assert_same(fast.decode(fast.look(embedding), points), plainly(heads, embedding, points))


@pytest.mark.parametrize("with_points", [True, False])
def test_boxes(heads, with_points):
    embedding = torch.randn(1, WIDTH, 6, 9)
    boxes = torch.tensor([[1.0, 2, 50, 60], [5, 5, 100, 90]])
    points = make_points(2) if with_points else None
    fast = DeployedMaskDecoder(*heads)
    decoded = fast.decode(fast.look(embedding), points, boxes, multimask_output=False)
    assert_same(decoded, plainly(heads, embedding, points, boxes, multimask=False))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("with_points", [True, False])
def test_earlier_masks(heads, count, with_points):
    embedding, masks = torch.randn(1, WIDTH, 6, 9), torch.randn(count, 1, 24, 36)
    points = make_points(count) if with_points else None
    fast = DeployedMaskDecoder(*heads)
    decoded = fast.decode(fast.look(embedding, masks), points)
    assert_same(decoded, plainly(heads, embedding, points, masks=masks))


def test_no_prompt_at_all(heads):
    embedding = torch.randn(1, WIDTH, 6, 9)
    fast = DeployedMaskDecoder(*heads)
    assert_same(fast.decode(fast.look(embedding)), plainly(heads, embedding))


def test_only_wanted_masks_are_made(heads):
    embedding, points = torch.randn(1, WIDTH, 6, 9), make_points(CHUNK + 3)
    fast = DeployedMaskDecoder(*heads)
    shared = fast.look(embedding)
    everything = fast.decode(shared, points)
    middle = everything.iou_predictions.median()
    few = fast.decode(shared, points, wanted=lambda iou: iou > middle)
    keep = everything.iou_predictions > middle
    assert 0 < len(few.low_res_logits) < len(everything.low_res_logits)
    for name in ("iou_predictions", "prompts", "tokens"):
        assert torch.equal(getattr(few, name), getattr(everything, name)[keep]), name
    wanted = everything.low_res_logits[keep]
    torch.testing.assert_close(few.low_res_logits, wanted, atol=ROUNDING, rtol=ROUNDING)


def test_nothing_wanted(heads):
    fast = DeployedMaskDecoder(*heads)
    shared = fast.look(torch.randn(1, WIDTH, 6, 9))
    decoded = fast.decode(shared, make_points(2), wanted=lambda iou: iou > torch.inf)
    assert decoded.low_res_logits.shape == (0, 24, 36)
    assert len(decoded.iou_predictions) == len(decoded.prompts) == len(decoded.tokens) == 0


def test_no_prompts(heads):
    fast = DeployedMaskDecoder(*heads)
    decoded = fast.decode(fast.look(torch.randn(1, WIDTH, 6, 9)), make_points(0))
    assert decoded.low_res_logits.shape == (0, 24, 36)


def test_the_modules_are_copied(heads):
    embedding, points = torch.randn(1, WIDTH, 6, 9), make_points(2)
    plain = plainly(heads, embedding, points)
    fast = DeployedMaskDecoder(*heads)
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters():
                parameter.zero_()
    assert_same(fast.decode(fast.look(embedding), points), plain)


def test_training_mode_stays_as_it_is(heads):
    heads[1].train()
    DeployedMaskDecoder(*heads)
    assert heads[1].training
    assert all(p.requires_grad for p in heads[1].parameters())


@pytest.mark.parametrize("shape", [(2, WIDTH, 6, 9), (6, 9)])
def test_wants_one_image(heads, shape):
    with pytest.raises(ValueError, match=r"wanted the embedding of one image, \[1, C, h, w\]"):
        DeployedMaskDecoder(*heads).look(torch.randn(shape))


def test_masks_and_prompts_must_be_as_many(heads):
    fast = DeployedMaskDecoder(*heads)
    shared = fast.look(torch.randn(1, WIDTH, 6, 9), torch.randn(2, 1, 24, 36))
    with pytest.raises(ValueError, match="3 prompts do not go with 2 masks"):
        fast.decode(shared, make_points(3))


def test_other_decoders_are_refused(heads):
    transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, num_heads=4, mlp_dim=48)
    decoder = HQMaskDecoder(transformer_dim=WIDTH, transformer=transformer, vit_dim=8)
    with pytest.raises(TypeError, match="came HQMaskDecoder; call it as it is"):
        DeployedMaskDecoder(heads[0], decoder)


def test_float64_is_exact(heads):
    encoder, decoder = (copy.deepcopy(head).double() for head in heads)
    embedding, (coords, labels) = torch.randn(1, WIDTH, 6, 9), make_points(3)
    fast = DeployedMaskDecoder(*heads, dtype=torch.float64)
    decoded = fast.decode(fast.look(embedding), (coords, labels))
    logits, iou = plainly((encoder, decoder), embedding.double(), (coords.double(), labels))
    assert decoded.low_res_logits.dtype == decoded.iou_predictions.dtype == torch.float32
    one_digit = 1e-7 * float(logits.abs().max())  # what float32 itself rounds
    got = decoded.low_res_logits.view(logits.shape)
    torch.testing.assert_close(got, logits.float(), atol=one_digit, rtol=0)
    got = decoded.iou_predictions.view(iou.shape)
    torch.testing.assert_close(got, iou.float(), atol=1e-7, rtol=1e-7)
