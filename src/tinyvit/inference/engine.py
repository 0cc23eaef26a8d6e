"""``Engine``: images of any kind in, features out, those of one shape computed together."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.checkpoints.files import weights_sha256
from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.images.preprocess import PreparedImage, prepare
from tinyvit.lazy import need_torch

from .backend import (
    Backend,
    BackendName,
    EarlyBackend,
    Encoded,
    LogitsBackend,
    StageBackend,
    choose_backend,
)
from .bundle import ExportedEncoder, engine_for, is_exported, open_network
from .read_ahead import Picture as Picture
from .read_ahead import choose_workers, each, preparations, read_ahead

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import Self

    from tinyvit.factory import StoredModel
    from tinyvit.modules import TinyViT

Array: TypeAlias = NDArray[np.float32]

Label = TypeVar("Label")
Result = TypeVar("Result")

WINDOW = 4
"""Batches' worth of images among which those of one shape are found."""

CPU_PIXELS = 8 * 256 * 256
"""Most pixels of a batch on a CPU: more at once is not faster there, and takes more memory; but a
backend may want as many images as it has threads."""

_NORM_EPS = 1e-5  # LayerNorm's own

logger = logging.getLogger("tinyvit")


class Engine:
    """Runs a TinyViT on images of any kind and size.

    Args:
        model: The model, as ``tinyvit.create_model`` gives it; it is never changed. Also the name
            of a checkpoint, the path of a file of weights, a folder of ``save_pretrained`` or one
            of ``tinyvit export``, which needs no torch. None takes the embedded weights, or nothing
            where ``backend`` is an object.
        backend: "auto": "native" on a CPU where tinyvit-native is installed, else "torch"; for an
            exported folder "onnx", else "openvino". "native", "openvino" or "onnx" (ONNX Runtime),
            each with the extra of that name; or any object that is a ``Backend``.
        device: "auto", or a torch device such as "cpu" or "cuda".
        precision: "fp32", "bf16", or "auto" (bf16 where the device computes it natively); also
            torch.float32 or torch.bfloat16. Nothing changes it unless asked, no autocast either.
        batch_size: Images computed together, at most; only images of one shape are, and on a
            CPU no more large ones than pay.
        image_spec: How images are prepared; None takes the model's.
        pad: False leaves out the padding to a square, so that an image of another shape costs
            less; None does as ``image_spec`` says.
        threads: Threads that a backend "native", "openvino" or "onnx" computes with; None leaves it
            to the library. In torch it is one number for the process: ``torch.set_num_threads``.
        workers: Threads that read images ahead while the backend computes; None chooses by the
            number of cores, 0 does everything in the caller's thread.

    Raises:
        TypeError: ``model`` is neither a TinyViT nor a name or path.
        CheckpointError: The file or folder cannot be read.
        DownloadError: The checkpoint cannot be fetched.
        MissingExtraError: The package of the backend is not installed.
        ValueError: An unknown backend, device or precision ("fp16" is refused, with the reason), a
            batch size below 1, workers below 0, or no way to tell how images are prepared.

    Examples:
        >>> import numpy as np, tinyvit
        >>> engine = tinyvit.Engine("tinyvit_sam_2m")
        >>> engine.embed(np.zeros((480, 640, 3), np.uint8)).shape
        torch.Size([1, 256, 16, 16])
    """

    def __init__(
        self,
        model: TinyViT | StoredModel | ExportedEncoder | str | os.PathLike[str] | None = None,
        *,
        backend: BackendName | Backend = "auto",
        device: str = "auto",
        precision: str | torch.dtype = "fp32",
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
        self._model: TinyViT | StoredModel | ExportedEncoder | None
        if is_exported(model) and isinstance(backend, str):
            folder = cast("str", model)
            self._model = open_network(folder, backend, device, str(precision), threads)
        elif isinstance(model, (str, os.PathLike)) or (model is None and isinstance(backend, str)):
            source = DEFAULT_CHECKPOINT if model is None else model
            is_native = isinstance(backend, str) and engine_for(source, backend, device) == "native"
            self._model = _open_model(source, is_native)
        else:
            self._model = model
        if isinstance(self._model, ExportedEncoder):
            self.backend, self._choice = cast("Backend", self._model), self._model.explain()
        else:
            chosen = choose_backend(self._model, backend, device, precision, threads)
            self.backend, self._choice = chosen
        self.image_spec = _choose_spec(self._model, image_spec, pad)
        logger.info("%s", self._in_one_line())

    def embed(self, images: Picture | Iterable[Picture]) -> Tensor:
        """The features of one or many images, stacked.

        Args:
            images: One image or many. An array [N, H, W, 3] or a tensor [N, 3, H, W] are many.

        Returns:
            [N, C, h, w] float32 on the CPU, in the order of ``images``.

        Raises:
            ImageError: An image cannot be read.
            MissingExtraError: torch is not installed; ``stream`` gives arrays.
            ValueError: The features have different shapes, as they may where images are not
                padded: take them one by one with ``stream``.
        """
        need_torch("Engine.embed")
        import torch

        features = [encoded.features for encoded in self.stream(images)]
        if not features:
            raise ValueError("embed wants at least one image, got none")
        shapes = sorted({f.shape for f in features})
        if len(shapes) > 1:
            raise ValueError(
                f"the features have {len(shapes)} different shapes, {shapes[0]} to {shapes[-1]}, "
                f"and cannot be stacked; take them one by one with engine.stream(images)"
            )
        return torch.from_numpy(np.stack(features))

    def stream(
        self,
        images: Picture | Iterable[Picture],
        *,
        stages: bool = False,
        pooled: bool = False,
        early: bool = False,
    ) -> Iterator[Encoded]:
        """The features of one or many images, one by one, in order, in bounded memory.

        Files (and bytes of files) are read ahead in threads. Images that could change meanwhile
        (open files, PIL images, arrays, tensors) are decoded when they are taken from ``images``.

        Args:
            images: As for ``embed``; may be a generator, which is used in the caller's thread only.
            stages: Give the maps of the stages too, from the same pass.
            pooled: Give one vector for each image too, to compare images by.
            early: Instead of them, give the early map of an ``EarlyBackend``.

        Yields:
            One ``Encoded`` for each image.

        Raises:
            ImageError: An image cannot be read; those before it have been yielded.
            ValueError: ``stages``, or a classifier's vectors, are wanted and the backend gives no
                stages; or what it gives is not finite.
        """
        with closing(self._prepared(images)) as prepared:
            wanted = {"stages": stages, "pooled": pooled, "early": early}
            for encoded in self.encode(prepared, **wanted):
                check_finite(encoded.features, self.backend.name)
                yield encoded

    def encode(
        self,
        inputs: Iterable[PreparedImage],
        *,
        stages: bool = False,
        pooled: bool = False,
        early: bool = False,
    ) -> Iterator[Encoded]:
        """As ``stream``, for images that ``prepare`` has made ready; those of a shape together.

        Args:
            inputs: ([3, H, W] float32, placement) of each image; may be a generator.
            stages: Give the maps of the stages too, from the same pass.
            pooled: Give one vector for each image too, as ``stream`` does.
            early: Instead of them, give the early map of an ``EarlyBackend``.

        Yields:
            One ``Encoded`` for each input, in order.

        Raises:
            ValueError: ``stages``, or a classifier's vectors, are wanted and the backend gives no
                stages.
        """
        norm = self._norm_head() if pooled else None
        with_stages = stages or norm is not None
        backend = self._stage_backend() if with_stages else self.backend

        def run(batch: Array) -> list[tuple[Array, tuple[Array, ...] | None, Array | None]]:
            given = self._given(batch)
            if early and isinstance(backend, EarlyBackend):
                features, first = backend.with_early(given)
                pairs = zip(_array(features), _array(first), strict=True)
                return [(one, None, map_) for one, map_ in pairs]
            if not isinstance(backend, StageBackend) or not with_stages:
                return [(one, None, None) for one in _array(backend(given))]
            output, maps = backend.with_stages(given)
            each_map = zip(*map(_array, maps), strict=True)
            return [(one, some, None) for one, some in zip(_array(output), each_map, strict=True)]

        window = self.batch_size * (1 if with_stages else WINDOW)  # maps of stages are large
        for found, placement in run_in_batches(inputs, run, self._most, window):
            features, maps, first = found
            vector = _pool(features, maps, placement, norm) if pooled else None
            yield Encoded(features, placement, maps if stages else None, vector, first)

    stream_prepared = encode

    def classify(self, images: Picture | Iterable[Picture]) -> Tensor:
        """Logits of one or many images.

        Args:
            images: As for ``embed``.

        Returns:
            [N, classes] float32 on the CPU.

        Raises:
            ImageError: An image cannot be read.
            MissingExtraError: torch is not installed; ``logits`` gives an array.
            ValueError: The backend gives no logits, or there is no image.
        """
        return _tensor(self.logits(images))

    def logits(self, images: Picture | Iterable[Picture]) -> Array:
        """As ``classify``, as an array of numpy: torch is not needed where the backend needs none.

        Args:
            images: As for ``embed``.

        Returns:
            [N, classes] float32.

        Raises:
            ImageError: An image cannot be read.
            ValueError: The backend gives no logits, or there is no image.
        """
        backend = self.backend
        if not isinstance(backend, LogitsBackend):
            raise ValueError(f"the backend {backend.name!r} gives no logits; use 'torch'")
        with closing(self._prepared(images)) as prepared:
            results = run_in_batches(
                prepared,
                lambda batch: list(_array(backend.logits(self._given(batch)))),
                self._most,
                self.batch_size,
            )
            rows = [logits for logits, _ in results]
        if not rows:
            raise ValueError("classify wants at least one image, got none")
        return np.stack(rows)

    def stages(self, image: Picture) -> tuple[list[Tensor], Placement]:
        """The maps of the stages of one image.

        Args:
            image: One image.

        Returns:
            ([C, h, w] float32 for each stage, where the image lies in the model's input).

        Raises:
            ImageError: The image cannot be read.
            ValueError: The backend gives no stages.
        """
        backend = self._stage_backend()
        pixels, placement = self.prepare(image)
        maps = map(_array, backend.stages(self._given(pixels[None])))
        return [_tensor(stage[0]) for stage in maps], placement

    def prepare(self, image: Picture) -> PreparedImage:
        """What the model gets for one image: [3, H, W] float32, and where it lies in it."""
        return prepare(image, self.image_spec)

    def summary(self) -> str:
        """Backend, device and precision in a few words, e.g. "torch, cpu, fp32"."""
        return f"{self.backend.name}, {self.backend.device}, {self.precision}"

    def explain(self) -> str:
        """What the engine chose, and why; with torch and native also what it made of the model."""
        has_more = self.backend.name in ("torch", "native")
        if not has_more or not hasattr(self.backend, "explain"):
            return self._in_one_line()
        return f"{self._in_one_line()}; runs {self.backend.explain()}"

    @property
    def precision(self) -> str:
        """What the backend computes in, "fp32" or "bf16"; "fp32" where it does not say."""
        return str(getattr(self.backend, "precision", "fp32"))

    @property
    def model(self) -> TinyViT | StoredModel | None:
        """What the engine was made of; None for an exported folder or a backend of its own."""
        return None if isinstance(self._model, ExportedEncoder) else self._model

    def weights_sha256(self) -> str:
        """SHA-256 of the model's weights under their canonical names; tells models apart.

        It does not depend on the file they came from, nor on the precision they are held in.

        Raises:
            ValueError: The engine was made without a model.
        """
        if self._model is None:
            raise ValueError("this engine has a backend of its own and no model to hash")
        if isinstance(self._model, ExportedEncoder):
            return self._model.weights_sha256()
        return weights_sha256(self._model.state_dict())

    def close(self) -> None:
        """Give back what the backend holds."""
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine({self._in_one_line()})"

    def _in_one_line(self) -> str:
        height, width = self.image_spec.size
        bare = self.image_spec.resize == "longest_side" and not self.image_spec.pad
        words = f"images {self.image_spec.resize} to {height}x{width}"
        return f"{self._choice}; {words}{', not padded' if bare else ''}"

    def _prepared(
        self, images: Picture | Iterable[Picture]
    ) -> Generator[PreparedImage, None, None]:
        """What ``prepare`` gives for each image, in order, files read ahead in threads."""
        sources = each(images)
        is_one = isinstance(sources, Sized) and len(sources) < 2
        jobs = preparations(sources, self.image_spec)
        return read_ahead(jobs, workers=0 if is_one else self.workers, ahead=self.ahead)

    @property
    def ahead(self) -> int:
        """Images read ahead, at most: the next batch is ready when one is done."""
        return max(self.batch_size, self.workers) + 1

    def _most(self, pixels: Array) -> int:
        """Images of that shape [3, H, W] to compute together."""
        if self.backend.device != "cpu":
            return self.batch_size
        fit = max(CPU_PIXELS // int(pixels[0].size), 1)
        wanted = getattr(self.backend, "images_at_once", 1)
        return min(self.batch_size, max(fit, wanted if wanted <= self.batch_size else 1))

    def _given(self, batch: Array) -> Tensor:
        """A batch as the backend takes it: a tensor, or the array for one that needs no torch."""
        takes_arrays = getattr(self.backend, "takes_arrays", False)
        return cast("Tensor", batch) if takes_arrays else _tensor(batch)

    def _norm_head(self) -> tuple[Array, Array] | None:
        """A classifier's last norm, (weight, bias); None of a model whose output is a map."""
        from tinyvit.factory import arguments_of

        model = self.model
        if model is None:
            part = getattr(self._model, "part", "encoder")
            if part != "encoder":
                raise ValueError(
                    f"an export of part {part!r} gives no vector of an image; embed with the "
                    "checkpoint itself, or with an exported encoder"
                )
            return None
        arguments = arguments_of(model)
        if arguments.get("neck_dim") is not None or not arguments.get("head", True):
            return None
        tensors = model.state_dict()
        weight, bias = (tensors[f"norm_head.{name}"] for name in ("weight", "bias"))
        return _array(weight), _array(bias)

    def _stage_backend(self) -> StageBackend:
        if not isinstance(self.backend, StageBackend):
            raise ValueError(f"the backend {self.backend.name!r} gives no stages; use 'torch'")
        return self.backend


def _open_model(source: str | os.PathLike[str], is_native: bool) -> TinyViT | StoredModel:
    """The model of a checkpoint's name, a file of weights, or a folder of ``save_pretrained``."""
    from tinyvit import factory

    if is_native:
        with factory.leave_to_torch():
            return factory.open_stored(source)
    folder = Path(source)
    if folder.is_dir():
        return factory.load_folder(folder / factory.CONFIG, folder / factory.WEIGHTS)
    return factory.create_model(checkpoint=source)


def _choose_spec(
    model: TinyViT | StoredModel | ExportedEncoder | None,
    image_spec: ImageSpec | None,
    pad: bool | None,
) -> ImageSpec:
    if image_spec is not None and not isinstance(image_spec, ImageSpec):
        raise TypeError(
            f"image_spec must be an ImageSpec, e.g. ImageSpec.sam(1024), got "
            f"{type(image_spec).__name__}"
        )
    spec = image_spec or getattr(model, "image_spec", None)
    if spec is None:
        raise ValueError(
            "this model does not say how its images are prepared; pass "
            "image_spec=ImageSpec.sam(1024), ImageSpec.timm(224) or another"
        )
    return spec if pad is None else dataclasses.replace(spec, pad=pad)


def _pool(
    features: Array,
    maps: tuple[Array, ...] | None,
    placement: Placement,
    norm: tuple[Array, Array] | None,
) -> Array:
    """One vector of an image: see ``Encoded.pooled``."""
    if norm is not None and maps is not None:
        mean = maps[-1].mean((1, 2), dtype=np.float64)
        spread = np.sqrt(mean.var() + _NORM_EPS)
        return cast("Array", ((mean - mean.mean()) / spread * norm[0] + norm[1]).astype(np.float32))
    if features.ndim != 3:
        return features
    height, width = placement.cells((features.shape[1], features.shape[2]))
    return cast("Array", features[:, :height, :width].mean((1, 2), dtype=np.float32))


def _tensor(array: Array) -> Tensor:
    """What a backend takes: a tensor on the same memory, which torch wants to be writable."""
    if sys.modules.get("torch") is None:
        need_torch("an engine that gives or takes tensors")
    import torch

    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _array(output: Tensor | Array) -> Array:
    if isinstance(output, np.ndarray):
        return output
    array: Array = output.detach().to("cpu").float().numpy()
    return array


def check_finite(values: Array, backend: str) -> None:
    """Refuse values of a backend that are not finite (NaN or infinity)."""
    if not np.isfinite(values).all():
        raise ValueError(
            f"backend {backend} gave values that are not finite; try precision='fp32' or another "
            "backend"
        )


def run_in_batches(
    inputs: Iterable[tuple[Array, Label]],
    run: Callable[[Array], Sequence[Result]],
    most: Callable[[Array], int],
    window: int,
) -> Iterator[tuple[Result, Label]]:
    """Run inputs, grouped by shape within a window.

    ``inputs`` are pairs of an image [3, H, W] and what goes with it; an error of theirs comes after
    the results before it. ``run`` makes N results of [N, 3, H, W], ``most`` tells from an image how
    many of its shape go together, and ``window`` images are held at most: read and not yielded.
    A batch is run as soon as it is full, or when its oldest image holds up a full window. So
    images of one shape wait for no more than their own batch.
    """
    order: deque[tuple[int, tuple[int, ...], Label]] = deque()  # number of the image, its shape
    groups: dict[tuple[int, ...], dict[int, Array]] = {}  # images by number, not computed yet
    results: dict[int, Result] = {}

    def compute(shape: tuple[int, ...]) -> None:
        group = groups.pop(shape)
        numbers, images = [*group], [*group.values()]
        del group
        batch = images[0][None] if len(images) == 1 else np.stack(images)
        del images  # the batch is a copy, and memory is bounded
        results.update(zip(numbers, run(batch), strict=True))

    def taken() -> tuple[Result, Label]:
        number, _, label = order.popleft()
        return results.pop(number), label

    source, count = iter(inputs), 0
    error: Exception | None = None
    try:
        while True:
            try:
                image, label = next(source)
            except StopIteration:
                break
            except Exception as err:  # after the good ones before it
                error = err
                break
            shape = image.shape
            order.append((count, shape, label))
            groups.setdefault(shape, {})[count] = image
            count += 1
            if len(groups[shape]) >= most(image):
                compute(shape)
            del image, label
            if len(order) >= window and order[0][0] not in results:
                compute(order[0][1])
            while order and order[0][0] in results:
                yield taken()
        while order:
            if order[0][0] not in results:
                compute(order[0][1])
            yield taken()
        if error is not None:
            raise error
    finally:
        del error  # it refers to this frame, and this frame to it
