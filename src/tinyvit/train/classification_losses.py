"""Losses of classifiers: cross entropy with soft targets, and with a teacher's sparse ones.

The sparse distribution is that of TinyViT's fast distillation (Wu et al., ECCV 2022, equation 2):
a teacher's k largest probabilities are kept, and what is missing to 1 is spread evenly over the
other classes. Pure functions on tensors.

Letters: B batch, K classes, k classes that are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dense_distribution", "one_hot", "soft_cross_entropy", "sparse_cross_entropy"]


def one_hot(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Distributions of labels, smoothed.

    Args:
        labels: [B] int64, 0 to ``classes`` - 1.
        classes: K.
        smoothing: Part that is spread evenly over all classes, 0 to below 1.

    Returns:
        [B, K] float32; rows sum to 1.

    Raises:
        ValueError: ``smoothing`` is out of its range.

    Example:
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
    """Mean cross entropy of logits with distributions.

    Args:
        logits: [B, K], any floating-point type; computed in float32 at least.
        targets: [B, K], rows sum to 1.

    Returns:
        A scalar.
    """
    logs = F.log_softmax(_wide(logits), dim=1)
    return -(targets.to(logs.dtype) * logs).sum(dim=1).mean()


def sparse_cross_entropy(logits: Tensor, indices: Tensor, probabilities: Tensor) -> Tensor:
    """Mean cross entropy of logits with a teacher's sparse distributions.

    Equal to ``soft_cross_entropy`` with ``dense_distribution``, without building it.

    Args:
        logits: [B, K] of the student.
        indices: [B, k] int64, the classes that were kept, distinct in a row.
        probabilities: [B, k], their probabilities.

    Returns:
        A scalar.
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


def dense_distribution(indices: Tensor, probabilities: Tensor, classes: int) -> Tensor:
    """A teacher's distribution, what was not kept spread evenly.

    Args:
        indices: [B, k] int64, distinct in a row.
        probabilities: [B, k].
        classes: K, at least k.

    Returns:
        [B, K] of the type of ``probabilities``.
    """
    others = classes - indices.shape[1]
    rest = (1 - probabilities.sum(dim=1, keepdim=True)).clamp_min(0) / max(others, 1)
    return rest.expand(-1, classes).contiguous().scatter_(1, indices, probabilities)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
