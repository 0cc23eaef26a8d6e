"""Models of Sweet Home 3D's furniture libraries -> triangles with normals, colours and textures.

A library (.sh3f) is a zip: a catalogue in Java's properties format and, per model, a folder with an
OBJ file, its MTL file and its textures. Polygons become triangles (convex ones as fans, others by
ear clipping), missing normals are computed, and the model is rotated and scaled as the catalogue
says. Not read: models in other formats (.dae, .3ds; the pinned package has none), lines, curves,
bump and reflection maps. The format: Wavefront's "Object files" (appendix B1).

T: triangles. N: positions. P: polygons with K corners.
"""

from __future__ import annotations

import dataclasses
import io
import posixpath
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from materials import Floats, Material, ReadFile, read_materials

CREASE = 50.0  # degrees
MOST_AT_A_CORNER = 64  # triangles; the centre of a fine disc needs no smoothing

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


def split_polygons(polygons: Doubles) -> tuple[Indices, Indices]:
    """Cut polygons with one number of corners into triangles.

    Args:
        polygons: Positions, [P, K, 3] float64, K at least 3.

    Returns:
        For each triangle its polygon, [T] int64, and which three of that polygon's corners it has,
        [T, 3] int64. T is P (K - 2).
    """
    count, corner_count = polygons.shape[:2]
    fan = np.array([[0, i, i + 1] for i in range(1, corner_count - 1)])
    pick = np.repeat(fan[None], count, axis=0)  # [P, K - 2, 3]
    if corner_count > 3:
        centred = polygons - polygons[:, :1]
        ahead = np.roll(centred, -1, axis=1)
        normal = np.cross(centred, ahead).sum(axis=1, keepdims=True)  # [P, 1, 3]
        turn = np.cross(ahead - centred, np.roll(centred, -2, axis=1) - ahead)
        bend = (turn * normal).sum(axis=2)  # [P, K]
        tolerance = 1e-6 * (normal**2).sum(axis=2)
        for index in np.flatnonzero((bend < -tolerance).any(axis=1)):
            pick[index] = _clip_ears(polygons[index], normal[index, 0])
    return np.repeat(np.arange(count), corner_count - 2), pick.reshape(-1, 3)


def _clip_ears(polygon: Doubles, normal: Doubles) -> Indices:
    """Triangles [K - 2, 3] of one polygon that is not convex."""
    axes = [axis for axis in range(3) if axis != int(np.abs(normal).argmax())]
    flat = polygon[:, axes]
    x, y = flat[:, 0], flat[:, 1]
    if (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() < 0:
        flat = flat * (-1, 1)  # now counterclockwise
    left = list(range(len(polygon)))
    triangles = []
    while len(left) > 3:
        ear = next((i for i in range(len(left)) if _is_ear(flat, left, i)), 0)
        triangles.append([left[ear - 1], left[ear], left[(ear + 1) % len(left)]])
        del left[ear]
    return np.array([*triangles, left])


def _is_ear(flat: Doubles, left: list[int], i: int) -> bool:
    """Whether the corner bends outwards and the triangle over it is empty."""
    before, here, after = left[i - 1], left[i], left[(i + 1) % len(left)]
    a, b, c = flat[before], flat[here], flat[after]
    if _area(a, b, c) <= 0:
        return False
    others = flat[[k for k in left if k not in (before, here, after)]]
    inside = np.ones(len(others), dtype=bool)
    for start, end in ((a, b), (b, c), (c, a)):
        side = (end[0] - start[0]) * (others[:, 1] - start[1])
        inside &= side - (end[1] - start[1]) * (others[:, 0] - start[0]) > 0
    return not inside.any()


def _area(a: Doubles, b: Doubles, c: Doubles) -> float:
    """Twice the signed area of a flat triangle."""
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def smooth_normals(corners: Doubles, vertex: Indices) -> Doubles:
    """Make normals for each corner of each triangle.

    Args:
        corners: Positions, [T, 3, 3] float64; no triangle without an area.
        vertex: Number of the position at each corner, [T, 3] int64; equal positions with other
            numbers are taken for one.

    Returns:
        Unit normals, [T, 3, 3] float64, on the side from which the corners run counterclockwise.
    """
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(cross, axis=1, keepdims=True)
    flat = cross / area
    _, first = np.unique(vertex, return_index=True)
    distinct, merged = np.unique(
        corners.reshape(-1, 3)[first].round(9), axis=0, return_inverse=True
    )
    number = np.zeros(int(vertex.max()) + 1, dtype=np.int64)
    number[vertex.ravel()[first]] = merged.ravel()
    number = number[vertex].ravel()  # [3 T] the merged vertex at each corner
    order = np.argsort(number, kind="stable")
    amount = np.bincount(number, minlength=len(distinct))
    start = np.concatenate([[0], np.cumsum(amount)[:-1]])
    meeting = np.where(amount[number] > MOST_AT_A_CORNER, 0, amount[number])  # [3 T]
    here = np.repeat(np.arange(len(number)), meeting)
    step = np.arange(len(here)) - np.repeat(np.cumsum(meeting) - meeting, meeting)
    other = order[start[number[here]] + step] // 3  # a triangle that meets this corner
    is_smooth = (flat[here // 3] * flat[other]).sum(axis=1) > np.cos(np.radians(CREASE))
    here, other = here[is_smooth], other[is_smooth]
    total = np.stack(
        [np.bincount(here, weights=cross[other, axis], minlength=len(number)) for axis in range(3)],
        axis=1,
    )
    length = np.linalg.norm(total, axis=1, keepdims=True)
    own = np.repeat(flat, 3, axis=0)
    return np.where(length > 0, total / np.where(length > 0, length, 1), own).reshape(-1, 3, 3)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Triangles; y points up, and a piece of furniture's front faces z.

    Attributes:
        corners: Positions, [T, 3, 3] float32 (triangle, corner, xyz).
        normals: Unit normals, same shape.
        texture_points: (u, v), [T, 3, 2] float32; v points up, 1 is one repeat.
        material_index: Which material, [T] int64.
        materials: The materials.
    """

    corners: Floats
    normals: Floats
    texture_points: Floats
    material_index: NDArray[np.int64]
    materials: tuple[Material, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in a library, not read yet.

    Attributes:
        library: The library's name, without suffix.
        name: The model's folder.
        member: The OBJ file in the library.
        rotation: How the catalogue turns it, [3, 3] float64.
        size: Width, height and depth in cm that the catalogue gives it.
    """

    library: str
    name: str
    member: str
    rotation: NDArray[np.float64]
    size: tuple[float, float, float]


def read_library(name: str, data: bytes) -> tuple[list[Model], Callable[[Model], Mesh]]:
    """Open a furniture library."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        catalogue = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
    except (zipfile.BadZipFile, KeyError) as err:
        raise ValueError(f"{name} is no furniture library: {err}; fetch its package again") from err
    members = {member.lower(): member for member in archive.namelist()}

    def read(model: Model) -> Mesh:
        folder = posixpath.dirname(model.member)

        def read_beside(file: str) -> bytes | None:
            base = file.replace("\\", "/").rsplit("/", 1)[
                -1
            ]  # some give a path on the maker's disk
            member = members.get(f"{folder}/{base}".lower())
            return None if member is None else archive.read(member)

        try:
            mesh = read_obj(archive.read(model.member).decode("latin-1"), read_beside)
        except ValueError as err:
            raise ValueError(f"{model.library}/{model.name}: {err}") from err
        return _place(mesh, model)

    return sorted(_read_catalogue(name, catalogue, members), key=lambda model: model.name), read


def _read_catalogue(library: str, text: str, members: dict[str, str]) -> Iterator[Model]:
    """The catalogue's models in OBJ format."""
    entries: dict[str, dict[str, str]] = defaultdict(dict)
    for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*?)\s*$", text, re.MULTILINE):
        entries[number][key] = value
    for entry in entries.values():
        member = members.get(entry.get("model", "").lstrip("/").lower())
        if member is None or not member.lower().endswith(".obj"):
            continue
        rotation = np.array(entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split(), dtype=float)
        width, height, depth = (float(entry[side]) for side in ("width", "height", "depth"))
        name = posixpath.basename(posixpath.dirname(member))
        yield Model(library, name, member, rotation.reshape(3, 3), (width, height, depth))


def _place(mesh: Mesh, model: Model) -> Mesh:
    """Turn a mesh, scale its box to the catalogue's, and put its middle at 0."""
    corners = mesh.corners @ model.rotation.T
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    extent = high - low
    is_thick = extent > 1e-6 * extent.max()
    scale = np.where(is_thick, np.array(model.size) / np.where(is_thick, extent, 1), 1.0)
    normals = (mesh.normals @ model.rotation.T) / scale
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    return dataclasses.replace(
        mesh,
        corners=((corners - (low + high) / 2) * scale).astype(np.float32),
        normals=normals.astype(np.float32),
    )


def read_obj(text: str, read_file: ReadFile) -> Mesh:
    """Read an OBJ file."""
    lists: dict[str, list[list[str]]] = {"v": [], "vt": [], "vn": []}
    materials: dict[str, Material] = {}
    names: dict[str, int] = {"": 0}
    current = 0
    faces: dict[int, list[list[int]]] = defaultdict(list)  # number of corners -> flat faces
    for line in text.replace("\\\n", " ").splitlines():
        kind, _, rest = line.strip().partition(" ")
        if kind in lists:
            lists[kind].append(rest.split())
        elif kind == "f":
            counts = [len(lists[key]) for key in ("v", "vt", "vn")]
            face = [index for word in rest.split() for index in _corner(word, counts)]
            if len(face) >= 9:
                faces[len(face) // 3].append([*face, current])
        elif kind == "usemtl":
            current = names.setdefault(rest.strip(), len(names))
        elif kind == "mtllib" and (data := read_file(rest.strip())) is not None:
            materials |= read_materials(data.decode("latin-1"), read_file)
    table = tuple(materials.get(name, Material()) for name in names)
    try:
        position, texture_point, normal = (
            np.array([row[:width] for row in lists[key]], dtype=np.float64).reshape(-1, width)
            for key, width in (("v", 3), ("vt", 2), ("vn", 3))
        )
    except ValueError as err:
        raise ValueError(f"the vertices are no rows of numbers: {err}") from err
    return _assemble(position, texture_point, normal, _triangles(faces, position), table)


def _corner(word: str, counts: list[int]) -> Iterator[int]:
    """A corner ``v/vt/vn`` as three indices from 0; -1 where there is none."""
    parts = [*word.split("/"), "", ""]
    if not parts[0]:
        raise ValueError(f"a face has the corner {word!r}, which has no position")
    for part, count in zip(parts, counts, strict=False):
        if not part:
            yield -1
            continue
        try:
            number = int(part)
        except ValueError as err:
            raise ValueError(f"a face has the corner {word!r}, wanted numbers as 1/2/3") from err
        index = number + count if number < 0 else number - 1
        if not 0 <= index < count:
            raise ValueError(f"a face has the corner {word!r}, but there are only {count} so far")
        yield index


def _triangles(
    faces: dict[int, list[list[int]]], position: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Faces as triangles, [T, 3, 4] (v, vt, vn, material)."""
    parts = [np.zeros((0, 3, 4), dtype=np.int64)]
    for count, rows in faces.items():
        flat = np.array(rows, dtype=np.int64)  # [P, 3 K + 1]
        corners = flat[:, :-1].reshape(-1, count, 3)
        material = np.repeat(flat[:, -1:, None], count, axis=1)
        corners = np.concatenate([corners, material], axis=2)  # [P, K, 4]
        polygon, pick = split_polygons(position[corners[:, :, 0]])
        parts.append(corners[polygon[:, None], pick])
    return np.concatenate(parts)


def _assemble(
    position: NDArray[np.float64],
    texture_point: NDArray[np.float64],
    normal: NDArray[np.float64],
    triangles: NDArray[np.int64],
    materials: tuple[Material, ...],
) -> Mesh:
    """Look the indices up, make the normals that are missing, drop what cannot be seen."""
    corners = position[triangles[..., 0]]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    opacity = np.array([material.opacity for material in materials])
    is_seen = (np.linalg.norm(cross, axis=1) > 0) & (opacity[triangles[:, 0, 3]] > 0)
    if not is_seen.any():
        raise ValueError(f"of {len(triangles)} triangles none has an area and can be seen")
    triangles, corners = triangles[is_seen], corners[is_seen]
    normals = smooth_normals(corners, triangles[..., 0])
    if len(normal):
        given = normal[triangles[..., 2]]
        length = np.linalg.norm(given, axis=-1, keepdims=True)
        is_given = (triangles[..., 2:3] >= 0) & (length > 0)
        normals = np.where(is_given, given / np.where(length > 0, length, 1), normals)
    points = np.zeros((len(triangles), 3, 2))
    if len(texture_point):
        has_point = triangles[..., 1:2] >= 0
        points = np.where(has_point, texture_point[triangles[..., 1]], 0)
    return Mesh(
        corners.astype(np.float32),
        normals.astype(np.float32),
        points.astype(np.float32),
        triangles[:, 0, 3],
        materials,
    )
