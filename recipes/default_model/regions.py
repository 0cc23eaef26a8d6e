"""Regions of the background photos, found by an algorithm, as masks for training.

A photo is split into superpixels (Felzenszwalb and Huttenlocher, 2004), and neighbours are merged
in the order of Ward's criterion on their mean colours (CIELAB), so a small piece is merged before a
large one of the same contrast. Three stages of the merging are kept: parts, things, and whole areas
such as a sky. They are no objects: they show where real edges are in real photos, which a composite
cannot.

``build`` writes ``WORK/regions/NAME.png`` for each row of ``WORK/backgrounds/manifest.csv``: RGB, a
stage in each channel from fine to coarse, a region's number in its pixels. If interrupted, it
continues with the remaining photos. ``draw_regions`` makes a training sample of them. A box may
stand for a region only where somebody would draw one: it fills at least half of its box, and
touches at most one edge of the image.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from changes import as_a_camera, crop, recoloured
from manifest import Background, read_rows, write_whole
from tinyvit.images.mask_ops import box_around

RGB = NDArray[np.uint8]

_LONGEST = 640
_LEAST, _LARGEST = 0.004, 0.6  # shares of the image
_FILL = 0.25  # share of its box that a region fills: what is thinner is no shape but an outline
_BOX_FILL = 0.5  # the same for one that a box may stand for
_MOST_MASKS = 12


def draw_regions(
    photograph: Path, regions: Path, size: tuple[int, int], rng: np.random.Generator
) -> tuple[RGB, NDArray[np.bool_], NDArray[np.bool_]] | None:
    """A part of a photograph and the regions of one stage in it.

    Args:
        photograph: The background.
        regions: Its regions.
        size: (width, height) of the result in pixels.
        rng: The random generator.

    Returns:
        (RGB [H, W, 3] uint8, masks [N, H, W] bool with N >= 1, for which a box may stand [N] bool);
        None if no region there is neither too small, too large nor too thin.
    """
    image = open_photograph(photograph)
    stages = _stages(regions, image.size)
    stage = stages[int(rng.integers(len(stages)))]
    seed = int(rng.integers(2**62))  # the same part of both
    part = crop(image, size, np.random.default_rng(seed))
    labels = np.asarray(crop(stage, size, np.random.default_rng(seed), Image.Resampling.NEAREST))
    masks = [mask for number in np.unique(labels) if number and _is_shape(mask := labels == number)]
    if not masks:
        return None
    chosen = [masks[i] for i in rng.permutation(len(masks))[:_MOST_MASKS]]
    boxed = np.array([has_box(mask) for mask in chosen])
    return as_a_camera(recoloured(part, 0.25, rng), rng), np.stack(chosen), boxed


def _is_shape(mask: NDArray[np.bool_]) -> bool:
    is_fair = _LEAST * mask.size <= mask.sum() <= _LARGEST * mask.size
    return bool(is_fair and _fill(mask) >= _FILL)


def has_box(mask: NDArray[np.bool_]) -> bool:
    """Whether somebody would draw a box around a region [H, W]."""
    edges = mask[0], mask[-1], mask[:, 0], mask[:, -1]
    return bool(_fill(mask) >= _BOX_FILL and sum(bool(edge.any()) for edge in edges) <= 1)


def _fill(mask: NDArray[np.bool_]) -> float:
    """Share of its box that a region fills."""
    x0, y0, x1, y1 = box_around(mask)
    return float(mask.sum() / ((x1 - x0) * (y1 - y0)))


@lru_cache(maxsize=256)
def open_photograph(path: Path) -> Image.Image:
    """A background, RGB, longest side at most 640 pixels; kept in memory, not to be changed."""
    with Image.open(path) as file:
        file.draft("RGB", (_LONGEST, _LONGEST))
        image: Image.Image = file.convert("RGB")
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.BILINEAR)
    return image


@lru_cache(maxsize=256)
def _stages(path: Path, size: tuple[int, int]) -> tuple[Image.Image, ...]:
    """Each stage of a photograph's regions, at the photograph's size."""
    with Image.open(path) as image:
        scaled = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    stages: tuple[Image.Image, ...] = scaled.split()
    return stages


LONGEST = 384
_STAGES = 8.0, 16.0, 28.0  # of Ward's distance, see _distance
_MOST = 255  # regions of a stage; larger ones have the lower numbers

Labels = NDArray[np.int64]


def regions_path(work: Path, photograph: str) -> Path:
    """Where the regions of a background photograph are, by its file's name."""
    return work / "regions" / f"{Path(photograph).stem}.png"


def build(work: Path) -> int:
    """Find the regions of every background that has none."""
    rows = read_rows(work / "backgrounds" / "manifest.csv", Background)
    left = [row for row in rows if not regions_path(work, row.file).is_file()]
    for number, row in enumerate(left, 1):
        with Image.open(work / "backgrounds" / row.file) as file:
            image = file.convert("RGB")
        image.thumbnail((LONGEST, LONGEST))
        found = find_regions(np.asarray(image))
        write_whole(Image.fromarray(found), regions_path(work, row.file))
        if number % 20 == 0 or number == len(left):
            print(f"    regions: {number} of {len(left)} photographs", file=sys.stderr)
    return len(left)


def find_regions(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Find the regions of a photograph.

    Args:
        pixels: [H, W, 3] uint8, RGB.

    Returns:
        [H, W, 3] uint8: for each stage the number of the region a pixel is in, 1 for the largest;
        0 where there are more than 255.
    """
    try:
        from skimage import color, filters, graph, segmentation
    except ImportError as err:
        raise ImportError(
            f"{err}; regions need scikit-image: "
            "pip install -r recipes/default_model/requirements.txt"
        ) from err
    lab = color.rgb2lab(filters.gaussian(pixels, 1.5, channel_axis=-1))
    pieces = segmentation.felzenszwalb(pixels, scale=40, sigma=0.8, min_size=40)
    regions = _neighbours(graph.RAG(), pieces, lab)
    share = 0.01 * pieces.size

    def weigh(regions: Any, _: int, target: int, other: int) -> dict[str, float]:
        return {"weight": _distance(regions.nodes[target], regions.nodes[other], share)}

    def join(regions: Any, source: int, target: int) -> None:
        for fact in ("count", "sum"):
            regions.nodes[target][fact] += regions.nodes[source][fact]

    for one, other in regions.edges:
        regions.edges[one, other].update(weigh(regions, one, one, other))
    stages = []
    for threshold in _STAGES:  # each goes on with the graph that the one before it left
        merged = graph.merge_hierarchical(
            pieces,
            regions,
            thresh=threshold,
            rag_copy=False,
            in_place_merge=True,
            merge_func=join,
            weight_func=weigh,
        )
        stages.append(_numbered(merged))
    return np.stack(stages, -1)


def _neighbours(regions: Any, pieces: Labels, lab: NDArray[np.float64]) -> Any:
    """The pieces as nodes of an empty graph, with an edge where two share a border."""
    counts = np.bincount(pieces.ravel())
    sums = np.stack(
        [np.bincount(pieces.ravel(), plane.ravel()) for plane in np.moveaxis(lab, -1, 0)]
    )
    for number, count in enumerate(counts):
        regions.add_node(number, labels=[number], count=int(count), sum=sums[:, number])
    beside = np.stack((pieces[:, :-1].ravel(), pieces[:, 1:].ravel()))
    below = np.stack((pieces[:-1].ravel(), pieces[1:].ravel()))
    pairs = np.unique(np.sort(np.concatenate((beside, below), 1), axis=0), axis=1)
    regions.add_edges_from(pairs[:, pairs[0] != pairs[1]].T.tolist())
    return regions


def _distance(one: Any, other: Any, share: float) -> float:
    """The root of Ward's criterion: a difference in CIELAB, larger the more pixels it concerns."""
    own, theirs = one["count"], other["count"]
    apart = np.linalg.norm(one["sum"] / own - other["sum"] / theirs)
    return float(apart * np.sqrt(own * theirs / (own + theirs) / share))


def _numbered(labels: Labels) -> NDArray[np.uint8]:
    """Regions numbered from 1 by falling size, as far as a byte goes."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    rank[rank > _MOST] = 0
    return rank[inverse].reshape(labels.shape).astype(np.uint8)
