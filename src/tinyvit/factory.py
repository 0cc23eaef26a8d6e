"""From a name to a ready model: a variant of the catalog, and weights for it.

``create_model`` builds, ``load_checkpoint`` fills a model that exists. Both read any family of the
lineage; what each step does to a state dict is known to ``tinyvit.checkpoints``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import numpy as np

from tinyvit import catalog
from tinyvit.catalog import DEFAULT_CHECKPOINT, Checkpoint, Variant
from tinyvit.checkpoints import files
from tinyvit.checkpoints.detection import Detection, detect
from tinyvit.checkpoints.download import Progress
from tinyvit.checkpoints.families import HEADS, group_by_part, to_canonical
from tinyvit.checkpoints.open import (
    OpenedCheckpoint,
    check_encoder,
    find_checkpoint,
    is_sam_folder,
    misfits,
    open_checkpoint,
)
from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec
from tinyvit.lazy import need_torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from typing_extensions import Unpack

    from tinyvit.modules import FeatureMaps, TinyViT

CONFIG, WEIGHTS, FOLDER_FORMAT = "config.json", "model.safetensors", 1
"""The files of a folder of ``save_pretrained``, and the newest format of the first."""


_PARTS_OF_TINYVIT = ("trunk", "head", "neck")
_OF_HEAD = ("norm_head.", "head.")
_FRESH_HEAD = ("head.weight", "head.bias")
_OF_TIMM = {  # arguments of timm.create_model that are none here -> what to do instead
    "pretrained": "name weights instead of a size, such as 'tiny_vit_5m_224.dist_in22k_ft_in1k' "
    "of tinyvit.list_checkpoints(); without weights it is untrained",
    "out_indices": "it goes with features_only=True",
    "global_pool": "the head takes the mean of the last map, and forward_features gives the map",
}


@dataclass(frozen=True)
class LoadReport:
    """What loading a checkpoint did.

    Attributes:
        path: The file.
        family: Whose key names it has.
        strides_reason: Why the model has its strides; no tensor shows them.
        left_out: Parts in the file that the model does not have.
        untrained: Parts of the model that the file does not have; they keep their first weights.
        resized: Attention-bias tables that were resized to the model's windows.
        thresholds: Of the masks of these weights, as the file states them; a subset of
            mask_threshold, pred_iou_thresh, stability_score_thresh, stability_score_offset.
    """

    path: Path
    family: str
    strides_reason: str
    left_out: tuple[str, ...]
    untrained: tuple[str, ...]
    resized: tuple[str, ...]
    thresholds: Mapping[str, float] = field(default_factory=dict)


class _Arguments(TypedDict, total=False):
    """Those of ``create_model`` that go with every kind of model."""

    img_size: int | None
    in_chans: int | None
    drop_rate: float
    drop_path_rate: float | None
    use_checkpoint: bool
    layer_lr_decay: float
    strides: Sequence[int] | None
    window_sizes: Sequence[int] | None
    antialias: bool
    sha256: str | None
    progress: Progress | None


@overload
def create_model(
    name: str | None = None,
    checkpoint: str | os.PathLike[str] | OpenedCheckpoint | None = None,
    *,
    features_only: Literal[True],
    out_indices: int | Sequence[int] | None = None,
    **arguments: Unpack[_Arguments],
) -> FeatureMaps: ...
@overload
def create_model(
    name: str | None = None,
    checkpoint: str | os.PathLike[str] | OpenedCheckpoint | None = None,
    *,
    num_classes: int | None = None,
    head: bool | None = None,
    features_only: Literal[False] = False,
    **arguments: Unpack[_Arguments],
) -> TinyViT: ...
def create_model(
    name: str | None = None,
    checkpoint: str | os.PathLike[str] | OpenedCheckpoint | None = None,
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float | None = None,
    use_checkpoint: bool = False,
    layer_lr_decay: float = 1.0,
    strides: Sequence[int] | None = None,
    window_sizes: Sequence[int] | None = None,
    head: bool | None = None,
    antialias: bool = False,
    sha256: str | None = None,
    progress: Progress | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **unknown: object,
) -> TinyViT | FeatureMaps:
    """Build a TinyViT, with weights if a checkpoint is named, in eval mode on the CPU.

    Args:
        name: A variant of ``list_models()``; or the full name of a checkpoint, as timm spells them
            ("tiny_vit_21m_384.dist_in22k_ft_in1k"); or None for the sizes of ``checkpoint``.
            Without either the embedded weights are taken.
        checkpoint: A name of ``list_checkpoints()``, the path of a file of any family, or what
            ``open_checkpoint`` gave.
        num_classes: Classes of the head. None takes the checkpoint's number; another number than
            the checkpoint's gives a fresh head.
        img_size: Side of the images in pixels; None takes the variant's.
        in_chans: Input channels; None takes the checkpoint's number, or 3.
        drop_rate: Dropout in the MLPs.
        drop_path_rate: Stochastic depth in training; None takes the variant's.
        use_checkpoint: Gradient checkpointing.
        layer_lr_decay: Layer-wise learning rate decay.
        strides: Strides of the merges; None takes the variant's.
        window_sizes: Window sides; None takes the variant's. A checkpoint's tables of attention
            biases are resized to them.
        head: Build the classification head. None takes the checkpoint's choice, or else the
            variant's.
        antialias: Resize tables with antialiasing, as timm does; False as Cream does.
        sha256: Hash that a downloaded file must have.
        progress: Called with (bytes there, bytes in all or None) during a download.
        features_only: As in timm, give ``FeatureMaps``, without head and neck and without the
            stages behind the last one asked for.
        out_indices: Stages of ``features_only``; None gives all.
        **unknown: None; of timm's other arguments an error says what to do instead.

    Returns:
        The model; ``model.image_spec`` says how to prepare images for it (of ``FeatureMaps``
        ``encoder.image_spec``).

    Raises:
        TypeError: An argument that is unknown.
        ValueError: An unknown variant, or arguments that contradict each other.
        CheckpointError: The checkpoint cannot be read, or does not fit; every missing and
            unexpected key is named.
        DownloadError: The checkpoint cannot be fetched.

    Warns:
        UserWarning: A part of the model is not in the checkpoint and stays untrained; or a SAM
            encoder is built without a checkpoint, whose masks would be noise.

    Examples:
        >>> import tinyvit
        >>> model = tinyvit.create_model("tiny_vit_5m_224")
        >>> sum(p.numel() for p in model.parameters())
        5392764
    """
    _refuse(unknown if features_only or out_indices is None else {"out_indices": out_indices})
    if head is False and num_classes:
        raise ValueError(f"num_classes={num_classes} wants a head, but head=False leaves it out")
    name, opened = _open(name, checkpoint, sha256, progress)
    from tinyvit.modules.tiny_vit import FeatureMaps, TinyViT

    row, found = (opened.row, opened.found) if opened is not None else (None, None)
    variant = _choose_variant(name, row, found)
    own: ImageSpec | None = None
    if opened is not None and name in (None, opened.found.variant):  # of no other variant's sizes
        own = files.image_spec_in(opened.metadata, opened.path)
    chosen = {**_arguments(variant, found), **({"img_size": max(own.size)} if own else {})}
    head = "head" in found.parts or bool(num_classes) if found and head is None else head
    overrides = {
        "num_classes": num_classes,
        "img_size": img_size,
        "in_chans": in_chans,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
        "use_checkpoint": use_checkpoint,
        "layer_lr_decay": layer_lr_decay,
        "strides": strides,
        "window_sizes": window_sizes,
        "head": head,
    }
    chosen.update({key: value for key, value in overrides.items() if value is not None})
    model = TinyViT(**chosen)
    model.image_spec = _image_spec(own, variant, row, found, img_size)
    if opened is None and variant is not None and variant.task != "classification":
        _warn_random(variant.name)
    if opened is not None:
        fresh = _FRESH_HEAD if num_classes is not None else ()
        _, untrained, _ = _fill(model, opened, antialias, fresh)
        _warn_untrained(opened, [p for p in untrained if p != "head" or num_classes is None])
    if features_only:
        maps = FeatureMaps(model, out_indices)
        model.prune_intermediate_layers(maps.out_indices)
        return maps.eval()
    return model.eval()


def _open(
    name: str | None,
    checkpoint: str | os.PathLike[str] | OpenedCheckpoint | None,
    sha256: str | None,
    progress: Progress | None,
) -> tuple[str | None, OpenedCheckpoint | None]:
    """The variant's name, if one is given, and the checkpoint; neither: the embedded weights."""
    if sys.modules.get("torch") is None:
        need_torch("create_model")
    if name is None and checkpoint is None:
        name = DEFAULT_CHECKPOINT
    if checkpoint is None and name in catalog.list_checkpoints():
        name, checkpoint = None, name
    if checkpoint is None or isinstance(checkpoint, OpenedCheckpoint):
        return name, checkpoint
    return name, open_checkpoint(checkpoint, sha256, progress)


def _refuse(unknown: Mapping[str, object]) -> None:
    for name, value in unknown.items():
        hint = f"; {_OF_TIMM[name]}" if name in _OF_TIMM else ""
        raise TypeError(f"create_model has no argument {name}, came {name}={value!r}{hint}")


def load_checkpoint(
    model: TinyViT,
    checkpoint: str | os.PathLike[str],
    *,
    antialias: bool = False,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> LoadReport:
    """Put the weights of a file of any family into a model that exists.

    Nothing is loaded unless everything fits. A part that only the file has (a mask decoder, say)
    is left out, and a part that only the model has (a neck, say) keeps its weights; the report
    names both. Tables of attention biases are resized to the model's windows.

    Args:
        model: The model; changed in place.
        checkpoint: A name of ``list_checkpoints()``, or the path of a file.
        antialias: Resize tables with antialiasing, as timm does; False as Cream does.
        sha256: Hash that a downloaded file must have.
        progress: Called with (bytes there, bytes in all or None) during a download.

    Returns:
        What was done.

    Raises:
        CheckpointError: The file cannot be read or does not fit; every missing and unexpected key
            and every wrong shape is named.
        DownloadError: The checkpoint cannot be fetched.

    Warns:
        UserWarning: A part of the model is not in the file.
    """
    opened = open_checkpoint(checkpoint, sha256, progress)
    parts = _fill(model, opened, antialias)
    _warn_untrained(opened, parts[1])
    found = opened.found
    return LoadReport(
        opened.path, found.family, found.strides_reason, *parts, thresholds=opened.thresholds
    )


def _fill(
    model: TinyViT, opened: OpenedCheckpoint, antialias: bool, fresh: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Load canonical tensors into the model: all, or none and an error that names everything.

    Gives ``left_out``, ``untrained`` and ``resized`` of ``LoadReport``. Keys in ``fresh`` are not
    taken from the file where the model has none or another shape.
    """
    from tinyvit.checkpoints.resize import resize_bias_tables

    found, tensors = opened.found, opened.tensors
    own = {key: tensor.shape for key, tensor in model.state_dict().items()}
    own_parts, parts = group_by_part(own), group_by_part(tensors)
    state = {key: tensors[key] for part in parts if part in own_parts for key in parts[part]}
    fresh = [key for key in fresh if key in state and own.get(key) != state[key].shape]
    for key in fresh:
        del state[key]
    resized: list[str] = []
    if any(own.get(key, state[key].shape) != state[key].shape for key in state):
        known = {key: value for key, value in state.items() if key in own}
        known, resized = resize_bias_tables(known, model.window_sizes, antialias)
        state.update(known)
    untrained = tuple(part for part in _PARTS_OF_TINYVIT if part in own_parts and part not in parts)
    load_exactly(
        model,
        state,
        f"{opened.path} ({found.family}, {found.variant or 'sizes of its own'}) does not fit "
        f"this TinyViT of widths {model.embed_dims}",
        {*fresh, *(key for part in untrained for key in own_parts[part])},
    )
    model.thresholds = dict(opened.thresholds)
    if "head.weight" in state:
        classes = files.classes_in(opened.metadata, opened.path) or ()
        model.classes = classes if len(classes) == model.num_classes else ()
    left_out = tuple(sorted(part for part in parts if part not in own_parts))
    return left_out, untrained, tuple(resized)


def load_exactly(
    module: nn.Module, state: Mapping[str, Tensor], otherwise: str, untouched: Collection[str] = ()
) -> None:
    """Load tensors that are all of a module's, or raise a CheckpointError that names everything.

    Those in ``untouched`` and counters of batches may be missing; ``otherwise`` begins the error.
    """
    own = {key: tensor.shape for key, tensor in module.state_dict().items()}
    needed = [k for k in own if k not in untouched and not k.endswith("num_batches_tracked")]
    missing = [key for key in needed if key not in state]
    unexpected = [key for key in state if key not in own]
    both = {key: (own[key], tensor.shape) for key, tensor in state.items() if key in own}
    wrong = {key: shapes for key, shapes in both.items() if shapes[0] != shapes[1]}
    if missing or unexpected or wrong:
        raise CheckpointError(f"{otherwise}: {'; '.join(misfits(missing, unexpected, wrong))}")
    module.load_state_dict(state, strict=False)


def _warn_random(name: str) -> None:
    """Say that a SAM has no weights, but not to packages of ours, which train or fill it."""
    if not str(sys._getframe(2).f_globals.get("__name__", "")).startswith("tinyvit."):
        warnings.warn(
            f"{name} has random weights: it is untrained; name a checkpoint for trained ones, see "
            "tinyvit.list_checkpoints()",
            stacklevel=3,
        )


def _warn_untrained(opened: OpenedCheckpoint, parts: Sequence[str]) -> None:
    if parts:
        verb = "is" if len(parts) == 1 else "are"
        warnings.warn(
            f"the {' and the '.join(parts)} of this model {verb} untrained: "
            f"{opened.path.name} ({opened.found.family}) holds no weights for it",
            stacklevel=3,
        )


def _choose_variant(
    name: str | None, row: Checkpoint | None, found: Detection | None
) -> Variant | None:
    if name is not None:
        if name in catalog.list_checkpoints():
            raise ValueError(
                f"{name!r} names a checkpoint, and another one is given; the variant is "
                f"{catalog.get_checkpoint(name).variant!r}"
            )
        return catalog.get_variant(name)
    known = row.variant if row is not None else found.variant if found is not None else None
    return catalog.get_variant(known) if known is not None else None


def _arguments(variant: Variant | None, found: Detection | None) -> dict[str, Any]:
    """Constructor arguments: the variant's, or those that a file of no variant shows."""
    sizes = None if found is None else found.architecture
    if variant is None:
        return {} if found is None else found.arguments()
    arguments: dict[str, Any] = variant.arguments()
    if sizes is not None:
        arguments["in_chans"] = sizes.in_chans
        if sizes.num_classes is not None:
            arguments["num_classes"] = sizes.num_classes
    return arguments


def _image_spec(
    own: ImageSpec | None,
    variant: Variant | None,
    row: Checkpoint | None,
    found: Detection | None,
    img_size: int | None,
) -> ImageSpec:
    """How images are prepared: as the file says, its row, the variant, or else its family."""
    if own is not None:
        spec = own
    elif row and variant and row.variant == variant.name and row.image_spec is not None:
        spec = row.image_spec
    elif variant is not None:
        spec = variant.image_spec
    elif found is not None and found.has_neck:
        is_student = found.architecture is not None and found.architecture.neck_size is not None
        spec = (ImageSpec.sam3 if is_student else ImageSpec.sam)(found.img_size)
    else:
        spec = ImageSpec.timm(found.img_size if found is not None else 224)
    if img_size is None or spec.size == (img_size, img_size):
        return spec
    if spec.resize == "crop" and spec.shorter_side is not None:
        shorter = int(spec.shorter_side * img_size / spec.size[0])
        return replace(spec, size=(img_size, img_size), shorter_side=shorter)
    return replace(spec, size=(img_size, img_size))


def load_folder(config_path: Path, weights_path: Path) -> TinyViT:
    """The encoder of a folder of ``save_pretrained`` or of a repository that timm publishes.

    Weights and config must fit each other; a CheckpointError says what does not.
    """
    import torch

    from tinyvit.modules import TinyViT

    config = read_config(config_path)
    if config.get("architectures") == ["Sam"]:
        return create_model(checkpoint=weights_path)
    if config.get("architecture") in catalog.list_models():  # timm's
        return create_model(config["architecture"], weights_path)
    try:
        model = TinyViT(**config["arguments"])
        model.image_spec, model.thresholds = _image_spec_and_thresholds(config)
        model.classes = tuple(map(str, config.get("classes", ())))
    except (KeyError, TypeError, ValueError, RuntimeError) as err:
        raise CheckpointError(
            f"{config_path} does not describe a TinyViT ({type(err).__name__}: {err}); it wants "
            f"'arguments' and 'image_spec' as tinyvit.save_pretrained writes them"
        ) from err
    tensors = files.read_state_dict(weights_path).tensors
    files.check_finite(tensors, weights_path)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        model.double()  # loading into float32 would round
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as err:
        raise CheckpointError(f"{weights_path} does not fit {config_path}: {err}") from err
    return model.eval()


def _image_spec_and_thresholds(
    config: Mapping[str, Any],
) -> tuple[ImageSpec | None, dict[str, float]]:
    spec = config.get("image_spec")
    thresholds = files.check_thresholds(config.get("thresholds", {}))
    return None if spec is None else ImageSpec.from_dict(spec), thresholds


def read_config(path: Path) -> dict[str, Any]:
    """A config.json of a format that can be read here."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; a folder of save_pretrained holds {CONFIG} and "
            f"{WEIGHTS}"
        ) from err
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} cannot be read as JSON: {err}") from err
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(config).__name__}")
    files.check_format(
        config.get("format"), FOLDER_FORMAT, config.get("tinyvit_version"), str(path)
    )
    return config


# -- without torch ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredModel:
    """A TinyViT as its file has it, for what runs it without torch."""

    arguments: Mapping[str, Any]  # those of ``TinyViT`` that give its network
    tensors: Mapping[str, NDArray[Any]]  # those of its state dict
    image_spec: ImageSpec | None  # how images are prepared; None where the file does not say
    thresholds: Mapping[str, float]  # of the masks of these weights
    heads: Mapping[str, NDArray[Any]]  # a SAM's prompt encoder and mask decoder, under its names
    path: Path
    family: str  # whose key names the file has
    classes: tuple[str, ...] = ()  # names of the head's classes, where the file says them

    @property
    def num_classes(self) -> int:
        """Outputs of the classification head; 0 without one."""
        return len(self.tensors.get("head.weight", ()))

    def without_head(self) -> StoredModel:
        """The same, without a classification head."""
        kept = {key: x for key, x in self.tensors.items() if not key.startswith(_OF_HEAD)}
        return replace(self, arguments={**self.arguments, "head": False}, tensors=kept, classes=())

    def state_dict(self) -> Mapping[str, NDArray[Any]]:
        """The tensors."""
        return self.tensors


def arguments_of(model: TinyViT | StoredModel) -> Mapping[str, Any]:
    """The constructor arguments of a model."""
    return model.arguments if isinstance(model, StoredModel) else model.arguments()


def leave_to_torch() -> AbstractContextManager[None]:
    """Around ``open_stored``: torch, where installed, may read it, or say more of an error."""
    return nullcontext() if find_spec("torch") is None else suppress(CheckpointError)


def open_stored(
    source: str | os.PathLike[str],
    img_size: int | None = None,
    progress: Progress | None = None,
    name: str | None = None,
) -> StoredModel:
    """The model of a checkpoint's name, a safetensors file or a folder; torch is not loaded.

    A variant ``name`` must be that of the file. ``img_size``, ``progress`` and errors are
    ``create_model``'s; a SAM's heads are compared with a network by who runs them.
    """
    folder = Path(source)
    config: dict[str, Any] = {}
    if folder.is_dir() and not is_sam_folder(folder):  # which says all in its weights' header
        path, row, config = folder / WEIGHTS, None, read_config(folder / CONFIG)
    else:
        path, row = find_checkpoint(source, progress=progress)
    arrays, header = files.read_arrays(path)
    files.check_finite(arrays, path)
    found = detect(arrays, path.name, header, compare=False)
    check_encoder(found, path)
    tensors = to_canonical(arrays, found.family)
    parts = group_by_part(tensors)
    kept = (keys for part, keys in parts.items() if part in _PARTS_OF_TINYVIT)
    own = {key: tensors[key] for keys in kept for key in keys}
    for key in [key for key in own if key.endswith(".running_var")]:  # some files have no counters
        own.setdefault(key.replace("running_var", "num_batches_tracked"), np.zeros((), np.int64))
    heads = {key: value for key, value in tensors.items() if key.partition(".")[0] in HEADS}
    classes = tuple(map(str, config.get("classes") or files.classes_in(header, path) or ()))
    if len(classes) != len(own.get("head.weight", ())):
        classes = ()
    rest = heads, path, found.family, classes
    if "arguments" in config:
        image_spec, thresholds = _image_spec_and_thresholds(config)
        return StoredModel(config["arguments"], own, image_spec, thresholds, *rest)
    variant = _choose_variant(None, row, found)
    if name is not None and catalog.get_variant(name) != variant:
        itself = "no known variant" if variant is None else variant.name
        raise CheckpointError(f"{path} is {itself} and not {name}, and torch would have to fit it")
    arguments = {**_arguments(variant, found), "head": found.has_head}
    image_spec = _image_spec(files.image_spec_in(header, path), variant, row, found, img_size)
    thresholds = {**(row.thresholds if row else {}), **files.thresholds_in(header, path)}
    return StoredModel(arguments, own, image_spec, thresholds, *rest)
