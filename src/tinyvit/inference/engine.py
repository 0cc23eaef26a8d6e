"""The engine: pictures in, features out. Decodes, prepares, batches, and picks what runs.

It knows pictures and backends; it does not know prompts or folders.

Shapes: N pictures, C channels, H W height and width of a picture, h w of a map.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast, get_args

import numpy as np
import torch
from torch import Tensor

from tinyvit.errors import ImageError
from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_tensor
from tinyvit.modules import TinyViT

from .backend import Backend, BackendName, StageBackend, choose_device, choose_precision
from .torch_backend import TorchBackend

if TYPE_CHECKING:
    from types import TracebackType

    from PIL.Image import Image
    from typing_extensions import Self

__all__ = ["Encoded", "Engine", "Picture"]

Picture: TypeAlias = "str | Path | bytes | BinaryIO | Image | np.ndarray[Any, Any] | Tensor"
"""One picture: a path, encoded bytes, an open file, a PIL image, RGB [H, W, 3], or a tensor
[3, H, W]."""

logger = logging.getLogger("tinyvit")


@dataclass(frozen=True)
class Encoded:
    """What the engine gives for one picture.

    Attributes:
        features: [C, h, w] (or [classes] for a classifier), float32, on the CPU.
        placement: Where the picture lies in the model's frame; maps coordinates both ways.
    """

    features: Tensor
    placement: Placement


class Engine:
    """Runs a TinyViT on pictures of any kind and size.

    Args:
        model: The model, as ``tinyvit.create_model`` gives it; it is never changed. May be None
            where ``backend`` is an object.
        backend: "auto" or "torch"; or any object that is a ``Backend``.
        device: "auto", or a torch device such as "cpu" or "cuda".
        precision: "fp32", "bf16", or "auto" (bf16 where the device computes it natively). Nothing
            changes precision unless asked.
        batch_size: Pictures computed together, at most; only pictures of one shape are.
        image_spec: How pictures are prepared; None takes the model's.

    Raises:
        TypeError: ``model`` is no TinyViT.
        ValueError: An unknown backend, device or precision, a batch size below 1, or no way to
            tell how pictures are prepared.

    Example:
        >>> import numpy as np, tinyvit
        >>> engine = tinyvit.Engine(tinyvit.create_model(checkpoint="tinyvit_starter"))
        >>> engine.embed(np.zeros((480, 640, 3), np.uint8)).shape
        torch.Size([1, 256, 16, 16])
    """

    def __init__(
        self,
        model: TinyViT | None = None,
        *,
        backend: BackendName | Backend = "auto",
        device: str = "auto",
        precision: str = "fp32",
        batch_size: int = 8,
        image_spec: ImageSpec | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.backend, self._choice = _choose_backend(model, backend, device, precision)
        self.image_spec = _choose_spec(model, image_spec)
        self._model = model
        logger.info("%s", self.explain())

    def embed(self, images: Picture | Iterable[Picture]) -> Tensor:
        """The features of one or many pictures, stacked.

        Args:
            images: One picture or many. An array [N, H, W, 3] or a tensor [N, 3, H, W] are many.

        Returns:
            [N, C, h, w] float32 on the CPU, in the order of ``images``.

        Raises:
            ImageError: A picture cannot be read.
            ValueError: The features have different shapes, as they may where pictures are not
                padded: take them one by one with ``stream``.
        """
        features = [encoded.features for encoded in self.stream(images)]
        if not features:
            raise ValueError("embed wants at least one picture, got none")
        shapes = sorted({tuple(f.shape) for f in features})
        if len(shapes) > 1:
            raise ValueError(
                f"the features have {len(shapes)} different shapes, {shapes[0]} to {shapes[-1]}, "
                f"and cannot be stacked; take them one by one with engine.stream(images)"
            )
        return torch.stack(features)

    def stream(self, images: Picture | Iterable[Picture]) -> Iterator[Encoded]:
        """The features of one or many pictures, one by one, in order, in bounded memory.

        Args:
            images: As for ``embed``; may be a generator.

        Yields:
            One ``Encoded`` for each picture.

        Raises:
            ImageError: A picture cannot be read; those before it have been yielded.
        """
        pictures = iter(_each(images))
        broken: ImageError | None = None
        while broken is None:
            prepared: list[tuple[Tensor, Placement]] = []
            for picture in islice(pictures, 2 * self.batch_size):
                try:
                    prepared.append(self.prepare(picture))
                except ImageError as err:
                    broken = err  # after the good ones before it
                    break
            if not prepared:
                break
            outputs = self._run([tensor for tensor, _ in prepared])
            for output, (_, placement) in zip(outputs, prepared, strict=True):
                yield Encoded(output, placement)
        if broken is not None:
            raise broken

    def classify(self, images: Picture | Iterable[Picture]) -> Tensor:
        """Logits of one or many pictures.

        Args:
            images: As for ``embed``.

        Returns:
            [N, classes] float32 on the CPU.

        Raises:
            ImageError: A picture cannot be read.
            ValueError: The backend gives no logits, or there is no picture.
        """
        if not isinstance(self.backend, TorchBackend):
            raise ValueError(f"the backend {self.backend.name!r} gives no logits; use 'torch'")
        rows = [self.backend.logits(self.prepare(picture)[0][None])[0] for picture in _each(images)]
        if not rows:
            raise ValueError("classify wants at least one picture, got none")
        return torch.stack(rows)

    def stages(self, image: Picture) -> tuple[list[Tensor], Placement]:
        """The maps of the stages of one picture.

        Args:
            image: One picture.

        Returns:
            ([C, h, w] float32 for each stage, where the picture lies in the model's frame).

        Raises:
            ImageError: The picture cannot be read.
            ValueError: The backend gives no stages.
        """
        if not isinstance(self.backend, StageBackend):
            raise ValueError(f"the backend {self.backend.name!r} gives no stages; use 'torch'")
        tensor, placement = self.prepare(image)
        return [stage[0] for stage in self.backend.stages(tensor[None])], placement

    def prepare(self, image: Picture) -> tuple[Tensor, Placement]:
        """What the backend gets for one picture: [3, H, W] float32, and where it lies in it."""
        return to_tensor(decode(image), self.image_spec)

    def explain(self) -> str:
        """What the engine chose, and why, in one line."""
        height, width = self.image_spec.size
        return f"{self._choice}; pictures {self.image_spec.resize} to {height}x{width}"

    def weights_sha256(self) -> str:
        """SHA-256 of the model's tensors (names, dtypes, shapes, bytes): tells models apart.

        Raises:
            ValueError: The engine was made without a model.
        """
        if self._model is None:
            raise ValueError("this engine has a backend of its own and no model to hash")
        digest = hashlib.sha256()
        for key, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Give back what the backend holds."""
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine({self.explain()})"

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run prepared pictures, those of one shape together; outputs in the order given."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, tensor in enumerate(tensors):
            groups.setdefault(tuple(tensor.shape), []).append(i)
        outputs: dict[int, Tensor] = {}
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                results = self.backend(torch.stack([tensors[i] for i in batch]))
                outputs.update(zip(batch, results, strict=True))
        return [outputs[i] for i in range(len(tensors))]


def _each(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """One picture as a list of one; stacks and iterables as they are."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images if images.ndim == 4 else [images]
    if isinstance(images, (str, bytes, bytearray, memoryview, Path)) or hasattr(images, "read"):
        return [cast(Picture, images)]
    return images if isinstance(images, Iterable) else [images]


def _choose_backend(
    model: TinyViT | None, backend: BackendName | Backend, device: str, precision: str
) -> tuple[Backend, str]:
    """The backend to use, and what was chosen and why in words."""
    if not isinstance(backend, str):
        if not isinstance(backend, Backend):
            raise TypeError(
                f"backend must be one of {get_args(BackendName)} or an object with name, device, "
                f"close() and __call__(batch), got {type(backend).__name__}"
            )
        if device != "auto" or precision != "fp32":
            raise ValueError(
                f"device={device!r} and precision={precision!r} are the backend's own affair where "
                f"backend is an object; leave them out"
            )
        return backend, f"{backend.name} on {backend.device}: given"
    if backend not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, got {backend!r}")
    if not isinstance(model, TinyViT):
        raise TypeError(
            f"Engine wants a TinyViT, as tinyvit.create_model gives it, got {type(model).__name__}"
        )
    place = choose_device(device)
    chosen, reason = choose_precision(precision, place)
    words = f"torch {torch.__version__} on {place}, {chosen} ({reason})"
    return TorchBackend(model, place, chosen), words


def _choose_spec(model: TinyViT | None, image_spec: ImageSpec | None) -> ImageSpec:
    spec = image_spec or getattr(model, "image_spec", None)
    if spec is None:
        raise ValueError(
            "this model does not say how its pictures are prepared; pass "
            "image_spec=ImageSpec.sam(1024), ImageSpec.timm(224) or another"
        )
    return spec
