"""The masks of a contestant of ``everything.py``, and the agreement of two sets. Needs numpy only.

A row is one mask: its pixels, packed eight to a byte, and its scores. N, M: masks of the two sets.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

PIXELS_AT_ONCE = 1 << 20  # a multiple of 8


class MaskSet:
    """Masks with their scores; packed only when converted to an array, outside the timed call."""

    def __init__(self, masks: Sequence[np.ndarray], scores: Sequence[tuple[float, float]]) -> None:
        self.masks, self.scores = masks, scores

    @classmethod
    def of_records(cls, records: Sequence[Mapping]) -> "MaskSet":
        """From the records of ``SamAutomaticMaskGenerator.generate``, with masks as arrays."""
        scores = [(row["predicted_iou"], row["stability_score"]) for row in records]
        return cls([row["segmentation"] for row in records], scores)

    @classmethod
    def of_masks(cls, masks: Sequence[np.ndarray], scores: Iterable[float]) -> "MaskSet":
        """From masks [H, W] bool and a score for each."""
        return cls(masks, [(float(score), float("nan")) for score in scores])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """[N] rows of (mask, predicted_iou, stability_score)."""
        width = -(-self.masks[0].size // 8) if self.masks else 0
        kind = [("mask", np.uint8, (width,)), ("predicted_iou", "f8"), ("stability_score", "f8")]
        rows = np.zeros(len(self.masks), kind)
        for i, (mask, scores) in enumerate(zip(self.masks, self.scores, strict=True)):
            rows["mask"][i] = np.packbits(mask)
            rows["predicted_iou"][i], rows["stability_score"][i] = scores
        return rows


def ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N, M] intersection over union of packed masks [N, bytes] and [M, bytes]; 1 if both empty."""
    common = np.zeros((len(a), len(b)))
    areas = [np.zeros(len(a)), np.zeros(len(b))]
    for start in range(0, a.shape[1], PIXELS_AT_ONCE // 8):
        part = slice(start, start + PIXELS_AT_ONCE // 8)
        left, right = (np.unpackbits(m[:, part], axis=1).astype(np.float32) for m in (a, b))
        common += left @ right.T
        areas = [areas[0] + left.sum(axis=1), areas[1] + right.sum(axis=1)]
    union = areas[0][:, None] + areas[1][None] - common
    return np.where(union > 0, common / np.maximum(union, 1), 1.0)


def same_prompts(theirs: np.ndarray, ours: np.ndarray) -> dict:
    """Agreement of the masks for the same prompts, row by row.

    Raises:
        ValueError: They have different numbers of masks.
    """
    if len(theirs) != len(ours):
        raise ValueError(f"{len(theirs)} masks against {len(ours)} for the same prompts")
    pairs = [
        ious(a["mask"][None], b["mask"][None])[0, 0] for a, b in zip(theirs, ours, strict=True)
    ]
    return {
        "masks": len(theirs),
        "least_iou": float(min(pairs)),
        "most_score_difference": _most_difference(theirs, ours),
    }


def same_things(theirs: np.ndarray, ours: np.ndarray, least: float = 0.98) -> dict:
    """Agreement of two results of everything mode, in any order of the masks."""
    if not len(theirs) or not len(ours):
        alone = {"theirs_alone": len(theirs), "ours_alone": len(ours)}
        return {"theirs": len(theirs), "ours": len(ours), "least_iou": None, **alone}
    table = ious(theirs["mask"], ours["mask"])
    partner_of_theirs, partner_of_ours = table.max(axis=1), table.max(axis=0)
    paired = partner_of_theirs >= least
    partners = ours[table.argmax(axis=1)]
    return {
        "theirs": len(theirs),
        "ours": len(ours),
        "least_iou": float(min(partner_of_theirs.min(), partner_of_ours.min())),
        "theirs_alone": int((partner_of_theirs < least).sum()),
        "ours_alone": int((partner_of_ours < least).sum()),
        "most_score_difference": _most_difference(theirs[paired], partners[paired]),
        "most_stability_difference": _most_difference(
            theirs[paired], partners[paired], "stability_score"
        ),
    }


def _most_difference(a: np.ndarray, b: np.ndarray, name: str = "predicted_iou") -> float:
    return float(np.abs(a[name] - b[name]).max(initial=0))
