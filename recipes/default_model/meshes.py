"""Models of Sweet Home 3D's furniture libraries -> triangles with normals, colours and textures.

A library (.sh3f) is a zip: a catalogue in Java's properties format and, per model, a folder with an
OBJ file, its MTL file and its textures. Faces become triangles, missing normals are made, and the
model is turned and scaled as its catalogue says. Not read: models in other formats (.dae, .3ds;
the pinned package has none), lines, curves, bump and reflection maps. Knows nothing of cameras.

T: triangles. N: positions. P: polygons with K corners.

The format: Wavefront's "Object files" (appendix B1).
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
from triangles import smooth_normals, split_polygons

__all__ = ["Mesh", "Model", "read_library", "read_obj"]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Triangles; y points up, and a piece of furniture's front looks along z.

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
    """Open a furniture library.

    Args:
        name: What to call it.
        data: The bytes of the .sh3f file.

    Returns:
        The models of its catalogue whose format is OBJ, by name; and what reads one of them, which
        raises ValueError, with the model's name, for a model without triangles.

    Raises:
        ValueError: If the file is no zip or has no catalogue.
    """
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
    """Read an OBJ file.

    Args:
        text: What is in it.
        read_file: Gives the bytes of a file that it names, None if there is no such file.

    Returns:
        Its visible triangles. Colours of materials that are nowhere defined are grey.

    Raises:
        ValueError: If a face is no list of indices, an index points nowhere, or no visible triangle
            is left.
    """
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
