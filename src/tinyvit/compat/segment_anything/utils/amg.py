"""segment-anything's ``utils.amg``: what everything mode is made of, on tensors, by its names.

``tinyvit.sam.SamAutomaticMaskGenerator`` itself works on parts of masks in numpy (``tinyvit.sam``).
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.images import mask_ops
from tinyvit.images.mask_ops import remove_small_regions as remove_small_regions
from tinyvit.sam import automatic
from tinyvit.sam.automatic import build_all_layer_point_grids as build_all_layer_point_grids
from tinyvit.sam.automatic import build_point_grid as build_point_grid
from tinyvit.sam.automatic import generate_crop_boxes as generate_crop_boxes


class MaskData(UserDict[str, Any]):
    """Lists, arrays and tensors about the same masks, filtered and joined together."""

    def __setitem__(self, key: str, item: Any) -> None:
        if not isinstance(item, (list, np.ndarray, Tensor)):
            raise TypeError(
                f"MaskData holds lists, arrays and tensors; {key} is a {type(item).__name__}"
            )
        super().__setitem__(key, item)

    def filter(self, keep: Tensor) -> None:
        """Keep the masks of a tensor of bool or of indices, everywhere."""
        mask = keep.detach().cpu().numpy()
        chosen = np.flatnonzero(mask) if mask.dtype == bool else mask
        for key, values in self.items():
            if isinstance(values, list):
                self[key] = [values[i] for i in chosen]
            elif isinstance(values, Tensor):
                self[key] = values[torch.as_tensor(chosen, device=values.device)]
            else:
                self[key] = values[chosen]

    def cat(self, new_stats: MaskData) -> None:
        """Append the values of other masks."""
        for key, values in new_stats.items():
            own = self.get(key)
            if own is None:
                self[key] = deepcopy(values)
            elif isinstance(values, Tensor):
                self[key] = torch.cat([own, values])
            elif isinstance(values, np.ndarray):
                self[key] = np.concatenate([own, values])
            else:
                self[key] = own + deepcopy(values)

    def to_numpy(self) -> None:
        """Make arrays of all tensors."""
        for key, values in self.items():
            if isinstance(values, Tensor):
                exact = values.float() if values.dtype == torch.bfloat16 else values
                self[key] = exact.detach().cpu().numpy()


def is_box_near_crop_edge(
    boxes: Tensor, crop_box: Sequence[int], orig_box: Sequence[int], atol: float = automatic.EDGE
) -> Tensor:
    """Which boxes [N, 4] of a crop end at its edge and not at the image's, [N] bool."""
    near = automatic.is_box_near_crop_edge(boxes.cpu().numpy(), crop_box, orig_box, atol)
    return torch.from_numpy(near).to(boxes.device)


def box_xyxy_to_xywh(box_xyxy: Any) -> Any:
    """Boxes [..., 4] as (x, y, width, height); a copy of the same kind."""
    box = deepcopy(box_xyxy)
    box[..., 2] -= box[..., 0]
    box[..., 3] -= box[..., 1]
    return box


def batch_iterator(batch_size: int, *args: Any) -> Iterator[list[Any]]:
    """Parts of ``batch_size`` of several sequences of one length."""
    counts = {len(values) for values in args}
    if len(counts) != 1:
        raise ValueError(f"wanted sequences of one length; came {sorted(counts)}")
    for start in range(0, counts.pop(), batch_size):
        yield [values[start : start + batch_size] for values in args]


def mask_to_rle_pytorch(tensor: Tensor) -> list[dict[str, Any]]:
    """Masks [N, H, W] bool as run lengths with counts as numbers."""
    return [dict(mask_ops.encode(m, compressed=False)) for m in tensor.bool().cpu().numpy()]


def rle_to_mask(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """The mask [H, W] bool of run lengths."""
    return mask_ops.decode(rle)


def area_from_rle(rle: Mapping[str, Any]) -> int:
    """Pixels of the mask."""
    return mask_ops.area(rle)


def calculate_stability_score(
    masks: Tensor, mask_threshold: float, threshold_offset: float
) -> Tensor:
    """IoU of the masks of logits [..., H, W] at a higher and at a lower threshold, [...]."""
    inner, outer = (
        (masks > mask_threshold + offset).sum((-1, -2), dtype=torch.int32)
        for offset in (threshold_offset, -threshold_offset)
    )
    return inner / outer


def uncrop_boxes_xyxy(boxes: Tensor, crop_box: Sequence[int]) -> Tensor:
    """Boxes [N, 4] or [N, K, 4] of a crop in the image."""
    x0, y0 = crop_box[:2]
    return boxes + boxes.new_tensor([x0, y0, x0, y0])


def uncrop_points(points: Tensor, crop_box: Sequence[int]) -> Tensor:
    """Points [N, 2] or [N, K, 2] of a crop in the image."""
    return points + points.new_tensor(list(crop_box[:2]))


def uncrop_masks(masks: Tensor, crop_box: Sequence[int], orig_h: int, orig_w: int) -> Tensor:
    """Masks [..., h, w] of a crop in the image [..., H, W]."""
    x0, y0, x1, y1 = crop_box
    return torch.nn.functional.pad(masks, (x0, orig_w - x1, y0, orig_h - y1), value=0)


def coco_encode_rle(uncompressed_rle: Mapping[str, Any]) -> dict[str, Any]:
    """Run lengths with their counts as text."""
    return {
        "size": list(uncompressed_rle["size"]),
        "counts": mask_ops.compress(uncompressed_rle["counts"]),
    }


def batched_mask_to_box(masks: Tensor) -> Tensor:
    """First and last pixels of masks [..., H, W] bool, xyxy [..., 4]; zeros for an empty mask."""
    flat = masks.reshape(-1, *masks.shape[-2:]).cpu().numpy()
    boxes = np.array([mask_ops.box_around(mask) for mask in flat], np.int64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, 2:] > 0
    return torch.from_numpy(boxes).reshape(*masks.shape[:-2], 4).to(masks.device)
