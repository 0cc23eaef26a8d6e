"""What runs a SAM: a ``Sam`` of torch, its file for the native engine, exported files; its decoder.

Imports no torch. ``open_sam`` is the one place that decides between them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from numpy.typing import NDArray

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.checkpoints.open import check_parts
from tinyvit.factory import leave_to_torch, open_stored
from tinyvit.image_spec import ImageSpec
from tinyvit.inference.bundle import ExportedPair, engine_for, is_exported, open_pair
from tinyvit.lazy import need_torch

from .prompts import Size

if TYPE_CHECKING:
    from tinyvit.inference.engine import Engine

    from .decoder import TorchDecoder
    from .graph_decoder import GraphDecoder
    from .model import Sam
    from .native_decoder import NativeDecoder

WIDTHS = 256
"""The native decoder takes multiples of it."""

Progress = Callable[[int, "int | None"], None]


class StoredSam:
    """A SAM as its file has it, for the native engine. Torch is not loaded.

    ``source`` is a name, a file or a folder; ``img_size`` asks for another side of the input than
    the file's. ``thresholds`` are those that the file states, ``heads`` the tensors of prompt
    encoder and mask decoder, and the encoder's ``image_spec`` is never None.

    Raises:
        CheckpointError: The file cannot be read without torch, or holds no whole SAM.
    """

    image_format = "RGB"

    def __init__(
        self,
        source: str | os.PathLike[str],
        img_size: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.source, self.img_size = source, img_size
        encoder = open_stored(source, img_size, progress)
        self.heads = encoder.heads
        parts = {key.partition(".")[0] for key in self.heads}
        check_parts({"trunk", *parts}, encoder.path, encoder.family)
        if encoder.image_spec is None:
            encoder = replace(encoder, image_spec=ImageSpec.sam(encoder.arguments["img_size"]))
        self.image_encoder, self.thresholds = encoder, encoder.thresholds
        self.mask_threshold = self.thresholds.get("mask_threshold", 0.0)
        self.is_hq = "mask_decoder.hf_token.weight" in self.heads
        self.num_multimask_outputs = len(self.heads["mask_decoder.mask_tokens.weight"]) - 1

    @property
    def grids(self) -> tuple[Size, Size]:
        """The encoder's grid for a padded image, and the pixels of the input that it covers."""
        encoder = self.image_encoder
        height, width = cast(ImageSpec, encoder.image_spec).size
        stem = 1 if encoder.arguments["stem"] == "pointwise" else 4
        stride = stem * math.prod(encoder.arguments["strides"])
        grid = -(-height // stride), -(-width // stride)
        return grid, (grid[0] * stride, grid[1] * stride)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """All tensors under the names of ``Sam.state_dict``."""
        encoder = {f"image_encoder.{key}": x for key, x in self.image_encoder.tensors.items()}
        return {**encoder, **self.heads}

    def build(self) -> Sam:
        """The same as a ``Sam`` of torch."""
        return _built(self.source, self.img_size)


class ExportedSam:
    """A whole SAM as exported files, open. Torch is not loaded."""

    image_format = "RGB"
    is_hq = False

    def __init__(self, pair: ExportedPair) -> None:
        self.pair, self.image_encoder = pair, pair.encoder
        self.thresholds: Mapping[str, float] = dict(pair.encoder.facts.thresholds)
        self.mask_threshold = self.thresholds.get("mask_threshold", 0.0)

    @cached_property
    def decoder(self) -> GraphDecoder:
        """What decodes prompts."""
        from .graph_decoder import GraphDecoder

        return GraphDecoder(self.pair)

    @property
    def num_multimask_outputs(self) -> int:
        """Masks of an ambiguous prompt."""
        return self.decoder.num_multimask_outputs


AnySam: TypeAlias = "Sam | StoredSam | ExportedSam"


def open_sam(
    given: AnySam | str | os.PathLike[str] | None,
    wanted_by: str,
    backend: object = "auto",
    device: object = "auto",
    *,
    precision: str = "fp32",
    threads: int | None = None,
    img_size: int | None = None,
    progress: Progress | None = None,
) -> AnySam:
    """A SAM as it is given, or of a name, file or folder; None takes the embedded weights.

    It is a ``StoredSam`` where the native engine is to run it and can: files of torch's own, other
    widths and what cannot be read without torch are built by torch. It is an ``ExportedSam`` for a
    folder of ``tinyvit export``, which is opened with ``precision`` and ``threads``.
    """
    if isinstance(given, WITHOUT_TORCH):
        return given
    if is_exported(given):
        if not isinstance(backend, str):
            raise ValueError(f"{wanted_by} runs exported files by 'onnx' or 'openvino' alone")
        place = "auto" if device is None else str(device)
        return ExportedSam(open_pair(cast(str, given), backend, place, precision, threads))
    if given is not None and not isinstance(given, (str, os.PathLike)):
        from .model import Sam

        if isinstance(given, Sam):
            return given
        raise TypeError(
            f"{wanted_by} wants a Sam, as build_sam makes it, or the name or path of a checkpoint; "
            f"came {type(given).__name__}"
        )
    source = DEFAULT_CHECKPOINT if given is None else given
    place = "cpu" if device is None else str(device)
    if isinstance(backend, str) and engine_for(source, backend, place) == "native":
        with leave_to_torch():
            stored = StoredSam(source, img_size, progress)
            width = stored.heads["mask_decoder.mask_tokens.weight"].shape[1]
            if width % WIDTHS == 0 or find_spec("torch") is None:
                return stored
    return _built(source, img_size, progress)


WITHOUT_TORCH = (StoredSam, ExportedSam)
"""What runs without torch."""


def is_hq(model: AnySam) -> bool:
    """Whether the mask decoder is Light HQ-SAM's, which wants the encoder's early map, too."""
    if isinstance(model, WITHOUT_TORCH):
        return model.is_hq
    from tinyvit.modules.sam.mask_decoder import HQMaskDecoder

    return isinstance(model.mask_decoder, HQMaskDecoder)


def _built(
    source: str | os.PathLike[str], img_size: int | None, progress: Progress | None = None
) -> Sam:
    need_torch("a Sam of torch")
    from .model import build_sam

    return build_sam(source, img_size=img_size, progress=progress)


def choose_decoder(
    model: AnySam, engine: Engine, device: str = "cpu", precision: str = "fp32", fast: bool = True
) -> NativeDecoder | TorchDecoder | GraphDecoder:
    """The decoder that goes with an engine: native where that runs the encoder, else torch's.

    That of exported files is their own.
    """
    if isinstance(model, ExportedSam):
        if precision != "fp32" or not fast:
            raise ValueError(
                "exported files run as they are, in fp32 for the decoder; leave decoder_precision "
                "and fast out"
            )
        return model.decoder
    is_native = isinstance(model, StoredSam) or engine.backend.name == "native"
    if is_native and fast and precision == "fp32":
        from .native_decoder import NativeDecoder

        return NativeDecoder(model, getattr(engine.backend, "threads", None))
    from .decoder import TorchDecoder

    return TorchDecoder(cast("Sam", model), device, precision, fast)
