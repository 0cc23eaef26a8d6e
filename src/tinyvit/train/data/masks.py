"""Images with the masks of their objects, in any of the usual formats; checked when opened.

What ``open_mask_set`` finds unfit (a missing or unreadable image, a mask of another size, an empty
mask) is skipped, counted and named in ``faults``, or is an error by choice.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import ImageError
from tinyvit.images.decode import decode, read_size

from .annotations import Annotation, MaskFile, read_mask_file
from .mask_formats import RawSample, image_source, read_samples
from .sources import SHOWN, identity


@dataclass(frozen=True)
class MaskSample:
    """One image and the annotations of its objects.

    Attributes:
        image: Its file, or a JSON of labelme that holds it.
        annotations: One for each object.
        labels: What each object is called; empty text where nothing is known.
    """

    image: Path
    annotations: tuple[Annotation, ...]
    labels: tuple[str, ...]

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
        read: dict[Path, NDArray[np.int64]] = {}
        for mask, annotation in zip(masks, self.annotations, strict=True):
            if isinstance(annotation, MaskFile) and annotation.value is not None:
                path = annotation.path
                if path not in read:  # one file may hold many objects
                    read[path] = read_mask_file(path, is_one_object=False)
                if read[path].shape == size:
                    mask[...] = read[path] == annotation.value
                    continue
            mask[...] = annotation.mask(size)
        return image, masks


@dataclass(frozen=True)
class MaskSet:
    """Images with masks; samples by number.

    Attributes:
        source: Where it was read from.
        scenes: The samples, each with at least one good mask.
        faults: What was skipped and why, a sentence each.
    """

    source: str
    scenes: tuple[MaskSample, ...]
    faults: tuple[str, ...] = ()

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
    found = read_samples(Path(path), None if images is None else Path(images))
    faults = found.faults
    samples: dict[Hashable, MaskSample] = {}
    for raw in found.samples:
        sample, wrong = _checked(raw, check_pixels)
        faults += wrong
        if sample is not None:
            known = samples.setdefault(identity(raw.image), sample)
            if known is not sample:
                samples[identity(raw.image)] = MaskSample(
                    known.image,
                    known.annotations + sample.annotations,
                    known.labels + sample.labels,
                )
    if faults and (on_fault == "error" or not samples):
        shown = "; ".join(faults[:SHOWN])
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        advice = "; repair them, or skip them with on_fault='skip'"
        if not samples:
            is_lost = images is None and "there is no file" in shown
            advice = "; say with images=... (--images) where the images are" if is_lost else ""
        what = "has faults" if samples else "has no image with a good mask"
        raise ValueError(f"{path} {what}: {shown}{more}{advice}")
    if not samples:
        raise ValueError(f"{path} holds no images with masks")
    return MaskSet(str(path), tuple(samples.values()), tuple(faults))


def _checked(raw: RawSample, check_pixels: bool) -> tuple[MaskSample | None, list[str]]:
    """The good part of a sample, if any, and what is wrong with the rest."""
    try:
        source = image_source(raw.image)
        size = read_size(source)
        if check_pixels:
            decode(source)
    except ImageError as err:
        return None, [str(err)]
    if raw.size is not None and raw.size != size:
        height, width = raw.size
        return None, [
            f"{raw.image}: its masks are for {width} x {height} pixels (width x height), but "
            f"the image is {size[1]} x {size[0]} when upright"
        ]
    faults: list[str] = []
    good: list[tuple[Annotation, str]] = []
    for annotation, label, origin in raw.objects:
        try:
            annotation.check(size)
        except (ImageError, ValueError) as err:
            faults.append(f"{raw.image}, {origin}: {err}")
        else:
            good.append((annotation, label))
    if not good:
        return None, faults or [f"{raw.image} has no masks"]
    annotations, labels = zip(*good, strict=True)
    return MaskSample(raw.image, annotations, labels), faults
