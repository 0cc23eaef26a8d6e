"""Pixels of every type -> RGB uint8 [H, W, 3].

The rules, the same for files, PIL images, arrays and tensors:

* Transparency is laid over white. The colour stored under transparent pixels is arbitrary (often
  black, or what was cut away); white is what a viewer shows there. Opaque pixels stay exact.
* 16 bits become 8 by dropping the lower byte, as Pillow does for 16-bit colour; true and false
  become 255 and 0; floating-point pixels must lie in 0..1, are scaled by 255 and rounded.
* Grey is repeated to three channels; CMYK, YCbCr, HSV and LAB are converted. Colour profiles that
  a file carries are not applied: the models were trained without.

This file knows no files and no formats, and does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tinyvit.errors import ImageError

if TYPE_CHECKING:
    import torch

__all__ = ["RGB", "from_array", "from_pil", "from_tensor"]

RGB: TypeAlias = NDArray[np.uint8]


def from_pil(image: Image.Image, name: str) -> RGB:
    """Convert a loaded PIL image of any mode; its EXIF orientation is not this function's job.

    Args:
        image: The image.
        name: What to call it in errors.

    Returns:
        RGB, [H, W, 3] uint8.

    Raises:
        ImageError: The pixels are out of the range that can be brought to 8 bits.
        ValueError: Pillow cannot convert this mode.
    """
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        values: NDArray[np.generic] = np.asarray(image)
        if mode == "I":  # 32 bits: where Pillow puts 16-bit PGM and older 16-bit PNG
            if values.min() < 0 or values.max() > 65535:
                raise ImageError(
                    f"{name} has whole numbers from {values.min()} to {values.max()} as pixels; "
                    "wanted 0 to 65535; scale it to 8 or 16 bits first"
                )
            values = values.astype(np.uint16)
        grey: RGB = np.repeat(_to_uint8(values, name)[:, :, None], 3, axis=2)
        if isinstance(clear := image.info.get("transparency"), int):
            grey[values == clear] = 255
        return grey
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        turned = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        return np.array(turned, dtype=np.uint8)
    if image.has_transparency_data:
        image = image.convert("LA") if mode == "La" else image
        return _over_white(image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _over_white(rgba: Image.Image) -> RGB:
    white = Image.new("RGBA", rgba.size, "white")
    return np.array(Image.alpha_composite(white, rgba).convert("RGB"))


def _to_uint8(values: NDArray[Any], name: str) -> RGB:
    """Bring pixels of any accepted type to 8 bits, or say why not."""
    kind, width = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        return cast("RGB", values.astype(np.uint8) * np.uint8(255))
    if kind == "u" and width == 1:
        return values.astype(np.uint8, copy=False)
    if kind == "u" and width == 2:
        return cast("RGB", (values >> 8).astype(np.uint8))
    if kind != "f":
        raise ImageError(
            f"{name} has pixels of type {values.dtype}; wanted uint8, uint16, bool or floats in "
            "0..1; convert it first, for example with .astype(numpy.uint8)"
        )
    if not np.isfinite(values).all():
        raise ImageError(f"{name} has pixels that are NaN or infinite; replace them first")
    low, high = float(values.min()), float(values.max())
    if low < -1e-4 or high > 1 + 1e-4:  # room for the overshoot of earlier arithmetic only
        raise ImageError(
            f"{name} has floating-point pixels from {low:g} to {high:g}; wanted 0 to 1; "
            "divide by the largest possible value, or convert 0..255 to uint8"
        )
    return cast("RGB", np.rint(np.clip(values, 0, 1) * 255.0).astype(np.uint8))


def from_array(array: NDArray[np.generic]) -> RGB:
    """Convert an array [H, W] or [H, W, 1 | 3 | 4] of uint8, uint16, bool or floats in 0..1.

    Returns:
        RGB, [H, W, 3] uint8, contiguous and writable; the same memory where nothing had to change.

    Raises:
        ImageError: The shape, the type or the range has no rule, or there are no pixels.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(
            "wanted an array [H, W] or [H, W, 1 | 3 | 4] of one picture; "
            f"came {list(array.shape)}{hint}"
        )
    if array.size == 0:
        raise ImageError(f"the array has no pixels: its shape is {list(array.shape)}")
    pixels = _to_uint8(array, "the array")
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    if pixels.shape[2] == 4:
        return _over_white(Image.fromarray(np.ascontiguousarray(pixels)))
    pixels = np.ascontiguousarray(pixels)
    return pixels if pixels.flags.writeable else pixels.copy()


def from_tensor(tensor: torch.Tensor) -> RGB:
    """Convert a tensor [3, H, W] or [1, H, W] of uint8, uint16, bool or floats in 0..1.

    Returns:
        RGB, [H, W, 3] uint8, contiguous and writable.

    Raises:
        ImageError: The shape, the type or the range has no rule, or there are no pixels.
    """
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ImageError(
            f"wanted a tensor [3, H, W] or [1, H, W] of one picture; came {list(tensor.shape)}"
        )
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy has no bfloat16
    return from_array(tensor.permute(1, 2, 0).numpy())
