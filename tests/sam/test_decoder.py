"""The one decoder against the modules as they are."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch

from tinyvit.image_spec import ImageSpec
from tinyvit.modules.sam.mask_decoder import TwoWayTransformer
from tinyvit.sam.decoder import CHUNK, TorchDecoder
from tinyvit.sam.embedding import ImageEmbedding
from tinyvit.sam.fast_decoder import FastMaskDecoder
from tinyvit.sam.prompts import PromptBatch

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order


def embedding(height=4, width=4, seed=0, early=False):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(32, height, width)).astype(np.float32)
    spec = ImageSpec.sam(16 * max(height, width), pad=False)
    placement = spec.place(16 * height, 16 * width)
    interm = generator.normal(size=(height, width, 16)).astype(np.float32) if early else None
    return ImageEmbedding(features, placement, spec, interm_features=interm)


def prompts(count, masks=None):
    generator = np.random.default_rng(count)
    coords = 64 * generator.random((count, 2, 2), np.float32)
    labels = generator.integers(0, 2, (count, 2))
    boxes = 20 * generator.random((count, 4), np.float32) + np.float32([0, 0, 30, 30])
    return PromptBatch((coords, labels), boxes, masks)


@torch.no_grad()
def by_hand(sam, x, batch, multimask=True, dtype=torch.float32):
    grid = x.features.shape[1:]
    points, boxes, masks = batch.points, batch.boxes, batch.masks
    sparse, dense = sam.prompt_encoder(
        points and (torch.tensor(points[0]).to(dtype), torch.tensor(points[1])),
        None if boxes is None else torch.tensor(boxes).to(dtype),
        None if masks is None else torch.tensor(masks).to(dtype),
        grid,
    )
    position = sam.prompt_encoder.get_dense_pe(grid)
    early = x.interm_features
    more = () if early is None else (False, torch.tensor(early)[None].to(dtype))
    features = torch.tensor(x.features)[None].to(dtype)
    logits, iou = sam.mask_decoder(features, position, sparse, dense, multimask, *more)
    return logits.float().numpy(), iou.float().numpy()


def decode(decoder, x, *arguments, **named):
    return decoder.decode(decoder.prepare(x), *arguments, **named)


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("is_hq, is_fast", [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("grid", [(4, 4), (2, 4)])
@pytest.mark.parametrize("with_masks", [False, True])
def test_it_is_what_the_modules_say(make_tiny_sam, multimask, is_hq, is_fast, grid, with_masks):
    sam, x = make_tiny_sam(is_hq=is_hq), embedding(*grid, early=is_hq)
    masks = np.random.default_rng(3).normal(size=(CHUNK + 3, 1, 4 * grid[0], 4 * grid[1]))
    batch = prompts(CHUNK + 3, masks.astype(np.float32) if with_masks else None)
    found = decode(TorchDecoder(sam, fast=is_fast), x, batch, multimask)
    for one, wanted in zip(found, by_hand(sam, x, batch, multimask), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, wanted, **CLOSE)


@pytest.mark.parametrize("is_hq", [False, True])
def test_only_masks_above_a_bound(make_tiny_sam, is_hq):
    decoder, x = TorchDecoder(make_tiny_sam(is_hq=is_hq)), embedding(early=is_hq)
    prepared, batch = decoder.prepare(x), prompts(5)
    logits, scores = decoder.decode(prepared, batch)
    ranked = np.sort(scores.ravel())
    bound = float((ranked[len(ranked) // 2 - 1] + ranked[len(ranked) // 2]) / 2)
    some, again = decoder.decode(prepared, batch, min_iou=bound)
    np.testing.assert_array_equal(again, scores)
    where = np.argwhere(scores > bound)
    assert 0 < len(some) == len(where) < scores.size
    for mask, (number, token) in zip(some, where, strict=True):
        np.testing.assert_allclose(mask, logits[number, token], **CLOSE)
    assert decoder.decode(prepared, batch, min_iou=1e9)[0].shape == (0, 16, 16)
    assert decoder.decode(prepared, batch, min_iou=-np.inf)[0].shape == (scores.size, 16, 16)


def test_arrays_can_be_written_to(make_tiny_sam):
    for array in decode(TorchDecoder(make_tiny_sam()), embedding(), prompts(2)):
        array[:] = 0


@pytest.mark.parametrize("is_hq", [False, True])
def test_no_prompts_have_no_masks(make_tiny_sam, is_hq):
    logits, iou = decode(
        TorchDecoder(make_tiny_sam(is_hq=is_hq)), embedding(early=is_hq), prompts(2).part(0, 0)
    )
    masks = 1 if is_hq else 3
    assert logits.shape == (0, masks, 16, 16)
    assert iou.shape == (0, masks)


def change_by_optimiser(sam):
    sam.mask_decoder.mask_tokens.weight.data.mul_(-1.0)
    sam.prompt_encoder.point_embeddings[1].weight.data.add_(1.0)


def change_by_loading(sam):
    for part in (sam.mask_decoder, sam.prompt_encoder):
        part.load_state_dict({key: 0.7 * value for key, value in part.state_dict().items()})


def change_the_decoder(sam):
    other = sam.mask_decoder.__class__.__new__(sam.mask_decoder.__class__)
    other.__dict__.update(sam.mask_decoder.__dict__)
    other._modules = {**sam.mask_decoder._modules}
    other.iou_token = torch.nn.Embedding(1, 32)
    sam.mask_decoder = other


@pytest.mark.parametrize("change", [change_by_optimiser, change_by_loading, change_the_decoder])
@pytest.mark.parametrize("is_hq", [False, True])
def test_new_weights_are_used_on_what_was_prepared(make_tiny_sam, change, is_hq):
    sam, x, batch = make_tiny_sam(is_hq=is_hq), embedding(early=is_hq), prompts(2)
    decoder = TorchDecoder(sam)
    prepared = decoder.prepare(x)
    before = decoder.decode(prepared, batch)[0]
    change(sam)
    after = decoder.decode(prepared, batch)[0]
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(after, by_hand(sam, x, batch)[0], **CLOSE)


def test_what_is_prepared_serves_alternating_images(make_tiny_sam, monkeypatch):
    decoder = TorchDecoder(make_tiny_sam())
    images = [decoder.prepare(embedding(seed=seed)) for seed in range(2)]
    assert images[0].nbytes > embedding().features.nbytes
    monkeypatch.setattr(FastMaskDecoder, "prepare", None)  # nothing is prepared again
    for number in (0, 1, 0, 1):
        wanted = by_hand(decoder._model, embedding(seed=number), prompts(2))
        np.testing.assert_allclose(
            decoder.decode(images[number], prompts(2))[0], wanted[0], **CLOSE
        )


def test_threads_may_share_it(make_tiny_sam):
    sam = make_tiny_sam()
    decoder, found = TorchDecoder(sam), {}

    def work(seed):
        for _ in range(5):
            found[seed] = decode(decoder, embedding(seed=seed), prompts(2))[0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        wanted = by_hand(sam, embedding(seed=seed), prompts(2))[0]
        np.testing.assert_allclose(found[seed], wanted, **CLOSE)


def test_masks_are_enlarged_logits(make_tiny_sam):
    decoder, x = TorchDecoder(make_tiny_sam()), embedding()
    assert decoder.logit_stride == 4
    logits, _ = decode(decoder, x, prompts(2))
    whole = decoder.masks(logits, x.placement, None)
    assert whole.shape == (2, 3, 64, 64)
    np.testing.assert_array_equal(decoder.masks(logits, x.placement, 0.25), whole > 0.25)


def test_wrong_calls_say_what_was_wanted(make_tiny_sam):
    decoder = TorchDecoder(make_tiny_sam())
    with pytest.raises(ValueError, match="hq_token_only=True wants a model with Light HQ-SAM"):
        decode(decoder, embedding(), prompts(1), hq_token_only=True)
    masks = PromptBatch(masks=np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"\[B, 1, 16, 16\]; came \[1, 1, 8, 8\]"):
        decode(decoder, embedding(), masks)
    with pytest.raises(ValueError, match="wants interm_features, the encoder's early map"):
        decode(TorchDecoder(make_tiny_sam(is_hq=True)), embedding(), prompts(1))


@pytest.mark.parametrize("is_hq", [False, True])
def test_fp64_is_exact(make_tiny_sam, is_hq):
    sam, x, batch = make_tiny_sam(is_hq=is_hq), embedding(early=is_hq), prompts(3)
    found = decode(TorchDecoder(sam, precision="fp64"), x, batch)
    wanted = by_hand(copy.deepcopy(sam).double(), x, batch, dtype=torch.float64)
    for one, exact in zip(found, wanted, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, exact, rtol=1e-6, atol=1e-6)  # float32's own rounding


def test_other_precisions_are_refused(make_tiny_sam):
    with pytest.raises(ValueError, match=r"one of \('fp32', 'fp64'\), came 'fp16'"):
        TorchDecoder(make_tiny_sam(), precision="fp16")


@pytest.mark.parametrize("part", ["activation", "transformer"])
def test_parts_that_the_fast_form_does_not_know_run_as_they_are(make_tiny_sam, part):
    sam, batch = make_tiny_sam(), prompts(3)
    if part == "activation":
        sam.mask_decoder.output_upscaling[2] = torch.nn.ReLU()
    else:
        sam.mask_decoder.transformer = type("Own", (TwoWayTransformer,), {})(2, 32, 2, 48)
    logits, scores = decode(TorchDecoder(sam), embedding(), batch)
    wanted, wanted_scores = by_hand(sam, embedding(), batch)
    np.testing.assert_allclose(logits, wanted, **CLOSE)
    np.testing.assert_allclose(scores, wanted_scores, **CLOSE)
