"""Prepared images -> results, those of one shape computed together, in the order given.

Knows tensors and a function that runs a batch; it knows no engine, no files and no threads.

Shapes: N images, H W height and width of one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeAlias, TypeVar, cast, get_args

import numpy as np
import torch
from torch import Tensor

from tinyvit.checkpoints.files import weights_sha256
from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_tensor
from tinyvit.modules import TinyViT

from .backend import (
    Backend,
    BackendName,
    LogitsBackend,
    StageBackend,
    choose_device,
    choose_precision,
)
from .read_ahead import choose_workers, read_ahead
from .torch_backend import TorchBackend

if TYPE_CHECKING:
    from types import TracebackType

    from PIL.Image import Image
    from typing_extensions import Self

Label = TypeVar("Label")
Result = TypeVar("Result")


@dataclass
class _Slot(Generic[Label, Result]):
    """One image's place in the order: its input until it is computed, then its result."""

    tensor: Tensor | None
    label: Label
    results: list[Result]


def run_in_batches(
    inputs: Iterable[tuple[Tensor, Label]],
    run: Callable[[Tensor], Sequence[Result]],
    most: Callable[[Tensor], int],
    window: int,
) -> Iterator[tuple[Result, Label]]:
    """Run inputs, grouped by shape within a window.

    A batch is run as soon as it is full, or when its oldest image holds up a full window. So
    images of one shape wait for no more than their own batch.

    Args:
        inputs: (image [3, H, W], what goes with it); may be a generator.
        run: [N, 3, H, W] -> N results.
        most: Most images of a shape in one batch, from one of them [3, H, W].
        window: Most images held: read and not yet yielded.

    Yields:
        (result, what goes with it) for each input, in order.

    Raises:
        Exception: What ``inputs`` raises, after the results before it; what ``run`` raises.
    """
    order: deque[_Slot[Label, Result]] = deque()
    groups: dict[tuple[int, ...], list[_Slot[Label, Result]]] = {}
    source = iter(inputs)
    error: Exception | None = None
    try:
        while True:
            try:
                tensor, label = next(source)
            except StopIteration:
                break
            except Exception as err:  # after the good ones before it
                error = err
                break
            slot = _Slot[Label, Result](tensor, label, [])
            order.append(slot)
            shape = tuple(tensor.shape)
            group = groups.setdefault(shape, [])
            group.append(slot)
            if len(group) >= most(tensor):
                _run_group(groups.pop(shape), run)
            if len(order) >= window and not order[0].results:
                _run_group(_group_of(order[0], groups), run)
            del tensor, label, slot, group
            while order and order[0].results:
                yield _taken(order)
        while order:
            if not order[0].results:
                _run_group(_group_of(order[0], groups), run)
            yield _taken(order)
        if error is not None:
            raise error
    finally:
        del error  # it refers to this frame, and this frame to it


def _group_of(
    slot: _Slot[Label, Result], groups: dict[tuple[int, ...], list[_Slot[Label, Result]]]
) -> list[_Slot[Label, Result]]:
    """Take out the group that holds an image which has not been computed."""
    return [] if slot.tensor is None else groups.pop(tuple(slot.tensor.shape))


def _run_group(
    group: list[_Slot[Label, Result]], run: Callable[[Tensor], Sequence[Result]]
) -> None:
    tensors = [slot.tensor for slot in group if slot.tensor is not None]
    batch = tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
    del tensors
    for slot in group:
        slot.tensor = None  # the batch is a copy, and memory is bounded
    for slot, result in zip(group, run(batch), strict=True):
        slot.results.append(result)


def _taken(order: deque[_Slot[Label, Result]]) -> tuple[Result, Label]:
    slot = order.popleft()
    return slot.results[0], slot.label


Picture: TypeAlias = "str | Path | bytes | BinaryIO | Image | np.ndarray[Any, Any] | Tensor"
"""One image: a path, encoded bytes, an open file, a PIL image, RGB [H, W, 3], or a tensor
[3, H, W]."""

Prepared: TypeAlias = "tuple[Tensor, Placement]"
"""A model's input [3, H, W] float32, and where the image lies in it."""


def each(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """One image as a list of one; stacks [N, H, W, 3], [N, 3, H, W] and iterables as they are."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images if images.ndim == 4 else [images]
    if isinstance(images, (str, bytes, bytearray, memoryview, Path)) or hasattr(images, "read"):
        return [cast(Picture, images)]
    return images if isinstance(images, Iterable) else [images]


def prepare(image: Picture, spec: ImageSpec) -> Prepared:
    """Decode an image and make it a model's input.

    Raises:
        ImageError: The image cannot be read.
        TypeError: It is no image.
    """
    return to_tensor(decode(image), spec)


def preparations(images: Iterable[Picture], spec: ImageSpec) -> Iterator[Callable[[], Prepared]]:
    """What is left to do for each image, which may be done later and in another thread.

    Files and bytes of files are left as they are. What may change meanwhile (an open file that is
    read on, a buffer that is filled again, the frames of a PIL pixels) is decoded when it is taken.

    Raises:
        ImageError: An image that is decoded here cannot be read.
        TypeError: It is no image.
    """
    for image in images:
        if isinstance(image, (str, bytes, os.PathLike)):
            yield partial(prepare, image, spec)
            continue
        pixels = decode(image)
        if isinstance(image, (np.ndarray, Tensor)):
            pixels = pixels.copy()  # it may share the memory of one that is used again
        yield partial(to_tensor, pixels, spec)


pass
pass


WINDOW = 4
"""Batches' worth of images among which those of one shape are found."""

CPU_PIXELS = 8 * 256 * 256
"""Most pixels of a batch on a CPU: more at once is not faster there, and takes more memory."""

logger = logging.getLogger("tinyvit")


@dataclass(frozen=True)
class Encoded:
    """What the engine gives for one image.

    Attributes:
        features: [C, h, w] (or [classes] for a classifier), float32, on the CPU.
        placement: Where the image lies in the model's frame; maps coordinates both ways.
        stages: The map of each stage, [C, h, w] float32 on the CPU, where asked for; else None.
    """

    features: Tensor
    placement: Placement
    stages: tuple[Tensor, ...] | None = None


class Engine:
    """Runs a TinyViT on images of any kind and size.

    Args:
        model: The model, as ``tinyvit.create_model`` gives it; it is never changed. May be None
            where ``backend`` is an object.
        backend: "auto", which is "torch"; "openvino" or "onnx" (ONNX Runtime), each with the extra
            of that name; or any object that is a ``Backend``.
        device: "auto", or a torch device such as "cpu" or "cuda".
        precision: "fp32", "bf16", or "auto" (bf16 where the device computes it natively). Nothing
            changes precision unless asked.
        batch_size: Images computed together, at most; only images of one shape are, and on a
            CPU no more large ones than pay.
        image_spec: How images are prepared; None takes the model's.
        pad: False leaves out the padding to a square, so that an image of another shape costs
            less; None does as ``image_spec`` says.
        threads: Threads that a backend "openvino" or "onnx" computes with; None leaves it to the
            library. In torch it is one number for the process: ``torch.set_num_threads``.
        workers: Threads that read images ahead while the backend computes; None chooses by the
            number of cores, 0 does everything in the caller's thread.

    Raises:
        TypeError: ``model`` is no TinyViT.
        MissingExtraError: The package of the backend is not installed.
        ValueError: An unknown backend, device or precision ("fp16" is refused, with the reason), a
            batch size below 1, workers below 0, or no way to tell how images are prepared.

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
        pad: bool | None = None,
        threads: int | None = None,
        workers: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        self.batch_size = batch_size
        self.workers = choose_workers() if workers is None else workers
        self.backend, self._choice = _choose_backend(model, backend, device, precision, threads)
        self.image_spec = _choose_spec(model, image_spec, pad)
        self._model = model
        logger.info("%s", self._in_one_line())

    def embed(self, images: Picture | Iterable[Picture]) -> Tensor:
        """The features of one or many images, stacked.

        Args:
            images: One image or many. An array [N, H, W, 3] or a tensor [N, 3, H, W] are many.

        Returns:
            [N, C, h, w] float32 on the CPU, in the order of ``images``.

        Raises:
            ImageError: An image cannot be read.
            ValueError: The features have different shapes, as they may where images are not
                padded: take them one by one with ``stream``.
        """
        features = [encoded.features for encoded in self.stream(images)]
        if not features:
            raise ValueError("embed wants at least one image, got none")
        shapes = sorted({tuple(f.shape) for f in features})
        if len(shapes) > 1:
            raise ValueError(
                f"the features have {len(shapes)} different shapes, {shapes[0]} to {shapes[-1]}, "
                f"and cannot be stacked; take them one by one with engine.stream(images)"
            )
        return torch.stack(features)

    def stream(
        self, images: Picture | Iterable[Picture], *, stages: bool = False
    ) -> Iterator[Encoded]:
        """The features of one or many images, one by one, in order, in bounded memory.

        Files (and bytes of files) are read ahead in threads. Images that could change meanwhile
        (open files, PIL images, arrays, tensors) are decoded when they are taken from ``images``.

        Args:
            images: As for ``embed``; may be a generator, which is used in the caller's thread only.
            stages: Give the maps of the stages too, from the same pass.

        Yields:
            One ``Encoded`` for each image.

        Raises:
            ImageError: An image cannot be read; those before it have been yielded.
            ValueError: ``stages`` are wanted and the backend gives none.
        """
        with closing(self._prepared(images)) as prepared:
            yield from self.stream_prepared(prepared, stages=stages)

    def stream_prepared(
        self, inputs: Iterable[Prepared], *, stages: bool = False
    ) -> Iterator[Encoded]:
        """As ``stream``, for images that ``prepare`` has made ready; those of a shape together.

        Args:
            inputs: ([3, H, W] float32, placement) of each image; may be a generator.
            stages: Give the maps of the stages too, from the same pass.

        Yields:
            One ``Encoded`` for each input, in order.

        Raises:
            ValueError: ``stages`` are wanted and the backend gives none.
        """
        run = self._run_with_stages if stages else self._run
        if stages:
            self._stage_backend()
        window = self.batch_size * (1 if stages else WINDOW)  # maps of stages are large
        for (features, maps), placement in run_in_batches(inputs, run, self._most, window):
            yield Encoded(features, placement, maps)

    def classify(self, images: Picture | Iterable[Picture]) -> Tensor:
        """Logits of one or many images.

        Args:
            images: As for ``embed``.

        Returns:
            [N, classes] float32 on the CPU.

        Raises:
            ImageError: An image cannot be read.
            ValueError: The backend gives no logits, or there is no image.
        """
        backend = self.backend
        if not isinstance(backend, LogitsBackend):
            raise ValueError(f"the backend {backend.name!r} gives no logits; use 'torch'")
        with closing(self._prepared(images)) as prepared:
            results = run_in_batches(
                prepared, lambda batch: list(backend.logits(batch)), self._most, self.batch_size
            )
            rows = [logits for logits, _ in results]
        if not rows:
            raise ValueError("classify wants at least one image, got none")
        return torch.stack(rows)

    def stages(self, image: Picture) -> tuple[list[Tensor], Placement]:
        """The maps of the stages of one image.

        Args:
            image: One image.

        Returns:
            ([C, h, w] float32 for each stage, where the image lies in the model's frame).

        Raises:
            ImageError: The image cannot be read.
            ValueError: The backend gives no stages.
        """
        backend = self._stage_backend()
        tensor, placement = self.prepare(image)
        return [stage[0] for stage in backend.stages(tensor[None])], placement

    def prepare(self, image: Picture) -> tuple[Tensor, Placement]:
        """What the backend gets for one image: [3, H, W] float32, and where it lies in it."""
        return prepare(image, self.image_spec)

    def explain(self) -> str:
        """What the engine chose, and why; with torch also what it made of the model."""
        if not isinstance(self.backend, TorchBackend):
            return self._in_one_line()
        return f"{self._in_one_line()}; runs {self.backend.explain()}"

    def weights_sha256(self) -> str:
        """SHA-256 of the model's tensors (names, dtypes, shapes, bytes): tells models apart.

        Raises:
            ValueError: The engine was made without a model.
        """
        if self._model is None:
            raise ValueError("this engine has a backend of its own and no model to hash")
        return weights_sha256(self._model.state_dict())

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
        return f"Engine({self._in_one_line()})"

    def _in_one_line(self) -> str:
        height, width = self.image_spec.size
        bare = self.image_spec.resize == "longest_side" and not self.image_spec.pad
        words = f"images {self.image_spec.resize} to {height}x{width}"
        return f"{self._choice}; {words}{', not padded' if bare else ''}"

    def _prepared(self, images: Picture | Iterable[Picture]) -> Generator[Prepared, None, None]:
        """What ``prepare`` gives for each image, in order, files read ahead in threads."""
        sources = each(images)
        is_one = isinstance(sources, Sized) and len(sources) < 2
        jobs = preparations(sources, self.image_spec)
        return read_ahead(jobs, workers=0 if is_one else self.workers, ahead=self.ahead)

    @property
    def ahead(self) -> int:
        """Images read ahead, at most: the next batch is ready when one is done."""
        return max(self.batch_size, self.workers) + 1

    def _most(self, tensor: Tensor) -> int:
        """Images of that shape [3, H, W] to compute together."""
        if self.backend.device != "cpu":
            return self.batch_size
        return min(self.batch_size, max(CPU_PIXELS // (tensor.shape[1] * tensor.shape[2]), 1))

    def _run(self, batch: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...] | None]]:
        return [(features, None) for features in self.backend(batch)]

    def _run_with_stages(self, batch: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...] | None]]:
        features, maps = self._stage_backend().with_stages(batch)
        return list(zip(features, zip(*maps, strict=True), strict=True))

    def _stage_backend(self) -> StageBackend:
        if not isinstance(self.backend, StageBackend):
            raise ValueError(f"the backend {self.backend.name!r} gives no stages; use 'torch'")
        return self.backend


def _choose_backend(
    model: TinyViT | None,
    backend: BackendName | Backend,
    device: str,
    precision: str,
    threads: int | None,
) -> tuple[Backend, str]:
    """The backend to use, and what was chosen and why in words."""
    if not isinstance(backend, str):
        if not isinstance(backend, Backend):
            raise TypeError(
                f"backend must be one of {get_args(BackendName)} or an object with name, device, "
                f"close() and __call__(batch), got {type(backend).__name__}"
            )
        if device != "auto" or precision != "fp32" or threads is not None:
            raise ValueError(
                f"device={device!r}, precision={precision!r} and threads={threads} are the "
                f"backend's own affair where backend is an object; leave them out"
            )
        return backend, f"{backend.name} on {backend.device}: given"
    if backend not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, got {backend!r}")
    if not isinstance(model, TinyViT):
        raise TypeError(
            f"Engine wants a TinyViT, as tinyvit.create_model gives it, got {type(model).__name__}"
        )
    if backend == "openvino":
        from .graph_backend import OpenVINOBackend

        openvino = OpenVINOBackend(model, device, precision, threads)
        return openvino, openvino.explain()
    if backend == "onnx":
        from .graph_backend import OnnxBackend

        onnx = OnnxBackend(model, device, precision, threads)
        return onnx, onnx.explain()
    if threads is not None:
        raise ValueError(
            f"threads={threads} cannot be set for backend 'torch' alone: torch has one number for "
            f"the whole process; call torch.set_num_threads({threads})"
        )
    place = choose_device(device)
    chosen, reason = choose_precision(precision, place)
    words = f"torch {torch.__version__} on {place}, {chosen} ({reason})"
    if backend == "auto" and place == "cpu":
        words += "; auto is torch: measured level with openvino"
    return TorchBackend(model, place, chosen), words


def _choose_spec(
    model: TinyViT | None, image_spec: ImageSpec | None, pad: bool | None
) -> ImageSpec:
    spec = image_spec or getattr(model, "image_spec", None)
    if spec is None:
        raise ValueError(
            "this model does not say how its images are prepared; pass "
            "image_spec=ImageSpec.sam(1024), ImageSpec.timm(224) or another"
        )
    return spec if pad is None else dataclasses.replace(spec, pad=pad)
