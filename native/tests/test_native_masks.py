"""Masks in an image's own pixels, against numpy: enlargement, regions, run lengths; every ISA."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_door import ISAS, _library
from test_native_decoder import GRID, features, heads, native, some
from tinyvit_native import Placement, enlarge

from tinyvit.image_spec import Placement as ImagePlacement
from tinyvit.images.mask_ops import runs_and_box
from tinyvit.sam.upscale import upscale, upscale_region

PRESENT = [isa for isa in ISAS if _library.door_has(isa.encode(), 0)]


def logits_of(size: tuple[int, int], seed: int, kind: str = "smooth") -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.normal(size=size).astype(np.float32)
    if kind in ("full", "empty"):
        return np.full(size, 9 if kind == "full" else -9, np.float32)
    rows, columns = (np.linspace(0, rng.uniform(2, 6), side) for side in size)
    waves = np.sin(rows + rng.uniform(0, 6))[:, None] * np.cos(columns + rng.uniform(0, 6))
    return (5 * waves).astype(np.float32)


def placements(size: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]):
    covered = 4 * size[0], 4 * size[1]
    return (
        Placement(covered, resized, original),
        ImagePlacement(original, resized, (0, 0), covered),
    )


@pytest.mark.parametrize("isa", PRESENT)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_enlargement(isa, data):
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    resized = tuple(data.draw(st.integers(1, 4 * side)) for side in size)
    original = tuple(data.draw(st.integers(1, 300)) for _ in range(2))
    ours, theirs = placements(size, resized, original)
    logits = np.stack(
        [logits_of(size, seed, kind) for seed, kind in enumerate(("smooth", "noise"))]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYVIT_ISA", isa)
        got, masks = enlarge(logits, ours), enlarge(logits, ours, 0.25)
    exact = upscale(logits, theirs)
    assert got.shape == exact.shape and got.dtype == np.float32 and masks.dtype == bool
    assert np.abs(got - exact).max() <= 4e-6 * np.abs(exact).max()
    assert np.array_equal(masks, got > 0.25)


def test_logits_that_do_not_cover_the_image():
    with pytest.raises(ValueError, match="logits cover 16 pixels and the image has 20"):
        enlarge(np.zeros((4, 4), np.float32), Placement((16, 16), (20, 16), (20, 16)))
    with pytest.raises(ValueError, match=r"must be \[\.\.\., h, w\]"):
        enlarge(np.zeros(4, np.float32), Placement((16, 16), (16, 16), (16, 16)))
    assert enlarge(np.zeros((0, 4, 4)), Placement((16, 16), (16, 16), (5, 6))).shape == (0, 5, 6)


@pytest.mark.parametrize("isa", PRESENT)
@pytest.mark.parametrize(
    ("original", "frame", "corner"),
    [
        ((190, 256), None, (0, 0)),
        ((64, 128), (64, 128), (0, 0)),
        ((500, 333), (600, 700), (100, 201)),
        ((3, 5), (9, 9), (1, 2)),
    ],
)
def test_regions(isa, original, frame, corner):
    model, x = heads(), features(GRID)
    prompts = some("points", GRID, 3)
    decoder = native(model, threads=2, isa=isa)
    prepared = decoder.prepare(x)
    logits, scores = decoder.decode(prepared, **prompts)
    ours, theirs = placements((64, 64), (256, 200), original)
    size = frame or original
    middle, offset = float(np.median(logits)), 0.2 * float(logits.std())
    for threshold in (middle, float(logits.min()) - 9, float(logits.max()) + 9):
        how = {"threshold": threshold, "offset": offset, "frame": frame, "corner": corner}
        found, again = decoder.find(prepared, ours, **prompts, **how)
        assert np.array_equal(again, scores) and len(found) == 9
        for one in found:
            region = upscale_region(logits[one.prompt, one.mask], theirs, 4.0, threshold, offset)
            assert one.score == scores[one.prompt, one.mask]
            # a pixel exactly at the bound may be rounded to either side
            assert np.isclose(one.stability, region.stability, atol=2e-3, equal_nan=True)
            top, left = region.top + corner[0], region.left + corner[1]
            counts, around = runs_and_box(region.mask, top, left, size, corner)
            assert one.counts.sum() == size[0] * size[1] and (one.counts[1:] > 0).all()
            if np.array_equal(counts, one.counts):
                assert one.box == around
            else:  # by a few pixels
                masks = [np.repeat(np.arange(len(c)) % 2, c) for c in (counts, one.counts)]
                assert (masks[0] != masks[1]).sum() <= 2


def test_which_regions():
    model, x, prompts = heads(), features(GRID), some("points", GRID, 3)
    decoder = native(model)
    prepared, placement = decoder.prepare(x), placements((64, 64), (256, 256), (99, 99))[0]
    all_of_them, scores = decoder.find(prepared, placement, **prompts)
    assert [(r.prompt, r.mask) for r in all_of_them] == [*map(tuple, np.argwhere(scores > -np.inf))]
    bound = float(np.median(scores))
    some_of_them, _ = decoder.find(prepared, placement, **prompts, min_score=bound)
    wanted = [r for r in all_of_them if r.score > np.float32(bound)]
    assert [(r.prompt, r.mask, r.box) for r in some_of_them] == [
        (r.prompt, r.mask, r.box) for r in wanted
    ]
    least = float(np.median([r.stability for r in all_of_them]))
    stable, _ = decoder.find(prepared, placement, **prompts, min_stability=least)
    for got, wanted in zip(stable, all_of_them, strict=True):
        assert got.stability == wanted.stability
        assert (got.counts is not None) == (wanted.stability >= np.float32(least))
    with pytest.raises(ValueError, match="does not lie within"):
        decoder.find(prepared, placement, **prompts, frame=(100, 100), corner=(2, 0))
