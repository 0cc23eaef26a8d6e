"""The losses of promptable segmentation, on low-res logits.

Focal loss (Lin et al., 2017), dice loss (Milletari et al., 2016), the error of the predicted IoU,
and Segment Anything's rule for ambiguous prompts: of several masks only the best one learns. The
predicted IoU learns for all of them, for otherwise it could not tell which one is best.

Shapes: N prompts, K masks of a prompt, h w the low-res logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_GAMMA = 2.0
FOCAL_ALPHA = 0.25


def shrink_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of the model's frame as targets for low-res logits, by covered area.

    Args:
        masks: [N, H, W] bool or 0..1.
        size: (h, w), at most (H, W).

    Returns:
        [N, h, w] float32: the share of each cell that the mask covers.
    """
    return F.adaptive_avg_pool2d(masks.float()[:, None], size)[:, 0]


def focal_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Focal loss, averaged over pixels.

    Args:
        logits: [..., h, w].
        targets: [..., h, w] in 0..1.
        weights: [..., h, w], 0 where a pixel does not count; None: all count alike.

    Returns:
        [...].
    """
    plain = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    chance = logits.sigmoid()
    wrong = chance * (1 - targets) + (1 - chance) * targets
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    values = alpha * wrong**FOCAL_GAMMA * plain
    if weights is None:
        return values.mean((-2, -1))
    return (values * weights).sum((-2, -1)) / weights.sum((-2, -1)).clamp_min(1)


def dice_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """One minus the dice coefficient; arguments and result as ``focal_loss``."""
    chance = logits.sigmoid()
    if weights is not None:
        chance, targets = chance * weights, targets * weights
    both = (chance * targets).sum((-2, -1))
    each = chance.sum((-2, -1)) + targets.sum((-2, -1))
    return 1 - (2 * both + 1) / (each + 1)  # the 1 keeps empty masks finite


def mask_ious(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """IoU of the masks that logits mean with targets, of which half is covered.

    Args:
        logits: [..., h, w].
        targets: [..., h, w] in 0..1.
        weights: As in ``focal_loss``.

    Returns:
        [...] without gradient; 0 where the target is empty and the mask is not.
    """
    ours, theirs = logits.detach() > 0, targets > 0.5
    if weights is not None:
        ours, theirs = ours & (weights > 0), theirs & (weights > 0)
    both, either = (ours & theirs).sum((-2, -1)), (ours | theirs).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both)).to(
        logits.dtype
    )


@dataclass(frozen=True)
class MaskLoss:
    """The loss of some prompts.

    Attributes:
        total: [N], with gradient.
        iou: [N], of the mask that the model itself thinks best.
        focal: [N], of the mask that learns, before weighting.
        dice: [N], of the mask that learns, before weighting.
        iou_error: [N], squared error of the predicted IoU, mean over the K masks.
    """

    total: Tensor
    iou: Tensor
    focal: Tensor
    dice: Tensor
    iou_error: Tensor


@dataclass(frozen=True)
class MaskLosses:
    """How the three losses are weighted.

    Args:
        focal: Weight of the focal loss.
        dice: Weight of the dice loss.
        iou: Weight of the predicted IoU's squared error.

    Raises:
        ValueError: A weight is negative, or those of focal and dice are both 0.
    """

    focal: float = 10.0
    dice: float = 1.0
    iou: float = 1.0

    def __post_init__(self) -> None:
        if min(self.focal, self.dice, self.iou) < 0 or self.focal + self.dice == 0:
            raise ValueError(
                "the weights of the losses must be at least 0, and focal or dice above it; came "
                f"focal={self.focal}, dice={self.dice}, iou={self.iou}"
            )

    def __call__(
        self,
        logits: Tensor,
        predicted_ious: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
    ) -> MaskLoss:
        """The loss of each prompt: that of its best mask, and of all its predicted IoUs.

        Args:
            logits: [N, K, h, w].
            predicted_ious: [N, K].
            targets: [N, h, w] in 0..1.
            weights: [N, h, w], 0 where a pixel does not count; None: all count alike.

        Returns:
            The loss.
        """
        wanted = targets[:, None].expand_as(logits)
        counted = None if weights is None else weights[:, None].expand_as(logits)
        focal = focal_loss(logits, wanted, counted)  # [N, K]
        dice = dice_loss(logits, wanted, counted)
        of_mask = self.focal * focal + self.dice * dice
        best = of_mask.detach().argmin(1, keepdim=True)
        true_ious = mask_ious(logits, wanted, counted)
        iou_error = ((predicted_ious - true_ious) ** 2).mean(1)
        chosen = predicted_ious.detach().argmax(1, keepdim=True)
        return MaskLoss(
            total=of_mask.gather(1, best)[:, 0] + self.iou * iou_error,
            iou=true_ious.gather(1, chosen)[:, 0],
            focal=focal.gather(1, best)[:, 0],
            dice=dice.gather(1, best)[:, 0],
            iou_error=iou_error,
        )


FeatureLoss: TypeAlias = Literal["mse", "cosine", "huber"]


def fit_grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample maps to another grid: bilinear, averaged over the cells that fall together.

    Args:
        features: [N, C, h, w].
        grid: New (h, w).

    Returns:
        [N, C, *grid]; the same tensor if it has this grid already.
    """
    if tuple(features.shape[-2:]) == tuple(grid):
        return features
    return F.interpolate(features, list(grid), mode="bilinear", align_corners=False, antialias=True)


def feature_loss(student: Tensor, teacher: Tensor, kind: FeatureLoss = "mse") -> Tensor:
    """Mean distance of two maps, in float32.

    Args:
        student: [N, C, h, w].
        teacher: [N, C, h, w].
        kind: "mse", the mean square over all numbers; "huber", the same but linear beyond 1;
            "cosine", 1 minus the cosine of the channel vectors, mean over the cells.

    Returns:
        A scalar.

    Raises:
        ValueError: The shapes differ, or ``kind`` is unknown.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have one shape; got {list(student.shape)} and "
            f"{list(teacher.shape)}; bring them together by fit_grid and an adapter"
        )
    student, teacher = student.float(), teacher.float()
    if kind == "mse":
        return F.mse_loss(student, teacher)
    if kind == "huber":
        return F.smooth_l1_loss(student, teacher)
    if kind == "cosine":
        return 1 - cosine_per_cell(student, teacher).mean()
    raise ValueError(f"the loss must be one of {', '.join(get_args(FeatureLoss))}; got {kind!r}")


def cosine_per_cell(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the two channel vectors of each cell; nothing is subtracted before.

    Args:
        a: [N, C, h, w].
        b: [N, C, h, w], or a shape that broadcasts to it.

    Returns:
        [N, h, w] float32, -1..1.
    """
    return F.cosine_similarity(a.float(), b.float(), dim=1)


def covered_cells(
    resized_sizes: Tensor, model_size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """The cells whose middle lies in the image and not in the padding.

    Args:
        resized_sizes: [N, 2] (height, width) of the images in the model's frame, in pixels.
        model_size: (height, width) of the frame in pixels.
        grid: (h, w) of the map.

    Returns:
        [N, h, w] bool; the first cell always counts.
    """
    sides = []
    for axis in (0, 1):
        middles = (torch.arange(grid[axis], device=resized_sizes.device) + 0.5) / grid[axis]
        inside = middles * model_size[axis] < resized_sizes[:, axis : axis + 1]
        inside[:, 0] = True
        sides.append(inside)
    return sides[0][:, :, None] & sides[1][:, None, :]


def mask_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How far masks are from a teacher's: dice plus cross entropy against its probabilities.

    Args:
        student: Logits [P, h, w].
        teacher: Logits [P, h, w].

    Returns:
        A scalar, in float32.
    """
    student, wanted = student.float(), teacher.float().sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student, wanted)
    found = student.sigmoid().flatten(1)
    wanted = wanted.flatten(1)
    both = (found * wanted).sum(1)
    # Squares in the divisor: the distance is then 0 for equal soft masks, not only for hard ones.
    dice = 1 - (2 * both + 1) / (found.square().sum(1) + wanted.square().sum(1) + 1)
    return entropy + dice.mean()
