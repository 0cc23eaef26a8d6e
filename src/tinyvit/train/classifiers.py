"""Classifiers to train: built from any checkpoint, for any number of classes and any size; kept.

What a checkpoint has goes in: a classifier's weights, or those of a SAM encoder without its neck.
The head is new where the classes are others. For another size of pictures the windows are chosen
anew and the tables of attention biases are resized to them.

A saved classifier is a safetensors file; its header carries the names of its classes and how its
pictures are prepared, beside the family and the strides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tinyvit.catalog import get_variant
from tinyvit.checkpoints.files import write_state_dict
from tinyvit.checkpoints.header import classes_in, header_for, image_spec_in
from tinyvit.checkpoints.opening import open_checkpoint
from tinyvit.errors import CheckpointError
from tinyvit.factory import create_model
from tinyvit.image_spec import ImageSpec
from tinyvit.modules import TinyViT

__all__ = [
    "build_classifier",
    "load_classifier",
    "save_classifier",
    "windows_for",
]

_USUAL_SIZE = 224
_REDUCTIONS = (4, 8, 16, 32)  # side of a picture over that of each stage's map
_LEAST_WINDOWS = (7, 7, 14, 7)  # those of 224, below which windows are only as small as the map


def windows_for(img_size: int) -> tuple[int, ...]:
    """Window sides of a four-stage classifier for a size of pictures.

    The published rows follow this rule: 7, 7, 14, 7 at 224; 12, 12, 24, 12 at 384; 16, 16, 32, 16
    at 512. The maps are cut into whole windows where that is possible, and a window is never
    larger than its map.

    Args:
        img_size: Side of the pictures in pixels.

    Returns:
        One side for each stage, in tokens.

    Raises:
        ValueError: ``img_size`` is below 1.

    Example:
        >>> windows_for(384), windows_for(32)
        ((12, 12, 24, 12), (4, 4, 2, 1))
    """
    if img_size < 1:
        raise ValueError(f"img_size must be at least 1 pixel, got {img_size}")
    windows = []
    for reduction, least in zip(_REDUCTIONS, _LEAST_WINDOWS, strict=True):
        side = -(-img_size // reduction)
        usual = max(least, round(img_size * least / _USUAL_SIZE))
        count = max(1, round(side / usual))
        windows.append(-(-side // count))
    return (windows[1], *windows[1:])  # the first stage has no attention and no windows


def build_classifier(
    classes: Sequence[str],
    *,
    model: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    img_size: int | None = None,
    window_sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> TinyViT:
    """Build a classifier to train.

    Args:
        classes: Names of the classes.
        model: A variant of ``tinyvit.list_models()``; None takes the checkpoint's.
        checkpoint: A name, a file or a folder of ``save_pretrained``; None starts from chance.
            Of a SAM checkpoint the encoder is taken, without the neck and with classifiers'
            strides.
        img_size: Side of the pictures in pixels; None takes the checkpoint's or variant's, and 224
            for a SAM encoder.
        window_sizes: Window sides; None chooses by ``windows_for`` where the size is another one.
        seed: Source of the weights that are new.

    Returns:
        The model, whose ``forward`` gives logits [B, K]. Its head is new unless the checkpoint's
        classes are these (or unnamed and as many).

    Raises:
        ValueError: Neither model nor checkpoint, or an unknown model.
        CheckpointError: The checkpoint cannot be read or does not fit.
        DownloadError: The checkpoint cannot be fetched.
    """
    if checkpoint is None:
        if model is None:
            raise ValueError(
                "wanted a model or a checkpoint to train, for example checkpoint='tinyvit_starter' "
                "or model='tiny_vit_5m_224'"
            )
        return _from_chance(classes, get_variant(model).task == "sam", model, img_size,
                            window_sizes, seed)  # fmt: skip
    opened = open_checkpoint(_file_of(checkpoint))
    natural = image_spec_in(opened.metadata, opened.path)
    if opened.found.has_neck:
        natural = None
        size: int | None = img_size or _USUAL_SIZE
    else:
        size = img_size or (None if natural is None else natural.size[0])
    if window_sizes is None and (img_size is not None or opened.found.has_neck):
        is_same = natural is not None and natural.size[0] == img_size
        window_sizes = None if is_same else windows_for(size or _USUAL_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = create_model(
            model,
            opened,
            num_classes=len(classes),
            img_size=size,
            window_sizes=window_sizes,
            strides=(2, 2, 2) if opened.found.has_neck else None,
            head=True,
        )
        known = classes_in(opened.metadata, opened.path)
        if opened.found.has_neck or (known is not None and known != tuple(classes)):
            built.reset_classifier(len(classes))
    return _finished(built, natural, size)


def save_classifier(model: TinyViT, path: str | os.PathLike[str], classes: Sequence[str]) -> Path:
    """Write a classifier that every command loads, with the names of its classes.

    Args:
        model: The model.
        path: A ``.safetensors`` file; an existing one is replaced at the end.
        classes: One name for each class.

    Returns:
        The path.

    Raises:
        ValueError: There are more or fewer names than classes.
        CheckpointError: The file cannot be written.
    """
    if len(classes) != model.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, but {len(classes)} names came"
        )
    header = {
        "tinyvit.family": "tinyvit",
        "tinyvit.strides": ",".join(str(stride) for stride in model.strides),
        **header_for(model.image_spec, classes),
    }
    return write_state_dict(path, model.state_dict(), metadata=header)


def load_classifier(
    path: str | os.PathLike[str],
) -> tuple[TinyViT, tuple[str, ...] | None]:
    """Load a classifier as it was saved.

    Args:
        path: A file of ``save_classifier``, or any other checkpoint of a classifier.

    Returns:
        The model in eval mode, and the names of its classes; None where the file names none.

    Raises:
        CheckpointError: The file cannot be read or holds no classifier.
        DownloadError: A published checkpoint cannot be fetched.
    """
    opened = open_checkpoint(_file_of(path))
    if not opened.found.has_head:
        raise CheckpointError(f"{opened.path} has no classification head; train one first")
    return create_model(checkpoint=opened), classes_in(opened.metadata, opened.path)


def _from_chance(
    classes: Sequence[str],
    is_sam: bool,
    name: str,
    img_size: int | None,
    window_sizes: Sequence[int] | None,
    seed: int,
) -> TinyViT:
    size = img_size if img_size is not None or not is_sam else _USUAL_SIZE
    if size is not None and window_sizes is None and size != get_variant(name).img_size:
        window_sizes = windows_for(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = create_model(
            name,
            num_classes=len(classes),
            img_size=size,
            window_sizes=window_sizes,
            strides=(2, 2, 2) if is_sam else None,
            head=True,
        )
    return _finished(built, None, size)


def _finished(built: TinyViT, natural: ImageSpec | None, size: int | None) -> TinyViT:
    """Take the neck off, and say how pictures are prepared."""
    if built.neck is not None:
        built.neck = built.neck_dim = None
        built.image_spec = ImageSpec.timm(size or _USUAL_SIZE)
    elif natural is not None:
        built.image_spec = natural if size in (None, natural.size[0]) else _resized(natural, size)
    return built


def _resized(spec: ImageSpec, size: int) -> ImageSpec:
    shorter = spec.shorter_side
    if shorter is not None:
        shorter = max(shorter * size // spec.size[0], size)
    return replace(spec, size=(size, size), shorter_side=shorter)


def _file_of(checkpoint: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The file of weights in a folder of ``save_pretrained``; anything else as it is."""
    inner = Path(checkpoint) / "model.safetensors"
    return inner if inner.is_file() else checkpoint
