"""The stages, ConvLayer (the first) and BasicLayer (the others), and the necks behind the last.

Shapes: B batch, C channels, H W height and width, L = H*W tokens in row-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .functional import Size, is_tracing
from .layers import Activation, LayerNorm2d, MBConv, PatchMerging, TinyViTBlock, to_pair

Downsample = Callable[..., nn.Module]
"""Called with (input_resolution, dim=, out_dim=, activation=), e.g. ``PatchMerging``."""


class Stage(nn.Module):
    """What both kinds of stage have: their blocks, their downsample, their declared size."""

    def __init__(
        self,
        make_block: Callable[..., nn.Module],
        dim: int,
        input_resolution: int | Size,
        depth: int,
        activation: Activation,
        drop_path: float | Sequence[float],
        downsample: Downsample | None,
        use_checkpoint: bool,
        out_dim: int | None,
    ) -> None:
        super().__init__()
        rates = drop_path_rates(drop_path, depth)
        self.dim = dim
        self.depth = depth
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList([make_block(drop_path=rate) for rate in rates])
        self.input_resolution = to_pair(input_resolution, "input_resolution")
        self.downsample: Any = None
        if downsample is not None:
            self.downsample = downsample(
                self.input_resolution,
                dim=dim,
                out_dim=dim if out_dim is None else out_dim,
                activation=activation,
            )

    def forward_blocks(self, x: Tensor, *size: Size) -> Tensor:
        """The blocks alone; each kind of stage has its own shapes."""
        for block in self.blocks:
            x = self.run_block(block, x, *size)
        return x

    def output_size(self, size: Size) -> Size:
        """(height, width) of the outgoing map for an incoming one."""
        if self.downsample is None:
            return size
        height, width = self.downsample.output_size(size)
        return height, width

    def declare(self, input_resolution: Size) -> Size:
        """Set the declared size of everything inside; returns that of the outgoing map."""
        for module in (self, *self.blocks, self.downsample):
            if hasattr(module, "input_resolution"):
                module.input_resolution = input_resolution
        return self.output_size(input_resolution)

    def run_block(self, block: nn.Module, *inputs: object) -> Tensor:
        """Call a block, by gradient checkpointing where that is asked for and gradients are on."""
        if not self.use_checkpoint or not torch.is_grad_enabled() or is_tracing():
            y: Tensor = block(*inputs)
        elif torch.compiler.is_compiling():  # the compiler keeps buffer updates out of recomputing
            y = checkpoint(block, *inputs, use_reentrant=False)
        else:
            y = checkpoint(
                block,
                *inputs,
                use_reentrant=False,  # the second run is in the backward pass
                context_fn=lambda: (nullcontext(), pause_batch_stats(block)),
            )
        return y

    def extra_repr(self) -> str:
        """The arguments that the children do not show."""
        return f"dim={self.dim}, input_resolution={self.input_resolution}, depth={self.depth}"


class ConvLayer(Stage):
    """Stage 1: MBConv blocks on a map, then the downsample.

    Args:
        dim: C.
        input_resolution: Declared (height, width).
        depth: Number of blocks.
        activation: Makes the activations.
        drop_path: One rate, or one for each block.
        downsample: Class of the module at the end, or None.
        use_checkpoint: Recompute the blocks in the backward pass instead of keeping their
            activations.
        out_dim: Channels after the downsample; None means ``dim``.
        conv_expand_ratio: Expansion of the blocks.

    Raises:
        ValueError: ``drop_path`` has a wrong length or a rate outside [0, 1].
    """

    def __init__(
        self,
        dim: int,
        input_resolution: int | Size,
        depth: int,
        activation: Activation,
        drop_path: float | Sequence[float] = 0.0,
        downsample: Downsample | None = None,
        use_checkpoint: bool = False,
        out_dim: int | None = None,
        conv_expand_ratio: float = 4.0,
    ) -> None:
        make_block = partial(MBConv, dim, dim, conv_expand_ratio, activation)
        common = dim, input_resolution, depth, activation, drop_path
        super().__init__(make_block, *common, downsample, use_checkpoint, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> tokens [B, L', out_dim], or the map where there is no downsample."""
        x = self.forward_blocks(x)
        y: Tensor = x if self.downsample is None else self.downsample(x)
        return y


class BasicLayer(Stage):
    """Stages 2 to 4: transformer blocks on tokens, then the downsample.

    Args:
        dim: C.
        input_resolution: Declared (height, width).
        depth: Number of blocks.
        num_heads: Heads of each block.
        window_size: Window side of each block.
        mlp_ratio: Hidden width of the MLPs over ``dim``.
        drop: Dropout probability in the MLPs.
        local_conv_size: Odd kernel side of the depthwise convolutions.
        drop_path: One rate, or one for each block.
        downsample: Class of the module at the end, or None.
        use_checkpoint: As for ``ConvLayer``.
        activation: Makes the activations.
        out_dim: Channels after the downsample; None means ``dim``.

    Raises:
        ValueError: ``drop_path`` has a wrong length, or an argument does not fit a block.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: int | Size,
        depth: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        downsample: Downsample | None = None,
        use_checkpoint: bool = False,
        local_conv_size: int = 3,
        activation: Activation = nn.GELU,
        out_dim: int | None = None,
    ) -> None:
        sizes = dim, input_resolution, num_heads, window_size, mlp_ratio, drop
        make_block = partial(
            TinyViTBlock, *sizes, local_conv_size=local_conv_size, activation=activation
        )
        common = dim, input_resolution, depth, activation, drop_path
        super().__init__(make_block, *common, downsample, use_checkpoint, out_dim)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Tokens [B, L, C] of a map of ``size`` -> [B, L', out_dim]; without downsample [B, L, C].

        ``size`` is (height, width), None means ``input_resolution``; a ValueError says that L is
        not height * width.
        """
        size = size or self.input_resolution
        x = self.forward_blocks(x, size)
        y: Tensor = x if self.downsample is None else self.downsample(x, size)
        return y


def drop_path_rates(drop_path: float | Sequence[float], depth: int) -> list[float]:
    """One rate for each of ``depth`` blocks, from one number or a sequence of ``depth`` numbers."""
    rates = drop_path if isinstance(drop_path, Sequence) else [drop_path] * depth
    if len(rates) != depth:
        raise ValueError(
            f"drop_path wants one rate for each of the {depth} blocks, got {len(rates)}: "
            f"{list(rates)}; pass {depth} rates or a single number"
        )
    return [float(rate) for rate in rates]


@contextmanager
def pause_batch_stats(module: nn.Module) -> Iterator[None]:
    """Compute with batch statistics as the mode says, but do not update the running ones.

    Gradient checkpointing runs a block's forward a second time; this keeps that second run from
    counting the same batch twice.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    try:
        for norm in norms:
            for name, buffer in [*norm.named_buffers(recurse=False)]:
                setattr(norm, name, buffer.clone())  # this run may write here; then it is dropped
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def make_neck(in_chans: int, neck_dim: int | None, neck_size: int | None) -> nn.Sequential | None:
    """SAM's neck (Kirillov et al., ICCV 2023), or EfficientSAM3's where its side is given."""
    if neck_dim is None:
        if neck_size is not None:
            raise ValueError(f"neck_size={neck_size} wants a neck, but neck_dim=None leaves it out")
        return None
    if neck_size is not None:
        return SAM3Neck(in_chans, neck_dim, neck_size)
    return nn.Sequential(
        nn.Conv2d(in_chans, neck_dim, kernel_size=1, bias=False),
        LayerNorm2d(neck_dim),
        nn.Conv2d(neck_dim, neck_dim, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(neck_dim),
    )


class SAM3Neck(nn.Sequential):
    """The head of EfficientSAM3's students: from TinyViT's map to one like SAM 3's image encoder's.

    1x1 convolution, batch norm, GELU, 3x3 convolution with bias, bilinear resize.

    Args:
        in_chans: Channels of the last stage.
        neck_dim: Channels of the embedding; SAM 3's are 1024.
        size: Side of the embedding; SAM 3's is 72.

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(self, in_chans: int, neck_dim: int = 1024, size: int = 72) -> None:
        if min(in_chans, neck_dim, size) < 1:
            raise ValueError(f"a neck wants positive numbers, got {in_chans}, {neck_dim}, {size}")
        super().__init__(
            nn.Conv2d(in_chans, neck_dim, kernel_size=1, bias=False),
            nn.BatchNorm2d(neck_dim),
            nn.GELU(),
            nn.Conv2d(neck_dim, neck_dim, kernel_size=3, padding=1),
        )
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, h, w] -> [B, neck_dim, size, size]."""
        for layer in self:
            x = layer(x)
        return F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)


class StageInfo(TypedDict):
    """One stage's map: channels, image pixels per position, and the module it comes from."""

    num_chs: int
    reduction: int
    module: str


class FeatureInfo(list[StageInfo]):
    """The stages' maps in depth order, with timm's accessors."""

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [stage["num_chs"] for stage in self]

    def reduction(self) -> list[int]:
        """Image pixels per position of each map, along one side."""
        return [stage["reduction"] for stage in self]

    def module_name(self) -> list[str]:
        """The module that each map comes from."""
        return [stage["module"] for stage in self]


def select_stages(indices: int | Sequence[int] | None, num_stages: int) -> tuple[int, ...]:
    """Stage numbers in depth order, each once; an int n means the last n, None means all."""
    if indices is None:
        return tuple(range(num_stages))
    if isinstance(indices, int):
        if indices > num_stages:
            raise ValueError(f"indices must name stages, at most {num_stages}, got {indices}")
        indices = range(num_stages - indices, num_stages)
    chosen = {i + num_stages if i < 0 else i for i in indices}
    if not chosen or not chosen <= set(range(num_stages)):
        raise ValueError(
            f"indices must name stages 0 to {num_stages - 1} (or -{num_stages} to -1), "
            f"got {tuple(indices)}"
        )
    return tuple(sorted(chosen))


def check_strides(strides: Sequence[int] | None, num_stages: int) -> tuple[int, ...]:
    """One stride for each merge between two stages; None means SAM's: 2, but 1 for the third."""
    if num_stages < 1:
        raise ValueError("depths must name at least one stage, got none")
    if strides is None:
        return tuple(1 if i == 2 else 2 for i in range(num_stages - 1))
    if len(strides) != num_stages - 1 or any(stride not in (1, 2) for stride in strides):
        raise ValueError(
            f"strides wants {num_stages - 1} numbers (1 or 2), one for each merge between "
            f"{num_stages} stages, got {tuple(strides)}"
        )
    return tuple(strides)


def check_stages(num_stages: int, **numbers: Sequence[int]) -> None:
    """Each argument must name every stage once, by a positive number."""
    for name, values in numbers.items():
        if len(values) != num_stages:
            raise ValueError(
                f"{name} wants {num_stages} numbers, one for each stage of depths, got {values}"
            )
        if min(values) < 1:
            raise ValueError(f"{name} must be positive, got {values}")


def make_stages(model: Any, use_checkpoint: bool) -> nn.ModuleList:
    """The stages that the model's attributes describe."""
    total, size = sum(model.depths), model.patch_embed.patches_resolution
    rates = [model.drop_path_rate * i / max(total - 1, 1) for i in range(total)]
    stages = nn.ModuleList()
    for i, depth in enumerate(model.depths):
        is_last = i == model.num_layers - 1
        common: dict[str, Any] = {
            "dim": model.embed_dims[i],
            "input_resolution": size,
            "depth": depth,
            "activation": nn.GELU,
            "drop_path": rates[sum(model.depths[:i]) :][:depth],
            "downsample": None if is_last else partial(PatchMerging, stride=model.strides[i]),
            "use_checkpoint": use_checkpoint,
            "out_dim": None if is_last else model.embed_dims[i + 1],
        }
        if not is_last:
            size = -(-size[0] // model.strides[i]), -(-size[1] // model.strides[i])
        if i == 0:
            stages.append(ConvLayer(**common, conv_expand_ratio=model.mbconv_expand_ratio))
            continue
        stage = BasicLayer(
            **common,
            num_heads=model.num_heads[i],
            window_size=model.window_sizes[i],
            mlp_ratio=model.mlp_ratio,
            drop=model.drop_rate,
            local_conv_size=model.local_conv_size,
        )
        stages.append(stage)
    return stages
