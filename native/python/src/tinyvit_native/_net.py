"""A network of the native library: numpy arrays in, numpy arrays out.

Shapes: B images, C channels, H W height and width, h w those of a map.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _abi

Floats = NDArray[np.float32]


class NativeError(RuntimeError):
    """The library failed for another reason than a wrong argument."""


@dataclass(frozen=True)
class Config:
    """The network's sizes; hidden widths, kernel sides and classes follow from the tensors.

    Attributes:
        embed_dims: Channels of the stages.
        depths: Blocks of the stages.
        num_heads: Attention heads of the stages; the first one is not used.
        window_sizes: Window sides of the stages; the first one is not used.
        strides: Of each merge between two stages, 1 or 2.
        in_chans: Channels of the images.
        stem: "conv", or "pointwise" (LiteMedSAM).
        end: What follows the last stage: "sam" (a neck), "sam3" (EfficientSAM3's) or None.
        end_size: Side of the embedding for "sam3".
        head: Whether there are tensors of a classification head.
    """

    embed_dims: Sequence[int] = (64, 128, 160, 320)
    depths: Sequence[int] = (2, 2, 6, 2)
    num_heads: Sequence[int] = (2, 4, 5, 10)
    window_sizes: Sequence[int] = (7, 7, 14, 7)
    strides: Sequence[int] = (2, 2, 1)
    in_chans: int = 3
    stem: Literal["conv", "pointwise"] = "conv"
    end: Literal["sam", "sam3"] | None = "sam"
    end_size: int = 72
    head: bool = False


def version() -> str:
    """The library's version."""
    return str(library().tinyvit_version().decode())


def abi_version() -> int:
    """The version of the C interface that this package speaks."""
    return _abi.ABI_VERSION


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 natively; else "bf16" works, and is slow."""
    return bool(library().tinyvit_has_bf16())


class Net:
    """A TinyViT that runs in the native library. Threads may share it; its calls then take turns.

    Args:
        config: The network's sizes.
        tensors: float32 arrays under their names in TinyViT's state dict. They are copied; what
            the network does not have is passed over.
        precision: "fp32", or "bf16" (maps and products; sums stay fp32).
        threads: Threads of a call; 0 means as many as the process has CPUs.
        isa: "generic", "avx2", "avx512", "avx512bf16" or "amx"; None means the best one here, or
            the one that the environment variable ``TINYVIT_ISA`` names.

    Raises:
        ValueError: A tensor is missing or has another shape than the config says.
        NativeError: This processor lacks the instructions.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, NDArray[Any]],
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
        threads: int = 0,
        isa: str | None = None,
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
        self.config = config
        self._handle = ctypes.c_void_p()
        struct = _to_struct(config, precision, threads, isa)
        array, count, kept = to_tensors(tensors)
        call("tinyvit_create", struct, array, count, ctypes.byref(self._handle))
        del kept

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle:
            library().tinyvit_destroy(handle)
            self._handle = ctypes.c_void_p()

    def encode(self, images: NDArray[Any], **how: Any) -> Floats:
        """The embedding [B, C, h, w]; the arguments are those of ``run``."""
        return self.run(images, embedding=True, **how)["embedding"]

    def logits(self, images: NDArray[Any], **how: Any) -> Floats:
        """The logits [B, classes]; the arguments are those of ``run``."""
        return self.run(images, logits=True, **how)["logits"]

    def stages(self, images: NDArray[Any], **how: Any) -> list[Floats]:
        """The map [B, C, h, w] of each stage, before its merge."""
        which = tuple(range(len(self.config.depths)))
        out = self.run(images, stages=which, **how)
        return [out[f"stage{i}"] for i in which]

    def run(
        self,
        images: NDArray[Any],
        *,
        embedding: bool = False,
        logits: bool = False,
        stages: Sequence[int] = (),
        early: bool = False,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        padded: tuple[int, int] | None = None,
        channels_last: bool = False,
    ) -> dict[str, Floats]:
        """One pass for everything that is asked for.

        Args:
            images: float32 [B, C, H, W], normalised; or uint8 [B, H, W, C] with mean and std.
            embedding: Give "embedding", [B, C, h, w].
            logits: Give "logits", [B, classes].
            stages: Give "stage0" and so on, [B, C, h, w].
            early: Give "early", [B, h, w, C], the map behind the second merge.
            mean: Of each channel of bytes, in 0 to 255.
            std: Likewise.
            padded: (height, width) that the normalised images are padded to with zeros at the
                bottom and right.
            channels_last: Give maps as [B, h, w, C].

        Returns:
            float32 arrays.

        Raises:
            ValueError: The images or the wishes do not fit the network.
        """
        kept, pixels = self._to_images(images, mean, std, padded)
        out = _abi.Outputs(layout=int(channels_last))
        sizes = self.sizes(*(padded or (pixels.height, pixels.width)))
        results: dict[str, Floats] = {}

        def give(name: str, shape: Sequence[int]) -> int:
            results[name] = np.empty((pixels.batch, *shape), np.float32)
            return int(results[name].ctypes.data)

        def as_map(chw: tuple[int, ...]) -> tuple[int, ...]:
            return (*chw[1:], chw[0]) if channels_last else chw

        if embedding:
            out.embedding = give("embedding", as_map(sizes["embedding"]))
        if logits:
            out.logits = give("logits", sizes["logits"])
        for i in stages:
            if not 0 <= i < len(self.config.depths):
                raise ValueError(f"stages must be 0 to {len(self.config.depths) - 1}, got {i}")
            out.stages[i] = give(f"stage{i}", as_map(sizes[f"stage{i}"]))
        if early:
            out.early = give("early", (*sizes["early"][1:], sizes["early"][0]))
        if pixels.batch:
            call("tinyvit_encode", self._handle, ctypes.byref(pixels), ctypes.byref(out))
        del kept
        return results

    def sizes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """(C, h, w) of "embedding", "stage0" ... and "early", (classes,) of "logits".

        Raises:
            ValueError: A side is not positive.
        """
        struct = _abi.Sizes()
        call("tinyvit_measure", self._handle, height, width, ctypes.byref(struct))
        sizes = {f"stage{i}": tuple(struct.stages[i]) for i in range(struct.num_stages)}
        return sizes | {
            "embedding": tuple(struct.embedding),
            "early": tuple(struct.early),
            "logits": (struct.num_logits,),
        }

    def describe(self) -> dict[str, Any]:
        """Instruction set, precision, threads, and bytes of weights and workspace."""
        info = _abi.Info()
        call("tinyvit_describe", self._handle, ctypes.byref(info))
        return {
            "isa": info.isa.decode(),
            "precision": ("fp32", "bf16")[info.precision],
            "threads": info.threads,
            "is_native": bool(info.is_native),
            "weight_bytes": info.weight_bytes,
            "workspace_bytes": info.workspace_bytes,
        }

    def trim(self) -> None:
        """Give the workspace back to the system; the next call takes a new one."""
        library().tinyvit_trim(self._handle)

    def _to_images(
        self,
        images: NDArray[Any],
        mean: Sequence[float],
        std: Sequence[float],
        padded: tuple[int, int] | None,
    ) -> tuple[NDArray[Any], _abi.Images]:
        chans = self.config.in_chans
        if images.dtype == np.uint8:
            shape, axis = "[batch, height, width, {}] of uint8", 3
            if len(mean) != chans or len(std) != chans:
                raise ValueError(f"images of uint8 want mean and std of {chans} channels")
        else:
            shape, axis = "[batch, {}, height, width] of float32", 1
        if images.ndim != 4 or images.shape[axis] != chans:
            raise ValueError(f"images must be {shape.format(chans)}, got {list(images.shape)}")
        is_bytes = axis == 3
        data = np.ascontiguousarray(images, np.uint8 if is_bytes else np.float32)
        height, width = data.shape[1:3] if is_bytes else data.shape[2:4]
        struct = _abi.Images(
            pixels=int(is_bytes), data=data.ctypes.data, batch=len(data), height=height, width=width
        )
        if padded is not None:
            struct.padded_height, struct.padded_width = padded
        if is_bytes:
            struct.mean[:chans], struct.std[:chans] = mean, std
        return data, struct


def _to_struct(config: Config, precision: str, threads: int, isa: str | None) -> _abi.ConfigStruct:
    stages = len(config.depths)
    if not 1 <= stages <= _abi.MAX_STAGES:
        raise ValueError(f"depths must name 1 to {_abi.MAX_STAGES} stages, got {stages}")
    struct = _abi.ConfigStruct(
        in_chans=config.in_chans,
        num_stages=stages,
        stem=("conv", "pointwise").index(config.stem),
        end=(None, "sam", "sam3").index(config.end),
        end_size=config.end_size,
        head=int(config.head),
        precision=("fp32", "bf16").index(precision),
        threads=threads,
        isa=isa.encode() if isa else None,
    )
    for name in ("embed_dims", "depths", "num_heads", "window_sizes", "strides"):
        values = tuple(getattr(config, name))
        wanted = stages - 1 if name == "strides" else stages
        if len(values) != wanted:
            raise ValueError(f"{name} wants {wanted} numbers for {stages} stages, got {values}")
        getattr(struct, name)[:wanted] = values
    return struct


def to_tensors(tensors: Mapping[str, NDArray[Any]]) -> tuple[Any, int, list[NDArray[Any]]]:
    """The structures of the floating-point arrays, their number, and the memory they point to."""
    kept, items = [], []
    for name, value in tensors.items():
        if np.ndim(value) > 4 or not np.issubdtype(value.dtype, np.floating):
            continue
        data = np.ascontiguousarray(value, np.float32)
        kept.append(data)
        item = _abi.Tensor(name=name.encode(), data=data.ctypes.data, ndim=data.ndim)
        item.shape[: data.ndim] = data.shape
        items.append(item)
    return (_abi.Tensor * max(len(items), 1))(*items), len(items), kept


_loaded: list[ctypes.CDLL] = []


def library() -> ctypes.CDLL:
    if not _loaded:
        _loaded.append(_abi.load(_abi.find_library()))
    return _loaded[0]


def call(name: str, *arguments: Any) -> None:
    """Call a function that reports errors.

    Raises:
        ValueError: A wrong argument.
        MemoryError: Out of memory.
        NativeError: Anything else.
    """
    error = _abi.Error()
    status = getattr(library(), name)(*arguments, ctypes.byref(error))
    if status == 0:
        return
    text = error.message.decode(errors="replace")
    kind = {1: ValueError, 3: MemoryError}.get(status, NativeError)
    raise kind(text)
