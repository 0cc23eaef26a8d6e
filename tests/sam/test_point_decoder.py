"""Points decoded by the fast form against the modules as they are."""

import pytest
import torch

from tinyvit.sam.decoder import PointDecoder
from tinyvit.sam.embedding import ImageEncoder

COORDS = torch.tensor([[5.0, 7.0], [33.0, 20.0], [60.5, 44.0], [12.0, 40.0], [0.0, 0.0]])


@pytest.fixture(params=[False, True], ids=["sam", "hq"])
def sam(request, make_tiny_sam):
    return make_tiny_sam(is_hq=request.param)


def plain(sam, embedding):
    """All masks [N, K, h4, w4] and predicted IoU [N, K], by the modules."""
    points = COORDS[:, None], torch.ones(len(COORDS), 1)
    features = embedding.features[None]
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(points, None, None)
        more = ()
        if embedding.interm_features is not None:
            more = (False, embedding.interm_features[None])
        position = sam.prompt_encoder.get_dense_pe()
        return sam.mask_decoder(features, position, sparse, dense, True, *more)


@pytest.fixture
def embedding(sam, photo):
    return next(ImageEncoder(sam).encode(photo(48, 64)))


def test_all_masks(sam, embedding):
    logits, iou = plain(sam, embedding)
    found = PointDecoder(sam).on(embedding).decode(COORDS, None)
    count = iou.shape[1]
    # The fast form sums in another order.
    torch.testing.assert_close(found.low_res_logits, logits.flatten(0, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.iou_predictions, iou.flatten(), atol=1e-5, rtol=1e-4)
    assert found.prompts.tolist() == [i for i in range(len(COORDS)) for _ in range(count)]
    assert found.tokens.tolist() == list(range(count)) * len(COORDS)


def test_only_those_above_a_bound(sam, embedding):
    on = PointDecoder(sam).on(embedding)
    whole = on.decode(COORDS, None)
    ranked = whole.iou_predictions.sort().values
    bound = float((ranked[len(ranked) // 2 - 1] + ranked[len(ranked) // 2]) / 2)
    some = on.decode(COORDS, bound)
    stay = whole.iou_predictions > bound
    assert 0 < len(some.prompts) < len(whole.prompts)
    assert torch.equal(some.prompts, whole.prompts[stay])
    assert torch.equal(some.tokens, whole.tokens[stay])
    torch.testing.assert_close(some.low_res_logits, whole.low_res_logits[stay])
    none = on.decode(COORDS, 1e9)
    assert none.low_res_logits.shape == (0, 16, 16)


def test_weights_that_change_are_noticed(sam, embedding):
    decoder = PointDecoder(sam)
    before = decoder.on(embedding).decode(COORDS, None)
    with torch.no_grad():
        sam.mask_decoder.iou_prediction_head.layers[-1].bias += 1
    after = decoder.on(embedding).decode(COORDS, None)
    torch.testing.assert_close(after.iou_predictions, before.iou_predictions + 1)
    sam.mask_decoder.iou_prediction_head.layers[-1].bias.data -= 1


def test_it_is_made_once_while_weights_stay(make_tiny_sam, embedding):
    decoder = PointDecoder(make_tiny_sam())
    decoder.on(embedding)
    made = decoder._made
    decoder.on(embedding)
    assert decoder._made is made
    assert decoder.pitch == 4
