"""Prompts as a user writes them: on the command line, in JSON or CSV files, masks as files.

They become the library's ``Prompt``, which says what is wrong with one; here it is said where.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tinyvit.checkpoints import read_state_dict
from tinyvit.images.decode import decode
from tinyvit.sam import Prompt
from tinyvit.sam.prompts import to_prompt

from .images import Item

COLUMNS = ("picture", "x", "y", "label", "x0", "y0", "x1", "y1", "object")
INSIDE = 128  # brightness from which a pixel of a mask's image is mask
GREY_AT_MOST = 0.1  # of the pixels of a mask; soft edges and JPEG leave fewer

Prompts: TypeAlias = "tuple[Prompt, ...]"
Point: TypeAlias = tuple[float, float, int]
"""x, y in pixels of the upright image; label 1 the object, 0 not the object."""
Box: TypeAlias = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the upright image."""


def prompts_of(
    points: Sequence[Point], boxes: Sequence[Box], mask: Path | None, each: bool
) -> Prompts:
    """What the options of one call mean, one prompt for each object.

    All points are about one object, and so are a box and a mask that come with them. Several boxes
    are several objects. With ``each`` every point and every box is an object of its own.
    """
    if not points and not boxes and mask is None:
        raise ValueError(
            "nothing is prompted; give --point X,Y or --box X0,Y0,X1,Y1, --mask FILE, --prompts "
            "FILE for many images, or --everything"
        )
    is_many = len(boxes) > 1 or (each and len(points) + len(boxes) > 1)
    if is_many and mask is not None:
        raise ValueError("--mask is about one object; give it with points, one box, or alone")
    if points and len(boxes) > 1 and not each:
        raise ValueError(
            "several --box are several objects, and it is not clear which of them the points are "
            "about; make every one an object of its own with --each, or say it with --prompts FILE"
        )
    if not is_many:
        return (_one(points, boxes[0] if boxes else None, mask),)
    alone = [_one((point,)) for point in points]
    return (*alone, *(_one((), box) for box in boxes))


def _one(points: Sequence[Point], box: Box | None = None, mask: Path | None = None) -> Prompt:
    return _checked(
        Prompt(
            points=[(x, y) for x, y, _ in points] if points else None,
            labels=[label for _, _, label in points] if points else None,
            box=box,
            mask=None if mask is None else read_mask(mask),
        )
    )


def _checked(prompt: Prompt) -> Prompt:
    if prompt.labels is not None and not prompt.labels.any() and prompt.kind[1:] == (False, False):
        raise ValueError(
            "points with the label 0 alone say only what the object is not; give a point on it, or "
            "a box around it, too"
        )
    return prompt


def read_mask(path: Path) -> NDArray[np.float32] | NDArray[np.bool_]:
    """A mask prompt of a file: logits [h4, w4] float32, or an image's bright pixels [H, W] bool."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (EOFError, ValueError) as err:
            raise ValueError(f"{str(path)!r} is no array of numpy: {err}") from err
        return _logits(path, [array])
    if suffix == ".safetensors":
        return _logits(path, [*map(np.asarray, read_state_dict(path).tensors.values())])
    brightness = decode(path).mean(axis=2)  # [H, W]
    mask: NDArray[np.bool_] = brightness >= INSIDE
    if not mask.any():
        raise ValueError(
            f"nothing in the mask {str(path)!r} is white: its brightest pixel is "
            f"{brightness.max():.0f} of 255, and pixels from {INSIDE} on are mask"
        )
    grey = np.mean((brightness > 32) & (brightness < 224))
    if grey > GREY_AT_MOST:
        warnings.warn(
            f"{str(path)!r} looks like a photograph and not like a mask: {grey:.0%} of its pixels "
            f"are neither black nor white; pixels from {INSIDE} on are taken for mask",
            stacklevel=2,
        )
    return mask


def _logits(path: Path, arrays: Sequence[NDArray[np.generic]]) -> NDArray[np.float32]:
    is_one = len(arrays) == 1 and arrays[0].dtype.kind == "f"
    if not is_one or arrays[0].squeeze().ndim != 2:
        came = ", ".join(f"{list(array.shape)} of {array.dtype}" for array in arrays)
        raise ValueError(
            f"{str(path)!r} must hold the low-res logits of one mask, [h, w] of floats; came {came}"
        )
    return arrays[0].squeeze().astype(np.float32)


def read_prompts(path: Path) -> dict[str, Prompts]:
    """Prompts of a ``.csv`` or JSON file: for each image's name one prompt for each object.

    Files of masks named in it are found from its folder. Errors say at which image and object.
    """
    text = path.read_text(encoding="utf-8-sig")
    objects = _of_csv(path, text) if path.suffix.lower() == ".csv" else _of_json(path, text)
    found: dict[str, Prompts] = {}
    for image, dictionaries in objects.items():
        prompts = []
        for number, dictionary in enumerate(dictionaries, 1):
            try:
                prompts.append(_prompt(path, dictionary))
            except (TypeError, ValueError) as err:
                raise ValueError(f"{path}: {image!r}, object {number}: {err}") from err
        found[image] = tuple(prompts)
    return found


def _prompt(path: Path, dictionary: object) -> Prompt:
    if not isinstance(dictionary, Mapping):
        raise TypeError(f"wanted an object like {{'points': [[x, y]]}}; came {dictionary!r:.60}")
    values = dict(dictionary)
    mask = values.get("mask")
    if mask is not None:
        if not isinstance(mask, str):
            raise TypeError(f"mask must be the name of a file; came {mask!r:.60}")
        values["mask"] = read_mask(path.parent / mask)
    return _checked(to_prompt(values))


def _of_json(path: Path, text: str) -> dict[str, Sequence[object]]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{path}: {twice[0]!r} stands there twice; put its objects together")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as err:
        raise ValueError(f"{path} is no JSON (and not named .csv): {err}") from err
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise ValueError(
            f"{path} must be an object of images with a list of objects each, such as "
            '{"a.jpg": [{"points": [[320, 240]]}]}'
        )
    return content


def _of_csv(path: Path, text: str) -> dict[str, Sequence[object]]:
    """Rows with the same image and object are one dictionary; all others one each."""
    lines = text.splitlines()
    mark = max(",;\t", key="".join(lines[:1]).count)  # Excel writes semicolons in many countries
    rows = csv.DictReader(lines, delimiter=mark)
    heads = [head.strip() for head in rows.fieldnames or ()]
    heads = ["picture" if head == "image" else head for head in heads]
    unknown = [head for head in heads if head not in COLUMNS]
    if "picture" not in heads or unknown:
        wrong = f"came {unknown[0]!r}" if unknown else "there is no column 'picture'"
        raise ValueError(
            f"{path}: the first line must name columns among {', '.join(COLUMNS)}; {wrong}"
        )
    rows.fieldnames = heads
    found: dict[str, dict[object, dict[str, Any]]] = {}
    for row in rows:
        place = f"{path}: line {rows.line_num}"
        if None in row or None in row.values():
            raise ValueError(f"{place} must have {len(heads)} values, as the first line")
        cells = {head: cell.strip() for head, cell in row.items() if cell.strip()}
        if not cells:
            continue
        image, name = cells.pop("picture", ""), cells.pop("object", "")
        if not image:
            raise ValueError(f"{place} names no image")
        named = {"name": name} if name else {}
        entry = found.setdefault(image, {}).setdefault(name or rows.line_num, named)
        _add_row(place, entry, cells)
    return {image: [*entries.values()] for image, entries in found.items()}


def _add_row(place: str, entry: dict[str, Any], cells: Mapping[str, str]) -> None:
    """Add a row's point and box to its object."""
    try:
        numbers = {head: float(cell) for head, cell in cells.items()}
    except ValueError as err:
        raise ValueError(f"{place}: {err}") from err
    box = [numbers[head] for head in ("x0", "y0", "x1", "y1") if head in numbers]
    if len(box) not in (0, 4) or ("x" in numbers) != ("y" in numbers):
        raise ValueError(f"{place}: a point has x and y, a box x0, y0, x1 and y1; came {numbers}")
    if "x" not in numbers and not box:
        raise ValueError(f"{place} has neither a point nor a box")
    if "label" in numbers and "x" not in numbers:
        raise ValueError(f"{place} has a label and no point; a label belongs to x and y")
    if box:
        if "box" in entry:
            raise ValueError(f"{place}: object {entry.get('name')!r} has a box already")
        entry["box"] = box
    if "x" in numbers:
        entry.setdefault("points", []).append([numbers["x"], numbers["y"]])
        entry.setdefault("labels", []).append(numbers.get("label", 1))


def share_out(
    images: Sequence[Item], prompts: Mapping[str, Prompts], source: Path
) -> tuple[list[Item], list[tuple[str, str]]]:
    """The images that have prompts of a file; and (name, message) of names that no image has.

    A name is an image's path relative to the folder that was named, or its path as it was given.
    """
    of_name = {image.path.as_posix(): image for image in images}
    of_name.update({image.name: image for image in images})
    found: dict[Item, Prompts] = {}
    missing: list[tuple[str, str]] = []
    for name, wanted in prompts.items():
        straight = name.replace("\\", "/")  # a file written on Windows
        image = of_name.get(name) or of_name.get(Path(straight).as_posix())
        if image is None:
            stems = {one.stem: one.name for one in images}  # the same suffix makes nothing alike
            near = get_close_matches(str(Path(name).with_suffix("")), stems, 1, cutoff=0.7)
            hint = f"; did you mean {stems[near[0]]!r}?" if near else ""
            words = f"{source} has prompts for {name!r}, which is not among the images{hint}"
            missing.append((name, words))
        elif image in found:
            raise ValueError(f"{source} names {image.name!r} in two ways; put them together")
        else:
            found[image] = wanted
    items = [replace(image, prompts=found[image]) for image in images if found.get(image)]
    if not items:
        names = ", ".join(repr(image.name) for image in images[:3])
        more = f": {missing[0][1]}" if missing else ""
        raise ValueError(f"none of the images ({names}) has prompts in {source}{more}")
    return items, missing
