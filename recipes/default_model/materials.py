"""MTL files and textures -> materials of surfaces.

Colours become amounts of light (linear), textures premultiplied. Of a material are read: Kd, Ks,
Ns, d, map_Kd, and map_d where there is no map_Kd.

The format: Wavefront's "Material library file".
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats: TypeAlias = NDArray[np.float32]
ReadFile: TypeAlias = Callable[[str], "bytes | None"]

LARGEST_TEXTURE = 512  # pixels; an image of the model is smaller than that
LEAST_GLASS = 0.55  # a pane is part of the object, so no pane is fainter than a mask's threshold
DARK_TINT = 0.35  # below, a colour beside a texture is an exporter's default, not a paint


@dataclasses.dataclass(frozen=True)
class Material:
    """The material of a surface.

    Attributes:
        diffuse: Linear RGB, 0..1.
        specular: Strength of reflections, 0..1.
        shininess: Blinn's exponent, 1..1000.
        opacity: 0 invisible .. 1 solid.
        texture: Linear RGBA, colours multiplied with alpha, [height, width, 4] float32, 0..1.
    """

    diffuse: tuple[float, float, float] = (0.6, 0.6, 0.6)
    specular: float = 0.0
    shininess: float = 32.0
    opacity: float = 1.0
    texture: Floats | None = None


def read_materials(text: str, read_file: ReadFile) -> dict[str, Material]:
    """Read an MTL file."""
    tables: dict[str, dict[str, str]] = {}
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "newmtl":
            values = tables.setdefault(rest.strip(), {})
        elif key:
            values[key] = rest.strip()
    return {name: _material(values, read_file) for name, values in tables.items()}


def _material(values: dict[str, str], read_file: ReadFile) -> Material:
    """A material from the lines of its part of the file."""
    texture = _read_texture(values.get("map_Kd") or values.get("map_d"), read_file)
    diffuse = _linear(np.clip(np.array((values.get("Kd") or ".6 .6 .6").split()[:3], float), 0, 1))
    if texture is not None:  # exporters write a grey or black colour beside a texture
        diffuse = diffuse / diffuse.max() if diffuse.max() > _linear(DARK_TINT) else np.ones(3)
    opacity = float(values.get("d", "1").split()[-1])
    if 0 < opacity < 1:
        opacity = max(opacity, LEAST_GLASS)
    red, green, blue = (float(value) for value in diffuse)
    specular = np.array((values.get("Ks") or "0 0 0").split()[:3], dtype=float)
    return Material(
        diffuse=(red, green, blue),
        specular=float(np.clip(specular.mean(), 0, 1)),
        shininess=float(np.clip(float(values.get("Ns", "32").split()[0]), 1, 1000)),
        opacity=min(max(opacity, 0.0), 1.0),
        texture=texture,
    )


def _linear(value: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Display values 0..1 to amounts of light 0..1."""
    return np.asarray(value, dtype=np.float64) ** 2.2


def _read_texture(name: str | None, read_file: ReadFile) -> Floats | None:
    """A texture file as linear, premultiplied RGBA."""
    data = None if name is None else read_file(name)
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.thumbnail((LARGEST_TEXTURE, LARGEST_TEXTURE))
            pixels = np.asarray(image.convert("RGBA"), dtype=np.float64) / 255
    except OSError:  # what Pillow raises for damaged files; the material's colour is used then
        return None
    alpha = pixels[:, :, 3:]
    return np.concatenate([_linear(pixels[:, :, :3]) * alpha, alpha], axis=2).astype(np.float32)
