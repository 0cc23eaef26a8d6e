"""From a picture with masks to one training sample: framed, with objects chosen and prompted.

Runs in worker processes, so no model is known here. Letters: B batch, K objects of a picture, H W
the model's frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.errors import ImageError
from tinyvit.evaluate.segment import LabelledPicture
from tinyvit.image_spec import ImageSpec
from tinyvit.images.preprocess import normalise_and_pad

from .clicks import first_click, noisy_box
from .scene_augment import FramedScene, SceneAugment, frame_scene
from .task import Batch

__all__ = ["OnBroken", "SceneSample", "SceneSampler", "Scenes", "collate_scenes"]

OnBroken = Literal["skip", "error"]

_TRIES = 20


class Scenes(Protocol):
    """Pictures with masks by number: a ``MaskSet``, or pictures drawn when they are asked for."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int, /) -> LabelledPicture:
        """One of them."""
        ...


@dataclass(frozen=True)
class SceneSample:
    """One picture to learn from.

    Attributes:
        index: Which picture.
        image: [3, H, W] float32, normalised and padded.
        size: (height, width) of the picture in the frame, without padding.
        masks: [K, H, W] bool in the frame.
        points: [K, 2] float32, a first click for each object.
        boxes: [K, 4] float32, a box for each object.
        broken: Reason by name of each broken picture met on the way.
    """

    index: int
    image: Tensor
    size: tuple[int, int]
    masks: NDArray[np.bool_]
    points: NDArray[np.float32]
    boxes: NDArray[np.float32]
    broken: dict[str, str]


@dataclass(frozen=True)
class SceneSampler:
    """Makes training samples of pictures with masks.

    Args:
        data: The pictures.
        spec: How pictures are prepared; fitted by their longest side.
        augment: Changes pictures by chance; None does not.
        objects: Objects of a picture that are prompted; those of a picture with fewer come again,
            with other prompts.
        least_pixels: Objects with fewer pixels in the frame are not learnt from, unless there is
            no larger one.
        on_broken: What a broken picture does: "skip" takes another one and gives the reason.

    Raises:
        ValueError: ``objects`` is below 1, or pictures are prepared otherwise.
    """

    data: Scenes
    spec: ImageSpec
    augment: SceneAugment | None = field(default_factory=SceneAugment)
    objects: int = 4
    least_pixels: int = 64
    on_broken: OnBroken = "skip"

    def __post_init__(self) -> None:
        if self.objects < 1:
            raise ValueError(f"objects must be at least 1, but is {self.objects}")
        if self.spec.resize != "longest_side":
            raise ValueError(
                f"a SAM's pictures are fitted by their longest side, not {self.spec.resize!r}"
            )

    def sample(self, index: int, rng: np.random.Generator) -> SceneSample:
        """One picture and some of its objects; another one that ``rng`` draws where it is broken.

        Args:
            index: 0 to ``len(self) - 1``.
            rng: The only source of chance.

        Raises:
            ImageError: The picture is broken and ``on_broken`` is "error", or many were in a row.
        """
        broken: dict[str, str] = {}
        for _ in range(_TRIES):
            try:
                framed = self._framed(index, rng)
            except (ImageError, ValueError) as err:
                name = self.data[index].name
                if self.on_broken == "error":
                    raise ImageError(f"{name}: {err}") from err
                broken[name] = str(err)
                index = int(rng.integers(len(self.data)))
            else:
                return self._prompted(index, framed, rng, broken)
        name, reason = next(iter(broken.items()))
        raise ImageError(
            f"{_TRIES} pictures drawn in a row were broken, the first is {name!r} ({reason}); most "
            "of the data cannot be read"
        )

    def _framed(self, index: int, rng: np.random.Generator) -> FramedScene:
        """A picture in the frame with at least one object that is large enough."""
        image, masks = self.data[index].load()
        if self.augment is not None:
            framed = self.augment(image, masks, self.spec.size, rng)
            if (framed.masks.sum((1, 2)) >= self.least_pixels).any():
                return framed
        framed = frame_scene(image, masks, self.spec.size)
        if not framed.masks.any():
            height, width = self.spec.size
            raise ValueError(f"all its objects vanish at {width} x {height} pixels")
        return framed

    def _prompted(
        self, index: int, framed: FramedScene, rng: np.random.Generator, broken: dict[str, str]
    ) -> SceneSample:
        areas = framed.masks.sum((1, 2))
        good = np.flatnonzero(areas >= min(self.least_pixels, int(areas.max())))
        order = rng.permutation(good)
        chosen = framed.masks[np.resize(order, self.objects)]  # again from the start if too few
        size = framed.pixels.shape[0], framed.pixels.shape[1]
        frame = np.zeros((self.objects, *self.spec.size), np.bool_)
        frame[:, : size[0], : size[1]] = chosen
        pixels = torch.from_numpy(framed.pixels).permute(2, 0, 1)
        return SceneSample(
            index,
            normalise_and_pad(pixels, replace(self.spec, pad=True))[0],
            size,
            frame,
            np.array([first_click(mask, rng) for mask in chosen], np.float32),
            np.array([noisy_box(mask, rng) for mask in chosen], np.float32),
            broken,
        )


def collate_scenes(samples: list[SceneSample]) -> Batch:
    """The samples' arrays, stacked by name, and ``broken``: reasons by name."""
    batch: dict[str, Any] = {
        "index": torch.tensor([one.index for one in samples]),
        "images": torch.stack([one.image for one in samples]),
        "sizes": torch.tensor([one.size for one in samples]),
        "masks": torch.from_numpy(np.stack([one.masks for one in samples])),
        "points": torch.from_numpy(np.stack([one.points for one in samples])),
        "boxes": torch.from_numpy(np.stack([one.boxes for one in samples])),
        "broken": {name: text for one in samples for name, text in one.broken.items()},
    }
    return batch
