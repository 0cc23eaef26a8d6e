"""Random changes of the parts of a composite: sizes, colours, shapes, and the camera.

Pillow images in and out; all randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

_BILINEAR, _BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
RGB = NDArray[np.uint8]


def crop(
    image: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    resample: Image.Resampling = _BILINEAR,
    least: float = 0.35,
) -> Image.Image:
    """A random part of an image at another size, its sides at least ``least`` of what fits."""
    width, height = size
    most = min(image.width / width, image.height / height)
    scale = most * float(np.exp(rng.uniform(np.log(least), 0.0)))
    x = rng.uniform(0, image.width - scale * width)
    y = rng.uniform(0, image.height - scale * height)
    box = (x, y, x + scale * width, y + scale * height)
    part = image.resize(size, resample, box=box, reducing_gap=2.0)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def changed(
    cutout: Image.Image, side: float, rng: np.random.Generator, *, is_oblique: bool = False
) -> Image.Image:
    """Mirrored, stretched, turned, recoloured, at a longest side of ``side`` pixels.

    It is turned a little most of the time; where ``is_oblique`` says so, by any angle.
    """
    if rng.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = side / max(cutout.size)
    stretch = float(np.exp(rng.uniform(-0.2, 0.2)))
    width = max(4, round(cutout.width * scale * stretch))
    height = max(4, round(cutout.height * scale / stretch))
    cutout = cutout.resize((width, height), _BILINEAR, reducing_gap=2.0)
    is_little = rng.random() < 0.7 and not is_oblique
    angle = rng.normal(0, 12) if is_little else rng.uniform(-180, 180)
    if abs(angle) > 3:
        cutout = cutout.rotate(angle, _BILINEAR, expand=True)
    alpha = cutout.getchannel("A")
    rgb = recoloured(cutout.convert("RGB"), 0.35, rng)
    rgb.putalpha(alpha)
    return rgb


def recoloured(image: Image.Image, most: float, rng: np.random.Generator) -> Image.Image:
    """Other brightness, contrast, saturation and tint; sometimes grey."""
    saturation = 0.0 if rng.random() < 0.05 else rng.uniform(1 - 1.5 * most, 1 + most)
    contrast = rng.uniform(1 - most, 1 + most)
    tint = rng.uniform(1 - most / 2, 1 + most / 2, 3)
    matrix = saturation * np.eye(3) + (1 - saturation) / 3  # towards the grey of each pixel
    scaled = contrast * tint[:, None] * matrix
    offset = tint * 128 * (1 - contrast) + rng.uniform(-100, 100) * most
    return image.convert("RGB", np.column_stack((scaled, offset)).ravel().tolist())


def towards(
    cutout: Image.Image, canvas: Image.Image, place: tuple[int, int], rng: np.random.Generator
) -> Image.Image:
    """The cut-out with its mean colour drawn towards that of the place it will lie on."""
    if rng.random() < 0.5:
        return cutout
    x, y = place
    here = canvas.crop((max(0, x), max(0, y), x + cutout.width, y + cutout.height))
    moved = rng.uniform(0.1, 0.7) * (_mean_colour(here) - _mean_colour(cutout))
    rgb = cutout.convert("RGB")
    rgb = rgb.convert("RGB", np.column_stack((np.eye(3), moved)).ravel().tolist())
    rgb.putalpha(cutout.getchannel("A"))
    return rgb


def _mean_colour(image: Image.Image) -> NDArray[np.float64]:
    """[3], of what is not transparent."""
    few = image.convert("RGBA").resize((6, 6), Image.Resampling.BOX)  # weighs by the alpha
    values = np.asarray(few, np.float64).reshape(-1, 4)
    shares: NDArray[np.float64] = values[:, 3:] + 1e-3
    mean: NDArray[np.float64] = (values[:, :3] * shares).sum(0) / shares.sum()
    return mean


def gradient(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A plain or softly changing background."""
    corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    if rng.random() < 0.5:
        corners[:] = corners[0, 0]
    return Image.fromarray(corners).resize(size, _BILINEAR)


def studio(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A wall above a floor of other brightness, with a soft seam, lit from one place."""
    width, height = size
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    colour = rng.uniform(60, 250) * rng.uniform(0.9, 1.1, 3)
    seam = np.clip((y - rng.uniform(0.45, 0.85)) / rng.uniform(0.01, 0.3) + 0.5, 0, 1)
    floor = 1 + seam * rng.uniform(-0.35, 0.25)
    distance = np.hypot(x - rng.uniform(-0.2, 1.2), y - rng.uniform(-0.2, 0.8))
    light = floor * (1 - rng.uniform(0.0, 0.5) * distance)
    pixels = np.clip(light[..., None] * colour, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def blob(side: int, rng: np.random.Generator) -> Image.Image:
    """An alpha of one piece: smooth noise above its own level, fading towards the border."""
    coarse = rng.normal(0, 1, (5, 5)).astype(np.float32)
    noise = np.asarray(Image.fromarray(coarse).resize((side, side), _BICUBIC))
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    level = noise + 1.5 - 2.5 * (x * x + y * y)
    soft = np.clip(level * side / 6 + 0.5, 0, 1)
    return Image.fromarray((soft * 255).astype(np.uint8))


def as_a_camera(image: Image.Image, rng: np.random.Generator) -> RGB:
    """Blur, noise and JPEG over the whole composite, each sometimes."""
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.4:
        values = np.asarray(image, np.float32)
        noise = rng.standard_normal(values.shape, np.float32)
        noise *= np.float32(rng.uniform(1, 10))
        image = Image.fromarray(np.clip(values + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.6:
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=int(rng.integers(35, 96)))
        with Image.open(stored) as read:
            image = read.convert("RGB")
    return np.array(image)
