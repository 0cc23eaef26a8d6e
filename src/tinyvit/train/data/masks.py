"""Images with the masks of their objects: COCO, SA-1B, labelme, a CSV, folders of mask files.

``open_mask_set`` recognises the format and follows the folders of its makers (CVAT, Label Studio,
Roboflow, COCO itself). A row that is damaged or unfit (a missing or unreadable image, a mask of
another size, an empty mask) costs itself only and is named in ``faults``, or is an error by choice.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import os
import warnings
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tinyvit.errors import ImageError
from tinyvit.folders.images import IMAGE_SUFFIXES
from tinyvit.images.decode import decode, read_size

from .annotations import Annotation, MaskFile, Polygons, RunLengths, as_ring, read_mask_file
from .lists import SHOWN, find_column, find_file, identity, inner_folder, load_json, read_table

_IMAGE_COLUMNS = ("picture", "image", "file_name", "filename", "image_path", "path")
_MASK_COLUMNS = ("mask", "mask_path", "mask_file", "masks")
_MANY, _SMALL = 32, 16  # so many objects of so few pixels are rather soft edges
_CIRCLE = 72  # corners of the polygon that stands for a circle
_WITHOUT_AREA = ("point", "points", "line", "linestrip", "lines")
_LABEL_FOLDERS = ("annotations", "labels", "json")
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
_MASK_FOLDERS = ("masks", "mask", "segmentationobject")


@dataclass(frozen=True)
class MaskSample:
    """One image and the annotations of its objects."""

    image: Path  # its file, or a JSON of labelme that holds it
    annotations: tuple[Annotation, ...]  # one for each object
    labels: tuple[str, ...]  # what each is called; empty text where nothing is known

    @property
    def name(self) -> str:
        """The image's file name."""
        return self.image.name

    def __len__(self) -> int:
        return len(self.annotations)

    def load(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Read the image and draw its masks: RGB [H, W, 3] uint8 and [N, H, W] bool."""
        image = decode(image_source(self.image))
        size = image.shape[0], image.shape[1]
        masks = np.zeros((len(self), *size), np.bool_)
        read = lru_cache(maxsize=1)(read_mask_file)  # one file may hold many objects
        for mask, one in zip(masks, self.annotations, strict=True):
            mask[...] = one.mask(size, read) if isinstance(one, MaskFile) else one.mask(size)
        return image, masks


@dataclass(frozen=True)
class MaskSet:
    """Images with masks; samples by number."""

    source: str  # where it was read from
    scenes: tuple[MaskSample, ...]  # each with at least one good mask
    faults: tuple[str, ...] = ()  # what was skipped and why, a sentence each

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> MaskSample:
        return self.scenes[index]

    def __iter__(self) -> Iterator[MaskSample]:
        return iter(self.scenes)

    @property
    def objects(self) -> int:
        """Masks of all images together."""
        return sum(map(len, self.scenes))

    def describe(self) -> str:
        """One line for a person: how many of what, and what was skipped."""
        text = f"{self.source}: {len(self)} images with {self.objects} masks"
        if not self.faults:
            return text
        more = f", and {len(self.faults) - 1} more" if len(self.faults) > 1 else ""
        return f"{text}; skipped {len(self.faults)}: {self.faults[0]}{more}"

    def split(self, share: float, seed: int = 0) -> tuple[MaskSet, MaskSet]:
        """Divide by image at random, always alike for a seed: (the rest, the share).

        The share is above 0 and below 1; where the set has two images or more, each part gets at
        least one. Each is in the order of the set; the first keeps the faults.
        """
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1, but is {share}")
        count = min(max(1, round(share * len(self))), len(self) - 1)
        order = np.random.default_rng(seed).permutation(len(self))
        chosen = set(order[: max(count, 0)].tolist())
        rest, part = (
            tuple(one for place, one in enumerate(self) if (place in chosen) is wanted)
            for wanted in (False, True)
        )
        return replace(self, scenes=rest), replace(self, scenes=part, faults=())

    def without(self, other: MaskSet) -> MaskSet:
        """The samples whose images are not in another set, by whatever names or links."""
        there = {identity(sample.image) for sample in other}
        return replace(self, scenes=tuple(one for one in self if identity(one.image) not in there))


def open_mask_set(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    on_fault: Literal["skip", "error"] = "skip",
    check_pixels: bool = False,
) -> MaskSet:
    """Open images with masks, and check that they fit each other.

    An image that the data name several times (by other ids, links or JSON files) is one sample.

    Args:
        path: A JSON of COCO, SA-1B or labelme; a CSV with the columns ``image`` (or ``picture``)
            and ``mask``; or a folder: with some of these in it or in ``annotations/``, or with
            ``images/`` and ``masks/``.
        images: Folder of the images, where it is not the one that ``path`` implies.
        on_fault: What does not fit is skipped and named ("skip"), or an error.
        check_pixels: Decode every image now, not only its header: an unreadable one is found here
            instead of in the middle of the training.

    Returns:
        The set.

    Raises:
        ValueError: There is no such set, its format is not known, nothing in it is good, or,
            with ``on_fault="error"``, anything in it is not.

    Warns:
        UserWarning: A mask file has several pages, of which the first is taken.
    """
    if on_fault not in ("skip", "error"):
        raise ValueError(f"on_fault must be 'skip' or 'error', but is {on_fault!r}")
    faults: list[str] = []
    samples: dict[Hashable, MaskSample] = {}
    for raw in read_samples(Path(path), None if images is None else Path(images), faults):
        if good := _good_objects(raw, check_pixels, faults):
            annotations, labels = zip(*good, strict=True)
            known = samples.get(identity(raw.image), MaskSample(raw.image, (), ()))
            samples[identity(raw.image)] = MaskSample(
                known.image, known.annotations + annotations, known.labels + labels
            )
    if not samples and not faults:
        raise ValueError(f"{path} holds no images with masks")
    if (on_fault == "error" and faults) or not samples:
        shown = "; ".join(faults[:SHOWN])
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        advice = "; repair them, or skip them with on_fault='skip'"
        if not samples:
            is_lost = images is None and "there is no file" in shown
            advice = "; say with images=... (--images) where the images are" if is_lost else ""
        what = "has faults" if samples else "has no image with a good mask"
        raise ValueError(f"{path} {what}: {shown}{more}{advice}")
    return MaskSet(str(path), tuple(samples.values()), tuple(faults))


def _good_objects(
    raw: RawSample, check_pixels: bool, faults: list[str]
) -> list[tuple[Annotation, str]]:
    """(annotation, label) of the good objects; what is wrong with the rest goes into faults."""
    try:
        source = image_source(raw.image)
        size = read_size(source)
        if check_pixels:
            decode(source)
    except ImageError as err:
        faults.append(str(err))
        return []
    if raw.size is not None and raw.size != size:
        height, width = raw.size
        faults.append(
            f"{raw.image}: its masks are for {width} x {height} pixels (width x height), but "
            f"the image is {size[1]} x {size[0]} when upright"
        )
        return []
    good: list[tuple[Annotation, str]] = []
    for annotation, label, origin in raw.objects:
        try:
            annotation.check(size)
            good.append((annotation, label))
        except (ImageError, ValueError) as err:
            faults.append(f"{raw.image}, {origin}: {err}")
    if not raw.objects:
        faults.append(f"{raw.image} has no masks")
    return good


@dataclass
class RawSample:
    """One image and its annotations as a data set names them; nothing is checked yet."""

    image: Path  # its file, or a JSON of labelme that holds it
    # (annotation, label, where it stands) of each object
    objects: list[tuple[Annotation, str, str]] = field(default_factory=list)
    # (H, W) that the data set says the image has; None if it says nothing
    size: tuple[int, int] | None = None


def read_samples(path: Path, images: Path | None, faults: list[str]) -> list[RawSample]:
    """Read a JSON, a CSV or a folder of any format; what is skipped, and why, goes into faults."""
    if not path.exists():
        raise ValueError(f"there is nothing at {path}; give a JSON, a CSV or a folder of masks")
    if images is not None and not images.is_dir():
        raise ValueError(f"images={str(images)!r} is no folder; wanted the folder of the images")
    table, jsons = _listed(path)
    if table is not None:
        return _read_csv(table, images, faults)
    samples: list[RawSample] = []
    for one in jsons:
        try:
            samples += _read_json(one, images, faults)
        except ValueError as err:
            faults.append(str(err))
    masks = inner_folder(path, _MASK_FOLDERS)
    folder = images or inner_folder(path, _IMAGE_FOLDERS)
    if samples or path.is_file() or (jsons and masks is None):
        return samples
    if folder is not None and folder != (masks or path):
        return _read_folders(folder, masks or path, faults)
    inner = sorted(place.name for place in path.iterdir() if place.is_dir())
    raise ValueError(
        f"{path} is no data set that is known: wanted JSON files of COCO or labelme, one CSV with "
        "the columns image and mask, or the folders images and masks in it; or say with "
        "images=... (--images) where the images of these masks are"
        + (f". It holds the folders {', '.join(inner[:6])}" if inner else "")
    )


def _listed(path: Path) -> tuple[Path | None, list[Path]]:
    """The one table, or the JSON files, that a path means."""
    if path.is_file():
        kind = path.suffix.lower()
        if kind not in (".csv", ".tsv", ".json"):
            raise ValueError(f"{path} is no JSON and no CSV; give one of these, or a folder")
        return (None, [path]) if kind == ".json" else (path, [])
    tables = [place for place in path.iterdir() if place.suffix.lower() in (".csv", ".tsv")]
    if len(tables) == 1:
        return tables[0], []
    for folder in (path, inner_folder(path, _LABEL_FOLDERS)):
        found = [] if folder is None else sorted(folder.glob("*.json"))
        if found:  # COCO lays captions and key points of the same images beside the objects
            return None, [one for one in found if one.name.startswith("instances_")] or found
    return None, []


def _image_folders(path: Path, images: Path | None) -> list[Path]:
    """Where the images of a file of annotations may be, the likeliest place first."""
    if images is not None:
        return [images]
    roots = [path.parent]
    if path.parent.name.lower() in _LABEL_FOLDERS:
        roots.append(path.parent.parent)
    part = path.stem.partition("_")[2] or path.stem  # instances_val2017.json and val2017
    insides = [inner for root in roots if (inner := inner_folder(root, _IMAGE_FOLDERS)) is not None]
    named = [place / part for place in (*roots, *insides) if (place / part).is_dir()]
    return [*named, *roots, *insides]


def _read_json(path: Path, images: Path | None, faults: list[str]) -> list[RawSample]:
    content = load_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    folders = _image_folders(path, images)
    if "annotations" in content:
        return _read_coco(content, path, folders, faults)
    if "shapes" in content:
        return [_read_labelme(content, path, folders, faults)]
    raise ValueError(
        f"{path} is neither COCO's JSON (with 'images' and 'annotations') nor labelme's (with "
        f"'shapes'); its keys are {', '.join(sorted(content)[:6])}"
    )


def _rows(
    content: Mapping[str, Any], key: str, path: Path, faults: list[str]
) -> list[tuple[int, Mapping[str, Any]]]:
    """(place, row) of the objects in a list of JSON; what is none is named."""
    value = content.get(key)
    if not isinstance(value, list):
        if value is not None:
            faults.append(f"{path}: {key!r} is {_short(value)}; wanted a list")
        return []
    for number, row in enumerate(value):
        if not isinstance(row, Mapping):
            faults.append(f"{path}, {key} {number}: {_short(row)} is no JSON object")
    return [(number, row) for number, row in enumerate(value) if isinstance(row, Mapping)]


def _key(value: object) -> str | None:
    """An id: tools write numbers or text; None for what is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_id = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    return str(value) if is_id else None


def _size(row: Mapping[str, Any], height: str, width: str) -> tuple[int, int] | None:
    """(H, W) where both are said."""
    try:
        size = int(row[height]), int(row[width])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _short(row: object) -> str:
    text = json.dumps(row)
    return text if len(text) < 80 else text[:77] + "..."


def _read_coco(
    content: dict[str, Any], path: Path, folders: list[Path], faults: list[str]
) -> list[RawSample]:
    only = content.get("image")  # SA-1B has one image in each file
    if isinstance(only, Mapping):
        content = {**content, "images": [{"id": only.get("image_id"), **only}]}
    categories = _rows(content, "categories", path, faults)
    names = {_key(row.get("id")): _text(row.get("name")) for _, row in categories}
    samples: dict[str, RawSample] = {}
    files: dict[str, str] = {}
    twice: set[str] = set()
    for number, row in _rows(content, "images", path, faults):
        key, name = _key(row.get("id")), row.get("file_name")
        if key is None or not isinstance(name, str) or not name:
            faults.append(f"{path}, images {number}: no 'id' or 'file_name' in {_short(row)}")
        elif files.setdefault(key, name) != name:
            twice.add(key)
            faults.append(
                f"{path}: the id {key} is that of {files[key]!r} and of {name!r}; which annotation "
                "belongs to which is not known"
            )
        elif key not in samples:
            image = find_file(name, folders) or folders[0] / name
            samples[key] = RawSample(image, [], _size(row, "height", "width"))
    for number, row in _rows(content, "annotations", path, faults):
        what = f"annotation {_text(row.get('id', f'number {number}'))}"
        key = next(iter(samples), None) if isinstance(only, Mapping) else _key(row.get("image_id"))
        if key is None or key not in samples or key in twice:
            why = "two images have" if key in twice else "there is no image with"
            faults.append(f"{path}, {what}: {why} the id {row.get('image_id')!r}")
            continue
        try:
            annotation, wrong = _coco_annotation(row.get("segmentation"))
            label = names.get(_key(row.get("category_id")), "")
            samples[key].objects.append((annotation, label, what))
        except ValueError as err:
            wrong = [str(err)]
        faults += [f"{path}, {what}: {fault}" for fault in wrong]
    return [sample for key, sample in samples.items() if key not in twice]


def _coco_annotation(segmentation: object) -> tuple[Annotation, list[str]]:
    """Run lengths count whatever ``iscrowd`` says: CVAT's brush and SAM tools always set it."""
    if isinstance(segmentation, list) and len(segmentation) == 1:
        segmentation = segmentation[0] if isinstance(segmentation[0], Mapping) else segmentation
    if isinstance(segmentation, Mapping):
        return RunLengths.read(segmentation), []
    return Polygons.read(segmentation)


def _read_labelme(
    content: dict[str, Any], path: Path, folders: list[Path], faults: list[str]
) -> RawSample:
    image = find_file(_text(content.get("imagePath")) or path.stem, folders)
    if image is None:
        image = path if content.get("imageData") else folders[0] / _text(content.get("imagePath"))
    objects: dict[object, tuple[Polygons, str, str]] = {}
    for number, shape in _rows(content, "shapes", path, faults):
        label, what = _text(shape.get("label")), f"shape {number}"
        group = shape.get("group_id")  # those of one label and group are one object
        key = number if group is None else (label, str(group))
        try:
            part = _labelme_shape(shape)
        except ValueError as err:
            faults.append(f"{path}, {what}: {err}")
            continue
        held, label, what = objects.get(key, (Polygons(()), label, what))
        whole = Polygons(held.rings + part.rings, held.patches + part.patches)
        objects[key] = whole, label, what
    return RawSample(image, [*objects.values()], _size(content, "imageHeight", "imageWidth"))


def _labelme_shape(shape: Mapping[str, Any]) -> Polygons:
    kind = shape.get("shape_type") or "polygon"
    if kind in _WITHOUT_AREA:
        raise ValueError(f"a {kind} has no area; wanted a polygon, rectangle, circle or mask")
    try:
        points = np.asarray(shape.get("points"), np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as err:
        raise ValueError("points must be pairs of numbers") from err
    is_plain = kind in ("rectangle", "circle", "mask")
    if not is_plain or (kind == "rectangle" and len(points) == 4):
        return Polygons((as_ring(points),))
    if len(points) != 2 or not np.isfinite(points).all():
        raise ValueError(f"a {kind} wants two points of finite numbers; came {len(points)}")
    (x0, y0), (x1, y1) = points
    if kind == "rectangle":
        return Polygons((np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]),))
    if kind == "circle":
        turn = np.linspace(0, 2 * math.pi, _CIRCLE, endpoint=False)
        directions = np.stack((np.cos(turn), np.sin(turn)), 1)
        return Polygons((points[0] + math.hypot(x1 - x0, y1 - y0) * directions,))
    try:
        png = base64.b64decode(shape.get("mask") or "")
        with Image.open(io.BytesIO(png)) as image:
            image.load()
    except (TypeError, ValueError, OSError, SyntaxError, UnidentifiedImageError) as err:
        raise ValueError(f"its mask is no image in base64: {err}") from err
    return Polygons((), ((int(min(x0, x1)), int(min(y0, y1)), png),))


def image_source(path: Path) -> Path | bytes:
    """What to read an image from: its file, or the image that a JSON of labelme holds."""
    if path.suffix.lower() != ".json":
        return path
    try:
        return base64.b64decode(load_json(path)["imageData"])
    except (TypeError, KeyError, ValueError, binascii.Error) as err:
        raise ImageError(f"{path} holds no image as imageData: {err}") from err


def _read_csv(path: Path, images: Path | None, faults: list[str]) -> list[RawSample]:
    (_, header), *rows = read_table(path)
    image_column = find_column(header, _IMAGE_COLUMNS)
    mask_column = find_column(header, _MASK_COLUMNS)
    if image_column is None or mask_column is None:
        raise ValueError(
            f"{path} must have the columns 'picture' (or 'image') and 'mask'; it has "
            f"{', '.join(header)}"
        )
    label_column = find_column(header, ("label", "class", "category"))
    folders = _image_folders(path, images)
    mask_folders = [path.parent, inner_folder(path.parent, _MASK_FOLDERS) or path.parent]
    samples: dict[Path, RawSample] = {}
    for line, cells in rows:
        cells = cells + [""] * (len(header) - len(cells))
        names = cells[image_column], cells[mask_column]
        if not all(names):
            what = f"no {header[image_column]} or no mask"
            faults.append(f"{path}, line {line}: {what} is named")
            continue
        image = find_file(names[0], folders) or folders[0] / names[0]
        mask = find_file(names[1], mask_folders) or path.parent / names[1]
        label = "" if label_column is None else cells[label_column]
        sample = samples.setdefault(image, RawSample(image))
        sample.objects.append((MaskFile(mask), label, f"line {line}"))
    return list(samples.values())


def _read_folders(images: Path, masks: Path, faults: list[str]) -> list[RawSample]:
    samples: dict[str, RawSample] = {}
    for image in _files(images):
        if image.stem in samples:
            faults.append(f"{image} has the stem of {samples[image.stem].image.name}")
        else:
            samples[image.stem] = RawSample(image)
    named: list[tuple[str, Path]] = []  # a stem and a file of one of its objects
    for mask in _files(masks):
        stem = mask.stem
        if stem in samples:
            _add_ids(samples[stem], mask, faults)
            continue
        while "_" in stem and stem not in samples:  # the longest stem that is an image's
            stem = stem.rpartition("_")[0]
        named.append((stem, mask))
    inner = sorted(place for place in masks.iterdir() if place.is_dir())
    named += [(folder.name, mask) for folder in inner for mask in _files(folder)]
    for stem, mask in named:
        if stem in samples:
            samples[stem].objects.append((MaskFile(mask), "", mask.name))
        else:
            faults.append(f"{mask} belongs to no image in {images}")
    return list(samples.values())


def _files(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.suffix.lower() in IMAGE_SUFFIXES)


def _add_ids(sample: RawSample, mask: Path, faults: list[str]) -> None:
    """One object for each id in a file of masks."""
    try:
        ids = read_mask_file(mask, is_one_object=False)
    except ImageError as err:
        faults.append(str(err))
        return
    values, areas = np.unique(ids[ids != 0], return_counts=True)
    if not len(values):
        faults.append(f"{mask} is empty: it shows no object")
    elif len(values) >= _MANY and np.median(areas) <= _SMALL:
        warnings.warn(
            f"{mask} is read as {len(values)} objects, half of them of {_SMALL} pixels or less; "
            "if these are soft edges, save one colour for each object without them",
            stacklevel=2,
        )
    for value in values.tolist():
        sample.objects.append((MaskFile(mask, value), "", f"{mask.name}, id {value}"))
