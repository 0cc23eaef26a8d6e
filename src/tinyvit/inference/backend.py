"""What runs a network: the protocols, and the choice of device and precision. Imports no torch.

``Encoder`` and ``Decoder`` are what promptable segmentation needs of whatever computes, and are
numpy at the surface. A ``Backend`` runs a network on batches of tensors inside an ``Engine``; any
object with its members can be passed as ``Engine(backend=...)``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol, TypeGuard, TypeVar, get_args, runtime_checkable

from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.lazy import need_torch

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from tinyvit.factory import StoredModel
    from tinyvit.images.preprocess import PreparedImage
    from tinyvit.modules import TinyViT

BackendName = Literal["auto", "torch", "native", "openvino", "onnx"]
Precision = Literal["fp32", "bf16", "auto"]

PRECISION_OF_DTYPE = {  # as text, so that torch is not loaded
    "torch.float32": "fp32",
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
}

FP16_REFUSED = (
    "precision 'fp16' is refused: it ends at 65504, and sums of squares in the neck's LayerNorm "
    "were measured above that; no file says how large its values get, and on a CPU it was no "
    "faster than 'fp32'; use 'bf16', which is fast and has the range of 'fp32'"
)
"""The measurement is that of ``benchmarks/proof.py``."""


class Encoder(Protocol):
    """Gives the features of prepared images; ``Engine`` is one."""

    @property
    def image_spec(self) -> ImageSpec:
        """How images are prepared."""

    @property
    def precision(self) -> str:
        """What it computes in, "fp32" or "bf16"."""

    def weights_sha256(self) -> str:
        """The hash of the weights, as in ``checkpoints.files``; ValueError: it has none to name."""

    def encode(self, inputs: Iterable[PreparedImage], *, stages: bool = False) -> Iterator[Encoded]:
        """The features of each input, in order; with the maps of the stages where asked for."""


class Prepared(Protocol):
    """What a decoder computed of an embedding for all prompts on it; held by the caller."""

    @property
    def nbytes(self) -> int:
        """How much memory it holds."""


EmbeddingT = TypeVar("EmbeddingT", contravariant=True)
PromptsT = TypeVar("PromptsT", contravariant=True)
PreparedT = TypeVar("PreparedT", bound=Prepared)


class Decoder(Protocol[EmbeddingT, PromptsT, PreparedT]):
    """Gives masks for prompts on an embedding; generic in ``sam``'s values."""

    def prepare(self, embedding: EmbeddingT) -> PreparedT:
        """What all prompts on this embedding share, computed once."""

    def decode(
        self, prepared: PreparedT, prompts: PromptsT, multimask_output: bool = True
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Prompts of one kind -> (low-res logits [N, K, h4, w4], predicted IoU [N, K])."""

    def masks(
        self, low_res_logits: NDArray[np.float32], placement: Placement, threshold: float
    ) -> NDArray[np.bool_]:
        """Low-res logits [N, K, h4, w4] -> masks [N, K, H, W] in the image's own pixels."""


@runtime_checkable
class Backend(Protocol):
    """Runs a network on prepared images."""

    @property
    def name(self) -> str:
        """What runs, in a word, e.g. "torch"."""

    @property
    def device(self) -> str:
        """Where it runs, e.g. "cpu" or "cuda:0"."""

    def __call__(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> the network's output, float32: [N, C, h, w] or [N, classes]."""

    def close(self) -> None:
        """Give back what is held; the backend is not used afterwards."""


@runtime_checkable
class StageBackend(Backend, Protocol):
    """A backend that also gives the maps of the stages."""

    def stages(self, batch: Tensor) -> list[Tensor]:
        """[N, 3, H, W] float32 -> the map of each stage, [N, C, h, w] float32."""

    def with_stages(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What a call and ``stages`` give, from one pass."""


@runtime_checkable
class EarlyBackend(Backend, Protocol):
    """A backend that also gives the early map that Light HQ-SAM's decoder wants."""

    def with_early(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] float32 -> what a call gives, and the map behind the second merge.

        That map is [N, h, w, D] float32.
        """


@runtime_checkable
class LogitsBackend(Backend, Protocol):
    """A backend that also gives a classifier's logits."""

    def logits(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> [N, classes] float32.

        Raises:
            ValueError: What runs has no logits.
        """


@dataclass(frozen=True)
class Encoded:
    """What an encoder gives for one image.

    Attributes:
        features: [C, h, w] (or [classes] for a classifier) float32.
        placement: Where the image lies in the model's input; maps coordinates both ways.
        stages: The map of each stage, [C, h, w] float32, where asked for; else None.
        pooled: One vector [C] float32 for the image, where asked for; else None: the mean over the
            cells that cover the image, or, of a classifier, what its last layer sees.
        early: Light HQ-SAM's early map [h, w, D] float32, where asked for; else None.
    """

    features: NDArray[np.float32]
    placement: Placement
    stages: tuple[NDArray[np.float32], ...] | None = None
    pooled: NDArray[np.float32] | None = None
    early: NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        height, width = self.placement.original_size
        stages = "" if self.stages is None else f", {len(self.stages)} stages"
        return f"Encoded({list(self.features.shape)}, image {height}x{width}{stages})"


def choose_device(device: str) -> str:
    """The device to use; "auto" takes a GPU if there is one. ValueError: it cannot be used."""
    need_torch(f"device={device!r}")
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ValueError(
            "device must be 'auto' or a device that torch can use here, got "
            f"{device!r}: {first_words(err)}"
        ) from err
    return device


def first_words(err: Exception) -> str:
    """The first line of an error of torch, or its kind where it has none."""
    return (str(err).strip().splitlines() or [type(err).__name__])[0]


def choose_precision(precision: str, device: str) -> tuple[Literal["fp32", "bf16"], str]:
    """The precision to compute in on a device of ``choose_device``, and why in words.

    A ValueError refuses unknown ones, and "fp16" with the reason.
    """
    if precision == "fp16":
        raise ValueError(FP16_REFUSED)
    if precision == "fp32":
        return "fp32", "exact; the default"
    if precision == "bf16":
        return "bf16", "asked for"
    if precision != "auto":
        raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
    import torch

    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported()
    else:
        native = device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if native:
        return "bf16", "this device computes bf16 natively"
    return "fp32", "this device does not compute bf16 natively"


def takes_native(backend: object, device: str) -> bool:
    """Whether a checkpoint is for the native engine; torch is not loaded to find out.

    "auto" takes it on a CPU, where it is installed. A GPU is looked for where torch could use one.
    """
    if backend == "native":
        return True
    if backend != "auto" or device not in ("auto", "cpu") or find_spec("tinyvit_native") is None:
        return False
    if device == "cpu" or find_spec("torch") is None or version("torch").endswith("+cpu"):
        return True
    return sys.platform != "darwin" and choose_device("auto") == "cpu"


def check_settings(backend: str, device: str, threads: int | None) -> None:
    """Refuse what a library on this machine's CPU cannot do."""
    if device not in ("auto", "cpu"):
        raise ValueError(f"backend {backend!r} runs on device 'cpu', got {device!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, or None for the default, got {threads}")


def choose_backend(
    model: TinyViT | StoredModel | None,
    backend: BackendName | Backend = "auto",
    device: str = "auto",
    precision: str | torch.dtype = "fp32",
    threads: int | None = None,
) -> tuple[Backend, str]:
    """The backend to run a model with, and what was chosen and why in words.

    "auto" is the native engine on a CPU where it is installed, else torch; OpenVINO and ONNX
    Runtime are taken only by name. Arguments and errors are those of ``Engine``.
    """
    precision = PRECISION_OF_DTYPE.get(str(precision), str(precision))
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
    from tinyvit.factory import StoredModel

    if isinstance(model, StoredModel) or (is_tiny_vit(model) and takes_native(backend, device)):
        from .native_backend import NativeBackend

        native = NativeBackend(model, device, precision, threads, falls_back=backend == "auto")
        return native, native.choice
    if not is_tiny_vit(model):
        raise TypeError(
            f"Engine wants a TinyViT, as tinyvit.create_model gives it, or the name, file or "
            f"folder of one, got {type(model).__name__}"
        )
    if backend in ("openvino", "onnx"):
        from . import graph_backend

        kind = {"openvino": graph_backend.OpenVINOBackend, "onnx": graph_backend.OnnxBackend}
        graph = kind[backend](model, device, precision, threads)
        return graph, graph.explain()
    if threads is not None:
        raise ValueError(
            f"threads={threads} cannot be set for backend 'torch' alone: torch has one number for "
            f"the whole process; call torch.set_num_threads({threads})"
        )
    import torch

    from .torch_backend import TorchBackend

    place = choose_device(device)
    chosen, reason = choose_precision(precision, place)
    words = f"torch {torch.__version__} on {place}, {chosen} ({reason})"
    if backend == "auto" and place == "cpu":
        words += "; auto is torch: measured level with openvino, and native is not installed"
    return TorchBackend(model, place, chosen), words


def is_tiny_vit(model: object) -> TypeGuard[TinyViT]:
    """Whether this is a TinyViT; torch is not loaded to find out."""
    modules = sys.modules.get("tinyvit.modules")
    return modules is not None and isinstance(model, modules.TinyViT)
