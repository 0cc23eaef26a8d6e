"""Options that several verbs have in common, and the models and files that they name."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tinyvit.catalog import (
    CHECKPOINTS,
    DEFAULT_CHECKPOINT,
    Task,
    find_variant,
    get_checkpoint,
    get_variant,
    list_checkpoints,
    list_models,
    nearest,
)
from tinyvit.errors import CheckpointError
from tinyvit.folders.images import Item, list_images

from .console import Console

if TYPE_CHECKING:
    from tinyvit.factory import StoredModel
    from tinyvit.inference import Engine
    from tinyvit.modules import TinyViT
    from tinyvit.sam import Sam
    from tinyvit.sam.open import AnySam

MAX_PIXELS = 178_956_970  # images.decode's, which loads numpy


def one_of(*choices: str) -> Callable[[str], str]:
    """Takes one of these texts from the command line; another one is wrong usage."""

    def parse(text: str) -> str:
        if text in choices:
            return text
        if text == "fp16" and "bf16" in choices:
            from tinyvit.inference.backend import FP16_REFUSED

            raise typer.BadParameter(f"{FP16_REFUSED}.")
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, choices))}.")

    return parse


def matching(names: Sequence[str]) -> Callable[[str], list[str]]:
    """For the shell: those of the names that begin as what has been typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


matching_checkpoints = matching(list_checkpoints())
matching_models = matching(list_models())


Positive = Annotated[int, typer.Option(min=1)]
Natural = Annotated[int, typer.Option(min=0)]

SHARED = """
as_json (--json): Print one JSON object on stdout instead.
images (PICTURE_OR_FOLDER): JPEG, PNG, WebP, TIFF, BMP, GIF or PPM files. Folders are read with all
    folders in them; hidden files and folders are left out.
output (--output -o DIR): Folder to write to.
store (STORE): A path or an address.
sheet (FILE.png): Write a gallery to look at.
seed: What --limit draws with.
model (VARIANT): Build this variant for the checkpoint. By default the checkpoint says which.
checkpoint (NAME_OR_PATH): A name of 'tinyvit models', a file that holds a whole SAM, not an encoder
    alone, or for segment and serve a folder of 'tinyvit export', which needs no torch. By default
    tinyvit_sam_2m, which is small, weak, and needs no download.
size: Side of the model's input in pixels. By default the one it was trained for.
device: auto (a GPU if there is one), or a torch device: cpu, cuda, cuda:1, mps.
precision ([fp32|bf16|auto]): What to compute in; auto is bf16 where the hardware has it built in.
backend ([auto|torch|native|openvino|onnx]): What runs the encoder; auto takes what is installed.
threads: Threads that compute. By default the library chooses.
workers: Threads that read and write images meanwhile; 0: none. By default as many as there are
    cores, at most 4.
batch_size: Images computed together, at most.
max_pixels: Refuse images with more pixels than this; their memory grows with it.
overwrite: Write everything again; replace any file.
teacher (--teacher NAME_OR_FILE): Weights of a TinyViT by name or file, or an ONNX file; for
    features also timm:NAME and hf:NAME.
teacher_size: Side of the teacher's input, for ONNX files, which do not say it. Images are then
    prepared as timm's classifiers have them, or for features as SAM has them.
no_pad: Do not pad images to a square: less work where they are not square, and results that differ
    a little from those with padding, most of all near the edges.
"""
"""Help of options that mean the same in several verbs, as in the ``Options:`` of a verb."""


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run."""

    device: str = "auto"
    precision: str = "fp32"
    backend: str = "auto"
    threads: Positive | None = None

    def arguments(self, checkpoint: str | None) -> dict[str, Any]:
        """What they mean for an ``Engine`` of this checkpoint; torch's threads are set here."""
        from tinyvit.inference.bundle import engine_for, is_exported

        found = {name: one for name, one in asdict(self).items() if one is not None}
        engine = engine_for(checkpoint, self.backend, self.device)
        if engine == "torch":
            found.pop("threads", None)
        if self.threads is not None and engine != "native" and not is_exported(checkpoint):
            import torch

            torch.set_num_threads(self.threads)  # one number for the whole process
        return found


@dataclass(frozen=True)
class FolderOptions(EngineOptions):
    """How it is run on many images."""

    workers: Natural | None = None
    pad: bool = True

    def arguments(self, checkpoint: str | None) -> dict[str, Any]:
        """The same; a model that pads or does not by itself is left to it."""
        found = super().arguments(checkpoint)
        return found if found.pop("pad") else found | {"pad": False}


_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_GOOD_CLASSIFIER = "tiny_vit_5m_224.dist_in22k_ft_in1k"


def file_of(text: str) -> Path:
    """The file of a path, a folder or the name of a checkpoint; fetches nothing."""
    from tinyvit.checkpoints import cached_path
    from tinyvit.checkpoints.open import find_checkpoint

    check_checkpoint(text)
    if text in list_checkpoints():
        there = cached_path(get_checkpoint(text))
        if not there.is_file():
            raise CheckpointError(
                f"{text} is not on this machine yet; fetch it with: tinyvit download {text}"
            )
        return there
    if (Path(text) / _WEIGHTS).is_file():
        return Path(text) / _WEIGHTS
    return find_checkpoint(text)[0]


def list_and_check(images: Sequence[Path], output: Path, checkpoint: str | None) -> list[Item]:
    """The images; refuses at once an output folder that cannot be written, or no checkpoint."""
    check_checkpoint(checkpoint)
    check_folder(output, "-o")
    return list_images(images, output)


def check_folder(output: Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written, before the work and not after it."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{str(output)!r} is a file; give a folder to write to")
    missing = [place for place in (output, *output.parents) if not place.exists()]
    try:
        if missing:  # if the outermost can be made, the others can
            missing[-1].mkdir()
            missing[-1].rmdir()
        elif not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as err:
        raise ValueError(
            f"the folder {str(output)!r} cannot be written: {err.strerror}; name another with "
            f"{flag}"
        ) from err


def check_checkpoint(text: str | None, flag: str = "") -> None:
    """Refuse at once what is neither a name nor there, and is no teacher of another library."""
    if text is None or text in list_checkpoints() or (text and Path(text).exists()):
        return
    if not text:
        raise CheckpointError("the name of the checkpoint is empty; give a name or a file")
    if flag and text.startswith(("timm:", "hf:")):  # of what is trained
        return
    if Path(text).suffix.lower() in (*SUFFIXES, ".onnx") or Path(text).name != text:
        raise CheckpointError(
            f"no such file: {text}{f' for {flag}' if flag else ''}; check the path, or name a "
            "checkpoint of 'tinyvit models'"
        )
    hint = nearest(text, list_checkpoints(), f", and there is no file {text!r}.", 0.7)
    raise CheckpointError(f"unknown checkpoint {text!r}{hint} List them with 'tinyvit models'")


def is_exported(checkpoint: str | None, size: int | None = None, model: str | None = None) -> bool:
    """Whether this is a folder of 'tinyvit export', which refuses --size and --model."""
    from tinyvit.inference.bundle import is_exported as found

    if not found(checkpoint):
        return False
    if size is not None or model is not None:
        raise ValueError(
            f"{checkpoint} was exported at one size of one model; leave "
            f"{'--size' if size is not None else '--model'} out"
        )
    return True


def load_sam(own: Console, checkpoint: str | None, size: int | None) -> Sam:
    """A whole SAM of a name or a file; None is the embedded one."""
    return cast("Sam", open_sam(own, checkpoint, size, "torch"))


def open_sam(
    own: Console, checkpoint: str | None, size: int | None, backend: str, device: str = "auto",
    precision: str = "fp32", threads: int | None = None,
) -> AnySam:  # fmt: skip
    """As ``load_sam``, for a backend: torch is not loaded where it does not need it."""
    from tinyvit.checkpoints.open import is_sam_folder
    from tinyvit.sam import open as sams

    name = checkpoint or DEFAULT_CHECKPOINT
    if is_exported(checkpoint, size) and backend != "torch":
        return sams.open_sam(name, "tinyvit", backend, device, precision=precision, threads=threads)
    if name not in list_checkpoints() and Path(name).is_dir() and not is_sam_folder(name):
        raise CheckpointError(
            f"{name!r} is a folder without a whole SAM; give a file or a name with one, or such a "
            "folder"
        )
    announce(own, name)
    with own.progress("downloading", counts_bytes=True) as update:
        return sams.open_sam(name, "tinyvit", backend, device, img_size=size, progress=update)


def load_encoder(
    own: Console, checkpoint: str | None, model: str | None, size: int | None,
    running: EngineOptions,
) -> TinyViT | StoredModel:  # fmt: skip
    """A model whose ``forward`` gives a map: the neck's, or the last stage's without one."""
    from tinyvit.factory import StoredModel

    default = get_checkpoint(DEFAULT_CHECKPOINT).variant
    if checkpoint is None and model is not None and get_variant(model).name != default:
        raise ValueError(
            f"--model {model} needs a --checkpoint: the embedded {DEFAULT_CHECKPOINT} does not fit "
            f"it; {_suggestion(model)}"
        )
    built = open_model(own, checkpoint or DEFAULT_CHECKPOINT, model, size, running)
    if isinstance(built, StoredModel):
        return built if built.arguments["neck_dim"] is not None else built.without_head()
    if built.neck is None:
        built.norm_head = built.head = None  # features are wanted, not logits
    return built


def load_classifier(
    own: Console, checkpoint: str | None, model: str | None, size: int | None,
    running: EngineOptions,
) -> TinyViT | StoredModel:  # fmt: skip
    """A model with a classification head; warns where it is a SAM encoder's."""
    from tinyvit.factory import arguments_of

    hint = f"choose another with --checkpoint, {_suggestion(model, 'classification')}"
    if checkpoint is None:
        raise ValueError(f"the embedded {DEFAULT_CHECKPOINT} has no classification head; {hint}")
    if checkpoint in list_checkpoints():
        variant = get_variant(get_checkpoint(checkpoint).variant)
        if variant.task != "classification":
            raise CheckpointError(
                f"{checkpoint} is a SAM encoder and has no trained classification head; {hint}"
            )
    built = open_model(own, checkpoint, model, size, running)
    sizes = arguments_of(built)
    if not sizes["head"] or not built.num_classes:
        raise CheckpointError(f"{checkpoint} has no classification head; {hint}")
    if sizes["neck_dim"] is not None:
        warnings.warn(
            f"{checkpoint} is a SAM encoder; the classification head in such files was mostly "
            "never trained",
            stacklevel=2,
        )
    return built


def announce_engine(own: Console, checkpoint: str, engine: Engine) -> None:
    """Say what computes: in short, and with ``--debug`` all that is known and why."""
    height, width = engine.image_spec.size
    short = f"{engine.summary()}, input {width}x{height}"
    own.say(f"{checkpoint}: {engine.explain() if own.is_debug else short}")


def announce(own: Console, checkpoint: str, cache_dir: Path | None = None) -> None:
    """Say what is about to be fetched, from where and under which licence."""
    from tinyvit.checkpoints import cached_path

    if checkpoint not in list_checkpoints():
        return
    row = get_checkpoint(checkpoint)
    if not row.embedded and not cached_path(row, cache_dir).is_file():
        own.say(f"fetching {row.name} ({row.licence}), published at {row.source}")


def variant_of(model: TinyViT | StoredModel) -> str | None:
    """The name of the catalog's variant with this model's sizes, or None."""
    from tinyvit.factory import arguments_of

    return find_variant(arguments_of(model))


def open_model(
    own: Console, checkpoint: str, model: str | None, size: int | None,
    running: EngineOptions | None = None,
) -> TinyViT | StoredModel:  # fmt: skip
    """A model as its file has it, fetched if need be.

    For ``running`` torch is not loaded where the native engine runs the file as it is.
    """
    from tinyvit.factory import create_model, leave_to_torch, load_folder, open_stored
    from tinyvit.inference.bundle import engine_for

    engine = running and engine_for(checkpoint, running.backend, running.device)
    is_folder = checkpoint not in list_checkpoints() and (Path(checkpoint) / _CONFIG).is_file()
    if is_folder and (model is not None or size is not None):
        raise ValueError(
            f"{checkpoint} is a folder that says itself which model it is and how images "
            "are prepared; leave --model and --size out"
        )
    announce(own, checkpoint)
    with own.progress("downloading", counts_bytes=True) as update:
        if engine == "native":
            with leave_to_torch():
                return open_stored(checkpoint, size, update, model)
        if is_folder:
            return load_folder(Path(checkpoint) / _CONFIG, Path(checkpoint) / _WEIGHTS)
        return create_model(model, checkpoint, img_size=size, progress=update)


def _suggestion(variant: str | None, task: Task | None = None) -> str:
    """What to name for a variant: the last of its checkpoints, which is the best known."""
    rows = [row for row in CHECKPOINTS if variant in (None, row.variant)]
    names = [row.name for row in rows if task in (None, get_variant(row.variant).task)]
    if variant is None or not names:
        names = [_GOOD_CLASSIFIER] if task == "classification" else ["a file of your own"]
    return f"for example {names[-1]} ('tinyvit models' lists all)"
