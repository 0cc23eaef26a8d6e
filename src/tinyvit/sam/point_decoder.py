"""Single points on one picture in, the masks whose predicted IoU is high enough out.

Segment Anything's own decoder runs in its frozen form, which never computes a mask that nobody
wants; Light HQ-SAM's and others run whole, and what is not wanted is dropped. Knows tensors in the
model's frame only.

Letters: N points, K masks of a point, M masks wanted, C channels, h4 w4 the low-res logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyvit.inference.watch import ModelWatch

from .decoding import PromptDecoder
from .deployed_decoder import Decoded, DeployedMaskDecoder, SharedImage
from .embedding import ImageEmbedding
from .mask_decoder import MaskDecoder
from .model import Sam
from .prompt_tensors import PromptTensors

__all__ = ["PointDecoder", "PointsOn"]


class PointDecoder:
    """Decodes points with the weights that a model has now.

    Args:
        model: The model; never changed.
        device: A torch device to compute on.
    """

    def __init__(self, model: Sam, device: str = "cpu") -> None:
        self._model = model
        self._device = device
        self._whole = PromptDecoder(model, device)
        self._made: _Made | None = None

    @property
    def pitch(self) -> float:
        """Pixels of the model's frame for one low-res logit."""
        return self._whole.pitch

    def on(self, embedding: ImageEmbedding) -> PointsOn:
        """Look at a picture once, for all points on it."""
        if type(self._model.mask_decoder) is not MaskDecoder:
            return PointsOn(embedding, self._whole, None)
        deployed = self._deployed()
        return PointsOn(embedding, self._whole, (deployed, deployed.look(embedding.features)))

    def _deployed(self) -> DeployedMaskDecoder:
        prompts, masks = self._model.prompt_encoder, self._model.mask_decoder
        made = self._made
        if made is None or not made.is_of(prompts, masks):
            deployed = DeployedMaskDecoder(prompts, masks, self._device)
            watches = ModelWatch(prompts), ModelWatch(masks)
            self._made = made = _Made(prompts, masks, watches, deployed)
        return made.deployed


class PointsOn:
    """Points on one picture; ``PointDecoder.on`` makes it.

    Args:
        embedding: The picture.
        whole: Decodes any decoder's prompts.
        fast: The frozen form and its look at the picture, if there is one.
    """

    def __init__(
        self,
        embedding: ImageEmbedding,
        whole: PromptDecoder,
        fast: tuple[DeployedMaskDecoder, list[SharedImage]] | None,
    ) -> None:
        self._embedding = embedding
        self._whole = whole
        self._fast = fast

    def decode(self, coords: Tensor, least_iou: float | None) -> Decoded:
        """The masks of single foreground points.

        Args:
            coords: [N, 2] float32, (x, y) in pixels of the model's frame.
            least_iou: Masks are wanted whose predicted IoU is above it; None wants all.

        Returns:
            The M masks wanted, in the order of (point, token), on the CPU.
        """
        points = coords[:, None], torch.ones(len(coords), 1, dtype=torch.int64)
        bound = -math.inf if least_iou is None else least_iou
        if self._fast is not None:
            deployed, shared = self._fast
            found = deployed.decode(shared, points, wanted=lambda iou: iou > bound)
            return _on_cpu(found)
        logits, iou = self._whole.decode(
            self._embedding.features,
            PromptTensors(points),
            interm_features=self._embedding.interm_features,
        )
        where = (iou > bound).nonzero()  # [M, 2]
        chosen = where[:, 0], where[:, 1]
        return _on_cpu(Decoded(logits[chosen], iou[chosen], *chosen))


@dataclass(frozen=True)
class _Made:
    """A frozen form, and what it was made of."""

    prompt_encoder: torch.nn.Module
    mask_decoder: torch.nn.Module
    watches: tuple[ModelWatch, ModelWatch]
    deployed: DeployedMaskDecoder

    def is_of(self, prompt_encoder: torch.nn.Module, mask_decoder: torch.nn.Module) -> bool:
        """Whether it is still the form of these modules."""
        same = self.prompt_encoder is prompt_encoder and self.mask_decoder is mask_decoder
        return same and not any(watch.has_changed() for watch in self.watches)


def _on_cpu(found: Decoded) -> Decoded:
    parts = found.low_res_logits, found.iou_predictions, found.prompts, found.tokens
    return Decoded(*(part.cpu() for part in parts))
