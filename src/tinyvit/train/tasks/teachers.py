"""Teachers: whatever turns images into feature maps or logits, and keeping what they say.

``open_teacher`` makes one of a TinyViT, a checkpoint, an ONNX file, a model of timm or of
transformers. ``store_features`` and ``write_logits`` fill a ``Store``, from which students learn
without the teacher; both go on where they were stopped.
"""

from __future__ import annotations

import importlib
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyvit.checkpoints.files import file_sha256, weights_sha256
from tinyvit.errors import CheckpointError, ImageError, MissingExtraError
from tinyvit.evaluate.classify import LabelledImages, Progress, read_batches
from tinyvit.factory import create_model
from tinyvit.folders.images import list_images
from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_input
from tinyvit.inference.backend import choose_device
from tinyvit.inference.graphs import OnnxGraph
from tinyvit.inference.read_ahead import choose_workers
from tinyvit.inference.torch_backend import TorchBackend
from tinyvit.modules import TinyViT
from tinyvit.train.data.augment import Augmentation, View, augmentation
from tinyvit.train.data.images import fingerprint
from tinyvit.train.store import Row, Store, image_state

from .classify import load_classifier, spec_of

_LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class Teacher:
    """Makes feature maps or logits; call it with [N, 3, H, W] float32, normalised."""

    # from images on the CPU to feature maps [N, C, h, w] or logits [N, K], on any device
    compute: Callable[[Tensor], Tensor]
    image_spec: ImageSpec  # how images are prepared for it; all inputs have one size
    name: str  # for people
    sha256: str  # of its weights: tells it from other teachers

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, h, w] or [N, K], float32 on the CPU."""
        with torch.inference_mode():
            return self.compute(images).float().cpu()


def open_teacher(
    source: str | os.PathLike[str] | TinyViT,
    image_spec: ImageSpec | None = None,
    device: str = "auto",
    gives: Literal["features", "logits"] = "features",
) -> Teacher:
    """A teacher of a TinyViT, a checkpoint, a ``.onnx`` file (on the CPU), or a published model.

    These are, for features, "timm:NAME" and "hf:NAME", a model of transformers (of a SAM its vision
    encoder). ``image_spec`` says how images are prepared; None takes the model's own, which ONNX
    files and transformers do not state in one way, so there it must be given.
    """
    place, name = choose_device(device), "TinyViT"
    if isinstance(source, TinyViT):
        model = source
    else:
        text = os.fspath(source)
        if text.lower().endswith(".onnx"):
            return _onnx_teacher(Path(text), _wanted(image_spec, text))
        if gives == "features" and text.startswith("timm:"):
            return _timm_teacher(text[5:], image_spec, place)
        if gives == "features" and text.startswith("hf:"):
            whole = _load("transformers").AutoModel.from_pretrained(text[3:])
            encoder = getattr(whole, "vision_encoder", whole)
            return module_teacher(encoder, _wanted(image_spec, text), text, place)
        is_classifier = gives == "logits"
        model = load_classifier(source)[0] if is_classifier else create_model(None, source)
        model.image_spec, name = image_spec or model.image_spec, Path(text).name
    sha256 = weights_sha256(model.state_dict())
    if gives == "logits":
        frozen = model.eval().requires_grad_(False).to(place)
        return Teacher(lambda x: frozen.classify(x.to(place)), spec_of(model), name, sha256)
    if model.neck is None or model.image_spec is None:
        raise ValueError(
            "a teacher wants a neck and an image_spec, and this TinyViT has "
            f"{'no neck' if model.neck is None else 'no image_spec'}; give a SAM encoder"
        )
    spec = model.image_spec
    spec = replace(spec, pad=True) if spec.resize == "longest_side" else spec
    return Teacher(TorchBackend(model, place), spec, name, sha256)


def open_maps(source: str | os.PathLike[str]) -> Callable[[Tensor], list[Tensor]]:
    """What ``source`` makes of images [N, 3, H, W] that are normalised for the student.

    A checkpoint gives its embedding, an ``.onnx`` file each of its outputs, [N, C, h, w] on the
    CPU; an ONNX file that is normalised otherwise has to do that itself.
    """
    if not os.fspath(source).lower().endswith(".onnx"):
        teacher = open_teacher(source)
        return lambda images: [teacher(images)]
    graph = OnnxGraph(source)
    (name,) = graph.inputs

    def compute(images: Tensor) -> list[Tensor]:
        pixels = np.ascontiguousarray(images.float().cpu().numpy())
        return [torch.from_numpy(found) for found in graph.run({name: pixels}).values()]

    return compute


def module_teacher(
    module: nn.Module,
    image_spec: ImageSpec,
    name: str = "",
    device: str = "cpu",
    channels_last: bool = False,
) -> Teacher:
    """Any module whose output is a map, tokens, or an object with ``last_hidden_state``.

    It is called with [N, 3, H, W] in eval mode; with ``channels_last`` maps are [N, h, w, C].
    """
    name = name or type(module).__name__
    sha256 = weights_sha256(module.state_dict())
    module.eval().to(device)

    def compute(images: Tensor) -> Tensor:
        found = module(images.to(device))
        found = getattr(found, "last_hidden_state", found)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{name} gave {type(found).__name__}; wanted a tensor or an object with "
                "last_hidden_state"
            )
        if channels_last and found.ndim == 4:
            found = found.permute(0, 3, 1, 2)
        return _as_map(found, name)

    return Teacher(compute, image_spec, name, sha256)


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
) -> Store:
    """Compute a teacher's features of images and keep them; goes on where it was stopped.

    ``names`` are paths below ``root``, by default of all images there; ``flips`` stores the
    features of mirrored images too. The teacher gets ``batch_size`` images together; a stop costs
    ``shard_size`` images, those of a file, at most. ``progress`` is called with (images done, all).
    """
    root = Path(root)
    if teacher.image_spec.resize == "longest_side" and not teacher.image_spec.pad:
        raise ValueError(
            "a store wants maps of one shape, and image_spec has pad=False; use "
            "dataclasses.replace(image_spec, pad=True)"
        )
    if names is None:
        names = sorted(image.path.relative_to(root).as_posix() for image in list_images([root]))
    facts = {
        "teacher": teacher.name,
        "teacher_sha256": teacher.sha256,
        "image_spec": teacher.image_spec.to_dict(),
        "flips": flips,
    }
    store = Store(folder, facts)
    todo = store.missing(names, root)
    done = len(names) - len(todo)
    for start in range(0, len(todo), shard_size):
        shard = todo[start : start + shard_size]
        rows: list[Row] = []
        for first in range(0, len(shard), batch_size):
            rows += _feature_rows(teacher, root, shard[first : first + batch_size], flips)
            if progress is not None:
                progress(done + len(rows), len(names))
        store.add(rows)
        done += len(rows)
    return store


def _feature_rows(teacher: Teacher, root: Path, names: Sequence[str], flips: bool) -> list[Row]:
    rows: list[Row] = []
    read: list[tuple[Row, NDArray[np.uint8]]] = []
    for name in names:
        state = image_state(root / name)  # before reading: a change meanwhile shows
        try:
            rgb = decode(root / name)
        except ImageError as err:
            rows.append(Row(name, info=state, reason=str(err)))
        else:
            info = {**state, "height": rgb.shape[0], "width": rgb.shape[1]}
            read.append((Row(name, info=info), rgb))
    if not read:
        return rows
    views = {"features": [rgb for _, rgb in read]}
    if flips:
        views["flipped"] = [np.ascontiguousarray(rgb[:, ::-1]) for _, rgb in read]
    maps: dict[str, Tensor] = {}
    for key, images in views.items():
        inputs = np.stack([to_input(rgb, teacher.image_spec)[0] for rgb in images])
        maps[key] = teacher(torch.from_numpy(inputs))
    for number, (row, _) in enumerate(read):
        arrays = {key: found[number] for key, found in maps.items()}
        if all(float(x.abs().max()) <= _LARGEST_FP16 for x in arrays.values()):  # NaN fails too
            kept = {key: x.to(torch.float16).numpy() for key, x in arrays.items()}
            rows.append(replace(row, arrays=kept))
        else:
            reason = f"{teacher.name} gave features that are not finite in fp16"
            rows.append(replace(row, reason=reason))
    return rows


def write_logits(
    folder: str | os.PathLike[str],
    images: LabelledImages,
    teacher: Teacher,
    *,
    augment: Augmentation | None = None,
    views: int = 10,
    k: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    shard_size: int = 256,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Store, dict[str, str]]:
    """Keep the ``k`` largest of a teacher's probabilities for ``views`` of each image.

    Goes on in a folder that belongs to the same, where it was stopped; a stop costs ``shard_size``
    images at most. Views are made by ``augment`` ("light" by default), with seeds from ``seed``;
    the teacher gets ``batch_size`` views together; ``progress`` is called with (views done, all).
    Gives the store, and the reason by name of each unreadable image; those have no row.
    """
    if len(images) < 1 or views < 1:
        raise ValueError(f"a store wants images and views, got {len(images)} and {views}")
    classes = tuple(images.classes)
    k = min(k, len(classes))
    if k < 1:
        raise ValueError(f"k must be from 1 to the number of classes, {len(classes)}, got {k}")
    augment = augmentation("light") if augment is None else augment
    facts = {
        "images": len(images),
        "views": views,
        "k": k,
        "classes": classes,
        "data": fingerprint(images),
        "augmentation": augment.to_dict(),
        "teacher": teacher.name,
        "teacher_sha256": teacher.sha256,
        "teacher_input": teacher.image_spec.to_dict(),
        "seed": seed,
    }
    store = Store(folder, facts)
    todo = [int(name) for name in store.missing(map(str, range(len(images))))]
    done = (len(images) - len(todo)) * views
    workers = choose_workers() if workers is None else workers
    unreadable: dict[str, str] = {}
    view, together = View(augment, teacher.image_spec), max(1, batch_size // views)
    for start in range(0, len(todo), shard_size):
        seeds = {index: _view_seeds(seed, views, index) for index in todo[start:][:shard_size]}
        load = partial(_make_views, images, view, seeds)
        rows: list[Row] = []
        for shown in read_batches(images, list(seeds), load, together, unreadable, workers):
            if shown:
                rows += _logit_rows(teacher, shown, seeds, len(classes), k, batch_size)
            done += len(shown) * views
            if progress is not None:
                progress(done, views * len(images))
        if rows:
            store.add(rows)
    return store, unreadable


def _view_seeds(seed: int, views: int, index: int) -> list[int]:
    sequences = (np.random.SeedSequence((seed, view, index)) for view in range(views))
    return [int(one.generate_state(1, np.uint64)[0]) for one in sequences]


def _make_views(
    images: LabelledImages, view: View, seeds: Mapping[int, Sequence[int]], index: int
) -> NDArray[np.float32]:
    """Views [V, 3, h, w] of one image, which is read once."""
    image = decode(images.source(index))
    return np.stack([view(image, np.random.default_rng(seed)) for seed in seeds[index]])


def _logit_rows(
    teacher: Teacher,
    shown: Mapping[int, NDArray[np.float32]],
    seeds: Mapping[int, Sequence[int]],
    classes: int,
    k: int,
    batch_size: int,
) -> list[Row]:
    """One row for each image, by its views [V, 3, h, w]."""
    best: list[tuple[Tensor, Tensor]] = []
    for part in torch.split(torch.from_numpy(np.concatenate(list(shown.values()))), batch_size):
        logits = teacher(part)
        if tuple(logits.shape) != (wanted := (len(part), classes)):
            raise ValueError(
                f"the teacher {teacher.name} gave {list(logits.shape)}, wanted {list(wanted)}: "
                "one logit for each class of the images"
            )
        if not bool(logits.isfinite().all()):
            raise ValueError(f"the teacher {teacher.name} gave logits that are not finite")
        best.append(logits.softmax(dim=1).topk(k, dim=1))
    kinds = np.float16, np.uint16 if classes <= 1 << 16 else np.uint32
    found = [
        torch.cat(parts).numpy().astype(kind).reshape(len(shown), -1, k)
        for parts, kind in zip(zip(*best, strict=True), kinds, strict=True)
    ]
    return [
        Row(str(i), {"seed": np.array(seeds[i], np.uint64), "probabilities": p, "classes": c})
        for i, p, c in zip(shown, *found, strict=True)
    ]


def _onnx_teacher(path: Path, image_spec: ImageSpec) -> Teacher:
    """The first output of an ONNX graph: maps, tokens or logits."""
    if not path.is_file():
        raise CheckpointError(f"there is no ONNX file {path}; check the path")
    graph = OnnxGraph(path)

    def compute(images: Tensor) -> Tensor:
        found = torch.from_numpy(graph(images.numpy()))
        return found if found.ndim == 2 else _as_map(found, path.name)

    return Teacher(compute, image_spec, path.name, file_sha256(path))


def _timm_teacher(name: str, image_spec: ImageSpec | None, device: str) -> Teacher:
    """A model of timm without its classifier; its own configuration says how images go in."""
    model = _load("timm").create_model(name, pretrained=True, num_classes=0)
    config = model.pretrained_cfg
    if image_spec is None:
        size = int(config["input_size"][1])
        own: Any = {key: tuple(255 * float(v) for v in config[key]) for key in ("mean", "std")}
        shorter = int(size / float(config.get("crop_pct", 1.0)))
        image_spec = ImageSpec((size, size), "crop", "bicubic", shorter_side=shorter, **own)
    model.forward = model.forward_features
    whole = nn.Sequential(OrderedDict(model=model))  # the hash has always had this name in it
    is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return module_teacher(whole, image_spec, f"timm:{name}", device, is_last)


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
            "ImageSpec.sam(1024) or ImageSpec.timm(224)"
        )
    return image_spec


def _load(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as err:
        raise MissingExtraError(
            f"this teacher needs {package}, which is not installed: pip install {package}"
        ) from err
