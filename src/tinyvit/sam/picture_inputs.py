"""What ``SamPredictor`` is given as a picture -> an encoder's input, and where it lies in it.

Knows an ``ImageSpec`` and no model. Letters: H W the picture, h w the same after resizing.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.images.decode import ImageSource, decode
from tinyvit.images.preprocess import normalise_and_pad, to_tensor
from tinyvit.inference.pictures import Prepared

from .mask_prompts import Size

__all__ = ["prepare_picture", "prepare_resized"]

_FORMATS = ("RGB", "BGR")


def prepare_picture(
    image: ImageSource, image_format: str, model_format: str, spec: ImageSpec
) -> Prepared:
    """Make a picture of any kind an input.

    Args:
        image: What ``tinyvit.images.decode`` reads.
        image_format: Order of an array's channels, "RGB" or "BGR".
        model_format: The order that the model was trained with.
        spec: How pictures are prepared.

    Returns:
        ([3, H', W'] float32, where the picture lies in it).

    Raises:
        ImageError: The picture cannot be read, or the array is no picture.
        TypeError: It is nothing that could be a picture.
        ValueError: Another format, or "BGR" for something that says its order itself.
    """
    if image_format not in _FORMATS:
        raise ValueError(f"image_format must be one of {_FORMATS}, came {image_format!r}")
    if image_format == "BGR" and not isinstance(image, np.ndarray):
        raise ValueError(
            "image_format='BGR' is for arrays; files and PIL images say their order themselves: "
            "leave it out"
        )
    if isinstance(image, np.ndarray) and image_format != model_format:
        channels = image.shape[2] if image.ndim == 3 else 1
        if channels in (3, 4):  # grey has no order, transparency stays behind
            image = image[:, :, [2, 1, 0, 3][:channels]]
    return to_tensor(decode(image), spec)


def prepare_resized(pixels: Tensor, original_size: Size, spec: ImageSpec) -> Prepared:
    """Make a picture that has been resized already an input.

    Args:
        pixels: RGB in 0..255, [1, 3, h, w], the longer side that of ``spec``.
        original_size: (H, W) of the picture before resizing.
        spec: How pictures are prepared.

    Returns:
        ([3, H', W'] float32 on the CPU, where the picture lies in it).

    Raises:
        ValueError: Another shape.
    """
    size, longest = tuple(pixels.shape), max(spec.size)
    if len(size) != 4 or size[:2] != (1, 3) or max(size[2:]) != longest:
        raise ValueError(
            f"set_torch_image wants [1, 3, h, w] with the longer side {longest}, as "
            f"transform.apply_image_torch gives it; came {list(size)}"
        )
    prepared = normalise_and_pad(pixels.detach().cpu(), spec)[0].float()
    height, width = (int(side) for side in original_size)
    frame = int(prepared.shape[1]), int(prepared.shape[2])
    return prepared, Placement((height, width), (size[2], size[3]), (0, 0), frame)
