"""What all rows of an embedding store have in common: encoder, preparation, and what is kept.

The recipe lies in the schema's metadata as JSON. It is compared before anything is read: a store
never holds rows of two encoders. Backend, device and versions belong to a commit, not to it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import safetensors.numpy

from tinyvit.catalog import find_variant
from tinyvit.checkpoints.files import check_format, header_for
from tinyvit.errors import CheckpointError
from tinyvit.factory import CONFIG, FOLDER_FORMAT, WEIGHTS, StoredModel, arguments_of
from tinyvit.image_spec import ImageSpec
from tinyvit.inference.bundle import FORMAT as EXPORT_FORMAT
from tinyvit.inference.bundle import INDEX, ExportedEncoder

if TYPE_CHECKING:
    from tinyvit.inference import Engine

Dtype = Literal["fp16", "int8", "fp32"]
Keep = Literal["all", "pooled"]

FORMAT = 1
"""Of a store."""

KEY = b"tinyvit.embedding_store"
"""Of the recipe in the schema's metadata."""

_REPORTED = ("tinyvit_version",)  # facts that may differ


@dataclass(frozen=True)
class Recipe:
    """How every row of a store was made.

    Attributes:
        variant: Name of the encoder's sizes in the catalog, or None.
        weights_sha256: Of the encoder, from ``Engine.weights_sha256``.
        strides: Of the encoder's merges.
        image_spec: How images are prepared.
        precision: What the encoder computes in, "fp32" or "bf16".
        keep: "all": features and pooled vectors; "pooled": vectors alone.
        early: Whether Light HQ-SAM's early map is kept, too.
        dtype: How features are stored: "fp16", "fp32", or "int8" with a scale for each channel.
        pooled_dim: Numbers in a pooled vector.
        tinyvit_version: What made the store.
    """

    variant: str | None
    weights_sha256: str
    strides: tuple[int, ...]
    image_spec: ImageSpec
    precision: str
    keep: Keep
    early: bool
    dtype: Dtype
    pooled_dim: int
    tinyvit_version: str

    @classmethod
    def of(
        cls, engine: Engine, dtype: Dtype = "fp16", keep: Keep | None = None, early: bool = False
    ) -> Recipe:
        """The recipe of what an engine gives.

        Raises:
            CheckpointError: An exported encoder that does not give what its weights give.
            ValueError: An unknown dtype or kind, an engine without a model, features of a
                classifier, or an early map of a backend or model that gives none.
        """
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}; came {dtype!r}")
        sizes = _sizes_of(engine)
        is_classifier = sizes.is_classifier
        keep = keep or ("pooled" if is_classifier else "all")
        if keep not in get_args(Keep):
            raise ValueError(f"keep must be one of {', '.join(get_args(Keep))}; came {keep!r}")
        if is_classifier and keep == "all":
            raise ValueError(
                "a classifier gives one vector for each image and no map to keep; use keep='pooled'"
            )
        if early and (keep == "pooled" or not sizes.is_torch):
            raise ValueError(
                "the early map of Light HQ-SAM is kept beside the features, and torch makes it; "
                "use keep='all' and backend='torch'"
            )
        return cls(
            sizes.variant,
            engine.weights_sha256(),
            sizes.strides,
            engine.image_spec,
            engine.precision,
            keep,
            early,
            dtype,
            sizes.pooled_dim,
            version("tinyvit"),
        )

    def differences(self, other: Recipe) -> list[str]:
        """Each fact that differs, with this recipe's value and the other's."""
        found = []
        for field in fields(self):
            own, its = getattr(self, field.name), getattr(other, field.name)
            if own != its and field.name not in _REPORTED:
                found.append(f"{field.name} is {_short(own)} in the store and {_short(its)} here")
        return found

    def check(self, other: Recipe, store: str) -> None:
        """Check that rows of another recipe may go into the store of this one.

        Raises:
            CheckpointError: They may not; each differing fact is named with both values.
        """
        differing = self.differences(other)
        if differing:
            raise CheckpointError(
                f"{store} was made in another way: {'; '.join(differing)}. Give what the store "
                "was made with (without a checkpoint, its own encoder is taken), or write to "
                "another store"
            )

    def to_metadata(self) -> dict[bytes, bytes]:
        """For the schema."""
        values = {**asdict(self), "image_spec": self.image_spec.to_dict(), "format": FORMAT}
        return {KEY: json.dumps(values).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, store: str) -> Recipe:
        """Read what ``to_metadata`` gave.

        Raises:
            CheckpointError: This is a dataset of something else, damaged, or of a newer format.
        """
        text = (metadata or {}).get(KEY)
        if text is None:
            raise CheckpointError(
                f"{store} is a Lance dataset and no embedding store: its schema has no "
                f"{KEY.decode()!r}; name a store that 'tinyvit embed' has made"
            )
        try:
            values: dict[str, Any] = json.loads(text)
            writer = values.get("tinyvit_version")
        except (ValueError, AttributeError) as err:
            raise CheckpointError(f"{store}: its recipe is damaged: {err}") from err
        check_format(values.pop("format", None), FORMAT, writer, store)
        try:
            values["image_spec"] = ImageSpec.from_dict(values["image_spec"])
            values["strides"] = tuple(values["strides"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as err:
            raise CheckpointError(f"{store}: its recipe is damaged: {err}") from err

    def describe(self) -> list[tuple[str, str]]:
        """Names and values for people."""
        height, width = self.image_spec.size
        kept = {"all": "features and pooled vectors", "pooled": "pooled vectors"}[self.keep]
        return [
            ("encoder", f"{self.variant or 'of its own sizes'}, weights {self.weights_sha256}"),
            ("images", f"{self.image_spec.resize} to {height}x{width}"),
            ("precision", self.precision),
            ("kept", f"{kept}, {self.dtype}{', with early maps' if self.early else ''}"),
        ]


class _Sizes(NamedTuple):
    """What a recipe says of an encoder's sizes."""

    variant: str | None
    strides: tuple[int, ...]
    pooled_dim: int
    is_classifier: bool = False
    is_torch: bool = False


def _sizes_of(engine: Engine) -> _Sizes:
    backend: object = engine.backend
    if isinstance(backend, ExportedEncoder):
        check_exact(backend)
        facts = backend.facts
        if not facts.weights_sha256 or facts.strides is None or backend.channels is None:
            raise CheckpointError(
                f"{backend.path} does not say which weights it has, or with which strides and "
                "channels; export again"
            )
        return _Sizes(facts.variant, facts.strides, backend.channels)
    model: Any = engine.model
    if model is None:
        raise ValueError(
            "this engine has a backend of its own and no model; an embedding store keeps the "
            "model, so make the engine of a checkpoint or an exported folder"
        )
    arguments = arguments_of(model)
    return _Sizes(
        find_variant(arguments),
        tuple(arguments["strides"]),
        arguments["neck_dim"] or arguments["embed_dims"][-1],
        arguments["neck_dim"] is None and arguments["head"],
        not isinstance(model, StoredModel),
    )


def check_exact(backend: object) -> None:
    """Check that an exported encoder gives what its weights give; another backend does.

    Raises:
        CheckpointError: It is no encoder, holds rounded weights, or adapts them to another size:
            its embeddings are others than those of the weights that it names.
    """
    if not isinstance(backend, ExportedEncoder):
        return
    facts, side = backend.facts, max(backend.image_spec.size)
    if backend.part != "encoder":
        raise CheckpointError(
            f"{backend.path} is of part {backend.part!r}, and embeddings of a store come from an "
            "encoder; export again with --part encoder, or embed with the checkpoint"
        )
    if facts.storage != "fp32":
        raise CheckpointError(
            f"{backend.path} holds its weights in {facts.storage}, so that its embeddings are not "
            "those of the weights; export again with --storage fp32"
        )
    if facts.network_side not in (None, side):
        raise CheckpointError(
            f"{backend.path} adapts weights for {facts.network_side} to inputs of {side}, so that "
            f"its embeddings are not those of the weights; export again with "
            f"--input-size {side}"
        )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text


def write_encoder(engine: Engine, folder: Path) -> None:
    """Write an engine's model in the form of ``save_pretrained``; torch is needed for torch's."""
    model = engine.model
    if not isinstance(model, StoredModel):
        from tinyvit.hub import save_pretrained

        if model is not None:
            save_pretrained(model, folder)
        return
    config = {
        "format": FOLDER_FORMAT,
        "library_name": "tinyvit",
        "tinyvit_version": version("tinyvit"),
        "architectures": ["TinyViT"],
        "arguments": dict(model.arguments),
        "image_spec": engine.image_spec.to_dict(),
        "thresholds": dict(model.thresholds),
        "classes": [*model.classes],
    }
    folder.mkdir(parents=True, exist_ok=True)
    strides, thresholds = model.arguments["strides"], dict(model.thresholds)
    header = header_for("tinyvit", strides, thresholds=thresholds)
    tensors = {name: np.asarray(array, order="C") for name, array in model.tensors.items()}
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(tensors, metadata=header))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


ENCODER = "_encoder"
"""The folder in a store that holds its encoder."""


def encoder_files(engine: Engine) -> dict[str, bytes]:
    """The files of an engine's model by name, as they lie in ``_encoder/``."""
    exported: object = engine.backend
    if isinstance(exported, ExportedEncoder):  # a folder of 'tinyvit export' with no decoder
        paths = [exported.path, exported.path.with_suffix(".bin")]
        files = {path.name: path.read_bytes() for path in paths if path.is_file()}
        index = {"format": EXPORT_FORMAT, "encoder": exported.path.name}
        return {**files, INDEX: json.dumps(index).encode()}
    with tempfile.TemporaryDirectory() as folder:
        write_encoder(engine, Path(folder))
        return {name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)}
