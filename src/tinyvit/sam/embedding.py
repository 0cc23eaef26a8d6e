"""The embedding of one image as a value: made once, kept in a file, decoded anywhere.

The file is safetensors: ``features`` [C, h, w], for Light HQ-SAM also ``interm_features``, and in
the header, each text JSON, what made them and where the image lies in the model's frame. These
are the conventions of ``tinyvit encode``, whose files can be loaded here.

Knows no model and no prompts: it is checked against what a model says of itself. Letters: C
channels, h w the embedding's grid, D channels of the early map.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tinyvit.checkpoints import read_state_dict, write_state_dict
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.images.decode import ImageSource, decode
from tinyvit.images.preprocess import PreparedImage, normalise_and_pad, to_input
from tinyvit.inference import Backend, Encoded, Engine, Picture
from tinyvit.inference.backend import BackendName
from tinyvit.inference.derived import ModelWatch
from tinyvit.modules import TinyViT
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder

from .model import Sam
from .prompts import Size

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """What an image encoder made of one image, and all that is needed to decode it.

    Args:
        features: [C, h, w], floating point; kept as float32 on the CPU.
        placement: Where the image lies in the model's frame; maps coordinates both ways.
        image_spec: How the image was prepared.
        weights_sha256: Of the encoder, from ``Engine.weights_sha256``; None where it is not known.
        interm_features: [h, w, D], the encoder's early map that Light HQ-SAM's decoder looks at;
            None for other decoders.

    Raises:
        ValueError: The features or the early map have another shape.
    """

    features: Tensor
    placement: Placement
    image_spec: ImageSpec
    weights_sha256: str | None = None
    interm_features: Tensor | None = None

    def __post_init__(self) -> None:
        for name, wanted in (("features", "[C, h, w]"), ("interm_features", "[h, w, D]")):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.ndim != 3 or not tensor.is_floating_point() or not tensor.numel():
                raise ValueError(
                    f"{name} of one image must be {wanted}, floating point; "
                    f"came {list(tensor.shape)} {tensor.dtype}"
                )
            object.__setattr__(self, name, tensor.detach().to("cpu", torch.float32))
        grid = self.features.shape[1:]
        if self.interm_features is not None and self.interm_features.shape[:2] != grid:
            raise ValueError(
                f"interm_features must have the grid of the features, {list(grid)}; "
                f"came {list(self.interm_features.shape)}"
            )

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.placement.original_size

    def check(self, weights_sha256: str | None, image_spec: ImageSpec) -> None:
        """Check that a model can decode this: its encoder would have made the same of the image.

        Padding does not matter, since the features' own grid says what they cover.

        Args:
            weights_sha256: Of the model's encoder; None where it is not known, then only
                ``image_spec`` is compared.
            image_spec: How the model's images are prepared.

        Raises:
            ValueError: Other weights, or another preparation; both sides are named.
        """
        own = self.weights_sha256
        if own is not None and weights_sha256 is not None and own != weights_sha256:
            raise ValueError(
                f"this embedding was made by an encoder with weights {own[:12]}…, but the model's "
                f"encoder has weights {weights_sha256[:12]}…; encode the image again, or take "
                "the model that made it"
            )
        if replace(self.image_spec, pad=False) != replace(image_spec, pad=False):
            raise ValueError(
                f"this embedding was made of an image prepared as {self.image_spec}, but the "
                f"model wants {image_spec}; encode the image again"
            )

    def save(
        self, path: str | os.PathLike[str], *, dtype: Literal["fp32", "fp16"] = "fp32"
    ) -> Path:
        """Write a safetensors file, whole or not at all; an existing one is replaced at the end.

        Args:
            path: The file, in a folder that exists.
            dtype: "fp32" keeps every bit; "fp16" takes half the room and keeps about three digits.

        Returns:
            The path.

        Raises:
            ValueError: Another ``dtype``, or values that it cannot hold.
            CheckpointError: The file cannot be written.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; came {dtype!r}")
        tensors = {"features": self.features.to(_DTYPES[dtype])}
        if self.interm_features is not None:
            tensors["interm_features"] = self.interm_features.to(_DTYPES[dtype])
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(
                f"the features hold values that are not finite in {dtype}; "
                + ("save with dtype='fp32'" if dtype == "fp16" else "encode the image again")
            )
        header = {
            **asdict(self.placement),
            "image_spec": self.image_spec.to_dict(),
            "weights_sha256": self.weights_sha256,
            "tinyvit_version": version("tinyvit"),
        }
        texts = {key: json.dumps(value) for key, value in header.items()}
        return write_state_dict(path, tensors, metadata=texts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImageEmbedding:
        """Read a file that ``save`` or ``tinyvit encode`` has written.

        Args:
            path: The file.

        Returns:
            The embedding, in float32.

        Raises:
            CheckpointError: The file is missing or damaged, or is no embedding.
        """
        file = read_state_dict(path)
        if "features" not in file.tensors:
            raise CheckpointError(
                f"{path} holds no tensor 'features'; wanted a file of ImageEmbedding.save or of "
                f"'tinyvit encode', came one with {', '.join(sorted(file.tensors)[:4])}"
            )
        try:
            header = {key: json.loads(text) for key, text in _facts(file.metadata).items()}
            embedding = cls(
                file.tensors["features"],
                _placement(header),
                ImageSpec.from_dict(header["image_spec"]),
                header["weights_sha256"],
                file.tensors.get("interm_features"),
            )
        except (KeyError, TypeError, ValueError) as err:
            raise CheckpointError(
                f"{path} is no embedding of one image, or its header is damaged: {err!s}; "
                "encode the image again"
            ) from err
        if not embedding.features.isfinite().all():
            raise CheckpointError(f"{path} holds features that are not finite; encode it again")
        return embedding


_PLACEMENT = tuple(field.name for field in fields(Placement))


def _facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """The texts that an embedding needs; the header of ``tinyvit encode`` has more."""
    wanted = (*_PLACEMENT, "image_spec", "weights_sha256")
    missing = [key for key in wanted if key not in metadata]
    if missing:
        raise KeyError(f"missing {', '.join(missing)}")
    return {key: metadata[key] for key in wanted}


def _placement(header: Mapping[str, Any]) -> Placement:
    sizes = {}
    for key in _PLACEMENT:
        height, width = header[key]
        sizes[key] = int(height), int(width)
    return Placement(**sizes)


_FORMATS = ("RGB", "BGR")


def prepare_image(
    image: ImageSource, image_format: str, model_format: str, spec: ImageSpec
) -> PreparedImage:
    """Make an image of any kind an input.

    Args:
        image: What ``tinyvit.images.decode`` reads.
        image_format: Order of an array's channels, "RGB" or "BGR".
        model_format: The order that the model was trained with.
        spec: How images are prepared.

    Returns:
        ([3, H', W'] float32, where the image lies in it).

    Raises:
        ImageError: The image cannot be read, or the array is no image.
        TypeError: It is nothing that could be an image.
        ValueError: Another format, or "BGR" for something that says its order itself.
    """
    if image_format not in _FORMATS:
        raise ValueError(f"image_format must be one of {_FORMATS}, came {image_format!r}")
    if image_format == "BGR" and not isinstance(image, np.ndarray):
        raise ValueError(
            "image_format='BGR' is for arrays; files and PIL images say their order themselves: "
            "leave it out"
        )
    if isinstance(image, np.ndarray) and image_format != model_format:
        channels = image.shape[2] if image.ndim == 3 else 1
        if channels in (3, 4):  # grey has no order, transparency stays behind
            image = image[:, :, [2, 1, 0, 3][:channels]]
    return to_input(decode(image), spec)


def prepare_resized(pixels: Tensor, original_size: Size, spec: ImageSpec) -> PreparedImage:
    """Make an image that has been resized already an input.

    Args:
        pixels: RGB in 0..255, [1, 3, h, w], the longer side that of ``spec``.
        original_size: (H, W) of the image before resizing.
        spec: How images are prepared.

    Returns:
        ([3, H', W'] float32 on the CPU, where the image lies in it).

    Raises:
        ValueError: Another shape.
    """
    size, longest = tuple(pixels.shape), max(spec.size)
    if len(size) != 4 or size[:2] != (1, 3) or max(size[2:]) != longest:
        raise ValueError(
            f"set_torch_image wants [1, 3, h, w] with the longer side {longest}, as "
            f"transform.apply_image_torch gives it; came {list(size)}"
        )
    prepared = normalise_and_pad(pixels.detach().cpu(), spec)[0].float()
    height, width = (int(side) for side in original_size)
    frame = int(prepared.shape[1]), int(prepared.shape[2])
    return prepared.numpy(), Placement((height, width), (size[2], size[3]), (0, 0), frame)


pass


class ImageEncoder:
    """Encodes images for the decoder of one ``Sam``.

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
        """How images are prepared."""
        return self.engine.image_spec

    def encode(self, images: Picture | Iterable[Picture]) -> Iterator[ImageEmbedding]:
        """Encode images one by one, in order, in bounded memory.

        Args:
            images: As for ``Engine.stream``.

        Yields:
            One embedding for each image.

        Raises:
            ImageError: An image cannot be read.
            ValueError: The decoder wants an early map, and the backend gives none.
            RuntimeError: The model has another image encoder by now.
        """
        yield from self._embeddings(self.engine.stream(images, stages=self._wants_early))

    def encode_prepared(self, inputs: Iterable[PreparedImage]) -> Iterator[ImageEmbedding]:
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
            ValueError: It was made with other weights or of an image prepared otherwise; the
                decoder wants an early map that it does not have.
        """
        embedding.check(self.weights_sha256(), self.image_spec)
        if self._wants_early and embedding.interm_features is None:
            raise ValueError(
                "this model has Light HQ-SAM's mask decoder, and the embedding has no "
                "interm_features; encode the image again with this model"
            )

    @property
    def _wants_early(self) -> bool:
        return isinstance(self._model.mask_decoder, HQMaskDecoder)

    def _embeddings(self, stream: Iterable[Encoded]) -> Iterator[ImageEmbedding]:
        for encoded in stream:
            facts = self._facts()
            early = None
            if encoded.stages is not None:
                early = facts.early_map(torch.from_numpy(encoded.stages[1]))
            features = torch.from_numpy(encoded.features)
            yield ImageEmbedding(
                features, encoded.placement, self.image_spec, facts.weights_sha256, early
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
    """How a ``Sam``'s images are prepared: as its encoder says, with the ``Sam``'s own pixels.

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
