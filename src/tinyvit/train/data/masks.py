"""Images with the masks of their objects, in any of the usual conventions; checked when opened.

``open_mask_set`` recognises COCO's JSON, labelme's JSON, folders of mask PNGs and CSV manifests
(``mask_formats.py`` says how each is laid out). Everything that does not fit (a missing or broken
image, a mask of another size, an empty mask) is left out, counted and named in ``faults``, or is
an error by choice; nothing is left out silently.

Knows no model. Shapes: N objects of an image, H W the image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import ImageError
from tinyvit.images.decode import decode, read_size

from .mask_formats import Draft, MaskFile, Outline, read_drafts, read_mask_file

_SHOWN = 5  # faults that an error names


@dataclass(frozen=True)
class Scene:
    """One image and the outlines of its objects.

    Attributes:
        image: Its file.
        outlines: One for each object.
        labels: What each object is called; empty text where nothing is known.
    """

    image: Path
    outlines: tuple[Outline, ...]
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        """The image's file name."""
        return self.image.name

    def __len__(self) -> int:
        return len(self.outlines)

    def load(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Read the image and draw its masks.

        Returns:
            (RGB [H, W, 3] uint8, masks [N, H, W] bool).

        Raises:
            ImageError: The image or a mask's file cannot be read.
            ValueError: A mask has become one of another size since the set was opened.
        """
        image = decode(self.image)
        size = image.shape[0], image.shape[1]
        masks = np.zeros((len(self), *size), np.bool_)
        read: dict[Path, NDArray[np.int64]] = {}
        for mask, outline in zip(masks, self.outlines, strict=True):
            if isinstance(outline, MaskFile) and outline.value is not None:
                if outline.path not in read:  # one file may hold many objects
                    read[outline.path] = read_mask_file(outline.path, is_one_object=False)
                if read[outline.path].shape == size:
                    mask[...] = read[outline.path] == outline.value
                    continue
            mask[...] = outline.mask(size)
        return image, masks


@dataclass(frozen=True)
class MaskSet(Sequence[Scene]):
    """Images with masks; a sequence of scenes.

    Attributes:
        source: Where it was read from.
        scenes: The images that have at least one good mask.
        faults: What was left out and why, a sentence each.
    """

    source: str
    scenes: tuple[Scene, ...]
    faults: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.scenes)

    @overload
    def __getitem__(self, index: int) -> Scene: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Scene]: ...

    def __getitem__(self, index: int | slice) -> Scene | Sequence[Scene]:
        return self.scenes[index]

    def __iter__(self) -> Iterator[Scene]:
        return iter(self.scenes)

    @property
    def objects(self) -> int:
        """Masks of all images together."""
        return sum(map(len, self.scenes))

    def describe(self) -> str:
        """One line for a person: how many of what, and what was left out."""
        text = f"{self.source}: {len(self)} images with {self.objects} masks"
        if not self.faults:
            return text
        more = f", and {len(self.faults) - 1} more" if len(self.faults) > 1 else ""
        return f"{text}; left out {len(self.faults)}: {self.faults[0]}{more}"

    def split(self, share: float, seed: int = 0) -> tuple[MaskSet, MaskSet]:
        """Divide by image, by chance.

        Args:
            share: Of the images that go to the second part, 0 to 1; where the set has two
                images or more, each part gets at least one.
            seed: The same seed always divides alike.

        Returns:
            (the rest, the share), each in the order of the set; the first keeps the faults.

        Raises:
            ValueError: The share is not between 0 and 1.
        """
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1, but is {share}")
        count = min(max(1, round(share * len(self))), len(self) - 1)
        order = np.random.default_rng(seed).permutation(len(self))
        chosen = set(order[:count].tolist()) if count > 0 else set()
        parts = [
            tuple(scene for place, scene in enumerate(self.scenes) if (place in chosen) is wanted)
            for wanted in (False, True)
        ]
        return replace(self, scenes=parts[0]), replace(self, scenes=parts[1], faults=())


def open_mask_set(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    on_fault: Literal["skip", "error"] = "skip",
    check_pixels: bool = False,
) -> MaskSet:
    """Open images with masks, and check that they fit each other.

    Args:
        path: A JSON of COCO; a CSV with the columns ``image`` (or ``image``) and ``mask``; or a
            folder: with one of these in it, with labelme's JSON files, or with ``images/`` and
            ``masks/``.
        images: Folder of the images, where it is not the one that ``path`` implies.
        on_fault: What does not fit is left out and named ("skip"), or an error.
        check_pixels: Decode every image now, not only its header: a broken one is found here
            instead of in the middle of the training.

    Returns:
        The set.

    Raises:
        ValueError: There is no such set, its convention is not known, nothing in it is good, or,
            with ``on_fault="error"``, anything in it is not.
    """
    if on_fault not in ("skip", "error"):
        raise ValueError(f"on_fault must be 'skip' or 'error', but is {on_fault!r}")
    drafts, faults = read_drafts(Path(path), None if images is None else Path(images))
    scenes = []
    for draft in drafts:
        scene, wrong = _checked(draft, check_pixels)
        faults += wrong
        if scene is not None:
            scenes.append(scene)
    if faults and (on_fault == "error" or not scenes):
        shown = "; ".join(faults[:_SHOWN])
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        advice = "" if not scenes else "; repair them, or leave them out with on_fault='skip'"
        what = "has faults" if scenes else "has no image with a good mask"
        raise ValueError(f"{path} {what}: {shown}{more}{advice}")
    if not scenes:
        raise ValueError(f"{path} holds no images with masks")
    return MaskSet(str(path), tuple(scenes), tuple(faults))


def _checked(draft: Draft, check_pixels: bool) -> tuple[Scene | None, list[str]]:
    """The good part of a draft, if any, and what is wrong with the rest."""
    try:
        size = read_size(draft.image)
        if check_pixels:
            decode(draft.image)
    except ImageError as err:
        return None, [str(err)]
    faults: list[str] = []
    if draft.size is not None and draft.size != size:
        height, width = draft.size
        faults.append(
            f"{draft.image}: its masks are for {width} x {height} pixels (width x height), but "
            f"the image is {size[1]} x {size[0]} when upright"
        )
        return None, faults
    good: list[tuple[Outline, str]] = []
    for number, (outline, label) in enumerate(draft.objects):
        try:
            outline.check(size)
        except (ImageError, ValueError) as err:
            faults.append(f"{draft.image}, object {number}: {err}")
        else:
            good.append((outline, label))
    if not good:
        return None, faults or [f"{draft.image} has no masks"]
    outlines, labels = zip(*good, strict=True)
    return Scene(draft.image, outlines, labels), faults
