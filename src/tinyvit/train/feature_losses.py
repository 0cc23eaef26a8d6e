"""How far a student's feature maps are from its teacher's, and its masks from the teacher's masks.

Pure functions on tensors. Decoupled distillation of SAM's encoder by the squared error of its
embedding: MobileSAM (Zhang et al., 2023). Dice: Milletari et al., 2016.

Letters: N pictures, C channels, h w a map's grid, P masks.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FeatureLoss",
    "cosine_per_cell",
    "covered_cells",
    "feature_loss",
    "fit_grid",
    "mask_loss",
]

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
    """The cells whose middle lies in the picture and not in the padding.

    Args:
        resized_sizes: [N, 2] (height, width) of the pictures in the model's frame, in pixels.
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
