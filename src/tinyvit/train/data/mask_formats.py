"""Images with masks as data sets write them: COCO, labelme, a CSV, folders of mask files.

``read_samples`` recognises the format. An annotation (polygons, run lengths, a file) becomes a mask
[H, W] only when asked, so that a data set of a million objects fits into memory. A pixel belongs to
a polygon if its centre lies inside (even-odd rule); the polygons of one object are joined, as in
COCO.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tinyvit.errors import ImageError
from tinyvit.folders.images import IMAGE_SUFFIXES
from tinyvit.images.decode import read_size
from tinyvit.sam.mask_ops import decode as decode_rle

Mask = NDArray[np.bool_]
Size = tuple[int, int]

_VOID = 255  # of a palette image: the uncertain edge in Pascal VOC's masks
_PLAINLY_LARGE = 8.0  # pixels: a polygon of such a width and area has pixels for certain


class Annotation(Protocol):
    """What can be made a mask.

    ``mask`` gives it, [H, W] bool in an image of this size; ``check`` finds out, as cheaply as it
    can be, whether it has any pixel. Both raise ``ValueError`` where the annotation is of an image
    of another size or damaged, and ``ImageError`` where its file cannot be read.
    """

    def mask(self, size: Size) -> Mask:
        """The mask in an image of this size."""
        ...

    def check(self, size: Size) -> None:
        """Refuse an annotation without a pixel."""
        ...


@dataclass(frozen=True)
class Polygons:
    """An object as polygons."""

    # each at least three points, [P, 2] (x, y) in pixels of the image
    rings: tuple[NDArray[np.float64], ...]

    @classmethod
    def read(cls, rings: object) -> Polygons:
        """Polygons from JSON: lists of numbers (x, y, x, y, ...) or of pairs."""
        if not isinstance(rings, Sequence) or not len(rings):
            raise ValueError("wanted a list of polygons; came none")
        arrays = []
        for ring in rings:
            try:
                array = np.asarray(ring, np.float64).reshape(-1, 2)
            except (TypeError, ValueError) as err:
                raise ValueError("a polygon must be numbers x, y, x, y, ...") from err
            if len(array) < 3 or not np.isfinite(array).all():
                raise ValueError(
                    f"a polygon wants at least three points of finite numbers; came {len(array)}"
                )
            arrays.append(array)
        return cls(tuple(arrays))

    def mask(self, size: Size) -> Mask:
        """What lies outside of the image is cut off."""
        joined = np.zeros(size, np.bool_)
        for ring in self.rings:
            joined |= fill_polygon(ring, size)
        return joined

    def check(self, size: Size) -> None:
        """Polygons that are plainly large are not drawn."""
        corners = np.array([0.0, 0.0]), np.array([size[1], size[0]], np.float64)
        for ring in self.rings:
            low, high = (np.clip(end, *corners) for end in (ring.min(0), ring.max(0)))
            if (high - low).min() >= _PLAINLY_LARGE and _area(ring) >= 2 * _PLAINLY_LARGE**2:
                return
        _check_not_empty(self.mask(size))


@dataclass(frozen=True)
class RunLengths:
    """An object as COCO's run lengths, compressed or not."""

    counts: str | tuple[int, ...]  # as COCO has them: text, or numbers
    size: Size  # (H, W) they are for

    @classmethod
    def read(cls, record: Mapping[str, object]) -> RunLengths:
        """Run lengths from JSON."""
        counts, size = record.get("counts"), record.get("size")
        if isinstance(counts, list):
            counts = tuple(int(count) for count in counts)
        if not isinstance(counts, (str, tuple)) or not isinstance(size, list) or len(size) != 2:
            raise ValueError('run lengths want {"size": [height, width], "counts": ...}')
        return cls(counts, (int(size[0]), int(size[1])))

    def mask(self, size: Size) -> Mask:
        """The mask, if its size is right."""
        if self.size != size:
            raise ValueError(_wrong_size("the run lengths are", self.size, size))
        counts = self.counts if isinstance(self.counts, str) else list(self.counts)
        found: Mask = np.asarray(decode_rle({"size": list(self.size), "counts": counts}), np.bool_)
        return found

    def check(self, size: Size) -> None:
        """As ``Annotation.check``."""
        _check_not_empty(self.mask(size))


@dataclass(frozen=True)
class MaskFile:
    """An object in a file of pixels."""

    path: Path  # the file
    value: int | None = None  # the object's id in it; None: the file shows one object

    def mask(self, size: Size) -> Mask:
        """The mask, if its size is right."""
        ids = read_mask_file(self.path, is_one_object=self.value is None)
        if ids.shape != size:
            raise ValueError(_wrong_size(f"the mask {self.path} is", ids.shape, size))
        found: Mask = ids == (1 if self.value is None else self.value)
        return found

    def check(self, size: Size) -> None:
        """An id was seen in the file, so that only its size needs a check."""
        if self.value is None:
            _check_not_empty(self.mask(size))
        elif (own := read_size(self.path)) != size:
            raise ValueError(_wrong_size(f"the mask {self.path} is", own, size))


def read_mask_file(path: Path, *, is_one_object: bool) -> NDArray[np.int64]:
    """Read an image of masks without loss: [H, W] int64 ids, 0 for none.

    A file of one object shows it where it is brighter than half of the brightest possible value,
    or, in an image of 0 and 1 or of a palette, where it is not 0. Otherwise each pixel holds an
    object's id: grey, or a palette's number (there 255 is nobody's), or a colour of its own for
    each object, and 0 or black for none. An 8-bit grey image with the value 255 holds one soft or
    hard mask all the same.

    Raises:
        ImageError: The file is missing, damaged, or of a mode that has no rule.
    """
    try:
        with Image.open(path) as image:
            image.load()
            mode = image.mode
            values = np.asarray(image.convert("RGB") if mode in ("RGBA", "CMYK") else image)
    except FileNotFoundError as err:
        raise ImageError(f"there is no mask file {path}; check the path") from err
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as err:
        raise ImageError(f"the mask file {path} cannot be read: {err}") from err
    if mode == "P":
        ids = np.where(values == _VOID, 0, values).astype(np.int64)
        return (ids > 0).astype(np.int64) if is_one_object else ids
    if values.ndim == 3 and values.shape[2] == 2:  # grey with transparency
        values = values[:, :, 0]
    if values.ndim == 3:
        parts = values[:, :, :3].astype(np.int64)
        ids = (parts[:, :, 0] << 16) | (parts[:, :, 1] << 8) | parts[:, :, 2]
        return (parts.max(2) > 127).astype(np.int64) if is_one_object else ids
    if values.dtype.kind not in "bui":
        raise ImageError(f"the mask file {path} has pixels of mode {mode}; wanted whole numbers")
    ids = values.astype(np.int64)
    largest = int(ids.max(initial=0))
    if is_one_object or (mode == "L" and largest == 255):
        half = 0 if largest <= 1 else (127 if largest <= 255 else 32767)
        return (ids > half).astype(np.int64)
    return ids


def fill_polygon(ring: NDArray[np.float64], size: Size) -> Mask:
    """The pixels whose centres lie inside a polygon [P, 2] (x, y), which is closed: [H, W] bool.

    Example:
        >>> fill_polygon(np.array([[1.0, 0.0], [3.0, 0.0], [3.0, 1.0], [1.0, 1.0]]), (1, 4))
        array([[False,  True,  True, False]])
    """
    height, width = size
    crossings = np.zeros((height, width + 1), np.bool_)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        low, high = sorted((y0, y1))
        first, last = (min(max(int(np.ceil(y - 0.5)), 0), height) for y in (low, high))
        if first >= last:
            continue
        rows = np.arange(first, last)
        x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
        crossings[rows, columns] ^= True  # the first centre to the right of the edge
    inside: Mask = np.logical_xor.accumulate(crossings, axis=1)[:, :width]
    return inside


def _area(ring: NDArray[np.float64]) -> float:
    x, y = ring.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _check_not_empty(mask: Mask) -> None:
    if not mask.any():
        raise ValueError("the mask is empty: no pixel of the image belongs to it")


def _wrong_size(what: str, came: Size | tuple[int, ...], wanted: Size) -> str:
    return (
        f"{what} {came[1]} x {came[0]} pixels (width x height), but the image is "
        f"{wanted[1]} x {wanted[0]}"
    )


_IMAGE_COLUMNS = ("picture", "image", "file_name", "filename")
_CIRCLE = 72  # corners of the polygon that stands for a circle
_LOSSY = (".jfif", ".jpe", ".jpeg", ".jpg")  # no masks


@dataclass
class RawSample:
    """One image and its annotations as a data set names them; nothing is checked yet."""

    image: Path  # its file
    # (annotation, label) of each object
    objects: list[tuple[Annotation, str]] = field(default_factory=list)
    # (H, W) that the data set says the image has; None if it says nothing
    size: tuple[int, int] | None = None


RawSamples = tuple[list[RawSample], list[str]]
"""In the order of the data set, and what was skipped and why."""


def read_samples(path: Path, images: Path | None) -> RawSamples:
    """Find out which format a JSON, a CSV or a folder follows, and read it.

    ``images`` is the folder of the images; None for the one that ``path`` implies.

    Raises:
        ValueError: There is nothing at ``path``, or nothing that is known.
    """
    if not path.exists():
        raise ValueError(f"there is nothing at {path}; give a JSON, a CSV or a folder of masks")
    if images is not None and not images.is_dir():
        raise ValueError(f"images={str(images)!r} is no folder; wanted the folder of the images")
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
        "CSV with the columns image and mask, or the folders images and masks in it; or say with "
        "images=... where the images of these masks are"
    )


def _read_file(path: Path, images: Path | None) -> RawSamples:
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


def _read_coco(content: Mapping[str, Any], path: Path, images: Path | None) -> RawSamples:
    folders = [images] if images is not None else [path.parent, path.parent / "images"]
    skipped: list[str] = []
    samples: dict[object, RawSample] = {}
    names = {row.get("id"): str(row.get("name", "")) for row in content.get("categories", [])}
    for row in content.get("images", []):
        if "id" not in row or "file_name" not in row:
            skipped.append(f"{path}: an image without 'id' or 'file_name': {_short(row)}")
            continue
        size = (int(row["height"]), int(row["width"])) if "height" in row else None
        samples[row["id"]] = RawSample(_find(row["file_name"], folders), [], size)
    for row in content["annotations"]:
        what = f"{path}, annotation {row.get('id')}"
        sample = samples.get(row.get("image_id"))
        if sample is None:
            skipped.append(f"{what}: there is no image with the id {row.get('image_id')!r}")
        elif row.get("iscrowd"):
            skipped.append(f"{what}: a crowd is no single object")
        else:
            try:
                annotation = _coco_annotation(row.get("segmentation"))
            except ValueError as err:
                skipped.append(f"{what}: {err}")
            else:
                sample.objects.append((annotation, names.get(row.get("category_id"), "")))
    return list(samples.values()), skipped


def _coco_annotation(segmentation: object) -> Annotation:
    if isinstance(segmentation, Mapping):
        return RunLengths.read(segmentation)
    return Polygons.read(segmentation)


def _short(row: object) -> str:
    text = json.dumps(row)
    return text if len(text) < 80 else text[:77] + "..."


# -- labelme -----------------------------------------------------------------------------------


def _read_labelme(paths: list[Path], images: Path | None) -> RawSamples:
    samples, skipped = [], []
    for path in paths:
        try:
            content = _load_json(path)
        except ValueError as err:
            skipped.append(str(err))
            continue
        if not isinstance(content.get("shapes"), list):
            skipped.append(f"{path} is no file of labelme: it has no list 'shapes'")
            continue
        name = Path(str(content.get("imagePath") or path.stem).replace("\\", "/"))
        image = _find(str(name), [path.parent] if images is None else [images])
        sides = content.get("imageHeight"), content.get("imageWidth")
        size = (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None
        samples.append(RawSample(image, _labelme_objects(content["shapes"], path, skipped), size))
    return samples, skipped


def _labelme_objects(
    shapes: list[Mapping[str, Any]], path: Path, skipped: list[str]
) -> list[tuple[Annotation, str]]:
    """Objects in the order of their first shapes; those of one label and group are joined."""
    rings: dict[object, tuple[str, list[Any]]] = {}
    for number, shape in enumerate(shapes):
        label, group = str(shape.get("label", "")), shape.get("group_id")
        try:
            ring = _labelme_ring(shape)
        except ValueError as err:
            skipped.append(f"{path}, shape {number}: {err}")
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


def _read_csv(path: Path, images: Path | None) -> RawSamples:
    here = path.parent
    folders = [images] if images is not None else [here, here / "images"]
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        column = next((name for name in _IMAGE_COLUMNS if name in columns), None)
        if column is None or "mask" not in columns:
            raise ValueError(
                f"{path} must have the columns 'picture' (or 'image') and 'mask'; it has "
                f"{', '.join(columns) or 'none'}"
            )
        samples: dict[Path, RawSample] = {}
        skipped: list[str] = []
        for row in reader:
            if not row[column] or not row["mask"]:
                skipped.append(f"{path}, line {reader.line_num}: no {column} or no mask is named")
                continue
            image = _find(row[column], folders)
            mask = _find(row["mask"], [here, here / "masks"])
            sample = samples.setdefault(image, RawSample(image))
            sample.objects.append((MaskFile(mask), row.get("label") or ""))
    return list(samples.values()), skipped


def _read_folders(images: Path, masks: Path) -> RawSamples:
    skipped: list[str] = []
    samples: dict[str, RawSample] = {}
    for image in _files(images):
        if image.stem in samples:
            skipped.append(f"{image} has the stem of {samples[image.stem].image.name}")
        else:
            samples[image.stem] = RawSample(image)
    for mask in _files(masks, _LOSSY):
        sample = samples.get(mask.stem)
        if sample is not None:
            _add_ids(sample, mask, skipped)
            continue
        stem = mask.stem
        while "_" in stem and stem not in samples:  # the longest stem that is an image's
            stem = stem.rpartition("_")[0]
        if stem in samples:
            samples[stem].objects.append((MaskFile(mask), ""))
        else:
            skipped.append(f"{mask} belongs to no image in {images}")
    for folder in sorted(place for place in masks.iterdir() if place.is_dir()):
        for mask in _files(folder, _LOSSY):
            if folder.name in samples:
                samples[folder.name].objects.append((MaskFile(mask), ""))
            else:
                skipped.append(f"{mask} belongs to no image in {images}")
    return list(samples.values()), skipped


def _files(folder: Path, but: tuple[str, ...] = ()) -> list[Path]:
    suffixes = set(IMAGE_SUFFIXES) - set(but)
    return sorted(place for place in folder.iterdir() if place.suffix.lower() in suffixes)


def _add_ids(sample: RawSample, mask: Path, skipped: list[str]) -> None:
    """One object for each id in a file of masks."""
    try:
        ids = read_mask_file(mask, is_one_object=False)
    except ImageError as err:
        skipped.append(str(err))
        return
    found = [int(value) for value in np.unique(ids) if value]
    if not found:
        skipped.append(f"{mask} is empty: it shows no object")
    sample.objects += [(MaskFile(mask, value), "") for value in found]
