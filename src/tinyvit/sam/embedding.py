"""The embedding of one picture as a value: made once, kept in a file, decoded anywhere.

The file is safetensors: ``features`` [C, h, w], for Light HQ-SAM also ``interm_features``, and in
the header, each text JSON, what made them and where the picture lies in the model's frame. These
are the conventions of ``tinyvit encode``, whose files can be loaded here.

Knows no model and no prompts: it is checked against what a model says of itself. Letters: C
channels, h w the embedding's grid, D channels of the early map.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tinyvit.checkpoints import read_state_dict, write_state_dict
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec, Placement

__all__ = ["ImageEmbedding"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """What an image encoder made of one picture, and all that is needed to decode it.

    Args:
        features: [C, h, w], floating point; kept as float32 on the CPU.
        placement: Where the picture lies in the model's frame; maps coordinates both ways.
        image_spec: How the picture was prepared.
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
                    f"{name} of one picture must be {wanted}, floating point; "
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
        """(height, width) of the picture in pixels."""
        return self.placement.original_size

    def check(self, weights_sha256: str | None, image_spec: ImageSpec) -> None:
        """Check that a model can decode this: its encoder would have made the same of the picture.

        Padding does not matter, since the features' own grid says what they cover.

        Args:
            weights_sha256: Of the model's encoder; None where it is not known, then only
                ``image_spec`` is compared.
            image_spec: How the model's pictures are prepared.

        Raises:
            ValueError: Other weights, or another preparation; both sides are named.
        """
        own = self.weights_sha256
        if own is not None and weights_sha256 is not None and own != weights_sha256:
            raise ValueError(
                f"this embedding was made by an encoder with weights {own[:12]}…, but the model's "
                f"encoder has weights {weights_sha256[:12]}…; encode the picture again, or take "
                "the model that made it"
            )
        if replace(self.image_spec, pad=False) != replace(image_spec, pad=False):
            raise ValueError(
                f"this embedding was made of a picture prepared as {self.image_spec}, but the "
                f"model wants {image_spec}; encode the picture again"
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
                + ("save with dtype='fp32'" if dtype == "fp16" else "encode the picture again")
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
                f"{path} is no embedding of one picture, or its header is damaged: {err!s}; "
                "encode the picture again"
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
