"""A mask prompt as low-res logits: those of an earlier answer, or a bool mask of the picture.

A bool mask has no logits of its own. A cell of the low-res grid that the mask covers entirely gets
+6, one outside gets -6, and one covered in part lies between in proportion, so that the logit is 0
where half is covered and the mask's outline stays where it was. 6 is what sure pixels of the
decoder's own answers have (sigmoid(6) = 0.998); much larger values would be unlike anything that
the prompt encoder saw in training.

Knows no model. Letters: H W the picture, h4 w4 the low-res logits.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tinyvit.image_spec import Placement

__all__ = ["SURE", "Size", "mask_to_logits"]

Size: TypeAlias = "tuple[int, int]"

SURE = 6.0
"""Logit of a pixel that a bool mask names; its negative for all others and for the padding."""


def mask_to_logits(
    mask: NDArray[np.float32] | NDArray[np.bool_],
    placement: Placement,
    low_res_size: Size,
    frame: Size,
) -> Tensor:
    """A mask prompt as the logits that a prompt encoder takes.

    Args:
        mask: [h4, w4] logits, given back as they are; or [H, W] bool, of the picture.
        placement: Where the picture lies in the model's frame.
        low_res_size: (h4, w4).
        frame: (height, width) of what the low-res logits cover, in pixels of the model's frame;
            at least as large as the resized picture.

    Returns:
        [h4, w4] float32 logits.
    """
    if mask.dtype != bool:
        return torch.from_numpy(mask.astype(np.float32))
    height, width = placement.resized_size
    # Pillow's filter averages where it shrinks: covered area, not a sample of it.
    pixels = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    small = np.array(pixels.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    plane = torch.zeros(1, 1, *frame)
    plane[0, 0, :height, :width] = torch.from_numpy(small) / 255
    coverage = F.adaptive_avg_pool2d(plane, low_res_size)[0, 0]
    return (2 * coverage - 1) * SURE
