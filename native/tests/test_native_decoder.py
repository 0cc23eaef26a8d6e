"""The mask decoder against the plain modules of torch: prompts, sizes, threads, ISAs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_door import ISAS, _library
from native_models import randomise, tensors_of
from tinyvit_native import Decoder, NativeError

from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder, TwoWayTransformer
from tinyvit.modules.sam.prompt_encoder import PromptEncoder

GRID, INPUT = (16, 16), (256, 256)


def heads(early: int = 0) -> torch.nn.ModuleDict:
    transformer = TwoWayTransformer(2, 256, 8, 2048)
    how = {"transformer_dim": 256, "transformer": transformer}
    parts = {
        "prompt_encoder": PromptEncoder(256, GRID, INPUT, 16),
        "mask_decoder": HQMaskDecoder(**how, vit_dim=early) if early else MaskDecoder(**how),
    }
    return randomise(torch.nn.ModuleDict(parts))


def native(model: torch.nn.ModuleDict, **how: object) -> Decoder:
    return Decoder(tensors_of(model), grid=GRID, input_size=INPUT, **how)


def plain(
    model: torch.nn.ModuleDict,
    features: np.ndarray,
    multimask: bool,
    *more: object,
    **prompts: object,
):
    model = model.double()
    others = ("boxes", "masks")
    exact = {k: torch.from_numpy(prompts[k]).double() for k in others if k in prompts}
    points = prompts.get("points")
    if points is not None:
        points = torch.from_numpy(points[0]).double(), torch.from_numpy(points[1])
    x = torch.from_numpy(features)[None].double()
    with torch.inference_mode():
        sparse, dense = model["prompt_encoder"](
            points,
            *(exact.get(k) for k in others),
            tuple(x.shape[2:]),
        )
        place = model["prompt_encoder"].get_dense_pe(tuple(x.shape[2:]))
        masks, iou = model["mask_decoder"](x, place, sparse, dense, multimask, *more)
    model.float()
    return masks.numpy(), iou.numpy()


def some(kind: str, size: tuple[int, int], count: int = 3) -> dict[str, object]:
    rng = np.random.default_rng(1)
    places = rng.uniform(0, 256, (count, 2, 2)).astype(np.float32)
    labels = np.array([[1, 0], [1, -1], [0, 1]] * count)[:count]
    prompts: dict[str, object] = {}
    if "points" in kind:
        prompts["points"] = places, labels
    if "boxes" in kind:
        prompts["boxes"] = rng.uniform(0, 256, (count, 4)).astype(np.float32)
    if "masks" in kind:
        prompts["masks"] = rng.normal(0, 5, (count, 1, 4 * size[0], 4 * size[1])).astype(np.float32)
    return prompts


def features(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(256, *size)).astype(np.float32)


def check(
    ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...], share: float = 2e-5
) -> None:
    for got, exact in zip(ours, theirs, strict=True):
        assert got.shape == exact.shape and got.dtype == np.float32
        assert np.abs(got - exact).max() <= share * np.abs(exact).max()


@pytest.mark.parametrize(
    "kind", ["points", "boxes", "points boxes", "points masks", "masks", "boxes masks"]
)
@pytest.mark.parametrize("size", [(16, 16), (7, 16), (1, 1), (9, 15)])
def test_prompts_and_sizes(kind, size):
    model, x, prompts = heads(), features(size), some(kind, size)
    decoder = native(model, threads=2)
    prepared = decoder.prepare(x)
    for multimask in (True, False):
        ours = decoder.decode(prepared, **prompts, multimask=multimask)
        check(ours, plain(model, x, multimask, **prompts))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if _library.door_has(isa.encode(), 0)])
def test_every_isa(isa):
    model, x, prompts = heads(), features(GRID), some("points", GRID)
    decoder = native(model, isa=isa)
    check(decoder.decode(decoder.prepare(x), **prompts), plain(model, x, True, **prompts))


@pytest.mark.parametrize("early", [64, 40])
@pytest.mark.parametrize("size", [(16, 16), (9, 15), (1, 2)])
def test_light_hq_sam(early, size):
    model, x, prompts = heads(early), features(size), some("points boxes", size)
    map_ = np.random.default_rng(3).normal(size=(*size, early)).astype(np.float32)
    exact = torch.from_numpy(map_)[None].double()
    for threads in (1, 3):
        decoder = native(model, threads=threads)
        prepared = decoder.prepare(x, map_)
        for multimask in (True, False):
            for hq_only in (True, False):
                ours = decoder.decode(prepared, **prompts, multimask=multimask, hq_only=hq_only)
                check(ours, plain(model, x, multimask, hq_only, exact, **prompts))
    with pytest.raises(ValueError, match=r"wants embedding\.early"):
        decoder.prepare(x)
    with pytest.raises(ValueError, match=r"early must be \["):
        decoder.prepare(x, map_[:, :, 0])


@pytest.mark.parametrize("threads", [1, 2])
def test_only_masks_of_a_good_score(threads):
    model, x, prompts = heads(), features(GRID), some("points", GRID, 4)
    decoder = native(model, threads=threads)
    prepared = decoder.prepare(x)
    logits, scores = decoder.decode(prepared, **prompts)
    for bound in (-np.inf, float(np.median(scores)), float(scores[1, 2]), np.inf):
        some_logits, again = decoder.decode(prepared, **prompts, min_score=bound)
        assert np.array_equal(again, scores)
        assert np.array_equal(some_logits, logits[scores > np.float32(bound)])


def test_same_bits_for_any_threads_and_number_of_prompts():
    model, x, prompts = heads(), features(GRID), some("points", GRID, 5)
    first = None
    for threads in (1, 2, 3):
        decoder = native(model, threads=threads)
        prepared = decoder.prepare(x)
        together = decoder.decode(prepared, **prompts)
        first = first or together
        for a, b in zip(first, together, strict=True):
            assert np.array_equal(a, b)
        places, labels = prompts["points"]
        for i in range(5):
            alone = decoder.decode(prepared, points=(places[i : i + 1], labels[i : i + 1]))
            assert all(np.array_equal(a[i], b[0]) for a, b in zip(first, alone, strict=True))


def test_many_points_and_none():
    model, x = heads(), features(GRID)
    decoder = native(model)
    prepared = decoder.prepare(x)
    rng = np.random.default_rng(2)
    many = rng.uniform(0, 256, (1, 70, 2)).astype(np.float32), rng.integers(0, 2, (1, 70))
    check(decoder.decode(prepared, points=many), plain(model, x, True, points=many))
    logits, scores = decoder.decode(prepared, points=(many[0][:0], many[1][:0]))
    assert logits.shape == (0, 3, 64, 64) and scores.shape == (0, 3)
    assert prepared.nbytes == ((256 + 3 * 128) * 256 + 2 * 16 * 256) * 4


def test_errors_say_what_was_wanted():
    model = heads()
    tensors = tensors_of(model)
    with pytest.raises(ValueError, match=r"'prompt_encoder.no_mask_embed.weight' is missing"):
        Decoder({k: v for k, v in tensors.items() if "no_mask" not in k})
    with pytest.raises(NativeError, match="multiple of 256 channels"):
        Decoder(tensors, num_heads=7)
    decoder = native(model)
    with pytest.raises(ValueError, match="wrong channels, got 5"):
        decoder.prepare(np.zeros((5, 2, 2), np.float32))
    prepared = decoder.prepare(features(GRID))
    with pytest.raises(ValueError, match=r"masks must be \[N, 1, 64, 64\]"):
        decoder.decode(prepared, masks=np.zeros((1, 1, 4, 4), np.float32))
    with pytest.raises(ValueError, match="hq_only wants Light HQ-SAM"):
        decoder.decode(prepared, boxes=np.zeros((1, 4)), hq_only=True)
    with pytest.raises(ValueError, match="another decoder"):
        native(model).decode(prepared, boxes=np.zeros((1, 4)))
