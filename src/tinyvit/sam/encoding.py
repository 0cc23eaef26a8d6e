"""Pictures in, embeddings out, by a ``Sam``'s image encoder on any backend.

A thin layer over ``tinyvit.Engine``: it prepares pictures as the ``Sam`` says, keeps what a
decoder needs beside the features, and knows which weights made them. Knows no prompts.

Letters: C channels, H W a model's input, h w the embedding's grid, D channels of the early map.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvit.image_spec import ImageSpec
from tinyvit.inference import Backend, Encoded, Engine, Picture
from tinyvit.inference.backend import BackendName
from tinyvit.inference.pictures import Prepared
from tinyvit.inference.watch import ModelWatch
from tinyvit.modules import TinyViT

from .embedding import ImageEmbedding
from .hq_mask_decoder import HQMaskDecoder
from .model import Sam

__all__ = ["PictureEncoder", "spec_of"]


class PictureEncoder:
    """Encodes pictures for the decoder of one ``Sam``.

    May be used by several threads.

    Args:
        model: The model; never changed.
        engine: Runs ``model.image_encoder``; None makes one from the arguments that follow.
        backend: As for ``Engine``.
        precision: As for ``Engine``.
        device: As for ``Engine``.
        batch_size: As for ``Engine``.
        pad: As for ``Engine``.

    Raises:
        ValueError: An engine and arguments for one, or values that ``Engine`` refuses.
        MissingExtraError: The package of the backend is not installed.
    """

    def __init__(
        self,
        model: Sam,
        *,
        engine: Engine | None = None,
        backend: BackendName | Backend = "auto",
        precision: str = "fp32",
        device: str = "auto",
        batch_size: int = 8,
        pad: bool | None = None,
    ) -> None:
        if engine is not None and (backend, precision, pad) != ("auto", "fp32", None):
            raise ValueError(
                "give either an engine or backend, precision and pad for a new one; an engine has "
                "its own"
            )
        self._model = model
        self._encoder = model.image_encoder
        self.engine = engine or Engine(
            model.image_encoder,
            backend=backend,
            device=device,
            precision=precision,
            batch_size=batch_size,
            image_spec=spec_of(model),
            pad=pad,
        )
        self._lock = threading.Lock()
        self._known: _Known | None = None

    @property
    def image_spec(self) -> ImageSpec:
        """How pictures are prepared."""
        return self.engine.image_spec

    def encode(self, images: Picture | Iterable[Picture]) -> Iterator[ImageEmbedding]:
        """Encode pictures one by one, in order, in bounded memory.

        Args:
            images: As for ``Engine.stream``.

        Yields:
            One embedding for each picture.

        Raises:
            ImageError: A picture cannot be read.
            ValueError: The decoder wants an early map, and the backend gives none.
            RuntimeError: The model has another image encoder by now.
        """
        yield from self._embeddings(self.engine.stream(images, stages=self._wants_early))

    def encode_prepared(self, inputs: Iterable[Prepared]) -> Iterator[ImageEmbedding]:
        """As ``encode``, for inputs ([3, H, W] float32, placement) that are ready."""
        yield from self._embeddings(self.engine.stream_prepared(inputs, stages=self._wants_early))

    def weights_sha256(self) -> str | None:
        """Hash of the encoder's weights as they are now; None where the engine has no model.

        Computed once, and again only when the encoder has changed.

        Raises:
            RuntimeError: The model has another image encoder by now.
        """
        return self._facts().weights_sha256

    def check(self, embedding: ImageEmbedding) -> None:
        """Check that the model can decode an embedding.

        Raises:
            ValueError: It was made with other weights or of a picture prepared otherwise; the
                decoder wants an early map that it does not have.
        """
        embedding.check(self.weights_sha256(), self.image_spec)
        if self._wants_early and embedding.interm_features is None:
            raise ValueError(
                "this model has Light HQ-SAM's mask decoder, and the embedding has no "
                "interm_features; encode the picture again with this model"
            )

    @property
    def _wants_early(self) -> bool:
        return isinstance(self._model.mask_decoder, HQMaskDecoder)

    def _embeddings(self, stream: Iterable[Encoded]) -> Iterator[ImageEmbedding]:
        for encoded in stream:
            facts = self._facts()
            early = None
            if encoded.stages is not None:
                early = facts.early_map(encoded.stages[1])
            yield ImageEmbedding(
                encoded.features, encoded.placement, self.image_spec, facts.weights_sha256, early
            )

    def _facts(self) -> _Known:
        if self._model.image_encoder is not self._encoder:
            raise RuntimeError(
                "the model has been given another image encoder; make a new predictor (or "
                "Segmenter) for it"
            )
        with self._lock:
            if self._known is None or self._known.watch.has_changed():
                self._known = _Known(self._encoder, self.engine)
            return self._known


class _Known:
    """What is derived of an encoder's weights as they are."""

    def __init__(self, encoder: TinyViT, engine: Engine) -> None:
        self.watch = ModelWatch(encoder)
        self._encoder = encoder
        self._merge: Any = None
        try:
            self.weights_sha256: str | None = engine.weights_sha256()
        except ValueError:  # an engine with a backend of its own has no weights to name
            self.weights_sha256 = None

    def early_map(self, stage: Tensor) -> Tensor:
        """The second stage's map [C, H, W] after its downsample, [h, w, D]; ``forward_hq``'s."""
        if self._merge is None:
            merge = copy.deepcopy(self._encoder.stages()[1].downsample)
            self._merge = merge.eval().to("cpu", torch.float32)
        with torch.no_grad():
            tokens = self._merge(stage[None])  # [1, h*w, D]
        height, width = self._merge.output_size((stage.shape[1], stage.shape[2]))
        early: Tensor = tokens[0].unflatten(0, (height, width))
        return early


def spec_of(model: Sam) -> ImageSpec:
    """How a ``Sam``'s pictures are prepared: as its encoder says, with the ``Sam``'s own pixels.

    Args:
        model: The model.

    Returns:
        The encoder's ``image_spec``, or segment-anything's rule where it has none; ``mean`` and
        ``std`` are those of the ``Sam`` where they differ.
    """
    encoder = model.image_encoder
    spec = encoder.image_spec or ImageSpec.sam(encoder.img_size)
    mean, std = (v.flatten().tolist() for v in (model.pixel_mean, model.pixel_std))
    if np.allclose([*mean, *std], [*spec.mean, *spec.std], rtol=1e-6):  # they are float32
        return spec
    return replace(spec, mean=tuple(mean), std=tuple(std))
