"""Choose among the weights of the last stage, and how their scores are read, before any evaluation.

Everything is measured on composites of the objects that validate, and on regions and labelled
things of the photographs that do, which no stage saw: which of the last stage's two files is better
(composites and regions alone), what to add to each predicted IoU so that the best of a click's
masks is taken and the prediction is right on average, and the thresholds for finding everything.
A click may mean any of the three: without things, the offsets preferred parts, and of held-out
things the chosen mask had an IoU of .62 instead of .69 (weights of the stage ``whole``).
``WORK/weights/chosen.json`` says what was chosen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

import evaluate
from composites import CompositeSet
from history import read_stages
from tinyvit.checkpoints.files import write_text
from tinyvit.evaluate.metrics import most_interior_point
from tinyvit.evaluate.segment import EvaluateSettings, LabelledImage, evaluate_segment
from tinyvit.images.mask_ops import box_around
from tinyvit.sam import SamPredictor

Floats = NDArray[np.float64]

MASKS = 400  # of each set
OFFSETS = np.arange(-0.2, 0.21, 0.02)
GOOD = 0.7  # IoU of a mask that should be found when everything is asked for
_KEPT = 0.85  # share of the good masks that a threshold lets through
_STABILITY_OFFSET = 1.0  # in logits, as segment-anything's


@dataclass(frozen=True)
class Answers:
    """What a model said: to a click its three masks, to a box its single one.

    Attributes:
        click_scores: [N, 3] predicted IoU.
        click_ious: [N, 3] true IoU.
        stabilities: [N, 3].
        box_scores: [N] predicted IoU.
        box_ious: [N] true IoU.
    """

    click_scores: Floats
    click_ious: Floats
    stabilities: Floats
    box_scores: Floats
    box_ious: Floats


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        weights: The file.
        mean_ious: Of each candidate, by its name.
        offsets: [4] what is added to the predicted IoU of each mask; the single one's first.
        thresholds: For the header of the file.
        before: (mean IoU of the mask with the best score, share where that is the best mask, mean
            distance of the predicted from the true IoU) of clicks, without the offsets.
        after: The same with them.
    """

    weights: str
    mean_ious: dict[str, float]
    offsets: tuple[float, float, float, float]
    thresholds: dict[str, float]
    before: tuple[float, float, float]
    after: tuple[float, float, float]


def build(work: Path, stages: Path, target: Path, most_masks: int = MASKS) -> Chosen:
    """Choose, and write what was chosen."""
    folder = work / "runs" / list(read_stages(stages))[-1]
    names = [name for name in ("best", "last") if (folder / f"{name}.safetensors").is_file()]
    if not names:
        raise ValueError(f"{folder} has no weights; the step 'train' makes them")
    choices = evaluate.Choices(None, work, 400, split="val", seed=7)
    sets = evaluate.open_sets(choices)
    settings = EvaluateSettings(
        (1, 3), most_clicks=3, with_baselines=False, most_masks=max(1, most_masks // 2)
    )
    means = {}
    for name in names:
        file = str(folder / f"{name}.safetensors")
        reports = [evaluate_segment(file, one.images, settings).ious for one in sets]
        kinds = ("1 click", "3 clicks", "box")
        means[name] = float(np.mean([report[kind].value for report in reports for kind in kinds]))
    best = folder / f"{max(names, key=means.__getitem__)}.safetensors"
    predictor = SamPredictor.from_checkpoint(best)
    images = [one.images for one in sets]
    if (work / "labels" / "manifest.csv").is_file():
        things = CompositeSet(work, "val", seed=7, things=1.0)[:most_masks]
        images.append(cast("Sequence[LabelledImage]", things))
    found = [answers(predictor, one, most_masks) for one in images]
    merged = Answers(*(np.concatenate(parts) for parts in zip(*map(_parts, found), strict=True)))
    offsets = choose_offsets(merged)
    added = np.array(offsets[1:])
    thresholds = choose_thresholds(merged, added)
    chosen = Chosen(
        str(best.relative_to(work)),
        means,
        offsets,
        thresholds,
        quality(merged, np.zeros(3)),
        quality(merged, added),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(asdict(chosen), indent=2) + "\n")
    return chosen


def _parts(found: Answers) -> tuple[Floats, ...]:
    return tuple(vars(found).values())


def answers(predictor: SamPredictor, images: Iterable[LabelledImage], most_masks: int) -> Answers:
    """Ask for each mask by a click at its most interior point, and by its box."""
    rows: list[tuple[Floats, Floats, Floats, float, float]] = []
    for one in images:
        if len(rows) >= most_masks:
            break
        image, masks = one.load()
        predictor.set_image(image)
        for mask in masks[: most_masks - len(rows)] > 0.5:  # some are probabilities
            point = np.array([most_interior_point(mask)])
            three, scores, logits = predictor.predict(point, np.ones(1, np.int64))
            single, score, _ = predictor.predict(
                box=np.array(box_around(mask), np.float64), multimask_output=False
            )
            high, low = (logits > _STABILITY_OFFSET), (logits > -_STABILITY_OFFSET)
            stable = high.sum((1, 2)) / np.maximum(1, low.sum((1, 2)))
            ious = np.array([_iou(found, mask) for found in three])
            rows.append(
                (scores.astype(float), ious, stable, float(score[0]), _iou(single[0], mask))
            )
    return Answers(*(np.array(part, np.float64) for part in zip(*rows, strict=True)))


def _iou(one: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    ours, theirs = one.astype(bool), other.astype(bool)
    return float((ours & theirs).sum() / max(1, (ours | theirs).sum()))


def choose_offsets(found: Answers) -> tuple[float, float, float, float]:
    """What to add to each mask's score: the best mean IoU of the chosen mask, right on average."""
    best = max(
        product(OFFSETS, OFFSETS),
        key=lambda pair: (quality(found, np.array([0.0, *pair]))[0], -abs(pair[0]) - abs(pair[1])),
    )
    added = np.array([0.0, *best])
    rows = np.arange(len(found.click_ious))
    taken = (found.click_scores + added).argmax(1)
    added += (found.click_ious[rows, taken] - (found.click_scores + added)[rows, taken]).mean()
    single = (found.box_ious - found.box_scores).mean()
    first, second, third = (round(float(value), 4) for value in added)
    return round(float(single), 4), first, second, third


def quality(found: Answers, added: Floats) -> tuple[float, float, float]:
    """(mean IoU of the chosen mask, how often it is the best, mean error of its score)."""
    scores, rows = found.click_scores + added, np.arange(len(found.click_ious))
    taken = scores.argmax(1)
    ious = found.click_ious[rows, taken]
    is_best = ious >= found.click_ious.max(1) - 1e-9
    error = np.abs(scores[rows, taken] - ious)
    return float(ious.mean()), float(is_best.mean()), float(error.mean())


def choose_thresholds(found: Answers, added: Floats) -> dict[str, float]:
    """Thresholds that let most of the good masks of clicks through; none without good masks."""
    is_good = found.click_ious >= GOOD
    if not is_good.any():
        return {}
    scores = (found.click_scores + added)[is_good]
    levels = {"pred_iou_thresh": scores, "stability_score_thresh": found.stabilities[is_good]}
    kept = {name: float(np.quantile(values, 1 - _KEPT)) for name, values in levels.items()}
    return {name: round(min(max(value, 0.0), 1.0), 2) for name, value in kept.items()}
