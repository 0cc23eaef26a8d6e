"""How a mesh is looked at: a view's numbers, and rays through the pixels of a window.

Knows no light and no surfaces.

N: rays. T: triangles. Lengths are in radii of the mesh's bounding sphere, its middle is 0.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from materials import Floats

__all__ = ["GRID", "Camera", "View", "direction_of"]

GRID = 4  # the finest grid of rays in a pixel, each way


@dataclasses.dataclass(frozen=True)
class View:
    """How a mesh is looked at.

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
