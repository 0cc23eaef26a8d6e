"""Writing a teacher's answers down once, for any number of students.

A teacher is shown V views of each picture; its k largest probabilities go into a ``LogitStore``,
each with the seed of the chance that made the view. Writing may be stopped at any moment and goes
on where it was. Who learns from the answers is not known here.

The method is TinyViT's (Wu et al., ECCV 2022, arXiv 2207.10666).

Letters: B batch, K classes, k classes that are kept, V views.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.checkpoints.files import file_sha256
from tinyvit.checkpoints.opening import find_checkpoint
from tinyvit.errors import ImageError
from tinyvit.evaluate.classify import LabelledPictures
from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.inference.read_ahead import choose_workers, read_ahead

from .augment import Augmentation, View, augmentation
from .classifiers import load_classifier
from .classify import spec_of
from .data_sets import fingerprint
from .logit_store import LogitStore, StoreHeader

__all__ = ["Teacher", "open_teacher", "write_logits"]

Answer = Callable[[Tensor], Tensor]
"""[B, 3, h, w] float32 -> logits [B, K]."""

Progress = Callable[[int, int], None]
"""Called with (views done, views in all)."""


@dataclass(frozen=True)
class Teacher:
    """Anything that answers.

    Attributes:
        answer: [B, 3, h, w] float32 -> logits [B, K], on any device.
        spec: How pictures are prepared for it.
        name: For people.
        sha256: Tells it from other teachers.
        device: Where its inputs are wanted.
    """

    answer: Answer
    spec: ImageSpec
    name: str
    sha256: str
    device: str = "cpu"


def open_teacher(
    source: str | os.PathLike[str], spec: ImageSpec | None = None, device: str = "cpu"
) -> Teacher:
    """Open a file as a teacher.

    Args:
        source: A checkpoint of a TinyViT classifier, or an ONNX file from pictures [B, 3, h, w] to
            logits [B, K].
        spec: How pictures are prepared for it; None takes the checkpoint's, and is wrong for ONNX.
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
                f"{path} does not say how its pictures are prepared; give spec=, for example "
                "tinyvit.ImageSpec.timm(224)"
            )
        from tinyvit.inference.onnx_backend import OnnxGraph

        graph = OnnxGraph(path)
        return Teacher(partial(_ask_graph, graph), spec, path.name, file_sha256(path))
    model, _ = load_classifier(source)
    model = model.eval().requires_grad_(False).to(device)
    inner = path / "model.safetensors"  # of a folder of save_pretrained
    file, _ = find_checkpoint(inner if inner.is_file() else source)
    return Teacher(model.classify, spec or spec_of(model), path.name, file_sha256(file), device)


def write_logits(
    folder: str | os.PathLike[str],
    pictures: LabelledPictures,
    teacher: Teacher,
    *,
    chance: Augmentation | None = None,
    views: int = 10,
    k: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[LogitStore, dict[str, str]]:
    """Write a teacher's answers to views of pictures; goes on where it was stopped.

    Args:
        folder: The store; made, or gone on with if it belongs to the same.
        pictures: What is shown.
        teacher: Who answers.
        chance: How views are made; None: "light".
        views: V.
        k: Classes to keep; at most all.
        seed: Source of the views' seeds.
        batch_size: Views answered together.
        workers: Threads that make views; None chooses.
        progress: Called as views are done.

    Returns:
        The store, and the reason by name of each broken picture; those have no answers.

    Raises:
        StoreMismatchError: The folder holds answers that belong to something else.
        ValueError: A number is out of its range, or the teacher has another number of classes.
        CheckpointError: The folder cannot be written.
        OSError: The disk is full. What was written stays good: free space and call again.
    """
    chance = augmentation("light") if chance is None else chance
    header = StoreHeader(
        pictures=len(pictures),
        views=views,
        k=min(k, len(pictures.classes)),
        classes=tuple(pictures.classes),
        data=fingerprint(pictures),
        augmentation=chance.to_dict(),
        teacher=teacher.name,
        teacher_sha256=teacher.sha256,
        teacher_input=teacher.spec.to_dict(),
        seed=seed,
    )
    store = LogitStore.create(folder, header)
    make = partial(_make_view, pictures, View(chance, teacher.spec))
    workers = choose_workers() if workers is None else workers
    broken: dict[str, str] = {}
    done = 0
    for view in range(views):
        left = store.missing(view)
        done += len(pictures) - len(left)
        jobs = (partial(make, index, _view_seed(seed, view, index)) for index in left.tolist())
        made = read_ahead(jobs, workers=workers, ahead=batch_size + workers)
        for batch in _good_batches(made, batch_size, broken, pictures):
            _answer(store, view, teacher, batch)
            done += len(batch)
            if progress is not None:
                progress(done, views * len(pictures))
    return store, broken


_MadeView = tuple[int, int, "NDArray[np.float32] | ImageError"]
"""(index of the picture, seed of the view, its pixels or what is wrong with it)."""


def _view_seed(seed: int, view: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, view, index)).generate_state(1, np.uint64)[0])


def _make_view(pictures: LabelledPictures, view: View, index: int, seed: int) -> _MadeView:
    try:
        image = decode(pictures.source(index))
    except ImageError as err:
        return index, seed, err
    return index, seed, view(image, np.random.default_rng(seed))


def _good_batches(
    made: Iterator[_MadeView], size: int, broken: dict[str, str], pictures: LabelledPictures
) -> Iterator[list[tuple[int, int, NDArray[np.float32]]]]:
    """Views in batches; broken pictures are named."""
    batch: list[tuple[int, int, NDArray[np.float32]]] = []
    for index, seed, pixels in made:
        if isinstance(pixels, ImageError):
            broken[pictures.name(index)] = str(pixels)
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
    teacher: Teacher,
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
            "logit for each class of the pictures"
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
