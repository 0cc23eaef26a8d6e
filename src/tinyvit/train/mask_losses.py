"""The losses of promptable segmentation, on low-res logits.

Focal loss (Lin et al., 2017), dice loss (Milletari et al., 2016), the error of the predicted IoU,
and Segment Anything's rule for ambiguous prompts: of several masks only the best one learns. The
predicted IoU learns for all of them, for otherwise it could not tell which one is best.

Shapes: N prompts, K masks of a prompt, h w the low-res logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MaskLoss", "MaskLosses", "dice_loss", "focal_loss", "mask_ious", "shrink_masks"]

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
