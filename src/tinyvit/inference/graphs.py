"""A TinyViT as an ONNX graph for other libraries, and where such graphs are kept.

One graph serves any size and any batch. ONNX Runtime and OpenVINO both read it; a file of it is
all that ``OpenVINOGraph`` needs to start without torch.

Facts: traced by torch's TorchScript exporter. The newer one, which goes through torch.export,
cannot take attention apart at dynamic sizes (torch 2.13), and gathers windows where this one
reshapes them. OpenVINO's own conversion of torch models gives a graph that is no faster, takes
three times as long, and reports its use to the publisher.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tinyvit.checkpoints.cache import cache_folder
from tinyvit.checkpoints.files import replacing
from tinyvit.errors import CheckpointError, MissingExtraError
from tinyvit.modules import TinyViT

from .copies import frozen_copy
from .fuse import reason_against

__all__ = ["INPUT", "OUTPUT", "cached_graph", "export_onnx", "fingerprint"]

INPUT, OUTPUT = "pictures", "features"
"""Names of the graph's input [N, C, H, W] and output, float32."""

_OPSET = 18
_FORM = 1
"""Raise it when ``export_onnx`` gives another graph for the same model."""


def export_onnx(model: TinyViT) -> bytes:
    """The model's ``forward`` in eval mode and float32, as the bytes of an ONNX file.

    Args:
        model: The model; it is not changed.

    Returns:
        A graph from ``INPUT`` [N, in_chans, H, W], of any N, H and W from 1, to ``OUTPUT``.

    Raises:
        MissingExtraError: onnx is not installed; torch's exporter wants it.
        ValueError: The model cannot be traced.
    """
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError(
            "making a graph of a model needs the package onnx, which is not installed; "
            "pip install 'tinyvit[openvino]' or 'tinyvit[onnx]'"
        )
    frozen = frozen_copy(model)
    example = torch.zeros(2, model.in_chans, 75, 58)
    axes = {0: "batch", 2: "height", 3: "width"}
    with (
        TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        file = Path(folder) / "graph.onnx"
        warnings.simplefilter("ignore")  # of its deprecation, and of torch's own use of itself
        try:
            torch.onnx.export(
                frozen,
                (example,),
                file,
                dynamo=False,
                opset_version=_OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: axes},
            )
        except (RuntimeError, TypeError, ValueError) as err:
            first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
            raise ValueError(
                f"this model cannot be made into an ONNX graph: {first}; use backend='torch'"
            ) from err
        return file.read_bytes()


def fingerprint(model: TinyViT) -> str | None:
    """What tells the graphs of two models apart, or None where the model's data do not tell.

    Args:
        model: The model.

    Returns:
        Hexadecimal SHA-256 of its architecture, its tensors and the versions that make the graph;
        None for a model with hooks or foreign modules.
    """
    if reason_against(model) is not None:
        return None
    settings = [
        (name, type(module).__qualname__, module.extra_repr())
        for name, module in model.named_modules()
    ]
    made_by = (_FORM, version("tinyvit"), torch.__version__, model.arguments(), settings)
    digest = hashlib.sha256(repr(made_by).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def cached_graph(model: TinyViT) -> Path | bytes:
    """The model's graph as a file in the cache folder; it is made if it is not there.

    Args:
        model: The model.

    Returns:
        The file ``graphs/<fingerprint>.onnx`` in tinyvit's cache folder; the graph itself where
        the model has no fingerprint or the folder cannot be written to.

    Raises:
        ValueError: The model cannot be traced.
    """
    key = fingerprint(model)
    if key is None:
        return export_onnx(model)
    path = cache_folder() / "graphs" / f"{key}.onnx"
    if path.is_file():
        return path
    graph = export_onnx(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replacing(path, lambda temporary: _write(temporary, graph))
    except (OSError, CheckpointError):  # read-only or full: the graph is as good from memory
        return graph
    return path


def _write(path: Path, graph: bytes) -> None:
    path.write_bytes(graph)
