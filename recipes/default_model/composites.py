"""Composites made on the fly: cut-out objects pasted on photographs, with exact masks.

A composite depends on the seed and its number alone, so a set of them is a sequence like any other
and needs no room on the disk. What keeps a network from learning the paste instead of the object:
soft shadows, colours drawn towards the background's, blur, noise and JPEG after compositing, and
patches of other photographs with the same kind of edge that are no objects.

Letters: N objects, H W the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from canvas import Canvas
from changes import as_a_camera, blob, changed, crop, gradient, recoloured
from manifest import Background, Row, read_rows
from photographs import draw_regions, open_photograph
from regions import regions_path

__all__ = ["Composite", "CompositeSet", "Look", "Split"]

Split = Literal["train", "val", "test"]
RGB = NDArray[np.uint8]

_SHAPES = (1.0, 1.0, 4 / 3, 4 / 3, 3 / 2, 3 / 2, 3 / 4, 2 / 3, 16 / 9)


@dataclass(frozen=True)
class Look:
    """How composites look.

    Attributes:
        most_objects: Objects pasted at most.
        smallest: Longest side of the smallest object, as a share of the image's.
        largest: The same of the largest.
        distractors: Unlabelled patches at most.
        least_visible: Objects of which less can be seen, as a share, are not labelled.
        least_pixels: Objects with fewer pixels are not labelled.
    """

    most_objects: int = 7
    smallest: float = 0.12
    largest: float = 1.0
    distractors: int = 3
    least_visible: float = 0.3
    least_pixels: int = 64


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
        return self._drawn[2]

    def load(self) -> tuple[RGB, NDArray[np.bool_]]:
        """(RGB [H, W, 3] uint8, masks [N, H, W] bool)."""
        pixels, masks, _ = self._drawn
        return pixels, masks

    @cached_property
    def _drawn(self) -> tuple[RGB, NDArray[np.bool_], tuple[str, ...]]:
        return self.owner.draw(self.number)


@dataclass(frozen=True)
class CompositeSet(Sequence[Composite]):
    """A sequence of composites.

    Attributes:
        work: The folder of the supply: ``objects/*.csv`` and ``backgrounds/manifest.csv``.
        split: Which objects and backgrounds are used; a background knows train and val only.
        size: The images' longest side in pixels.
        seed: Source of all chance.
        length: How many there are.
        weights: How often each kind of object is drawn; kinds that are not named are left out.
        look: How they look.
        regions: How often, 0 to 1, a number is no composite but a photograph as it is, with
            regions of it as masks; see ``photographs.py``.

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
    look: Look = field(default_factory=Look)
    regions: float = 0.0

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

    def draw(self, number: int) -> tuple[RGB, NDArray[np.bool_], tuple[str, ...]]:
        """(RGB [H, W, 3] uint8, masks [N, H, W] bool with N >= 1, a label for each)."""
        for attempt in range(20):
            rng = np.random.default_rng([self.seed, number, attempt])
            if self.regions and rng.random() < self.regions:
                if (found := self._photograph(rng)) is not None:
                    return found
                continue
            canvas = self._canvas(rng)
            drawn = self._paste_all(canvas, rng)
            if drawn is not None:
                masks, labels = drawn
                return as_a_camera(canvas.image, rng), masks, labels
        raise ValueError(f"composite {number}: no object stays visible; is the supply empty?")

    def _photograph(
        self, rng: np.random.Generator
    ) -> tuple[RGB, NDArray[np.bool_], tuple[str, ...]] | None:
        """A photograph as it is, with regions of it as masks."""
        files = _backgrounds(self.work, self.split)
        file = files[rng.integers(len(files))]
        found = draw_regions(file, regions_path(self.work, file.name), self._sides(rng), rng)
        return None if found is None else (*found, ("region",) * len(found[1]))

    def _sides(self, rng: np.random.Generator) -> tuple[int, int]:
        """(width, height) of an image."""
        shape = _SHAPES[rng.integers(len(_SHAPES))]
        width = self.size if shape >= 1 else round(self.size * shape)
        height = self.size if shape <= 1 else round(self.size / shape)
        return width, height

    def _canvas(self, rng: np.random.Generator) -> Canvas:
        """A crop of a background, sometimes a plain one."""
        sides = self._sides(rng)
        if rng.random() < 0.08:
            return Canvas(gradient(sides, rng))
        files = _backgrounds(self.work, self.split)
        image = crop(open_photograph(files[rng.integers(len(files))]), sides, rng)
        return Canvas(recoloured(image, 0.25, rng))

    def _paste_all(
        self, canvas: Canvas, rng: np.random.Generator
    ) -> tuple[NDArray[np.bool_], tuple[str, ...]] | None:
        look = self.look
        count = int(rng.choice([1, 1, 1, 2, 2, 3, 4, 5, 6, 7]))
        count = min(count, look.most_objects)
        order = ["object"] * count + ["patch"] * int(rng.integers(look.distractors + 1))
        rng.shuffle(order)
        labels: list[str] = []
        for what in order:
            if what == "patch":
                canvas.paste(self._patch(rng), rng, is_labelled=False)
            else:
                cutout, label = self._cutout(count, rng)
                canvas.paste(cutout, rng, is_labelled=True)
                labels.append(label)
        masks, kept = canvas.masks(look.least_visible, look.least_pixels)
        return (masks, tuple(labels[i] for i in kept)) if len(kept) else None

    def _cutout(self, count: int, rng: np.random.Generator) -> tuple[Image.Image, str]:
        """An object, changed by chance and resized."""
        kinds = [k for k in self.weights if _objects(self.work, k, self.split)]
        shares = np.array([self.weights[kind] for kind in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        groups = _objects(self.work, kind, self.split)
        views = groups[rng.integers(len(groups))]
        file, label = views[rng.integers(len(views))]
        smallest = self.look.smallest
        largest = self.look.largest if count <= 2 else 0.6
        side = self.size * float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
        if count == 1:
            side = self.size * rng.uniform(0.25, largest)
        return changed(_rgba(file), side, rng), label

    def _patch(self, rng: np.random.Generator) -> Image.Image:
        """A piece of another photograph in a shape that is no object."""
        files = _backgrounds(self.work, self.split)
        side = max(8, round(self.size * float(np.exp(rng.uniform(np.log(0.08), np.log(0.5))))))
        piece = crop(open_photograph(files[rng.integers(len(files))]), (side, side), rng)
        piece.putalpha(blob(side, rng))
        return piece


# --- the supply -----------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _objects(work: Path, kind: str, split: str) -> tuple[tuple[tuple[Path, str], ...], ...]:
    """The views of each group of objects: (file, label)."""
    table = work / "objects" / f"{kind}.csv"
    if not table.exists():
        return ()
    groups: dict[str, list[tuple[Path, str]]] = {}
    for row in read_rows(table, Row):
        if row.split == split:
            groups.setdefault(row.group, []).append((table.parent / row.file, row.label))
    return tuple(tuple(views) for views in groups.values())


@lru_cache(maxsize=8)
def _backgrounds(work: Path, split: str) -> tuple[Path, ...]:
    table = work / "backgrounds" / "manifest.csv"
    wanted = "val" if split == "test" else split
    rows = read_rows(table, Background) if table.exists() else []
    return tuple(table.parent / row.file for row in rows if row.split == wanted)


@lru_cache(maxsize=8192)  # all of them: a few 100 MB in each process that draws
def _rgba(path: Path) -> Image.Image:
    with Image.open(path) as image:
        cutout: Image.Image = image.convert("RGBA")
    return cutout
