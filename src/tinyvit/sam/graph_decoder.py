"""A SAM's decoder as an exported graph: prompts on an embedding -> low-res logits, scores, masks.

Imports no torch. Numpy at the surface, see ``inference.backend``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import CheckpointError
from tinyvit.image_spec import Placement
from tinyvit.images.mask_ops import Found
from tinyvit.inference.bundle import ExportedPair
from tinyvit.inference.engine import check_finite

from .embedding import ImageEmbedding
from .prompts import PromptBatch
from .upscale import find_regions, upscale

Floats: TypeAlias = NDArray[np.float32]

_INPUTS = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input")
_LOGITS, _SCORES = "low_res_masks", "iou_predictions"
_ALL = 4
"""Masks of a decoder that gives all: that of a clear prompt, and three of an ambiguous one."""


class GraphDecoder:
    """Decodes prompts by an exported graph; threads may share it.

    One after the other, but for a graph that takes many in a call.

    A graph that gives the best mask alone chooses it itself: of a box without points the best of
    three, where a model gives its single one.
    """

    device = "cpu"

    def __init__(self, pair: ExportedPair) -> None:
        self._graph, self._name = pair.decoder, pair.encoder.name
        self._words = pair.encoder.explain()
        inputs, outputs = self._graph.inputs, self._graph.outputs
        lacking = [name for name in _INPUTS if name not in inputs]
        lacking += [name for name in (_SCORES, _LOGITS) if name not in outputs]
        if lacking:
            raise CheckpointError(
                f"{pair.path.name} is no decoder as segment-anything's exporter writes it: it "
                f"lacks {', '.join(lacking)}"
            )
        self._wanted = inputs["image_embeddings"]
        is_ours = "tinyvit.format" in self._graph.metadata  # others name axes that are not free
        self._takes_many = is_ours and inputs["point_labels"][0] is None
        self._num_points = inputs["point_labels"][1]
        side = cast(int, inputs["mask_input"][3])
        self._no_mask = np.zeros((1, 1, side, side), np.float32)
        self.logit_stride = pair.encoder.image_spec.size[0] / side
        self._count = outputs[_SCORES][-1] or self._count_masks()

    @property
    def num_multimask_outputs(self) -> int:
        """Masks of an ambiguous prompt."""
        return max(self._count - 1, 1)

    def explain(self) -> str:
        """What runs, and why, in words."""
        return self._words

    def prepare(self, embedding: ImageEmbedding) -> Floats:
        """The embedding as the graph takes it, [1, C, g, g]; ValueError: it does not fit."""
        features = embedding.features[None]
        wanted = zip(self._wanted, features.shape, strict=True)
        if any(a not in (None, b) for a, b in wanted):
            raise ValueError(
                f"the exported decoder takes embeddings {list(self._wanted[1:])}, came "
                f"{list(features.shape[1:])}; encode images with the encoder of the same folder, "
                "padded to a square"
            )
        check_finite(features, self._name)
        return np.ascontiguousarray(features)

    def decode(
        self,
        prepared: Floats,
        prompts: PromptBatch,
        multimask_output: bool = True,
        *,
        min_iou: float | None = None,
        hq_token_only: bool = False,
    ) -> tuple[Floats, Floats]:
        """As ``TorchDecoder.decode``; a graph with the best mask alone gives that in any case."""
        if hq_token_only:
            raise ValueError("hq_token_only=True wants a model with Light HQ-SAM's mask decoder")
        size = self._no_mask.shape[2:]
        prompts.check_masks(size)
        which = slice(None)
        if self._count == _ALL:
            which = slice(1, None) if multimask_output else slice(0, 1)
        kept = range(self._count)[which]
        logits = np.empty((len(prompts), len(kept), *size), np.float32)
        scores = np.empty((len(prompts), len(kept)), np.float32)
        step = max(len(prompts), 1) if self._takes_many and prompts.masks is None else 1
        for start in range(0, len(prompts), step):
            rows = slice(start, start + step)
            found = self._graph.run(self._inputs(prepared, prompts.part(start, start + step)))
            logits[rows], scores[rows] = found[_LOGITS][:, which], found[_SCORES][:, which]
        check_finite(scores, self._name)
        check_finite(logits, self._name)
        return (logits if min_iou is None else logits[scores > min_iou]), scores

    def find(
        self,
        prepared: Floats,
        prompts: PromptBatch,
        placement: Placement,
        *,
        min_iou: float,
        **more: Any,
    ) -> tuple[Iterator[Found], Floats]:
        """As ``TorchDecoder.find``."""
        logits, scores = self.decode(prepared, prompts, min_iou=min_iou)
        return find_regions(logits, scores, min_iou, placement, self.logit_stride, **more), scores

    def masks(
        self, low_res_logits: Floats, placement: Placement, threshold: float | None
    ) -> NDArray[Any]:
        """Low-res logits [..., h4, w4] -> masks [..., H, W] bool; float32 logits for None."""
        return upscale(low_res_logits, placement, self.logit_stride, threshold)

    def _inputs(self, features: Floats, prompts: PromptBatch) -> dict[str, Floats]:
        """The inputs for some prompts: points, padding where there is no box, and corners."""
        count, padding = len(prompts), 0
        coords: NDArray[Any] = np.zeros((count, 0, 2), np.float32)
        labels: NDArray[Any] = np.zeros((count, 0), np.float32)
        if prompts.points is not None:
            coords, labels = prompts.points
        if prompts.boxes is not None:
            coords = np.concatenate([coords, prompts.boxes.reshape(-1, 2, 2)], 1)
            labels = np.concatenate([labels, np.tile([2, 3], (count, 1))], 1)
        elif prompts.points is not None:
            padding = 1
        if self._num_points is not None:
            padding = self._num_points - labels.shape[1]
        if padding < 0:
            raise ValueError(
                f"this decoder was exported for {self._num_points} points in a prompt, a box "
                f"counted as two; came {labels.shape[1]}"
            )
        coords = np.pad(coords, ((0, 0), (0, padding), (0, 0)))
        labels = np.pad(labels, ((0, 0), (0, padding)), constant_values=-1)
        mask = self._no_mask if prompts.masks is None else prompts.masks
        given = {
            "image_embeddings": features,
            "point_coords": coords.astype(np.float32),
            "point_labels": labels.astype(np.float32),
            "mask_input": mask.astype(np.float32),
            "has_mask_input": np.array([prompts.masks is not None], np.float32),
            "orig_im_size": np.ones(2, np.float32),  # masks are enlarged here, where they are used
        }
        return {name: given[name] for name in self._graph.inputs}

    def _count_masks(self) -> int:
        """Masks of a prompt, of a graph that does not say."""
        features = np.zeros([side or 1 for side in self._wanted], np.float32)
        corner = PromptBatch((np.zeros((1, 1, 2), np.float32), np.ones((1, 1), np.int64)))
        found = self._graph.run(self._inputs(features, corner))
        return int(found[_SCORES].shape[-1])
