"""The losses of all tasks.

Masks, on low-res logits: focal loss (Lin et al., 2017), dice loss (Milletari et al., 2016), the
error of the predicted IoU, and Segment Anything's rule for ambiguous prompts: of several masks only
the best one learns, the predicted IoU of all of them. Classes: cross entropy with soft targets, or
with a teacher's k largest probabilities, what is missing to 1 spread evenly over the other classes
(TinyViT's fast distillation, Wu et al., ECCV 2022, equation 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import FeatureLoss, SegmentSettings

FOCAL_GAMMA = 2.0
FOCAL_ALPHA = 0.25


def focal_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Focal loss of logits [..., h, w], averaged over pixels: [...].

    ``targets`` are in 0..1; ``weights`` are 0 where a pixel does not count.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    found = logits.sigmoid()
    wrong = found * (1 - targets) + (1 - found) * targets
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    values = alpha * wrong**FOCAL_GAMMA * entropy
    if weights is None:
        return values.mean((-2, -1))
    return (values * weights).sum((-2, -1)) / weights.sum((-2, -1)).clamp_min(1)


def dice_loss(
    logits: Tensor, targets: Tensor, weights: Tensor | None = None, squared: bool = False
) -> Tensor:
    """One minus the dice coefficient; arguments and result as ``focal_loss``.

    With ``squared`` the divisor sums squares: the loss is then 0 for equal soft masks, too.
    """
    found = logits.sigmoid()
    if weights is not None:
        found, targets = found * weights, targets * weights
    both = (found * targets).sum((-2, -1))
    each = found.square() + targets.square() if squared else found + targets
    return 1 - (2 * both + 1) / (each.sum((-2, -1)) + 1)  # the 1 keeps empty masks finite


def mask_ious(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """IoU of the masks of logits with targets above 0.5, [...] without gradient.

    1 where both are empty, 0 where only the target is; arguments as ``focal_loss``.
    """
    ours, theirs = logits.detach() > 0, targets > 0.5
    if weights is not None:
        ours, theirs = ours & (weights > 0), theirs & (weights > 0)
    both, either = (ours & theirs).sum((-2, -1)), (ours | theirs).sum((-2, -1))
    ious = torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both))
    return ious.to(logits.dtype)


def prompt_losses(
    settings: SegmentSettings,
    logits: Tensor,
    predicted_ious: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss of each prompt, ``total`` [N]: that of its best mask, and of all predicted IoUs.

    ``logits`` are [N, K, h, w], ``predicted_ious`` [N, K], ``targets`` [N, h, w] in 0..1 and
    ``weights`` [N, h, w], 0 where a pixel does not count. Beside it, [N] each: ``train_iou`` of the
    mask that the model itself thinks best, unweighted ``focal`` and ``dice`` of the one that
    learns, and ``iou_error``, the squared error of the predicted IoUs.
    """
    wanted = targets[:, None].expand_as(logits)
    counted = None if weights is None else weights[:, None].expand_as(logits)
    focal = focal_loss(logits, wanted, counted)  # [N, K]
    dice = dice_loss(logits, wanted, counted)
    of_mask = settings.focal * focal + settings.dice * dice
    best = of_mask.detach().argmin(1, keepdim=True)
    true_ious = mask_ious(logits, wanted, counted)
    iou_error = ((predicted_ious - true_ious) ** 2).mean(1)
    chosen = predicted_ious.detach().argmax(1, keepdim=True)
    return {
        "total": of_mask.gather(1, best)[:, 0] + settings.iou * iou_error,
        "train_iou": true_ious.gather(1, chosen)[:, 0],
        "focal": focal.gather(1, best)[:, 0],
        "dice": dice.gather(1, best)[:, 0],
        "iou_error": iou_error,
    }


def fit_grid(features: Tensor, grid: Sequence[int]) -> Tensor:
    """Resample maps [N, C, h, w] to another grid: bilinear, averaged where cells fall together."""
    if tuple(features.shape[-2:]) == tuple(grid):
        return features
    return F.interpolate(features, list(grid), mode="bilinear", align_corners=False, antialias=True)


def feature_loss(student: Tensor, teacher: Tensor, kind: FeatureLoss = "mse") -> Tensor:
    """Mean distance of two maps [N, C, h, w], a scalar in float32.

    "mse" is the mean square over all numbers, "huber" the same but linear beyond 1, "whitened" the
    mean square in units of each channel's variance in the teacher's maps, so that no loud channel
    drowns the others; "cosine" 1 minus the cosine of the channel vectors, mean over the cells.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have one shape; got {list(student.shape)} and "
            f"{list(teacher.shape)}; bring them together by fit_grid and an adapter"
        )
    student, teacher = student.float(), teacher.float()
    if kind == "mse":
        return F.mse_loss(student, teacher)
    if kind == "whitened":
        spread = teacher.var((0, 2, 3), correction=0, keepdim=True)
        return ((student - teacher).square() / (spread + 1e-6 * spread.mean() + 1e-12)).mean()
    if kind == "huber":
        return F.smooth_l1_loss(student, teacher)
    if kind == "cosine":
        return 1 - cosine_per_cell(student, teacher).mean()
    raise ValueError(f"the loss must be one of {', '.join(get_args(FeatureLoss))}; got {kind!r}")


def cosine_per_cell(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the channel vectors of [N, C, h, w], nothing subtracted: [N, h, w] float32."""
    return F.cosine_similarity(a.float(), b.float(), dim=1)


def covered_cells(placed: Tensor, grid: Sequence[int]) -> Tensor:
    """The cells of a map (h, w) whose middle lies in the image: [N, h, w] bool; always the first.

    ``placed`` [N, 2] is (height, width) of the images as parts of the model input.
    """
    sides = []
    for axis, count in enumerate(grid):
        places = torch.arange(count, device=placed.device)
        sides.append(((places + 0.5) / count < placed[:, axis, None]) | (places == 0))
    return sides[0][:, :, None] & sides[1][:, None, :]


def mask_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How far mask logits [P, h, w] are from a teacher's: dice plus cross entropy, a scalar."""
    student, wanted = student.float(), teacher.float().sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student, wanted)
    return entropy + dice_loss(student, wanted, squared=True).mean()


def one_hot(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Distributions [B, K] float32 of labels [B], ``smoothing`` spread evenly over all classes.

    Examples:
        >>> one_hot(torch.tensor([1]), 4, smoothing=0.2)
        tensor([[0.0500, 0.8500, 0.0500, 0.0500]])
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be at least 0 and below 1, got {smoothing}")
    target = torch.full(
        (len(labels), classes), smoothing / classes, dtype=torch.float32, device=labels.device
    )
    return target.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, K] with distributions [B, K], in float32 at least."""
    logs = F.log_softmax(_wide(logits), dim=1)
    return -(targets.to(logs.dtype) * logs).sum(dim=1).mean()


def sparse_cross_entropy(logits: Tensor, indices: Tensor, probabilities: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, K] with a teacher's sparse distributions.

    ``indices`` [B, k] are the classes that were kept, ``probabilities`` [B, k] theirs. Equal to
    ``soft_cross_entropy`` with the dense distribution, without building it.
    """
    logs = F.log_softmax(_wide(logits), dim=1)  # [B, K]
    kept = probabilities.to(logs.dtype)
    seen = logs.gather(1, indices)  # [B, k]
    others = logits.shape[1] - indices.shape[1]
    total = (kept * seen).sum(dim=1)
    if others:
        rest = (1 - kept.sum(dim=1)).clamp_min(0) / others  # rounding may carry the sum above 1
        total = total + rest * (logs.sum(dim=1) - seen.sum(dim=1))
    return -total.mean()


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
