"""``Masks``: what prompts mean in one image, and its forms for other tools.

It keeps low-res logits and enlarges a mask when it is asked for: a full-size mask of every prompt
would take a gigabyte for a few hundred prompts on a photograph, its low-res logits take 256 kB.
Coordinates are continuous: a box around one pixel is 1 wide.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import MissingExtraError
from tinyvit.image_spec import Placement
from tinyvit.images import draw
from tinyvit.images.decode import ImageSource, decode
from tinyvit.images.mask_ops import box_around, encode, is_outer, outlines

from .prompts import Prompt
from .upscale import upscale

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Masks:
    """What prompts on one image mean, in the order of the prompts.

    Iterating gives the best mask of each prompt, [H, W] bool; so do ``masks[0]`` and, stacked to
    [N, H, W], ``np.asarray(masks)``. In a notebook the masks are drawn.

    Attributes:
        prompts: The N prompts.
        low_res_logits: Of each prompt, [K, h4, w4] float32; K may differ between them.
        predicted_ious: Of each prompt, [K] float32: the network's own estimate.
        placement: Where the image lies in the model's input.
        logit_stride: Input pixels per low-res logit; also readable as ``pitch``, its older name.
        threshold: Logits above it are mask.
    """

    prompts: tuple[Prompt, ...]
    low_res_logits: tuple[Floats, ...]
    predicted_ious: tuple[Floats, ...]
    placement: Placement
    logit_stride: float
    threshold: float = 0.0

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[NDArray[np.bool_]]:
        return (self.mask(prompt) for prompt in range(len(self)))

    def __getitem__(self, prompt: int) -> NDArray[np.bool_]:
        return self.mask(prompt)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        best = [*self]
        array = np.stack(best) if best else np.zeros((0, *self.placement.original_size), np.bool_)
        return array if dtype is None else array.astype(dtype)

    @property
    def pitch(self) -> float:
        """Older name of ``logit_stride``."""
        return self.logit_stride

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, K, H, W), K the most of any prompt."""
        most = max((len(ious) for ious in self.predicted_ious), default=0)
        return (len(self), most, *self.placement.original_size)

    @property
    def scores(self) -> NDArray[np.float32]:
        """The predicted IoU of every mask, [N, K] float32; nan where a prompt has fewer masks."""
        scores = np.full(self.shape[:2], np.nan, np.float32)
        for row, ious in zip(scores, self.predicted_ious, strict=True):
            row[: len(ious)] = ious
        return scores

    @cached_property
    def boxes(self) -> NDArray[np.float64]:
        """The box around the best mask of each prompt, [N, 4] xyxy in pixels; 0 for an empty one.

        Enlarges every mask once; kept.
        """
        return np.array([box_around(mask) for mask in self], np.float64).reshape(len(self), 4)

    def best(self) -> NDArray[np.int64]:
        """Which mask of each prompt has the highest score, [N] int64; the first of equals."""
        return np.array([int(np.argmax(ious)) for ious in self.predicted_ious], np.int64)

    def logits(self, prompt: int, token: int | None = None) -> Floats:
        """Logits of one mask in the original image.

        Args:
            prompt: Which prompt, from 0.
            token: Which of its masks, from 0; None takes the best.

        Returns:
            [H, W] float32.

        Raises:
            IndexError: There is no such prompt or mask.
        """
        return cast(Floats, self._enlarged(prompt, token, None))

    def mask(self, prompt: int, token: int | None = None) -> NDArray[np.bool_]:
        """One mask in the original image, [H, W] bool; arguments and errors as for ``logits``."""
        return cast("NDArray[np.bool_]", self._enlarged(prompt, token, self.threshold))

    def to_numpy(self) -> NDArray[np.bool_]:
        """All masks at once, [N, K, H, W] bool; empty where a prompt has fewer masks than K."""
        masks = np.zeros(self.shape, np.bool_)
        for prompt, ious in enumerate(self.predicted_ious):
            for token in range(len(ious)):
                masks[prompt, token] = self.mask(prompt, token)
        return masks

    def to_coco(self, image_id: int, category_id: int = 1) -> list[dict[str, object]]:
        """The best mask of each prompt as COCO's annotations and results have it.

        Args:
            image_id: Of the image.
            category_id: Of what is segmented; Segment Anything names no categories.

        Returns:
            For each prompt, ready for JSON: ``segmentation`` (compressed run lengths), ``bbox``
            (x, y, width, height), ``area`` in pixels, ``score`` and ``predicted_iou`` (the same
            number), ``iscrowd`` 0, ``prompt`` as ``Prompt.describe`` gives it, and the two ids.
            Annotations of a data set want an ``id`` each, which only the caller can number.
        """
        found: list[dict[str, object]] = []
        for prompt, ious, mask in zip(self.prompts, self.predicted_ious, self, strict=True):
            x0, y0, x1, y1 = map(float, box_around(mask))
            score = float(np.max(ious))
            found.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "segmentation": encode(mask),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "score": score,
                    "predicted_iou": score,
                    "prompt": prompt.describe(),
                }
            )
        return found

    def overlay(self, image: ImageSource) -> NDArray[np.uint8]:
        """The best mask of each prompt over the image, with the boxes and points prompted.

        Args:
            image: Anything that ``tinyvit.images.decode`` reads, of the size of the masks.

        Returns:
            [H, W, 3] uint8.

        Raises:
            ImageError: The image cannot be read.
            ValueError: It has another size.
        """
        return draw_prompts(draw.draw_masks(decode(image), [*self]), self.prompts)

    def polygons(self, tolerance: float = 0.0) -> list[list[NDArray[np.float64]]]:
        """The outlines of the best mask of each prompt.

        Args:
            tolerance: Pixels that an outline may lie beside the edge of the mask; 0 follows the
                edges of pixels, and filled by the even-odd rule gives the mask back exactly.

        Returns:
            For each prompt its outlines, each [P, 2] float64 as (x, y), the last corner not
            repeated; outer ones run clockwise as seen, holes the other way round.

        Raises:
            ValueError: The tolerance is negative or not finite.
        """
        return [outlines(mask, tolerance) for mask in self]

    def to_labelme(
        self, image_path: str, label: str = "object", tolerance: float = 1.0
    ) -> dict[str, object]:
        """The best mask of each prompt as labelme's file has it, ready for JSON.

        Args:
            image_path: Of the image, as the file should name it.
            label: Of a mask whose prompt has no ``name``.
            tolerance: As for ``polygons``; of masks in one part without holes, which become
                polygons. Others are exact: labelme's shape "mask". Empty ones are left out.

        Returns:
            ``version``, ``flags``, ``shapes``, ``imagePath``, ``imageData`` (None),
            ``imageHeight`` and ``imageWidth``.

        Raises:
            ValueError: The tolerance is negative or not finite.
        """
        shapes = []
        for prompt, mask in zip(self.prompts, self, strict=True):
            rings = outlines(mask, tolerance)
            if not mask.any():
                continue
            shape: dict[str, Any] = {"label": prompt.name or label, "group_id": None, "flags": {}}
            if len(rings) == 1:
                shape |= {"points": rings[0].tolist(), "shape_type": "polygon"}
            else:
                x0, y0, x1, y1 = box_around(mask)
                part = mask[y0:y1, x0:x1].astype(np.uint8) * np.uint8(255)
                corners = [[x0, y0], [x1 - 1, y1 - 1]]  # the last pixel belongs to it
                data = b64encode(draw.to_png(part)).decode("ascii")
                shape |= {"points": corners, "shape_type": "mask", "mask": data}
            shapes.append(shape)
        height, width = self.placement.original_size
        return {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": image_path,
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }

    def to_yolo(self, class_id: int = 0, tolerance: float = 1.0) -> list[str]:
        """The best mask of each prompt as lines of a file of labels for YOLO's segmentation.

        Args:
            class_id: Of what is segmented.
            tolerance: As for ``polygons``.

        Returns:
            A line "class x y x y ..." in shares of width and height for each part of a mask; YOLO
            has no holes, and they are left out.

        Raises:
            ValueError: The tolerance is negative or not finite.
        """
        sides = np.array(self.placement.original_size[::-1])
        rings = [ring for some in self.polygons(tolerance) for ring in some if is_outer(ring)]
        numbers = [" ".join(f"{x:.6g}" for x in (ring / sides).ravel()) for ring in rings]
        return [f"{class_id} {line}" for line in numbers]

    def to_supervision(self) -> Any:
        """The best mask of each prompt as ``supervision.Detections``.

        Returns:
            With ``xyxy`` [N, 4], ``mask`` [N, H, W] bool and ``confidence`` [N], the predicted IoU.

        Raises:
            MissingExtraError: supervision is not installed.
        """
        try:
            from supervision import Detections
        except ImportError as err:
            raise MissingExtraError(
                "to_supervision wants the package supervision; pip install supervision"
            ) from err
        confidence = np.array([ious.max() for ious in self.predicted_ious], np.float32)
        return Detections(xyxy=self.boxes, mask=np.asarray(self), confidence=confidence)

    def _repr_png_(self) -> bytes:
        grey = np.full((*self.placement.original_size, 3), 64, np.uint8)
        return draw.to_png(self.overlay(grey))

    def __repr__(self) -> str:
        count, most, height, width = self.shape
        return f"Masks({count} prompts, up to {most} masks each, image {height}x{width})"

    def _enlarged(self, prompt: int, token: int | None, threshold: float | None) -> NDArray[Any]:
        if not -len(self) <= prompt < len(self):
            raise IndexError(f"there are {len(self)} prompts; there is no prompt {prompt}")
        ious = self.predicted_ious[prompt]
        chosen = int(np.argmax(ious)) if token is None else token
        if not -len(ious) <= chosen < len(ious):
            raise IndexError(f"prompt {prompt} has {len(ious)} masks; there is no mask {token}")
        low_res = self.low_res_logits[prompt][chosen]
        return upscale(low_res, self.placement, self.logit_stride, threshold)


def draw_prompts(image: NDArray[np.uint8], prompts: Sequence[Prompt]) -> NDArray[np.uint8]:
    """The boxes of prompts in the colours of their masks, then the points, over an image."""
    for number, prompt in enumerate(prompts):
        if prompt.box is not None:
            image = draw.draw_boxes(image, prompt.box[None], [draw.colour(number)])
    for prompt in prompts:
        if prompt.points is not None and prompt.labels is not None:
            image = draw.draw_points(image, prompt.points, prompt.labels)
    return image
