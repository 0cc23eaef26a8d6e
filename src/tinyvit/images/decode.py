"""Any image -> RGB uint8 [H, W, 3]: files and their formats, and pixels of every type.

The rules for pixels, the same for files, PIL images, arrays and tensors:

* Transparency is laid over white. The colour stored under transparent pixels is arbitrary (often
  black, or what was cut away); white is what a viewer shows there. Opaque pixels stay exact.
* 16 bits become 8 by dropping the lower byte, as Pillow does for 16-bit colour files. Cameras,
  microscopes and satellites write 8, 10, 12 or 14 bits into 16: where the largest value of an image
  is below 16384, the fewest of these bits that hold it are its range, and the lowest bits beyond 8
  are dropped. The log says so once for each depth. An image that is meant to be that dark is scaled
  to 8 bits by the caller.
* True and false become 255 and 0; floating-point pixels must lie in 0..1, are scaled by 255 and
  rounded.
* Grey is repeated to three channels; CMYK, YCbCr, HSV and LAB are converted. Colour profiles that
  a file carries are not applied: the models were trained without.
"""

from __future__ import annotations

import functools
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import (  # noqa: F401  (importing a plugin registers it in Image.OPEN)
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from tinyvit.errors import ImageError

if TYPE_CHECKING:
    import torch

RGB: TypeAlias = NDArray[np.uint8]
ImageFile: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO"
ImageSource: TypeAlias = "ImageFile | Image.Image | NDArray[np.generic] | torch.Tensor"

with suppress(ImportError):  # before Pillow 11.3
    importlib.import_module("PIL.AvifImagePlugin")

MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; where Pillow, too, stops by default
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF")
"""AVIF needs a Pillow that reads it, HEIF (HEIC) the package pillow-heif."""

_DEPTHS = (8, 10, 12, 14)
_FOREIGN = (  # what else comes under the name of an image
    (b"%PDF", "a PDF"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"8BPS", "a Photoshop file"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"version https://git-lfs", "a pointer of Git LFS, whose file was not fetched"),
    (b"<", "XML, SVG or HTML"),
    (b"\x93NUMPY", "a numpy array (load it and pass the array)"),
    (b"\x89HDF", "an HDF5 file"),
)

logger = logging.getLogger("tinyvit")

ORIENTATION_TAG = 0x0112
UPRIGHT = {  # EXIF orientation -> how to undo it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def from_pil(image: Image.Image, name: str) -> Image.Image:
    """A loaded PIL image of any mode in mode RGB, not turned by EXIF; ``name`` stands in errors.

    It is the given image where nothing had to change.
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
        return Image.fromarray(grey)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        turned = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        return cast("Image.Image", turned)
    if image.has_transparency_data:
        image = image.convert("LA") if mode == "La" else image
        return _over_white(image.convert("RGBA"))
    # a copy by ``convert`` costs more than all else: its memory is new
    return image if mode == "RGB" else image.convert("RGB")


def _over_white(rgba: Image.Image) -> Image.Image:
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _to_uint8(values: NDArray[Any], name: str) -> RGB:
    """Bring pixels of any accepted type to 8 bits, or say why not."""
    kind, width = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        return cast("RGB", values.astype(np.uint8) * np.uint8(255))
    if kind == "u" and width == 1:
        return values.astype(np.uint8, copy=False)
    if kind == "u" and width == 2:
        return cast("RGB", (values >> _depth(int(values.max())) - 8).astype(np.uint8))
    if kind != "f":
        raise ImageError(
            f"{name} has pixels of type {values.dtype}; wanted uint8, uint16, bool or floats in "
            "0..1; convert it first, for example with .astype(numpy.uint8)"
        )
    if not np.isfinite(values).all():
        raise ImageError(
            f"{name} has pixels that are NaN or infinite; replace them first, for example with "
            "numpy.nan_to_num"
        )
    low, high = float(values.min()), float(values.max())
    if low < -1e-4 or high > 1 + 1e-4:  # allows for rounding in earlier arithmetic only
        raise ImageError(
            f"{name} has floating-point pixels from {low:g} to {high:g}; wanted 0 to 1; "
            "divide by the largest possible value, or convert 0..255 to uint8"
        )
    return cast("RGB", np.rint(np.clip(values, 0, 1) * 255.0).astype(np.uint8))


def _depth(most: int) -> int:
    """The bits that 16-bit pixels up to ``most`` use."""
    depth = next((bits for bits in _DEPTHS if most < 1 << bits), 16)
    if depth < 16 and most:
        _tell_depth(depth)
    return depth


@functools.cache
def _tell_depth(depth: int) -> None:
    logger.warning(
        "a 16-bit image has no pixel above %d: taken for one of %d bits; scale such images to "
        "8 bits yourself if they are meant to be dark",
        (1 << depth) - 1,
        depth,
    )


def from_array(array: NDArray[np.generic]) -> RGB:
    """RGB of an array [H, W] or [H, W, 1 | 3 | 4], contiguous and writable.

    It has the same memory where nothing had to change.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(
            "wanted an array [H, W] or [H, W, 1 | 3 | 4] of one image; "
            f"came {list(array.shape)}{hint}"
        )
    if array.size == 0:
        raise ImageError(f"the array has no pixels: its shape is {list(array.shape)}")
    pixels = _to_uint8(array, "the array")
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    if pixels.shape[2] == 4:
        return np.array(_over_white(Image.fromarray(np.ascontiguousarray(pixels))))
    pixels = np.ascontiguousarray(pixels)
    return pixels if pixels.flags.writeable else pixels.copy()


def from_tensor(tensor: torch.Tensor) -> RGB:
    """RGB of a tensor [3, H, W] or [1, H, W], contiguous and writable."""
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ImageError(
            f"wanted a tensor [3, H, W] or [1, H, W] of one image; came {list(tensor.shape)}"
        )
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy has no bfloat16
    return from_array(tensor.permute(1, 2, 0).numpy())


def decode(source: ImageSource, *, max_pixels: int | None = MAX_PIXELS) -> RGB:
    """Read an image.

    Args:
        source: A path; the bytes of a file; a binary file object (read from its start); a PIL
            image; an array [H, W] or [H, W, 1 | 3 | 4] of uint8, uint16, bool or floats in 0..1;
            or a tensor [1 | 3, H, W] of the same types. JPEG, PNG, WebP, TIFF and GIF (first
            frame), BMP, PPM and JPEG 2000 files are read; AVIF by Pillow 11.3 or newer; HEIC with
            the extra ``heif``.
        max_pixels: Most pixels a file or a PIL image may have. None: no limit.

    Returns:
        RGB, [H, W, 3] uint8, contiguous and writable; memory may be shared with a given array.

    Raises:
        ImageError: The file is missing, a folder, empty, no image, damaged, cut short or too
            large; or the pixels are none, not finite, out of range or of a type without a rule.
        TypeError: ``source`` is nothing of the above.

    Examples:
        >>> decode(np.array([[0, 255]], dtype=np.uint8)).tolist()
        [[[0, 0, 0], [255, 255, 255]]]
    """
    rgb = to_rgb(source, max_pixels)
    return np.array(rgb) if isinstance(rgb, Image.Image) else rgb


def to_rgb(source: ImageSource, max_pixels: int | None) -> RGB | Image.Image:
    """As ``decode``, which copies what is a PIL image here: upright, in mode RGB."""
    if isinstance(source, Image.Image):
        _check_size(source, "the PIL image", max_pixels)
        return _loaded(source, "the PIL image")
    if isinstance(source, np.ndarray):
        return from_array(source)
    if "torch" in sys.modules and isinstance(source, sys.modules["torch"].Tensor):
        return from_tensor(source)
    with _opened(cast("ImageFile", source)) as (image, stream, name):
        _check_size(image, name, max_pixels)
        stream.is_decoding = image.format != "JPEG2000"  # its decoder reads to the end and asks
        return _loaded(image, name)


def read_size(source: ImageFile) -> tuple[int, int]:
    """Read an image's (height, width) from the header alone, orientation applied."""
    with _opened(source) as (image, _, name):
        _check_size(image, name, None)
        width, height = image.size
        if image.format == "TIFF":  # whether .size is already turned depends on Pillow's version
            width, height = (getattr(image, "tag_v2")[tag] for tag in (256, 257))  # noqa: B009
        return (width, height) if orientation_of(image) >= 5 else (height, width)


class _TruncatedFileError(OSError):
    """A decoder asked for bytes beyond the end of the file."""


class _Stream:
    """A binary file that, while decoding, refuses to be read beyond its end."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.is_decoding, self.was_short = raw, False, False

    def read(self, size: int = -1) -> bytes:
        data = self.raw.read(size)
        self.was_short = self.was_short or len(data) < size
        if self.is_decoding and size != 0 and not data:
            raise _TruncatedFileError("the decoder wants more bytes than there are")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        return self.raw.tell()


@contextmanager
def _opened(source: ImageFile) -> Iterator[tuple[Image.Image, _Stream, str]]:
    """Open a source and read its header; give the image, its stream and a name for errors."""
    if isinstance(source, (str, os.PathLike)):
        name = repr(os.fspath(source))
        try:
            raw = open(source, "rb")  # noqa: SIM115 (closed below, with the other sources)
        except (OSError, ValueError) as err:
            known: dict[type[Exception], str] = {
                FileNotFoundError: f"there is no file {name}; check the path",
                IsADirectoryError: f"{name} is a folder; give the path of one image",
            }
            raise ImageError(known.get(type(err), f"{name} cannot be opened: {err}")) from err
        with raw:
            yield *_open_image(raw, name), name
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name = f"the image of {len(source)} bytes"
        yield *_open_image(io.BytesIO(source), name), name
    elif hasattr(source, "read"):
        name = f"the image in {getattr(source, 'name', type(source).__name__)!r}"
        yield *_open_image(_seekable(source, name), name), name
    else:
        raise TypeError(
            "wanted a path, bytes, a binary file object, a PIL image, a numpy array or a torch "
            f"tensor; came {type(source).__name__}"
        )


def _seekable(source: BinaryIO, name: str) -> BinaryIO:
    try:
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)
        data = source.read()
    except (OSError, ValueError) as err:
        raise ImageError(f"{name} cannot be read: {err}") from err
    if not isinstance(data, bytes):
        raise TypeError(f"wanted a file opened in binary mode ('rb'); {name} gives text")
    return io.BytesIO(data)


def _open_image(raw: BinaryIO, name: str) -> tuple[Image.Image, _Stream]:
    stream = _Stream(raw)
    try:
        prefix = stream.read(64)
    except OSError as err:
        raise ImageError(f"{name} cannot be read: {err}") from err
    if not prefix:
        raise ImageError(f"{name} is empty (0 bytes); copy or download it again")
    if prefix[:4] == b"RIFF" and raw.seek(0, 2) < 8 + int.from_bytes(prefix[4:8], "little"):
        raise _damaged(name, _TruncatedFileError())
    factory = _factory(prefix, name)
    stream.seek(0)
    stream.was_short = False
    try:
        return factory(cast("BinaryIO", stream), ""), stream
    except MemoryError:
        raise
    except Exception as err:  # plugins raise nearly everything on damaged headers
        raise _damaged(name, _TruncatedFileError() if stream.was_short else err) from err


def _factory(prefix: bytes, name: str) -> Callable[[BinaryIO, str], Image.Image]:
    """What opens a file that starts with these bytes."""
    if prefix[4:8] == b"ftyp":
        brands = prefix[8 : int.from_bytes(prefix[:4], "big")]
        if b"avi" in brands:
            if "AVIF" not in Image.OPEN or Image.OPEN["AVIF"][1](prefix[:16]) is not True:  # type: ignore[misc]
                raise ImageError(
                    f"{name} is an AVIF image, which this Pillow ({PIL.__version__}) does not "
                    "read; upgrade it: pip install -U 'pillow>=11.3'"
                )
            return Image.OPEN["AVIF"][0]
        if b"hei" in brands or b"hev" in brands or b"mif1" in brands:
            try:
                opener = importlib.import_module("pillow_heif").HeifImageFile
            except ImportError as err:
                raise ImageError(
                    f"{name} is a HEIC image, which the package pillow-heif reads; "
                    "pip install 'tinyvit[heif]'"
                ) from err
            return cast("Callable[[BinaryIO, str], Image.Image]", opener)
    for form in FORMATS:
        factory, accept = Image.OPEN.get(form, (None, None))
        if factory and accept and accept(prefix[:16].ljust(16, b"\0")) is True:
            return factory
    foreign = next((words for start, words in _FOREIGN if prefix.startswith(start)), None)
    came = foreign or ("text" if prefix.isascii() and b"\0" not in prefix else "no known format")
    raise ImageError(
        f"{name} is not an image that can be read: it is {came}; wanted one of {', '.join(FORMATS)}"
    )


def _damaged(name: str, err: Exception) -> ImageError:
    reason = str(err) or type(err).__name__
    words = f"is damaged or of a kind that cannot be decoded: {reason}"
    if isinstance(err, _TruncatedFileError) or "truncated" in reason.lower():
        words = (
            "is cut short (truncated): the file ends before the image does; copy or download it "
            "again"
        )
    elif isinstance(err, Image.DecompressionBombError):  # WebP and growing GIF only
        words = f"is above Pillow's own limit, PIL.Image.MAX_IMAGE_PIXELS: {err}"
    elif "unknown pixel mode" in reason:
        words = (
            "has bands or pixels that are neither grey nor RGB; choose one band or three and save "
            "them as grey or RGB, or pass an array [H, W, 3]"
        )
    return ImageError(f"{name} {words}")


def _check_size(image: Image.Image, name: str, max_pixels: int | None) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels: it is {width} x {height} (width x height)")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(
            f"{name} is {width} x {height} = {width * height} pixels, above the limit of "
            f"{max_pixels}; if you trust it, raise the limit with max_pixels={width * height}"
        )


def orientation_of(image: Image.Image) -> int:
    """Give the EXIF orientation 1..8; 1 where there is none or it cannot be read."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif", "xmp"} & set(image.info):
        return 1  # asking Pillow would decode the whole image to look behind it
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception as err:  # a broken note about the image is no reason to refuse the image
        logger.debug("taken for upright, since the EXIF block cannot be read: %s", err)
        return 1
    return value if value in UPRIGHT else 1


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """Decode an opened image: in mode RGB, upright."""
    orientation = orientation_of(image)
    if image.format == "TIFF":
        orientation = 1  # Pillow turns these while it loads them
        if getattr(image, "_im", image) is None:  # with its memory there, Pillow asks no limit
            image.im = Image.new(image.mode, getattr(image, "_tile_size", image.size)).im
    try:
        image.load()
        rgb = from_pil(image, name)
    except (ImageError, MemoryError):
        raise
    except Exception as err:  # decoders raise nearly everything on damaged data
        raise _damaged(name, err) from err
    return rgb.transpose(UPRIGHT[orientation]) if orientation > 1 else rgb
