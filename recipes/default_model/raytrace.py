"""A mesh and a view -> an image with exact alpha.

Rays through each pixel find the surfaces (Embree, on the CPU, through ``embreex``, BSD licence);
panes and cut-out textures let part of the light through. A surface is lit by a lamp with a soft
shadow and by the whole sky, whose rays are blocked by nearby surfaces: corners are darker. The
lamp's highlight is Blinn's. Pixels on an outline get four times the rays. Nothing is random here:
what varies is in the ``View``.

N: rays. T: triangles. Lengths are in radii of the mesh's bounding sphere, its centre is 0.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from materials import Floats
from meshes import Mesh

GRID = 4  # the finest grid of rays in a pixel, each way


@dataclasses.dataclass(frozen=True)
class View:
    """Camera and light.

    Attributes:
        azimuth: Where the camera stands, degrees around y; 0 is in front.
        elevation: Degrees above the ground.
        roll: Degrees by which the camera is tilted.
        field: Angle under which the bounding sphere is seen, degrees.
        lamp_azimuth: Where the lamp stands, degrees around y.
        lamp_elevation: Degrees above the ground.
        lamp_share: How much of the light comes from the lamp, 0..1.
        lamp_width: Radius of the lamp seen from the mesh, degrees.
        lamp_colour: RGB around 1.
        exposure: 1: a white surface that faces the lamp is just white.
        longest_side: Pixels.
    """

    azimuth: float
    elevation: float
    roll: float = 0.0
    field: float = 30.0
    lamp_azimuth: float = 40.0
    lamp_elevation: float = 50.0
    lamp_share: float = 0.5
    lamp_width: float = 4.0
    lamp_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    exposure: float = 1.0
    longest_side: int = 320


class Camera:
    """Rays through the pixels of a window that is just as large as the mesh.

    Attributes:
        size: Height and width of the window in pixels.
    """

    def __init__(self, corners: Floats, view: View) -> None:
        """Find the window.

        Args:
            corners: Positions [T, 3, 3] float32, none further than 1 from 0.
            view: Where from.
        """
        towards = direction_of(view.azimuth, view.elevation)  # from the mesh to the camera
        right = np.cross([0.0, 1.0, 0.0], towards)
        right /= np.linalg.norm(right)
        up = np.cross(towards, right)
        roll = np.radians(view.roll)
        self.right = np.cos(roll) * right + np.sin(roll) * up
        self.up = np.cos(roll) * up - np.sin(roll) * right
        self.towards = towards
        self.eye = towards / np.sin(np.radians(view.field / 2))
        from_eye = corners.reshape(-1, 3) - self.eye
        depth = -(from_eye @ towards)
        across, upwards = from_eye @ self.right / depth, from_eye @ self.up / depth
        extent = max(np.ptp(across), np.ptp(upwards))
        self.pixel = extent / (view.longest_side - 1)  # one pixel less, for what rounding adds
        self.left, self.top = across.min() - self.pixel / 2, upwards.max() + self.pixel / 2
        self.size = (
            min(int(np.ptp(upwards) / self.pixel) + 2, view.longest_side),
            min(int(np.ptp(across) / self.pixel) + 2, view.longest_side),
        )

    def rays(self, pixels: NDArray[np.int64], place: tuple[int, int]) -> tuple[Floats, Floats]:
        """Rays through one place in pixels.

        Args:
            pixels: Their numbers, row by row, [N] int64.
            place: Row and column in the grid that divides a pixel, each 0..``GRID`` - 1.

        Returns:
            Origins and unit directions, [N, 3] float32 each.
        """
        row, column = np.divmod(pixels, self.size[1])
        across = self.left + self.pixel * (column + (place[1] + 0.5) / GRID)
        upwards = self.top - self.pixel * (row + (place[0] + 0.5) / GRID)
        direction = across[:, None] * self.right + upwards[:, None] * self.up - self.towards
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        origin = np.repeat(self.eye[None].astype(np.float32), len(pixels), axis=0)
        return origin, direction.astype(np.float32)


def direction_of(azimuth: float, elevation: float) -> NDArray[np.float64]:
    """Turn two angles into a direction.

    Args:
        azimuth: Degrees around y; 0 is along z, 90 along x.
        elevation: Degrees above the ground.

    Returns:
        A unit vector, [3] float64.
    """
    around, above = np.radians(azimuth), np.radians(elevation)
    flat = np.cos(above)
    return np.array([flat * np.sin(around), np.sin(above), flat * np.cos(around)])


LAYERS = 12  # surfaces behind each other
NEAR = 1e-4  # how far from a surface the next ray starts
SKY_RAYS = 24
SUBSETS = GRID  # a pixel's first rays share out the directions of light, so that it sees them all
BOUNCE = 0.12  # light in a corner that no ray of the sky comes to


def render(mesh: Mesh, view: View) -> NDArray[np.uint8]:
    """Take an image."""
    corners = mesh.corners - (mesh.corners.min(axis=(0, 1)) + mesh.corners.max(axis=(0, 1))) / 2
    corners /= max(float(np.linalg.norm(corners, axis=2).max()), 1e-12)
    tracer = _Tracer(dataclasses.replace(mesh, corners=corners), view)
    camera = Camera(corners, view)
    height, width = camera.size
    pixels = np.arange(height * width)
    light = np.zeros((height * width, 4))
    first = [(1, 0), (0, 2), (3, 1), (2, 3)]  # one in each row and column of the grid
    for subset, place in enumerate(first):
        light += tracer.trace(*camera.rays(pixels, place), subset)
    rays = np.full(height * width, float(len(first)))
    edge = np.flatnonzero(_is_edge((light[:, 3] / len(first)).reshape(height, width)))
    rest = [(i, j) for i in range(GRID) for j in range(GRID) if (i, j) not in first]
    for number, place in enumerate(rest):
        light[edge] += tracer.trace(*camera.rays(edge, place), number % SUBSETS)
        rays[edge] += 1
    return _develop((light / rays[:, None]).reshape(height, width, 4), view.exposure)


def _is_edge(alpha: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where alpha is not the same as all around."""
    padded = np.pad(alpha, 1)
    height, width = alpha.shape
    around = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    span: NDArray[np.float64] = np.ptp(np.stack(around), axis=0)
    return span > 1e-3


def _develop(light: NDArray[np.float64], exposure: float) -> NDArray[np.uint8]:
    """Premultiplied linear light [H, W, 4] to a cropped image."""
    alpha = np.rint(light[:, :, 3] * 255)
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    if len(rows) == 0:
        raise ValueError("nothing can be seen in this view")
    colour = exposure * light[:, :, :3] / np.maximum(light[:, :, 3:], 1e-9)
    bright = colour > 0.7  # above, light is pressed together and never clipped hard
    colour = np.where(bright, 1 - 0.3 * np.exp(-(colour - 0.7) / 0.3), colour)
    shown = np.rint(255 * np.clip(colour, 0, 1) ** (1 / 2.2)) * (alpha > 0)[:, :, None]
    image = np.concatenate([shown, alpha[:, :, None]], axis=2).astype(np.uint8)
    cropped = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.ascontiguousarray(cropped)


class _Scene(Protocol):
    """What is asked of Embree."""

    def run(
        self, origins: Floats, directions: Floats, *, output: bool = ..., query: str = ...
    ) -> Any:
        """Follow rays to the first triangle: what was met, or just whether (-1: nothing)."""
        ...


class _Tracer:
    """Light that comes along rays."""

    def __init__(self, mesh: Mesh, view: View) -> None:
        self.mesh = mesh
        self.surfaces = _scene(mesh.corners)
        opaque = np.array(
            [
                material.opacity == 1
                and (material.texture is None or bool(material.texture[..., 3].min() > 0.5))
                for material in mesh.materials
            ]
        )
        blocking = mesh.corners[opaque[mesh.material_index]]
        self.blockers = _scene(blocking) if len(blocking) else None
        self.sky = _sphere(SKY_RAYS, np.radians(view.lamp_azimuth))
        self.lamp = _cone(direction_of(view.lamp_azimuth, view.lamp_elevation), view.lamp_width)
        self.lamp_colour = view.lamp_share * np.array(view.lamp_colour)
        self.sky_strength = (1 - view.lamp_share) * 1.25

    def trace(self, origins: Floats, directions: Floats, subset: int) -> NDArray[np.float64]:
        """Premultiplied linear RGB and opacity along rays, [N, 4]."""
        result = np.zeros((len(origins), 4))
        passing = np.ones(len(origins))
        active = np.arange(len(origins))
        starts = origins
        for _ in range(LAYERS):
            if len(active) == 0:
                break
            hit = self.surfaces.run(starts, directions[active], output=True)
            found = hit["primID"] >= 0
            active = active[found]
            triangle, u, v = hit["primID"][found], hit["u"][found], hit["v"][found]
            weights = np.stack([1 - u - v, u, v], axis=1)
            points = np.einsum("nk,nkc->nc", weights, self.mesh.corners[triangle])
            colour, specular, opacity = self._surface(triangle, weights)
            seen = np.flatnonzero(opacity > 0.01)
            light = self._shade(
                triangle[seen], weights[seen], points[seen], directions[active[seen]],
                (colour[seen], specular[seen]), subset,
            )  # fmt: skip
            share = passing[active[seen]] * opacity[seen]
            result[active[seen], :3] += share[:, None] * light
            result[active[seen], 3] += share
            passing[active] *= 1 - opacity
            goes_on = passing[active] > 0.01
            active = active[goes_on]
            starts = points[goes_on] + NEAR * directions[active]
        return result

    def _surface(
        self, triangle: NDArray[np.int32], weights: Floats
    ) -> tuple[Floats, Floats, Floats]:
        """Linear colour [N, 3], strength and exponent of reflections [N, 2], opacity [N]."""
        index = self.mesh.material_index[triangle]
        materials = self.mesh.materials
        colour = np.array([material.diffuse for material in materials], np.float32)[index]
        opacity = np.array([material.opacity for material in materials], np.float32)[index]
        shine = [(material.specular, material.shininess) for material in materials]
        points = np.einsum("nk,nkc->nc", weights, self.mesh.texture_points[triangle])
        for number in np.unique(index):
            texture = materials[number].texture
            if texture is not None:
                at = np.flatnonzero(index == number)
                texel = _look_up(texture, points[at])
                opacity[at] *= texel[:, 3]
                colour[at] *= texel[:, :3] / np.maximum(texel[:, 3:], 1e-6)
        return colour, np.array(shine, np.float32)[index], opacity

    def _shade(
        self,
        triangle: NDArray[np.int32],
        weights: Floats,
        points: Floats,
        directions: Floats,
        surface: tuple[Floats, Floats],
        subset: int,
    ) -> Floats:
        """Linear light [N, 3] that surfaces send back along rays."""
        colour, shine = surface
        normals = np.einsum("nk,nkc->nc", weights, self.mesh.normals[triangle])
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
        normals *= np.where(np.einsum("nc,nc->n", normals, directions) > 0, -1, 1)[:, None]
        starts = (points - 4 * NEAR * directions).astype(np.float32)
        sky = np.full(len(points), BOUNCE, dtype=np.float32)
        chosen = self.sky[subset::SUBSETS]
        for way in chosen:
            facing = np.maximum(normals @ way, 0) * self._reaches(starts, normals @ way > 0, way)
            sky += facing * (_brightness(way[1]) * 4 / len(chosen))
        lamp_way = self.lamp[subset]
        facing = np.maximum(normals @ lamp_way, 0)
        facing *= self._reaches(starts, facing > 0, lamp_way)
        light = colour * (self.sky_strength * sky[:, None] + facing[:, None] * self.lamp_colour)
        half = lamp_way - directions
        half /= np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-12)
        glint = np.maximum(np.einsum("nc,nc->n", normals, half), 0) ** shine[:, 1]
        light += (shine[:, 0] * glint * (facing > 0))[:, None] * self.lamp_colour * 0.6
        cosine = np.abs(np.einsum("nc,nc->n", normals, directions))
        mirrored = directions[:, 1] + 2 * cosine * normals[:, 1]
        gloss = np.minimum(shine[:, 0], 0.6) * (0.06 + 0.6 * (1 - cosine) ** 5)
        light += (gloss * self.sky_strength * _brightness(mirrored))[:, None]
        result: Floats = light.astype(np.float32)
        return result

    def _reaches(
        self, starts: Floats, asked: NDArray[np.bool_], way: NDArray[np.float32]
    ) -> Floats:
        """1 where light from a direction reaches a point, 0 where not or where not asked."""
        result = asked.astype(np.float32)
        at = np.flatnonzero(asked)
        if self.blockers is not None and len(at):
            ways = np.repeat(way[None], len(at), axis=0)
            blocked = self.blockers.run(starts[at], ways, query="OCCLUDED") >= 0
            result[at[blocked]] = 0
        return result


def _scene(corners: Floats) -> _Scene:
    """Embree's index of triangles."""
    try:
        meshes = importlib.import_module("embreex.mesh_construction")
        scenes = importlib.import_module("embreex.rtcore_scene")
    except ImportError as err:
        raise ImportError(
            "rendering needs the package embreex; install it with: pip install -r "
            "recipes/default_model/requirements.txt"
        ) from err
    scene: _Scene = scenes.EmbreeScene()
    meshes.TriangleMesh(scene, np.ascontiguousarray(corners, dtype=np.float32))
    return scene


def _look_up(texture: Floats, points: Floats) -> Floats:
    """Texels [N, 4] at texture points [N, 2], between the four nearest; the texture repeats."""
    height, width = texture.shape[:2]
    x = (points[:, 0] % 1) * width - 0.5
    y = ((1 - points[:, 1]) % 1) * height - 0.5
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    right_share, low_share = (x - left)[:, None], (y - top)[:, None]
    lines = [texture[(top + i) % height, (left + j) % width] for i in (0, 1) for j in (0, 1)]
    upper = lines[0] * (1 - right_share) + lines[1] * right_share
    lower = lines[2] * (1 - right_share) + lines[3] * right_share
    result: Floats = (upper * (1 - low_share) + lower * low_share).astype(np.float32)
    return result


def _brightness(height: Floats) -> Floats:
    """Light from a direction whose y is given: the sky above, the ground below."""
    share: Floats = np.clip(0.5 + height * 1.5, 0, 1)
    result: Floats = np.float32(0.25) + np.float32(0.75) * share
    return result


def _sphere(count: int, turn: float) -> Floats:
    """Directions spread evenly, [count, 3]: a spiral from pole to pole."""
    height = 1 - (2 * np.arange(count) + 1) / count
    around = turn + np.arange(count) * np.pi * (3 - np.sqrt(5))
    flat = np.sqrt(1 - height**2)
    ways = np.stack([flat * np.sin(around), height, flat * np.cos(around)], axis=1)
    return ways.astype(np.float32)


def _cone(axis: NDArray[np.float64], width: float) -> Floats:
    """Directions around an axis, one for each subset of rays, [SUBSETS, 3]."""
    side = np.cross(axis, [1.0, 0.0, 0.0] if abs(axis[0]) < 0.9 else [0.0, 1.0, 0.0])
    side /= np.linalg.norm(side)
    other = np.cross(axis, side)
    ways = []
    for number in range(SUBSETS):
        angle, radius = 2 * np.pi * number / SUBSETS, np.tan(np.radians(width))
        way = axis + radius * (np.cos(angle) * side + np.sin(angle) * other)
        ways.append(way / np.linalg.norm(way))
    return np.array(ways, dtype=np.float32)
