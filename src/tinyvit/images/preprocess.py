"""Images -> a model's input: resize, crop, normalise and pad as an ``ImageSpec`` says.

Every size comes from ``ImageSpec.place``. Pixels are resized by Pillow (antialiased), as
segment-anything and timm do, so that embeddings equal theirs. ``ResizeLongestSide`` has the names
and results of segment-anything's class, apart from one repair: no side ever becomes 0 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.images.decode import MAX_PIXELS, ImageSource, to_rgb

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]

PreparedImage: TypeAlias = tuple[NDArray[np.float32], Placement]
"""A model's input [3, H, W], and where the image lies in it."""

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
LEAST_RANGE = 1e-8  # for "min_max": an image of one colour becomes 0
LONGEST_WHOLE = 8  # an image longer than this many crops is resized only where the crop looks


def resize(
    image: NDArray[np.uint8],
    size: Size,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> NDArray[np.uint8]:
    """Resize RGB [H, W, 3] uint8 with antialiasing; the same array if it has this size already."""
    check_rgb("image", image)
    check_interpolation(interpolation, FILTERS)
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be (height, width), each at least 1, but is {size}")
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), FILTERS[interpolation]))


def prepare(
    source: ImageSource, spec: ImageSpec, *, max_pixels: int | None = MAX_PIXELS
) -> PreparedImage:
    """Decode an image and make it a model's input, without the copies between.

    Gives what ``to_input(decode(source, max_pixels=max_pixels), spec)`` gives, and raises what
    ``tinyvit.images.decode.decode`` raises.
    """
    rgb = to_rgb(source, max_pixels)
    image = rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)
    return _to_input(image, spec)


def to_input(image: NDArray[np.uint8], spec: ImageSpec) -> PreparedImage:
    """Make one image a model's input.

    Args:
        image: RGB, [H, W, 3] uint8, as ``tinyvit.images.decode.decode`` gives it.
        spec: What the model wants.

    Returns:
        The input [3, h, w] float32, and where the image lies in it.

    Raises:
        ValueError: ``image`` is no RGB uint8 image.

    Examples:
        >>> pixels, placement = to_input(np.zeros((30, 60, 3), np.uint8), ImageSpec.sam(16))
        >>> pixels.shape, placement.resized_size
        ((3, 16, 16), (8, 16))
    """
    check_rgb("image", image)
    return _to_input(Image.fromarray(image), spec)


def _to_input(image: Image.Image, spec: ImageSpec) -> PreparedImage:
    placement = spec.place(image.height, image.width)
    pixels = np.asarray(_resized(image, spec, placement))  # [h, w, 3]
    return normalise(pixels, spec, placement.model_size), placement


def normalise(
    pixels: NDArray[np.uint8], spec: ImageSpec, size: tuple[int, int]
) -> NDArray[np.float32]:
    """RGB [h, w, 3] uint8 -> [3, *size] float32 as ``spec`` says; zeros beyond the image."""
    shift, scale = spec.mean, spec.std
    if spec.normalise == "min_max":
        low, high = float(pixels.min()), float(pixels.max())
        shift, scale = (low, low, low), (max(high - low, LEAST_RANGE),) * 3
    out = np.zeros((3, *size), np.float32)
    for channel in range(3):
        plane = out[channel, : pixels.shape[0], : pixels.shape[1]]
        plane[...] = pixels[:, :, channel]
        plane -= np.float32(shift[channel])
        plane /= np.float32(scale[channel])
    return out


def normalise_and_pad(pixels: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """Normalise tensors that have been resized already, and pad them if ``spec`` does.

    RGB in 0..255, [3, h, w] or [N, 3, h, w], becomes [1, 3, H, W] or [N, 3, H, W] on the same
    device; float32, or the given floating-point type. ValueError: it does not fit ``spec.size``.
    """
    import torch

    if pixels.ndim not in (3, 4) or pixels.shape[-3] != 3:
        raise ValueError(f"wanted RGB pixels [3, h, w] or [N, 3, h, w]; came {list(pixels.shape)}")
    height, width = spec.size
    h, w = pixels.shape[-2:]
    fits = h <= height and w <= width
    if not (fits if spec.resize == "longest_side" else (h, w) == (height, width)):
        raise ValueError(
            f"the image is {h} x {w} (height x width), which does not fit the model's "
            f"{height} x {width}; resize it first, for example with to_input"
        )
    batch = pixels if pixels.ndim == 4 else pixels[None]
    batch = batch if batch.is_floating_point() else batch.float()
    if spec.normalise == "min_max":
        shift, high = batch.amin((1, 2, 3), keepdim=True), batch.amax((1, 2, 3), keepdim=True)
        scale = (high - shift).clamp_min(max(LEAST_RANGE, torch.finfo(batch.dtype).tiny))
    else:
        shift, scale = (batch.new_tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    batch = (batch - shift) / scale
    if not spec.pad:
        return batch
    return torch.nn.functional.pad(batch, (0, width - w, 0, height - h))


class ResizeLongestSide:
    """Segment-anything's resizing: the longest side to a target, coordinates along with it.

    Args:
        target_length: The longest side after resizing, in pixels.

    Raises:
        ValueError: ``target_length`` is not a whole number of at least 1.
    """

    def __init__(self, target_length: int) -> None:
        self.target_length = ImageSpec.sam(target_length).size[0]

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> Size:
        """Give the (height, width) after resizing; no side is below 1."""
        return ImageSpec.sam(long_side_length).place(oldh, oldw).resized_size

    def apply_image(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize RGB [H, W, 3] uint8 to [h, w, 3] uint8."""
        check_rgb("image", image)
        return resize(image, self._place(image.shape[:2]).resized_size)

    def apply_coords(self, coords: NDArray[np.generic], original_size: Size) -> NDArray[np.float64]:
        """Map points [..., 2] (x, y) in the original image of (height, width) to the resized."""
        return self._place(original_size).points_to_model(np.asarray(coords, dtype=np.float64))

    def apply_boxes(self, boxes: NDArray[np.generic], original_size: Size) -> NDArray[np.float64]:
        """Map boxes [..., 4] xyxy in the original image; they come back as [B, 4]."""
        mapped = self._place(original_size).boxes_to_model(np.asarray(boxes, dtype=np.float64))
        return mapped.reshape(-1, 4)

    def apply_image_torch(self, image: torch.Tensor) -> torch.Tensor:
        """Resize a floating-point batch [N, C, H, W] to [N, C, h, w]; close to, not equal to PIL.

        Raises:
            ValueError: ``image`` has another shape or type.
        """
        from torch.nn.functional import interpolate

        if image.ndim != 4 or not image.is_floating_point():
            raise ValueError(
                "wanted a floating-point batch [N, C, H, W]; "
                f"came {list(image.shape)} of {image.dtype}"
            )
        size = self._place(tuple(image.shape[-2:])).resized_size
        return interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def apply_coords_torch(self, coords: torch.Tensor, original_size: Size) -> torch.Tensor:
        """Map points [..., 2] (x, y) of any type; they come back in float32."""
        return self._place(original_size).points_to_model(coords.float())

    def apply_boxes_torch(self, boxes: torch.Tensor, original_size: Size) -> torch.Tensor:
        """Map boxes [..., 4] xyxy of any type; they come back as [B, 4] float32."""
        return self._place(original_size).boxes_to_model(boxes.float()).reshape(-1, 4)

    def _place(self, original_size: tuple[int, ...]) -> Placement:
        height, width = original_size
        return ImageSpec.sam(self.target_length).place(height, width)


def _resized(image: Image.Image, spec: ImageSpec, placement: Placement) -> Image.Image:
    """Resize and crop, without the padding."""
    height, width = placement.resized_size
    top, left = placement.crop_offset
    crop_h, crop_w = spec.size
    if spec.resize == "crop" and max(height, width) > LONGEST_WHOLE * max(spec.size):
        # A strip of 1 x 3000 would become 235 x 705000 for a crop of 224. Pillow can compute the
        # crop alone, but then chooses the order of its two passes anew, so a level of 255 may
        # differ (more in noise); that is why ordinary images go whole, as in torchvision.
        seen = placement.boxes_to_image([0.0, 0.0, float(crop_w), float(crop_h)])
        old_h, old_w = placement.original_size
        x0, y0 = max(0.0, seen[0]), max(0.0, seen[1])  # the last bit may lie outside
        corners = (x0, y0, min(float(old_w), seen[2]), min(float(old_h), seen[3]))
        return image.resize((crop_w, crop_h), FILTERS[spec.interpolation], box=corners)
    if image.size != (width, height):
        image = image.resize((width, height), FILTERS[spec.interpolation])
    return image.crop((left, top, left + crop_w, top + crop_h)) if spec.resize == "crop" else image


def check_rgb(name: str, pixels: NDArray[np.uint8]) -> None:
    """Raise a ValueError for pixels that are not an image [H, W, 3] uint8."""
    is_array = isinstance(pixels, np.ndarray)
    good = is_array and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    if not good or pixels.size == 0:
        came = f"{list(pixels.shape)} {pixels.dtype}" if is_array else type(pixels).__name__
        raise ValueError(
            f"{name} must be an image [H, W, 3] uint8; came {came}; "
            "tinyvit.images.decode.decode makes one of nearly anything"
        )


def check_interpolation(name: str, filters: Mapping[str, object]) -> None:
    """Raise a ValueError for the name of an interpolation that is not offered."""
    if name not in filters:
        raise ValueError(f"interpolation must be one of {', '.join(filters)}, but is {name!r}")
