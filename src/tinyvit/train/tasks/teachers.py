"""A hash that tells the weights of models apart; knows tensors by name and nothing else."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyvit.checkpoints.files import file_sha256, weights_sha256
from tinyvit.checkpoints.open import find_checkpoint
from tinyvit.errors import CheckpointError, ImageError, MissingExtraError
from tinyvit.evaluate.classify import LabelledImages
from tinyvit.factory import create_model
from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_tensor
from tinyvit.inference.backend import choose_device
from tinyvit.inference.graph_backend import OnnxGraph
from tinyvit.inference.read_ahead import choose_workers, read_ahead
from tinyvit.inference.torch_backend import TorchBackend
from tinyvit.modules import TinyViT
from tinyvit.train.data.augment import Augmentation, View, augmentation
from tinyvit.train.data.images import fingerprint
from tinyvit.train.store import (
    FeatureStore,
    LogitStore,
    StoredImage,
    StoreFacts,
    StoreHeader,
    image_state,
)

from .classify import load_classifier, spec_of


def tensor_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes, in the order of the names.

    Args:
        tensors: Tensors of any device and memory layout; both do not matter.

    Returns:
        64 hexadecimal digits.
    """
    return weights_sha256(tensors, older=True)


Progress = Callable[[int, int], None]

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm"})
_FP16_MOST = 65504.0


class Teacher(Protocol):
    """Makes feature maps.

    Attributes:
        name: For people.
        sha256: Hash of its weights.
        image_spec: How images are prepared for it; all inputs have one size.
    """

    name: str
    sha256: str
    image_spec: ImageSpec

    def __call__(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] float32, normalised -> [N, C, h, w] float32, on the CPU."""
        ...


class TinyViTTeacher:
    """A TinyViT's ``forward_features``: the neck's output.

    Args:
        model: The teacher; it is never changed.
        name: For people.
        device: Where it runs.

    Raises:
        ValueError: The model does not say how images are prepared.
    """

    def __init__(self, model: TinyViT, name: str = "TinyViT", device: str = "cpu") -> None:
        if model.neck is None or model.image_spec is None:
            raise ValueError(
                "a teacher wants a neck and an image_spec, and this TinyViT has "
                f"{'no neck' if model.neck is None else 'no image_spec'}; give a SAM encoder"
            )
        spec = model.image_spec
        self.name = name
        self.sha256 = tensor_fingerprint(model.state_dict())
        self.image_spec = replace(spec, pad=True) if spec.resize == "longest_side" else spec
        self._backend = TorchBackend(model, device)

    def __call__(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> [N, C, h, w] float32."""
        return self._backend(images)


class OnnxTeacher:
    """An ONNX graph, run by ONNX Runtime: images in, a feature map as its first output.

    Args:
        path: The file.
        image_spec: How images are prepared for it.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        CheckpointError: There is no such file.
        ValueError: ONNX Runtime cannot read it.
    """

    def __init__(self, path: str | os.PathLike[str], image_spec: ImageSpec) -> None:
        if not Path(path).is_file():
            raise CheckpointError(f"there is no ONNX file {os.fspath(path)}; check the path")
        self.name = Path(path).name
        self.sha256 = file_sha256(path)
        self.image_spec = image_spec
        self._graph = OnnxGraph(path)

    def __call__(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> [N, C, h, w] float32."""
        return _as_map(torch.from_numpy(self._graph(images.numpy())), self.name)


class ModuleTeacher:
    """Any PyTorch module whose output is a map, tokens, or an object with ``last_hidden_state``.

    Args:
        module: Called with [N, 3, H, W]; used in eval mode and without gradients.
        image_spec: How images are prepared for it.
        name: For people.
        device: Where it runs.
        channels_last: Whether a map comes as [N, h, w, C].
    """

    def __init__(
        self,
        module: nn.Module,
        image_spec: ImageSpec,
        name: str = "",
        device: str = "cpu",
        channels_last: bool = False,
    ) -> None:
        self.name = name or type(module).__name__
        self.sha256 = tensor_fingerprint(module.state_dict())
        self.image_spec = image_spec
        self._module, self._device = module.eval().to(device), device
        self._channels_last = channels_last

    def __call__(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> [N, C, h, w] float32.

        Raises:
            ValueError: The output is no map and no tokens of a square grid.
        """
        with torch.inference_mode():
            found = self._module(images.to(self._device))
        found = getattr(found, "last_hidden_state", found)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{self.name} gave {type(found).__name__}; wanted a tensor or an object with "
                "last_hidden_state"
            )
        found = found.float().cpu()
        if self._channels_last and found.ndim == 4:
            found = found.permute(0, 3, 1, 2)
        return _as_map(found, self.name)


def open_teacher(
    source: str | os.PathLike[str] | TinyViT,
    image_spec: ImageSpec | None = None,
    device: str = "auto",
) -> Teacher:
    """Make a teacher of whatever names one.

    Args:
        source: A TinyViT; a checkpoint's name or file; a ``.onnx`` file; "timm:NAME"; "hf:NAME", a
            model of transformers (of a SAM its vision encoder).
        image_spec: How images are prepared. None takes the model's own; ONNX files and
            transformers do not say it in one way, so there it must be given.
        device: Where it runs; ONNX files always on the CPU.

    Raises:
        ValueError: ``image_spec`` is wanted, or the model cannot teach.
        CheckpointError: The file cannot be read.
        MissingExtraError: The package is not installed.
    """
    place = choose_device(device)
    if isinstance(source, TinyViT):
        return TinyViTTeacher(source, device=place)
    text = os.fspath(source)
    if text.startswith("timm:"):
        return _timm_teacher(text[5:], image_spec, place)
    if text.startswith("hf:"):
        package = _load("transformers", "transformers")
        model = package.AutoModel.from_pretrained(text[3:])
        encoder = getattr(model, "vision_encoder", model)
        return ModuleTeacher(encoder, _wanted(image_spec, text), text, place)
    if text.lower().endswith(".onnx"):
        return OnnxTeacher(text, _wanted(image_spec, text))
    model = create_model(None, source)
    if image_spec is not None:
        model.image_spec = image_spec
    return TinyViTTeacher(model, Path(text).name, place)


def list_images(root: str | os.PathLike[str]) -> list[str]:
    """Paths of all images below a folder, relative to it, sorted.

    Raises:
        ValueError: There is no such folder, or no image in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; wanted one with images")
    found = [path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES]
    names = sorted(path.relative_to(root).as_posix() for path in found if path.is_file())
    if not names:
        raise ValueError(f"no images below {root}; wanted {', '.join(sorted(_SUFFIXES))}")
    return names


def store_features(
    teacher: Teacher,
    root: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    flips: bool = False,
    batch_size: int = 4,
    shard_size: int = 64,
    progress: Progress | None = None,
) -> FeatureStore:
    """Have a teacher look at images and keep its features; goes on where it was stopped.

    Args:
        teacher: Gives the features.
        root: The images' folder.
        folder: The store's folder; one that exists must be of this teacher.
        names: Paths below ``root``; None takes all images there.
        flips: Store the features of mirrored images too.
        batch_size: Images that the teacher gets together.
        shard_size: Images in a file; what a stop can cost.
        progress: Called with (images done, images in all).

    Returns:
        The store. ``broken`` of it names the images that could not be read.

    Raises:
        ValueError: There are no images, or the teacher's maps differ in shape.
        CheckpointError: The store is of another teacher, or cannot be written.
    """
    root = Path(root)
    if teacher.image_spec.resize == "longest_side" and not teacher.image_spec.pad:
        raise ValueError(
            "a store wants maps of one shape, and image_spec has pad=False; use "
            "dataclasses.replace(image_spec, pad=True)"
        )
    names = list_images(root) if names is None else list(names)
    facts = StoreFacts(teacher.name, teacher.sha256, teacher.image_spec, flips)
    store = FeatureStore(folder, facts)
    todo = store.missing(root, names)
    done = len(names) - len(todo)
    for start in range(0, len(todo), shard_size):
        shard = _Shard(teacher, root, flips)
        for first in range(start, min(start + shard_size, len(todo)), batch_size):
            chosen = todo[first : min(first + batch_size, start + shard_size)]
            shard.look_at(chosen)
            done += len(chosen)
            if progress is not None:
                progress(done, len(names))
        store.add(shard.features, shard.flipped, shard.images, shard.broken)
    return store


class _Shard:
    """What becomes one file of the store."""

    def __init__(self, teacher: Teacher, root: Path, flips: bool) -> None:
        self.teacher, self.root, self.flips = teacher, root, flips
        self.features: list[Tensor] = []
        self.flipped: list[Tensor] = []
        self.images: list[StoredImage] = []
        self.broken: list[StoredImage] = []

    def look_at(self, names: Sequence[str]) -> None:
        """Take in the features of images, and the reasons of broken ones."""
        found: list[tuple[StoredImage, NDArray[np.uint8]]] = []
        for name in names:
            state = image_state(self.root / name)  # before reading: a change meanwhile shows
            try:
                rgb = decode(self.root / name)
            except ImageError as err:
                self.broken.append(StoredImage(name, *state, reason=str(err)))
            else:
                found.append((StoredImage(name, *state, *rgb.shape[:2]), rgb))
        if not found:
            return
        plain = self._features([rgb for _, rgb in found])
        mirrored = self._features([rgb[:, ::-1] for _, rgb in found]) if self.flips else plain
        for (image, _), one, other in zip(found, plain, mirrored, strict=True):
            if not all(float(x.abs().max()) <= _FP16_MOST for x in (one, other)):  # NaN fails too
                reason = f"{self.teacher.name} gave features that are not finite in fp16"
                self.broken.append(replace(image, height=0, width=0, reason=reason))
                continue
            self.images.append(image)
            self.features.append(one.to(torch.float16))
            if self.flips:
                self.flipped.append(other.to(torch.float16))

    def _features(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        inputs = [
            to_tensor(np.ascontiguousarray(image), self.teacher.image_spec)[0] for image in images
        ]
        return self.teacher(torch.stack(inputs))


def _timm_teacher(name: str, image_spec: ImageSpec | None, device: str) -> Teacher:
    """A model of timm without its classifier; its own configuration says how images go in."""
    package = _load("timm", "timm")
    model = package.create_model(name, pretrained=True, num_classes=0)
    config = model.pretrained_cfg
    if image_spec is None:
        size = int(config["input_size"][1])
        mean, std = (tuple(255 * float(v) for v in config[key]) for key in ("mean", "std"))
        shorter = int(size / float(config.get("crop_pct", 1.0)))
        image_spec = ImageSpec(
            (size, size), "crop", "bicubic", (mean[0], mean[1], mean[2]),
            (std[0], std[1], std[2]), shorter_side=shorter,
        )  # fmt: skip
    is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return ModuleTeacher(_Features(model), image_spec, f"timm:{name}", device, is_last)


class _Features(nn.Module):
    """timm's ``forward_features`` as a ``forward``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> object:
        features: Callable[[Tensor], object] = self.model.forward_features  # type: ignore[assignment]
        return features(x)


def _as_map(found: Tensor, name: str) -> Tensor:
    """A map as it is; tokens [N, T, C] of a square grid, after any class tokens, as a map."""
    if found.ndim == 4:
        return found
    if found.ndim == 3:
        side = int(found.shape[1] ** 0.5)
        if 0 <= found.shape[1] - side * side <= min(5, side):  # class and register tokens in front
            tokens = found[:, found.shape[1] - side * side :]
            batch, _, channels = tokens.shape
            return tokens.transpose(1, 2).reshape(batch, channels, side, side)
    raise ValueError(
        f"{name} gave {list(found.shape)}; wanted a map [N, C, h, w] or tokens [N, T, C] of a "
        "square grid"
    )


def _wanted(image_spec: ImageSpec | None, source: str) -> ImageSpec:
    if image_spec is None:
        raise ValueError(
            f"{source} does not say how its images are prepared; give image_spec, for example "
            "ImageSpec.sam(1024)"
        )
    return image_spec


def _load(package: str, install: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as err:
        raise MissingExtraError(
            f"this teacher needs {package}, which is not installed: pip install {install}"
        ) from err


Answer = Callable[[Tensor], Tensor]
"""[B, 3, h, w] float32 -> logits [B, K]."""

"""Called with (views done, views in all)."""


@dataclass(frozen=True)
class LogitTeacher:
    """Anything that answers.

    Attributes:
        answer: [B, 3, h, w] float32 -> logits [B, K], on any device.
        spec: How images are prepared for it.
        name: For people.
        sha256: Tells it from other teachers.
        device: Where its inputs are wanted.
    """

    answer: Answer
    spec: ImageSpec
    name: str
    sha256: str
    device: str = "cpu"


def open_logit_teacher(
    source: str | os.PathLike[str], spec: ImageSpec | None = None, device: str = "cpu"
) -> LogitTeacher:
    """Open a file as a teacher.

    Args:
        source: A checkpoint of a TinyViT classifier, or an ONNX file from images [B, 3, h, w] to
            logits [B, K].
        spec: How images are prepared for it; None takes the checkpoint's, and is wrong for ONNX.
        device: Where a checkpoint is computed; ONNX is computed on the CPU.

    Returns:
        The teacher.

    Raises:
        ValueError: ONNX without ``spec``, or a file that cannot be read.
        CheckpointError: The checkpoint cannot be read or has no head.
        MissingExtraError: onnxruntime is not installed.
    """
    path = Path(source)
    if path.suffix.lower() == ".onnx":
        if spec is None:
            raise ValueError(
                f"{path} does not say how its images are prepared; give spec=, for example "
                "tinyvit.ImageSpec.timm(224)"
            )
        from tinyvit.inference.graph_backend import OnnxGraph

        graph = OnnxGraph(path)
        return LogitTeacher(partial(_ask_graph, graph), spec, path.name, file_sha256(path))
    model, _ = load_classifier(source)
    model = model.eval().requires_grad_(False).to(device)
    inner = path / "model.safetensors"  # of a folder of save_pretrained
    file, _ = find_checkpoint(inner if inner.is_file() else source)
    return LogitTeacher(
        model.classify, spec or spec_of(model), path.name, file_sha256(file), device
    )


def write_logits(
    folder: str | os.PathLike[str],
    images: LabelledImages,
    teacher: LogitTeacher,
    *,
    chance: Augmentation | None = None,
    views: int = 10,
    k: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[LogitStore, dict[str, str]]:
    """Write a teacher's answers to views of images; goes on where it was stopped.

    Args:
        folder: The store; made, or gone on with if it belongs to the same.
        images: What is shown.
        teacher: Who answers.
        chance: How views are made; None: "light".
        views: V.
        k: Classes to keep; at most all.
        seed: Source of the views' seeds.
        batch_size: Views answered together.
        workers: Threads that make views; None chooses.
        progress: Called as views are done.

    Returns:
        The store, and the reason by name of each broken image; those have no answers.

    Raises:
        StoreMismatchError: The folder holds answers that belong to something else.
        ValueError: A number is out of its range, or the teacher has another number of classes.
        CheckpointError: The folder cannot be written.
        OSError: The disk is full. What was written stays good: free space and call again.
    """
    chance = augmentation("light") if chance is None else chance
    header = StoreHeader(
        images=len(images),
        views=views,
        k=min(k, len(images.classes)),
        classes=tuple(images.classes),
        data=fingerprint(images),
        augmentation=chance.to_dict(),
        teacher=teacher.name,
        teacher_sha256=teacher.sha256,
        teacher_input=teacher.spec.to_dict(),
        seed=seed,
    )
    store = LogitStore.create(folder, header)
    make = partial(_make_view, images, View(chance, teacher.spec))
    workers = choose_workers() if workers is None else workers
    broken: dict[str, str] = {}
    done = 0
    for view in range(views):
        left = store.missing(view)
        done += len(images) - len(left)
        jobs = (partial(make, index, _view_seed(seed, view, index)) for index in left.tolist())
        made = read_ahead(jobs, workers=workers, ahead=batch_size + workers)
        for batch in _good_batches(made, batch_size, broken, images):
            _answer(store, view, teacher, batch)
            done += len(batch)
            if progress is not None:
                progress(done, views * len(images))
    return store, broken


_MadeView = tuple[int, int, "NDArray[np.float32] | ImageError"]
"""(index of the image, seed of the view, its pixels or what is wrong with it)."""


def _view_seed(seed: int, view: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, view, index)).generate_state(1, np.uint64)[0])


def _make_view(images: LabelledImages, view: View, index: int, seed: int) -> _MadeView:
    try:
        image = decode(images.source(index))
    except ImageError as err:
        return index, seed, err
    return index, seed, view(image, np.random.default_rng(seed))


def _good_batches(
    made: Iterator[_MadeView], size: int, broken: dict[str, str], images: LabelledImages
) -> Iterator[list[tuple[int, int, NDArray[np.float32]]]]:
    """Views in batches; broken images are named."""
    batch: list[tuple[int, int, NDArray[np.float32]]] = []
    for index, seed, pixels in made:
        if isinstance(pixels, ImageError):
            broken[images.name(index)] = str(pixels)
            continue
        batch.append((index, seed, pixels))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _answer(
    store: LogitStore,
    view: int,
    teacher: LogitTeacher,
    batch: list[tuple[int, int, NDArray[np.float32]]],
) -> None:
    """Ask the teacher and write what it says."""
    images = torch.from_numpy(np.stack([pixels for _, _, pixels in batch])).to(teacher.device)
    with torch.inference_mode():
        logits = teacher.answer(images).float().cpu()
    wanted = (len(batch), len(store.header.classes))
    if tuple(logits.shape) != wanted:
        raise ValueError(
            f"the teacher {teacher.name} gave {list(logits.shape)}, wanted {list(wanted)}: one "
            "logit for each class of the images"
        )
    if not bool(logits.isfinite().all()):
        raise ValueError(f"the teacher {teacher.name} gave logits that are not finite")
    best = logits.softmax(dim=1).topk(store.header.k, dim=1)
    store.write(
        view,
        np.array([index for index, _, _ in batch], dtype=np.int64),
        np.array([seed for _, seed, _ in batch], dtype=np.uint64),
        best.values.numpy(),
        best.indices.numpy(),
    )


def _ask_graph(graph: Callable[[NDArray[np.float32]], NDArray[np.float32]], x: Tensor) -> Tensor:
    return torch.from_numpy(graph(x.numpy()))
