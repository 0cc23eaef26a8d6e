"""Composites made on the fly: cut-out objects pasted on photos, with exact masks.

A composite depends on the seed and its number alone, so a set of them is a sequence like any other
and takes no disk space. What keeps a network from recognising the pasting instead of the object:
soft shadows, colours drawn towards the background's, blur, noise and JPEG after compositing, and
patches of other photographs with the same kind of edge that are no objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from changes import as_a_camera, blob, changed, crop, gradient, recoloured, studio, towards
from label import draw_label
from manifest import Background, Row, read_rows
from regions import draw_regions, open_photograph, regions_path

Plane = NDArray[np.float32]
Flags = NDArray[np.bool_]


class Canvas:
    """The image so far and what can be seen of each object."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.alphas: list[Plane] = []
        self.areas: list[float] = []
        self.labelled: list[bool] = []

    def paste(
        self,
        cutout: Image.Image,
        rng: np.random.Generator,
        *,
        is_labelled: bool,
        middle: tuple[float, float] | None = None,
    ) -> None:
        """Lay a cut-out over everything, around ``middle`` or anywhere, sometimes with a shadow."""
        if middle is None:
            x, y = (_place(*sides, rng) for sides in zip(cutout.size, self.image.size, strict=True))
        else:
            x, y = (round(at - s / 2) for at, s in zip(middle, cutout.size, strict=True))
        cutout = towards(cutout, self.image, (x, y), rng)
        alpha = cutout.getchannel("A")
        if rng.random() < 0.6:  # the softness of a real edge
            alpha = alpha.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
        if rng.random() < 0.4:
            self._shade(alpha, (x, y), rng)
        layer = Image.new("L", self.image.size)
        layer.paste(alpha, (x, y))
        self.image.paste(cutout.convert("RGB"), (x, y), alpha)
        seen = np.asarray(layer, np.float32) / np.float32(255)
        for below in self.alphas:
            below *= 1 - seen
        self.alphas.append(seen.copy())
        self.areas.append(float(np.asarray(alpha, np.float32).sum()) / 255)
        self.labelled.append(is_labelled)

    def _shade(self, alpha: Image.Image, place: tuple[int, int], rng: np.random.Generator) -> None:
        side = max(alpha.size)
        softness, far = side * rng.uniform(0.02, 0.1), side * rng.uniform(0.02, 0.15)
        margin = int(3 * softness) + 1
        wide = Image.new("L", (alpha.width + 2 * margin, alpha.height + 2 * margin))
        wide.paste(alpha, (margin, margin))
        strength = rng.uniform(0.15, 0.6)
        shadow = wide.filter(ImageFilter.BoxBlur(softness)).point(lambda v: int(v * strength))
        angle = rng.uniform(0, 2 * np.pi)
        x = place[0] - margin + int(far * np.cos(angle))
        y = place[1] - margin + int(far * abs(np.sin(angle)))
        self.image.paste((0, 0, 0), (x, y, x + wide.width, y + wide.height), shadow)

    def masks(self, least_visible: float, least_pixels: int) -> tuple[NDArray[np.bool_], list[int]]:
        """(masks [N, H, W], which of the labelled objects they are)."""
        found, kept, number = [], [], -1
        for seen, area, is_labelled in zip(self.alphas, self.areas, self.labelled, strict=True):
            if not is_labelled:
                continue
            number += 1
            mask = seen > 0.5
            if mask.sum() >= least_pixels and seen.sum() >= least_visible * area:
                found.append(mask)
                kept.append(number)
        size = self.image.height, self.image.width
        return (np.stack(found) if found else np.zeros((0, *size), np.bool_)), kept


def _place(own: int, whole: int, rng: np.random.Generator) -> int:
    """Where something of one length begins on another, so that most of it lies there."""
    low, high = sorted((-0.2 * own, whole - 0.8 * own))
    return int(rng.uniform(low, high))


Split = Literal["train", "val", "test"]
RGB = NDArray[np.uint8]

_SHAPES = (1.0, 1.0, 4 / 3, 4 / 3, 3 / 2, 3 / 2, 3 / 4, 2 / 3, 16 / 9)


@dataclass(frozen=True)
class CompositeSettings:
    """How composites are drawn.

    Attributes:
        most_objects: Objects pasted at most.
        smallest: Longest side of the smallest object, as a share of the image's.
        largest: The same of the largest.
        distractors: Unlabelled patches at most.
        least_visible: Objects of which less can be seen, as a share, are not labelled.
        least_pixels: Objects with fewer pixels are not labelled.
        plain: Share of plain grounds.
        studio: Share of grounds with a floor and a wall, as in a studio.
        crowds: Share of composites that show 3 to 7 things of one kind that touch or overlap.
        oblique: Share of objects drawn from the long, thin ones alone, which lie at any angle.
    """

    most_objects: int = 7
    smallest: float = 0.12
    largest: float = 1.0
    distractors: int = 3
    least_visible: float = 0.3
    least_pixels: int = 64
    plain: float = 0.08
    studio: float = 0.0
    crowds: float = 0.0
    oblique: float = 0.0


@dataclass(frozen=True)
class Sample:
    """What is drawn: an image and its masks.

    Attributes:
        image: RGB [H, W, 3] uint8.
        masks: [N, H, W] bool, or float32 probabilities in 0..1.
        labels: What each object is called.
        boxed: [N] bool: which a box may stand for.
    """

    image: RGB
    masks: Flags | Plane
    labels: tuple[str, ...]
    boxed: Flags


@dataclass(frozen=True)
class Composite:
    """One composite, drawn when it is loaded.

    Attributes:
        number: Which one of its set.
        owner: The set.
    """

    number: int
    owner: CompositeSet

    @property
    def name(self) -> str:
        """The set's part and the number."""
        return f"{self.owner.split}_{self.number:06d}"

    @property
    def labels(self) -> tuple[str, ...]:
        """What each object is called."""
        return self._drawn.labels

    @property
    def boxed(self) -> Flags:
        """[N] bool: which objects may be prompted by a box."""
        return self._drawn.boxed

    def load(self) -> tuple[RGB, Flags | Plane]:
        """(RGB [H, W, 3] uint8, masks [N, H, W] bool or float32 in 0..1)."""
        return self._drawn.image, self._drawn.masks

    @cached_property
    def _drawn(self) -> Sample:
        return self.owner.draw(self.number)


@dataclass(frozen=True)
class CompositeSet(Sequence[Composite]):
    """A sequence of composites.

    Attributes:
        work: The folder of the supply: ``objects/*.csv`` and ``backgrounds/manifest.csv``.
        split: Which objects and backgrounds are used; a background knows train and val only.
        size: The images' longest side in pixels.
        seed: Of the random generator.
        length: How many there are.
        weights: How often each kind of object is drawn; kinds that are not named are left out.
        settings: How they are drawn.
        regions: Probability that a sample is an unchanged photo with its regions as masks instead
            of a composite; see ``regions.py``.
        things: Probability that it is a photo with a thing that a network labelled; see
            ``label.py``.

    Raises:
        ValueError: The supply has no object or background of that split.
    """

    work: Path
    split: Split = "train"
    size: int = 256
    seed: int = 0
    length: int = 1_000_000
    weights: dict[str, float] = field(
        default_factory=lambda: {"photo": 0.35, "render": 0.35, "emoji": 0.2, "clipart": 0.1}
    )
    settings: CompositeSettings = field(default_factory=CompositeSettings)
    regions: float = 0.0
    things: float = 0.0

    def __post_init__(self) -> None:
        kinds = {kind: _objects(self.work, kind, self.split) for kind in self.weights}
        if not any(kinds.values()):
            raise ValueError(f"{self.work / 'objects'} has no object of split {self.split!r}")
        if not _backgrounds(self.work, self.split):
            raise ValueError(f"{self.work / 'backgrounds'} has none of split {self.split!r}")

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Composite: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Composite]: ...

    def __getitem__(self, index: int | slice) -> Composite | Sequence[Composite]:
        if isinstance(index, slice):
            return [Composite(n, self) for n in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"composite {index} of {self.length}")
        return Composite(index % self.length, self)

    def draw(self, number: int) -> Sample:
        """One sample, with at least one mask."""
        for attempt in range(20):
            rng = np.random.default_rng([self.seed, number, attempt])
            share = rng.random() if self.regions or self.things else 1.0
            if share < self.regions:
                found = self._photograph(rng)
            elif share < self.regions + self.things:
                found = self._thing(rng)
            else:
                found = self._composite(rng)
            if found is not None:
                return found
        raise ValueError(f"composite {number}: no object stays visible; is the supply empty?")

    def _photograph(self, rng: np.random.Generator) -> Sample | None:
        """An unchanged photo, with its regions as masks."""
        files = _backgrounds(self.work, self.split)
        file = files[rng.integers(len(files))]
        found = draw_regions(file, regions_path(self.work, file.name), self._sides(rng), rng)
        if found is None:
            return None
        image, masks, boxed = found
        return Sample(image, masks, ("region",) * len(masks), boxed)

    def _thing(self, rng: np.random.Generator) -> Sample | None:
        """A photo with a thing in it; every photo as often, however many of its crops are good."""
        photographs = _things(self.work, self.split)
        crops = photographs[rng.integers(len(photographs))]
        found = draw_label(crops[rng.integers(len(crops))], self.size, rng)
        return None if found is None else Sample(*found, ("thing",), np.ones(1, np.bool_))

    def _composite(self, rng: np.random.Generator) -> Sample | None:
        """Objects pasted on a background."""
        canvas = self._canvas(rng)
        if self.settings.crowds and rng.random() < self.settings.crowds:
            labels = self._paste_crowd(canvas, rng)
        else:
            labels = self._paste_all(canvas, rng)
        masks, kept = canvas.masks(self.settings.least_visible, self.settings.least_pixels)
        if not kept:
            return None
        names = tuple(labels[i] for i in kept)
        return Sample(as_a_camera(canvas.image, rng), masks, names, np.ones(len(kept), np.bool_))

    def _sides(self, rng: np.random.Generator) -> tuple[int, int]:
        """(width, height) of an image."""
        shape = _SHAPES[rng.integers(len(_SHAPES))]
        width = self.size if shape >= 1 else round(self.size * shape)
        height = self.size if shape <= 1 else round(self.size / shape)
        return width, height

    def _canvas(self, rng: np.random.Generator) -> Canvas:
        """A crop of a background, sometimes a plain one."""
        sides = self._sides(rng)
        share, settings = rng.random(), self.settings
        if share < settings.plain:
            return Canvas(gradient(sides, rng))
        if share < settings.plain + settings.studio:
            return Canvas(studio(sides, rng))
        files = _backgrounds(self.work, self.split)
        image = crop(open_photograph(files[rng.integers(len(files))]), sides, rng)
        return Canvas(recoloured(image, 0.25, rng))

    def _paste_all(self, canvas: Canvas, rng: np.random.Generator) -> list[str]:
        """Objects and patches anywhere; gives what each object is called."""
        settings = self.settings
        count = int(rng.choice([1, 1, 1, 2, 2, 3, 4, 5, 6, 7]))
        count = min(count, settings.most_objects)
        order = ["object"] * count + ["patch"] * int(rng.integers(settings.distractors + 1))
        rng.shuffle(order)
        labels: list[str] = []
        for what in order:
            if what == "patch":
                canvas.paste(self._patch(rng), rng, is_labelled=False)
            else:
                cutout, label = self._cutout(count, rng)
                canvas.paste(cutout, rng, is_labelled=True)
                labels.append(label)
        return labels

    def _paste_crowd(self, canvas: Canvas, rng: np.random.Generator) -> list[str]:
        """Things of one kind, each beside or partly on one before it."""
        views = self._group(rng, is_long=False)
        count = int(rng.integers(3, 8))
        side = self.size * rng.uniform(0.18, 0.45)
        sides = np.array(canvas.image.size)
        middles = [rng.uniform(0.3, 0.7, 2) * sides]
        labels = []
        for number in range(count):
            file, label = views[rng.integers(len(views))]
            cutout = changed(_rgba(file), side * rng.uniform(0.8, 1.2), rng)
            if number:
                turn = rng.uniform(0, 2 * np.pi)
                step = rng.uniform(0.55, 1.0) * np.array(cutout.size)
                step *= np.cos(turn), np.sin(turn)
                near = middles[rng.integers(number)] + step
                middles.append(np.clip(near, 0.05 * sides, 0.95 * sides))
            x, y = middles[-1]
            canvas.paste(cutout, rng, is_labelled=True, middle=(x, y))
            labels.append(label)
        return labels

    def _group(self, rng: np.random.Generator, is_long: bool) -> tuple[tuple[Path, str], ...]:
        """The views of a random object of a random kind, or of a long one where there are any."""
        kinds = [k for k in self.weights if _objects(self.work, k, self.split, is_long)]
        if not kinds:
            return self._group(rng, False)
        shares = np.array([self.weights[kind] for kind in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        groups = _objects(self.work, kind, self.split, is_long)
        return groups[rng.integers(len(groups))]

    def _cutout(self, count: int, rng: np.random.Generator) -> tuple[Image.Image, str]:
        """An object, randomly changed and resized."""
        is_long = bool(self.settings.oblique) and rng.random() < self.settings.oblique
        views = self._group(rng, is_long)
        file, label = views[rng.integers(len(views))]
        smallest = max(self.settings.smallest, 0.3 * is_long)
        largest = self.settings.largest if count <= 2 else 0.6
        side = self.size * float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
        if count == 1:
            side = self.size * rng.uniform(0.25, largest)
        return changed(_rgba(file), side, rng, is_oblique=is_long), label

    def _patch(self, rng: np.random.Generator) -> Image.Image:
        """A piece of another photo in a shape that is no object."""
        files = _backgrounds(self.work, self.split)
        side = max(8, round(self.size * float(np.exp(rng.uniform(np.log(0.08), np.log(0.5))))))
        piece = crop(open_photograph(files[rng.integers(len(files))]), (side, side), rng)
        piece.putalpha(blob(side, rng))
        return piece


# --- the supply -----------------------------------------------------------------------------------


_LONG = 3.0  # times as long as wide


@lru_cache(maxsize=64)
def _objects(
    work: Path, kind: str, split: str, is_long: bool = False
) -> tuple[tuple[tuple[Path, str], ...], ...]:
    """The views of each group of objects, all or the long ones: (file, label)."""
    table = work / "objects" / f"{kind}.csv"
    if not table.exists():
        return ()
    groups: dict[str, list[tuple[Path, str]]] = {}
    for row in read_rows(table, Row):
        sides = row.width, row.height
        if row.split == split and (not is_long or max(sides) >= _LONG * min(sides)):
            groups.setdefault(row.group, []).append((table.parent / row.file, row.label))
    return tuple(tuple(views) for views in groups.values())


@lru_cache(maxsize=8)
def _backgrounds(work: Path, split: str) -> tuple[Path, ...]:
    table = work / "backgrounds" / "manifest.csv"
    wanted = "val" if split == "test" else split
    rows = read_rows(table, Background) if table.exists() else []
    return tuple(table.parent / row.file for row in rows if row.split == wanted)


@lru_cache(maxsize=8)
def _things(work: Path, split: str) -> tuple[tuple[Path, ...], ...]:
    """The labelled crops of each photograph."""
    table = work / "labels" / "manifest.csv"
    photographs: dict[str, list[Path]] = {}
    for row in read_rows(table, Background):
        if row.split == split:
            name = row.file.rpartition("_")[0]
            photographs.setdefault(name, []).append(table.parent / row.file)
    if not photographs:
        raise ValueError(f"{table} has no thing of split {split!r}")
    return tuple(tuple(crops) for crops in photographs.values())


@lru_cache(maxsize=8192)  # all of them: a few 100 MB in each process that draws
def _rgba(path: Path) -> Image.Image:
    with Image.open(path) as image:
        cutout: Image.Image = image.convert("RGBA")
    return cutout
