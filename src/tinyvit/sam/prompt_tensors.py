"""Many prompts as the tensors that a decoder takes, in the model's frame.

Prompts are never padded to the same number of points: a padding point is a token of its own, and
other tokens look at it, so the answer would change. They are grouped instead, and those of one
group stacked. Knows no model: where a picture lies in the model's frame comes from a ``Placement``,
how fine its low-res logits are from the caller.

Letters: N (B in errors) prompts, P points, h4 w4 the low-res logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.image_spec import Placement

from .mask_prompts import Size, mask_to_logits
from .prompts import Kind, Prompt

__all__ = ["PromptTensors", "group_prompts", "stack_prompts"]


@dataclass(frozen=True)
class PromptTensors:
    """Prompts of one kind as a decoder takes them.

    Attributes:
        points: (coordinates [N, P, 2] float32 as (x, y) in pixels of the model's frame, labels
            [N, P] int64: 1, 0, or -1 for no point at all), or None.
        boxes: [N, 4] float32 xyxy in the model's frame, or None.
        masks: [N, 1, h4, w4] float32 logits, or None.

    Raises:
        ValueError: Nothing is prompted, a shape is wrong, a coordinate is not finite, a label is
            unknown, or the numbers of prompts differ.
    """

    points: tuple[Tensor, Tensor] | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        counts = {}
        if self.points is not None:
            coords, labels = self.points
            _check_tensor("point_coords", coords, ("B", "N", 2))
            _check_tensor("point_labels", labels, tuple(coords.shape[:2]))
            unknown = sorted(set(labels.flatten().tolist()) - {-1, 0, 1})
            if unknown:
                raise ValueError(
                    f"labels of points must be 1, 0, or -1 for no point at all; came {unknown}"
                )
            counts["point_coords"] = len(coords)
        if self.boxes is not None:
            _check_tensor("boxes", self.boxes, ("B", 4))
            counts["boxes"] = len(self.boxes)
        if self.masks is not None:
            _check_tensor("mask_input", self.masks, ("B", 1, "h4", "w4"))
            counts["mask_input"] = len(self.masks)
        if not counts:
            raise ValueError("nothing is prompted; give points, boxes or masks")
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{count} in {name}" for name, count in counts.items())
            raise ValueError(f"every kind of prompt must be about the same objects; came {shown}")

    def __len__(self) -> int:
        given = self.points[0] if self.points is not None else self.boxes
        return len(cast(Tensor, self.masks if given is None else given))

    def part(self, start: int, stop: int) -> PromptTensors:
        """The prompts from ``start`` up to ``stop``."""
        return PromptTensors(
            None
            if self.points is None
            else (self.points[0][start:stop], self.points[1][start:stop]),
            None if self.boxes is None else self.boxes[start:stop],
            None if self.masks is None else self.masks[start:stop],
        )


def group_prompts(prompts: Sequence[Prompt]) -> dict[Kind, list[int]]:
    """Positions of the prompts of each kind; each kind can be decoded together.

    Args:
        prompts: Any mixture.

    Returns:
        Kind -> positions in ``prompts``, both in the order of their first appearance.
    """
    groups: dict[Kind, list[int]] = {}
    for position, prompt in enumerate(prompts):
        groups.setdefault(prompt.kind, []).append(position)
    return groups


def stack_prompts(
    prompts: Sequence[Prompt], placement: Placement, low_res_size: Size, frame: Size
) -> PromptTensors:
    """Prompts of one kind, moved to the model's frame and stacked.

    Args:
        prompts: At least one, all of one kind, checked by ``Prompt.check_in``.
        placement: Where the picture lies in the model's frame.
        low_res_size: (h4, w4) of the picture's low-res logits.
        frame: (height, width) of what the low-res logits cover, in pixels of the model's frame.

    Returns:
        The tensors, on the CPU.

    Raises:
        ValueError: The prompts are of different kinds.
    """
    if len({prompt.kind for prompt in prompts}) > 1:
        raise ValueError("only prompts of one kind can be stacked; see group_prompts")
    points = boxes = masks = None
    count, has_box, has_mask = prompts[0].kind
    if count:
        coords = np.stack([cast(Any, prompt.points) for prompt in prompts])
        labels = np.stack([cast(Any, prompt.labels) for prompt in prompts])
        points = _float(placement.points_to_model(coords)), torch.from_numpy(labels)
    if has_box:
        boxes = _float(placement.boxes_to_model(np.stack([cast(Any, p.box) for p in prompts])))
    if has_mask:
        logits = [
            mask_to_logits(prompt.mask, placement, low_res_size, frame)
            for prompt in prompts
            if prompt.mask is not None
        ]
        masks = torch.stack(logits)[:, None]
    return PromptTensors(points, boxes, masks)


def _float(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Check a tensor's shape, in which a letter stands for any number, and that it is finite."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, came {type(tensor).__name__}")
    fits = len(shape) == tensor.ndim and all(
        isinstance(want, str) or want == side
        for want, side in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have the shape [{wanted}]; came {list(tensor.shape)}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite numbers; came some that are NaN or infinite")
