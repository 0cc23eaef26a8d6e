"""How pictures with masks lie on the disk, in four conventions; read without looking at pixels.

* COCO's JSON: ``images`` and ``annotations`` with polygons or run lengths; crowds are left out.
* labelme: one JSON for each picture, with polygons, rectangles and circles; shapes of one label
  and one group are one object.
* A CSV with the columns ``picture`` (or ``image``) and ``mask``, one row for each object, and
  perhaps ``label``; paths from the CSV's folder, or from ``images`` and ``masks`` in it.
* Folders ``images`` and ``masks``: ``masks/STEM.png`` holds all objects of the picture of that stem
  as ids or colours, ``masks/STEM_ANYTHING.png`` or ``masks/STEM/ANYTHING.png`` one object each.

Coordinates are those of the upright picture. What cannot be read becomes a fault in words, not an
error. Ids in mask files are the only pixels that are read here.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.errors import ImageError

from .outlines import MaskFile, Outline, Polygons, RunLengths, object_ids, read_mask_file

__all__ = ["Draft", "read_drafts"]

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm")
MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp")

_PICTURE_COLUMNS = ("picture", "image", "file_name", "filename")
_CIRCLE = 72  # corners of the polygon that stands for a circle


@dataclass
class Draft:
    """One picture and its outlines as a data set names them; nothing is checked yet.

    Attributes:
        picture: Its file.
        objects: (outline, label) of each object.
        size: (H, W) that the data set says the picture has; None if it says nothing.
    """

    picture: Path
    objects: list[tuple[Outline, str]] = field(default_factory=list)
    size: tuple[int, int] | None = None


Drafts = tuple[list[Draft], list[str]]


def read_drafts(path: Path, images: Path | None) -> Drafts:
    """Find out which convention a path follows, and read it.

    Args:
        path: A JSON, a CSV or a folder.
        images: Folder of the pictures; None for the one that ``path`` implies.

    Returns:
        (drafts in the order of the data set, faults).

    Raises:
        ValueError: There is nothing at ``path``, or nothing that is known.
    """
    if not path.exists():
        raise ValueError(f"there is nothing at {path}; give a JSON, a CSV or a folder of masks")
    if images is not None and not images.is_dir():
        raise ValueError(f"images={str(images)!r} is no folder; wanted the folder of the pictures")
    if path.is_file():
        return _read_file(path, images)
    manifests = sorted(path.glob("*.csv"))
    if len(manifests) == 1:
        return _read_csv(manifests[0], images)
    jsons = sorted(path.glob("*.json"))
    if jsons:
        first = _load_json(jsons[0])
        if "annotations" in first and len(jsons) == 1:
            return _read_coco(first, jsons[0], images)
        return _read_labelme(jsons, images)
    masks = path / "masks" if (path / "masks").is_dir() else path
    folder = images or (path / "images" if (path / "images").is_dir() else None)
    if folder is not None and folder != masks:
        return _read_folders(folder, masks)
    raise ValueError(
        f"{path} is no data set that is known: wanted one JSON of COCO, JSON files of labelme, one "
        "CSV with the columns picture and mask, or the folders images and masks in it; or say with "
        "images=... where the pictures of these masks are"
    )


def _read_file(path: Path, images: Path | None) -> Drafts:
    if path.suffix.lower() == ".csv":
        return _read_csv(path, images)
    if path.suffix.lower() != ".json":
        raise ValueError(f"{path} is no JSON and no CSV; give one of these, or a folder")
    content = _load_json(path)
    if "annotations" in content:
        return _read_coco(content, path, images)
    if "shapes" in content:
        return _read_labelme([path], images)
    raise ValueError(
        f"{path} is neither COCO's JSON (with 'images' and 'annotations') nor labelme's (with "
        f"'shapes'); its keys are {', '.join(sorted(content)[:6])}"
    )


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ValueError(f"{path} cannot be read as JSON: {err}") from err
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def _find(name: str, folders: Iterable[Path]) -> Path:
    """The file of this name in the first folder that has it; else where it was expected first."""
    places = [place for folder in folders for place in (folder / name, folder / Path(name).name)]
    return next((place for place in places if place.is_file()), places[0])


# -- COCO --------------------------------------------------------------------------------------


def _read_coco(content: Mapping[str, Any], path: Path, images: Path | None) -> Drafts:
    folders = [images] if images is not None else [path.parent, path.parent / "images"]
    faults: list[str] = []
    drafts: dict[object, Draft] = {}
    names = {row.get("id"): str(row.get("name", "")) for row in content.get("categories", [])}
    for row in content.get("images", []):
        if "id" not in row or "file_name" not in row:
            faults.append(f"{path}: a picture without 'id' or 'file_name': {_short(row)}")
            continue
        size = (int(row["height"]), int(row["width"])) if "height" in row else None
        drafts[row["id"]] = Draft(_find(row["file_name"], folders), [], size)
    for row in content["annotations"]:
        what = f"{path}, annotation {row.get('id')}"
        draft = drafts.get(row.get("image_id"))
        if draft is None:
            faults.append(f"{what}: there is no picture with the id {row.get('image_id')!r}")
        elif row.get("iscrowd"):
            faults.append(f"{what}: a crowd is no single object")
        else:
            try:
                outline = _coco_outline(row.get("segmentation"))
            except ValueError as err:
                faults.append(f"{what}: {err}")
            else:
                draft.objects.append((outline, names.get(row.get("category_id"), "")))
    return list(drafts.values()), faults


def _coco_outline(segmentation: object) -> Outline:
    if isinstance(segmentation, Mapping):
        return RunLengths.read(segmentation)
    return Polygons.read(segmentation)


def _short(row: object) -> str:
    text = json.dumps(row)
    return text if len(text) < 80 else text[:77] + "..."


# -- labelme -----------------------------------------------------------------------------------


def _read_labelme(paths: list[Path], images: Path | None) -> Drafts:
    drafts, faults = [], []
    for path in paths:
        try:
            content = _load_json(path)
        except ValueError as err:
            faults.append(str(err))
            continue
        if not isinstance(content.get("shapes"), list):
            faults.append(f"{path} is no file of labelme: it has no list 'shapes'")
            continue
        name = Path(str(content.get("imagePath") or path.stem).replace("\\", "/"))
        picture = _find(str(name), [path.parent] if images is None else [images])
        sides = content.get("imageHeight"), content.get("imageWidth")
        size = (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None
        drafts.append(Draft(picture, _labelme_objects(content["shapes"], path, faults), size))
    return drafts, faults


def _labelme_objects(
    shapes: list[Mapping[str, Any]], path: Path, faults: list[str]
) -> list[tuple[Outline, str]]:
    """Objects in the order of their first shapes; those of one label and group are joined."""
    rings: dict[object, tuple[str, list[Any]]] = {}
    for number, shape in enumerate(shapes):
        label, group = str(shape.get("label", "")), shape.get("group_id")
        try:
            ring = _labelme_ring(shape)
        except ValueError as err:
            faults.append(f"{path}, shape {number}: {err}")
            continue
        key = number if group is None else (label, group)
        rings.setdefault(key, (label, []))[1].append(ring)
    return [(Polygons(tuple(found)), label) for label, found in rings.values()]


def _labelme_ring(shape: Mapping[str, Any]) -> Any:
    kind = shape.get("shape_type", "polygon")
    try:
        points = np.asarray(shape.get("points"), np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as err:
        raise ValueError("points must be pairs of numbers") from err
    if kind in ("rectangle", "circle"):
        if len(points) != 2:
            raise ValueError(f"a {kind} wants two points; came {len(points)}")
        (x0, y0), (x1, y1) = points
        if kind == "rectangle":
            return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
        turn = np.linspace(0, 2 * math.pi, _CIRCLE, endpoint=False)
        return points[0] + math.hypot(x1 - x0, y1 - y0) * np.stack((np.cos(turn), np.sin(turn)), 1)
    if kind != "polygon":
        raise ValueError(f"a {kind} has no area; wanted a polygon, rectangle or circle")
    return Polygons.read([points]).rings[0]


# -- files of masks ----------------------------------------------------------------------------


def _read_csv(path: Path, images: Path | None) -> Drafts:
    here = path.parent
    folders = [images] if images is not None else [here, here / "images"]
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        column = next((name for name in _PICTURE_COLUMNS if name in columns), None)
        if column is None or "mask" not in columns:
            raise ValueError(
                f"{path} must have the columns 'picture' (or 'image') and 'mask'; it has "
                f"{', '.join(columns) or 'none'}"
            )
        drafts: dict[Path, Draft] = {}
        faults: list[str] = []
        for row in reader:
            if not row[column] or not row["mask"]:
                faults.append(f"{path}, line {reader.line_num}: no {column} or no mask is named")
                continue
            picture = _find(row[column], folders)
            mask = _find(row["mask"], [here, here / "masks"])
            draft = drafts.setdefault(picture, Draft(picture))
            draft.objects.append((MaskFile(mask), row.get("label") or ""))
    return list(drafts.values()), faults


def _read_folders(pictures: Path, masks: Path) -> Drafts:
    faults: list[str] = []
    drafts: dict[str, Draft] = {}
    for picture in _files(pictures, PICTURES):
        if picture.stem in drafts:
            faults.append(f"{picture} has the stem of {drafts[picture.stem].picture.name}")
        else:
            drafts[picture.stem] = Draft(picture)
    for mask in _files(masks, MASKS):
        draft = drafts.get(mask.stem)
        if draft is not None:
            _add_ids(draft, mask, faults)
            continue
        stem = mask.stem
        while "_" in stem and stem not in drafts:  # the longest stem that is a picture's
            stem = stem.rpartition("_")[0]
        if stem in drafts:
            drafts[stem].objects.append((MaskFile(mask), ""))
        else:
            faults.append(f"{mask} belongs to no picture in {pictures}")
    for folder in sorted(place for place in masks.iterdir() if place.is_dir()):
        for mask in _files(folder, MASKS):
            if folder.name in drafts:
                drafts[folder.name].objects.append((MaskFile(mask), ""))
            else:
                faults.append(f"{mask} belongs to no picture in {pictures}")
    return list(drafts.values()), faults


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.suffix.lower() in endings)


def _add_ids(draft: Draft, mask: Path, faults: list[str]) -> None:
    """One object for each id in a file of masks."""
    try:
        ids = read_mask_file(mask, is_one_object=False)
    except ImageError as err:
        faults.append(str(err))
        return
    found = object_ids(ids)
    if not found:
        faults.append(f"{mask} is empty: it shows no object")
    draft.objects += [(MaskFile(mask, value), "") for value in found]
