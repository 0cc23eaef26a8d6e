"""Pictures of a batch laid over each other: mixup and cutmix, and the targets that go with it.

Mixup is of Zhang et al., 2018 (arXiv 1710.09412), cutmix of Yun et al., 2019 (arXiv 1905.04899).
Both mix each picture of a batch with another one of it; one strength is drawn for a batch.

Letters: B batch, K classes, H W height and width of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Mixing", "mix"]


@dataclass(frozen=True)
class Mixing:
    """How much is mixed.

    Args:
        mixup: The parameter of the Beta distribution for mixup; 0 for none.
        cutmix: The same for cutmix; 0 for none.
        probability: Part of the batches that are mixed.
        switch: Part of the mixed batches that get cutmix, where both are on.

    Raises:
        ValueError: A value is out of its range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0:
            raise ValueError(
                f"mixup and cutmix must be at least 0, got {self.mixup} and {self.cutmix}"
            )
        if not (0 <= self.probability <= 1 and 0 <= self.switch <= 1):
            raise ValueError(
                "probability and switch must be between 0 and 1, got "
                f"{self.probability} and {self.switch}"
            )


def mix(
    images: Tensor, targets: Tensor, settings: Mixing, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix a batch.

    Args:
        images: [B, 3, H, W].
        targets: [B, K], a distribution over the classes for each picture.
        settings: How much.
        generator: On the CPU; all chance comes from here.

    Returns:
        The mixed pictures and targets; new tensors, or the given ones where nothing is mixed. A
        target is mixed by the areas that are really seen.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    rng = np.random.default_rng(seed)  # torch has no public Beta with a generator
    can = (settings.mixup > 0, settings.cutmix > 0)
    if not any(can) or len(images) < 2 or rng.random() >= settings.probability:
        return images, targets
    is_cut = can[1] and (not can[0] or rng.random() < settings.switch)
    alpha = settings.cutmix if is_cut else settings.mixup
    keep = float(rng.beta(alpha, alpha))
    order = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    if is_cut:
        top, bottom, left, right = _box(images.shape[2], images.shape[3], keep, rng)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
        keep = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    else:
        mixed = torch.lerp(images[order], images, keep)
    return mixed, torch.lerp(targets[order], targets, keep)


def _box(
    height: int, width: int, keep: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a rectangle of 1 - keep of the area, cut at the borders."""
    side = (1 - keep) ** 0.5
    h, w = int(height * side), int(width * side)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, left = max(y - h // 2, 0), max(x - w // 2, 0)
    return top, min(y + h - h // 2, height), left, min(x + w - w // 2, width)
