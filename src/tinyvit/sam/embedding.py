"""The embedding of one image: the value, its file, and what makes it of an image for a ``Sam``.

The file is safetensors: ``features`` [C, h, w], for Light HQ-SAM also ``interm_features``, and in
the header, each text JSON, what made them and where the image lies in the model's input. These
are the conventions of ``tinyvit encode``, whose files can be loaded here.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError

from tinyvit.checkpoints.files import check_format, write_bytes
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.images.decode import ImageSource
from tinyvit.images.preprocess import PreparedImage, normalise_and_pad, prepare
from tinyvit.inference.backend import choose_device
from tinyvit.inference.derived import Derived

from .open import WITHOUT_TORCH, AnySam, ExportedSam, StoredSam, is_hq
from .prompts import Size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tinyvit.inference.backend import Backend, BackendName, Encoded
    from tinyvit.inference.engine import Engine, Picture
    from tinyvit.modules import TinyViT

    from .model import Sam

FORMAT = 1
"""Of the file: 0 had no number and no ``precision``."""

_DTYPES = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """What an image encoder made of one image, and all that is needed to decode it.

    Args:
        features: [C, h, w], floating point, an array or a tensor; kept as float32 in numpy.
        placement: Where the image lies in the model's input; maps coordinates both ways.
        image_spec: How the image was prepared.
        weights_sha256: Of the encoder, from ``Engine.weights_sha256``; None where it is not known.
        interm_features: [h, w, D], the encoder's early map for Light HQ-SAM's decoder; None for
            other decoders.
        precision: What the encoder computed in, "fp32" or "bf16"; None where it is not known.

    Raises:
        ValueError: The features or the early map have another shape.
    """

    features: NDArray[np.float32]
    placement: Placement
    image_spec: ImageSpec
    weights_sha256: str | None = None
    interm_features: NDArray[np.float32] | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", _as_map("features", "[C, h, w]", self.features))
        if self.interm_features is None:
            return
        early = _as_map("interm_features", "[h, w, D]", self.interm_features)
        object.__setattr__(self, "interm_features", early)
        if early.shape[:2] != self.features.shape[1:]:
            raise ValueError(
                f"interm_features must have the grid of the features, "
                f"{list(self.features.shape[1:])}; came {list(early.shape)}"
            )

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.placement.original_size

    @property
    def low_res_size(self) -> tuple[int, int]:
        """(height, width) of the low-res logits that a decoder gives, 4 for each grid position."""
        return 4 * self.features.shape[1], 4 * self.features.shape[2]

    def __repr__(self) -> str:
        height, width = self.original_size
        early = "" if self.interm_features is None else ", with an early map"
        return f"ImageEmbedding({list(self.features.shape)}, image {height}x{width}{early})"

    def _repr_png_(self) -> bytes:
        from tinyvit.images.draw import feature_rgb, to_png

        return to_png(feature_rgb(self.features).repeat(16, 0).repeat(16, 1))

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
            dtype: "fp32" keeps every bit; "fp16" takes half the space and keeps about three digits.

        Returns:
            The path.

        Raises:
            ValueError: Another ``dtype``, or values that it cannot hold.
            CheckpointError: The file cannot be written.
        """
        path = Path(path)
        write_bytes(path, self.to_bytes(dtype=dtype))
        return path

    def to_bytes(self, *, dtype: Literal["fp32", "fp16"] = "fp32") -> bytes:
        """What ``save`` writes; arguments and ``ValueError`` as there."""
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; came {dtype!r}")
        with np.errstate(over="ignore"):
            arrays = {"features": self.features.astype(_DTYPES[dtype])}
            if self.interm_features is not None:
                arrays["interm_features"] = self.interm_features.astype(_DTYPES[dtype])
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError(
                f"the features hold values that are not finite in {dtype}; "
                + ("save with dtype='fp32'" if dtype == "fp16" else "encode the image again")
            )
        header = {
            **asdict(self.placement),
            "format": FORMAT,
            "image_spec": self.image_spec.to_dict(),
            "weights_sha256": self.weights_sha256,
            "precision": self.precision,
            "tinyvit_version": version("tinyvit"),
        }
        texts = {key: json.dumps(value) for key, value in header.items()}
        return safetensors.numpy.save(arrays, metadata=texts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImageEmbedding:
        """Read a file that ``save`` or ``tinyvit encode`` has written.

        Args:
            path: The file.

        Returns:
            The embedding, in float32.

        Raises:
            CheckpointError: The file is missing or damaged, is no embedding, or is of a newer
                format.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as err:
            raise CheckpointError(f"{path} cannot be read: {err.strerror}") from err
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "the embedding") -> ImageEmbedding:
        """As ``load``, from what ``to_bytes`` gives; ``name`` is for the words of an error."""
        try:
            arrays = safetensors.numpy.load(data)
            length = int.from_bytes(data[:8], "little")  # of the header, which is JSON
            texts = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        except (SafetensorError, ValueError, KeyError, TypeError) as err:
            raise CheckpointError(
                f"{name} is no safetensors file, or damaged: {err}; encode the image again"
            ) from err
        if "features" not in arrays:
            raise CheckpointError(
                f"{name} holds no tensor 'features'; wanted a file of ImageEmbedding.save or of "
                f"'tinyvit encode', came one with {', '.join(sorted(arrays)[:4])}"
            )
        try:
            header = _header(texts, name)
            placement = Placement(**{key: _size(header[key]) for key in _PLACEMENT})
            spec, early = ImageSpec.from_dict(header["image_spec"]), arrays.get("interm_features")
            more = header["weights_sha256"], early, header["precision"]
            embedding = cls(arrays["features"], placement, spec, *more)
        except (KeyError, TypeError, ValueError) as err:
            raise CheckpointError(
                f"{name} is no embedding of one image, or its header is damaged: {err!s}; "
                "encode the image again"
            ) from err
        if not np.isfinite(embedding.features).all():
            raise CheckpointError(f"{name} holds features that are not finite; encode it again")
        return embedding


_PLACEMENT = tuple(field.name for field in fields(Placement))


def _header(texts: dict[str, str], name: str) -> dict[str, Any]:
    """The facts that an embedding needs; the header of ``tinyvit encode`` has more."""
    number = texts.get("format", "pt")  # "pt" is what format 0 and torch's own files have
    found = None if number == "pt" else json.loads(number)
    check_format(found, FORMAT, texts.get("tinyvit_version", "").strip('"'), name)
    wanted = (*_PLACEMENT, "image_spec", "weights_sha256")
    missing = [key for key in wanted if key not in texts]
    if missing:
        raise KeyError(f"missing {', '.join(missing)}")
    facts = {key: json.loads(texts[key]) for key in wanted}
    precision = json.loads(texts.get("precision", "null"))
    return {**facts, "precision": precision if isinstance(precision, str) else None}


def _size(pair: Sequence[int]) -> Size:
    height, width = pair
    return int(height), int(width)


def _as_map(name: str, wanted: str, values: ArrayLike | Tensor) -> NDArray[np.float32]:
    """A map of one image, checked: float32, its own memory or the caller's, never read-only."""
    if hasattr(values, "detach"):
        tensor = cast("Tensor", values).detach().cpu()
        values = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
    array = np.asarray(values)
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size:
        raise ValueError(
            f"{name} of one image must be {wanted}, floating point; "
            f"came {list(array.shape)} {array.dtype}"
        )
    return np.require(array, np.float32, ["C", "W"])


def prepare_image(
    image: ImageSource, image_format: str, model_format: str, spec: ImageSpec
) -> PreparedImage:
    """Make an image of any kind a model's input; the formats are orders of an array's channels."""
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"image_format must be one of ('RGB', 'BGR'), came {image_format!r}")
    if image_format == "BGR" and not isinstance(image, np.ndarray):
        raise ValueError(
            "image_format='BGR' is for arrays; files and PIL images say their order themselves: "
            "leave it out"
        )
    if isinstance(image, np.ndarray) and image_format != model_format:
        channels = image.shape[2] if image.ndim == 3 else 1
        if channels in (3, 4):  # grey has no order, transparency stays behind
            image = image[:, :, [2, 1, 0, 3][:channels]]
    return prepare(image, spec)


def prepare_resized(pixels: Tensor, original_size: Size, spec: ImageSpec) -> PreparedImage:
    """Make an image that has been resized already, RGB in 0..255 [1, 3, h, w], a model's input."""
    size, longest = tuple(pixels.shape), max(spec.size)
    if len(size) != 4 or size[:2] != (1, 3) or max(size[2:]) != longest:
        raise ValueError(
            f"set_torch_image wants [1, 3, h, w] with the longer side {longest}, as "
            f"transform.apply_image_torch gives it; came {list(size)}"
        )
    prepared = normalise_and_pad(pixels.detach().cpu(), spec)[0].float()
    height, width = (int(side) for side in original_size)
    model_size = int(prepared.shape[1]), int(prepared.shape[2])
    return prepared.numpy(), Placement((height, width), (size[2], size[3]), (0, 0), model_size)


class ImageEncoder:
    """Encodes images for the decoder of one ``Sam``, which is never changed; threads may share it.

    An ``engine`` runs ``model.image_encoder``; None makes one from the arguments that follow, which
    are those of ``Engine``. ``device`` None is where the model is now. ``fast=False`` runs the
    encoder itself, as training wants it, instead of a backend.
    """

    def __init__(
        self,
        model: AnySam,
        engine: Engine | None = None,
        backend: BackendName | Backend = "auto",
        precision: str = "fp32",
        device: str | torch.device | None = "auto",
        pad: bool | None = None,
        workers: int | None = None,
        batch_size: int = 8,
        fast: bool = True,
        threads: int | None = None,
    ) -> None:
        from tinyvit.inference.engine import Engine

        if engine is not None and (backend, precision, pad) != ("auto", "fp32", None):
            raise ValueError(
                "give either an engine or backend, precision and pad for a new one; an engine has "
                "its own"
            )
        if not fast and (engine is not None or (backend, precision) != ("auto", "fp32")):
            raise ValueError(
                "fast=False runs the model as it is; leave engine, backend and precision out"
            )
        if isinstance(model, ExportedSam) and pad is False:
            raise ValueError(
                "an exported decoder takes padded images; leave pad=False (--no-pad) out"
            )
        self._model = model
        self._encoder = model.image_encoder
        self.device = "cpu"
        if not isinstance(model, WITHOUT_TORCH):
            self.device = choose_device(str(model.device if device is None else device))
        self.engine = engine or Engine(
            model.image_encoder,
            backend=backend if fast else _PlainEncoder(cast("Sam", model)),
            device=self.device if fast and isinstance(backend, str) else "auto",
            precision=precision,
            batch_size=batch_size,
            image_spec=spec_of(model),
            pad=pad,
            threads=threads,
            workers=workers,
        )
        self._derived = Derived(self._modules, self._derive)

    @property
    def image_spec(self) -> ImageSpec:
        """How images are prepared."""
        return self.engine.image_spec

    def encode(self, images: Picture | Iterable[Picture]) -> Iterator[ImageEmbedding]:
        """Encode images one by one, in order, in bounded memory; see ``Engine.stream``."""
        yield from self._embeddings(self.engine.stream(images, **self._wanted()))

    def encode_prepared(self, inputs: Iterable[PreparedImage]) -> Iterator[ImageEmbedding]:
        """As ``encode``, for inputs ([3, H, W] float32, placement) that are ready."""
        yield from self._embeddings(self.engine.encode(inputs, **self._wanted()))

    def weights_sha256(self) -> str | None:
        """Hash of the encoder's weights as they are now; None where the engine has no model."""
        return self._derived.get()[0]

    def check(self, embedding: ImageEmbedding) -> None:
        """Check that the model can decode an embedding; ``ValueError`` says why it cannot."""
        embedding.check(self.weights_sha256(), self.image_spec)
        if self.wants_early and embedding.interm_features is None:
            raise ValueError(
                "this model has Light HQ-SAM's mask decoder, and the embedding has no "
                "interm_features; encode the image again with this model"
            )

    def _wanted(self) -> dict[str, bool]:
        """What of a pass is wanted: the early map, or the stages to make it of."""
        early = isinstance(self._model, StoredSam)
        return {"stages": self.wants_early and not early, "early": self.wants_early and early}

    @property
    def wants_early(self) -> bool:
        """Whether the mask decoder, Light HQ-SAM's, wants the encoder's early map, too."""
        return is_hq(self._model)

    def _embeddings(self, stream: Iterable[Encoded]) -> Iterator[ImageEmbedding]:
        precision = self.engine.precision
        for encoded in stream:
            weights_sha256, merge = self._derived.get()
            early = encoded.early
            if encoded.stages is not None and merge is not None:
                early = early_map(encoded.stages[1], merge)
            values = encoded.features, encoded.placement, self.image_spec
            yield ImageEmbedding(*values, weights_sha256, early, precision)

    def _modules(self) -> tuple[nn.Module, ...]:
        if isinstance(self._model, WITHOUT_TORCH):
            return ()
        if self._model.image_encoder is not self._encoder:
            raise RuntimeError(
                "the model has been given another image encoder; make a new predictor (or "
                "Segmenter) for it"
            )
        return (self._model.image_encoder,)

    def _derive(self) -> tuple[str | None, nn.Module | None]:
        """The hash of the weights, and a copy of what makes the early map."""
        try:
            weights_sha256: str | None = self.engine.weights_sha256()
        except ValueError:  # an engine with a backend of its own has no weights to name
            weights_sha256 = None
        if isinstance(self._model, WITHOUT_TORCH):
            return weights_sha256, None
        return weights_sha256, early_merge(self._model.image_encoder)


def early_merge(encoder: TinyViT) -> nn.Module | None:
    """A copy of the second stage's downsample, which ``early_map`` takes; None without one."""
    stages = encoder.stages()
    merge = copy.deepcopy(stages[1].downsample) if len(stages) > 1 else None
    return None if merge is None else merge.eval().float().cpu()


def early_map(stage: ArrayLike, merge: Any) -> NDArray[np.float32]:
    """The second stage's map [C, H, W] after its downsample, [h, w, D]; ``forward_hq``'s."""
    import torch

    x = torch.as_tensor(stage)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        tokens = merge(x[None])  # [1, h*w, D]
    height, width = merge.output_size((x.shape[1], x.shape[2]))
    early: NDArray[np.float32] = tokens[0].unflatten(0, (height, width)).numpy()
    return early


class _PlainEncoder:
    """A ``Sam``'s image encoder itself as an engine's backend: it has the weights of the moment."""

    name = "torch, the model as it is"

    def __init__(self, model: Sam) -> None:
        self._model = model

    @property
    def device(self) -> str:
        return str(self._model.device)

    def __call__(self, batch: Tensor) -> Tensor:
        return self.with_stages(batch)[0]

    def stages(self, batch: Tensor) -> list[Tensor]:
        return self.with_stages(batch)[1]

    def with_stages(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        import torch

        x = batch.to(self._model.device, self._model.pixel_mean.dtype)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            features, maps = self._model.image_encoder.forward_intermediates(x)
        return features.float().cpu(), [stage.float().cpu() for stage in maps]

    def close(self) -> None:
        pass


def spec_of(model: AnySam) -> ImageSpec:
    """How a ``Sam``'s images are prepared: as its encoder says, with the ``Sam``'s own pixels."""
    if isinstance(model, WITHOUT_TORCH):
        return cast(ImageSpec, model.image_encoder.image_spec)
    encoder = model.image_encoder
    spec = encoder.image_spec or ImageSpec.sam(encoder.img_size)
    mean, std = (v.flatten().tolist() for v in (model.pixel_mean, model.pixel_std))
    if np.allclose([*mean, *std], [*spec.mean, *spec.std], rtol=1e-6):  # they are float32
        return spec
    return replace(spec, mean=tuple(mean), std=tuple(std))
