"""Prove a store: every row against its checksum, the encoder's hash, and masks on real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import ImageError
from tinyvit.images.decode import decode

from .commits import delete, remove_twice
from .plan import paths_twice
from .rows import DamagedRowError, StoreRow
from .run import SOURCES
from .sources import Source, find_file, read_source
from .store import CHUNK, EmbeddingStore

if TYPE_CHECKING:
    from tinyvit.sam import Masks, Segmenter

POINTS = tuple((x, y) for y in (0.25, 0.5, 0.75) for x in (0.25, 0.5, 0.75))
"""Where one click for each mask is made, as shares of (width, height)."""


@dataclass
class VerifyReport:
    """What was found in a store.

    Attributes:
        rows: Rows that were read whole and are as they were written.
        failed: Rows of images that failed.
        damaged: Paths of rows that are not as they were written, or cannot be read.
        twice: Paths that have two rows.
    """

    rows: int = 0
    failed: int = 0
    damaged: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MaskAgreement:
    """Masks from a store against masks from the image itself.

    Attributes:
        images: Images compared.
        masks: Masks compared, one for each click, in all.
        mean_iou: Their mean intersection over union.
        worst_iou: The least of them.
        missing: Images whose file was not found or is another by now.
    """

    images: int
    masks: int
    mean_iou: float
    worst_iou: float
    missing: int


def verify_store(
    store: EmbeddingStore,
    repair: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> VerifyReport:
    """Read every row of a store whole.

    Args:
        store: The store.
        repair: Delete damaged rows and the older of two of one path; the next run embeds the
            images again.
        progress: Is given (rows read, rows in all).
    """
    report = VerifyReport()
    column = store.dataset.to_table(columns=["path"])["path"]
    report.twice = paths_twice(column)
    for start in range(0, len(column), CHUNK):
        paths = column[start : start + CHUNK].to_pylist()
        for row in _whole(store, paths, report):
            report.failed += row.state == "failed"
            report.rows += 1
        if progress is not None:
            progress(start + len(paths), len(column))
    if repair:
        remove_twice(store, report.twice)
        delete(store, report.damaged)
    return report


def _whole(store: EmbeddingStore, paths: Sequence[str], report: VerifyReport) -> Iterator[StoreRow]:
    """The rows of these paths; of those that are not whole, alone, the path."""
    try:
        yield from store.read_rows(paths).values()
    except (DamagedRowError, OSError, ValueError):
        if len(paths) == 1:
            report.damaged.append(paths[0])
            return
        for path in paths:
            yield from _whole(store, [path], report)


def compare_masks(
    store: EmbeddingStore,
    segmenter: Segmenter,
    images: int = 20,
    roots: Sequence[str] | None = None,
    seed: int = 0,
) -> MaskAgreement:
    """Compare masks of stored embeddings with those of the images themselves.

    Nine clicks on each image, the best mask of each.

    Args:
        store: The store, with features.
        segmenter: With the store's encoder.
        images: How many, drawn by ``seed``.
        roots: Folders with the images; None: those that were embedded last.
        seed: Of the choice.

    Raises:
        ValueError: The segmenter has another encoder, or no image was found.
    """
    if roots is None:
        roots = store.dataset.config().get(SOURCES, "").splitlines()
    ious: list[float] = []
    compared = missing = 0
    for path, row in store.iterate(shuffle=seed, raw=True):
        if compared == images:
            break
        pixels = _pixels(row, path, roots)
        if pixels is None:
            missing += 1
            continue
        height, width = pixels.shape[:2]
        prompts = [[{"points": [[x * width, y * height]]} for x, y in POINTS]]
        (stored,) = segmenter.segment([row.to_embedding(store.recipe)], prompts)
        (fresh,) = segmenter.segment([pixels], prompts)
        ious += _ious(stored, fresh)
        compared += 1
    if not compared:
        raise ValueError(
            f"none of {missing} images was found as it was embedded; say with images=... where "
            "they are"
        )
    return MaskAgreement(compared, len(ious), float(np.mean(ious)), min(ious), missing)


def _pixels(row: StoreRow, path: str, roots: Sequence[str]) -> NDArray[np.uint8] | None:
    """The image of a row, upright RGB [H, W, 3]; None where it is not there as it was."""
    place = find_file(path, roots)
    if place is None:
        return None
    try:
        data, _ = read_source(Source(path, place, row.size, row.mtime_ns))
        return decode(data) if len(data) == row.size else None
    except ImageError:
        return None


def _ious(first: Masks, second: Masks) -> list[float]:
    """Intersection over union of each mask, by the better of its candidates in the second."""
    found = []
    for number, best in enumerate(second.best().tolist()):
        one, other = first.mask(number, best), second.mask(number, best)
        union = np.count_nonzero(one | other)
        found.append(np.count_nonzero(one & other) / union if union else 1.0)
    return found
