"""TinyViT (Wu et al., ECCV 2022): stem, stages, neck and head; feature maps; learning rates."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from .functional import Size, is_tracing, to_map
from .layers import PatchEmbed, Stem, freeze_batch_stats, to_pair
from .stage import (
    FeatureInfo,
    Stage,
    check_stages,
    check_strides,
    make_neck,
    make_stages,
    select_stages,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from tinyvit.image_spec import ImageSpec

NO_DECAY = "attention_biases"


class ParamGroup(TypedDict):
    """One group for a ``torch.optim`` optimiser."""

    params: list[nn.Parameter]
    lr: float
    lr_scale: float
    weight_decay: float


def set_lr_scales(model: TinyViT, decay: float) -> None:
    """Give every parameter its ``lr_scale`` attribute.

    The rate of block i of n, in depth order, is scaled by decay ** (n - 1 - i). The stem goes with
    the first block, a stage's downsample with its last block; heads and neck have scale 1.
    """
    for parameter in model.parameters():
        parameter.lr_scale = 1.0  # type: ignore[attr-defined]
    last = sum(model.depths) - 1
    scaled: list[tuple[nn.Module, float]] = [(model.patch_embed, decay**last)]
    i = 0
    for stage in model.stages():
        for block in stage.blocks:
            scaled.append((block, decay ** (last - i)))
            i += 1
        if stage.downsample is not None:
            scaled.append((stage.downsample, decay ** (last - i + 1)))
    for module, scale in scaled:
        for parameter in module.parameters():
            parameter.lr_scale = scale  # type: ignore[attr-defined]


class FeatureMaps(nn.Module):
    """A TinyViT that returns the maps of some stages, for detectors and dense heads.

    Args:
        encoder: The model. Build it with ``neck_dim=None, head=False``, so that no parameter is
            left without a gradient.
        out_indices: Stages, as for ``TinyViT.forward_intermediates``.

    Raises:
        ValueError: An index is unknown.

    Examples:
        >>> import torch
        >>> from tinyvit.modules import FeatureMaps, TinyViT
        >>> encoder = TinyViT(embed_dims=(16, 32, 64, 96), num_heads=(1, 1, 2, 3),
        ...                   strides=(2, 2, 2), neck_dim=None, head=False)
        >>> maps = FeatureMaps(encoder, out_indices=(1, 2, 3)).eval()
        >>> [tuple(m.shape) for m in maps(torch.zeros(1, 3, 100, 75))]
        [(1, 32, 13, 10), (1, 64, 7, 5), (1, 96, 4, 3)]
    """

    def __init__(self, encoder: TinyViT, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.out_indices = select_stages(out_indices, encoder.num_layers)
        info = encoder.feature_info
        self.feature_info = FeatureInfo(info[i] for i in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> one [B, C, h, w] for each stage of ``out_indices``."""
        maps = self.encoder.forward_intermediates(x, self.out_indices, intermediates_only=True)
        return maps if isinstance(maps, list) else maps[1]


def init_weights(module: nn.Module) -> None:
    """Linear layers start from a normal of std 0.02, their biases from 0."""
    if isinstance(module, nn.Linear):
        # The published file truncates at +-2, a hundred deviations away; looking for what lies
        # beyond would take most of the constructor's time.
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class TinyViT(nn.Module):
    """The compact vision transformer, for any image size from 1x1 up.

    With a neck (the default) ``forward`` gives SAM's image embedding. Built with ``neck_dim=None``
    it is a classifier: ``forward`` gives logits, as timm's and Cream's models do. ``classify``
    gives logits in both cases.

    Args:
        img_size: Declared image size in pixels, one number or (height, width). Any other size
            may be passed at any time.
        in_chans: Input channels.
        num_classes: Classes of ``head``; 0 leaves the linear layer out.
        embed_dims: Channels of the stages.
        depths: Blocks of the stages.
        num_heads: Attention heads of the stages (the first stage has no attention).
        window_sizes: Window sides of the stages.
        mlp_ratio: Hidden width of the MLPs over their channels.
        drop_rate: Dropout probability in the MLPs.
        drop_path_rate: Stochastic depth of the last block; the rates rise linearly from 0.
        use_checkpoint: Gradient checkpointing: slower training with far less memory.
        mbconv_expand_ratio: Expansion of the first stage's blocks.
        local_conv_size: Odd kernel side of the depthwise convolutions.
        layer_lr_decay: Layer-wise learning rate decay, see ``param_groups``.
        strides: Stride of each merge between two stages. SAM encoders have (2, 2, 1) and
            classifiers (2, 2, 2); a state dict's shapes do not tell which. None means SAM's: 2,
            and 1 for the third merge.
        stem: "conv", or "pointwise" (LiteMedSAM).
        neck_dim: Channels of the neck's output; None leaves the neck out.
        neck_size: None builds SAM's neck. A number builds the neck of EfficientSAM3's students
            (``SAM3Neck``), whose map has this side whatever the image; theirs is 72.
        head: Build ``norm_head`` and ``head``. SAM checkpoints carry them unused.

    Attributes:
        image_spec: How images are prepared for these weights; None for a model built by hand.
        thresholds: Of the masks of the mask decoder that belongs to these weights, as their file
            states them; a subset of mask_threshold, pred_iou_thresh, stability_score_thresh and
            stability_score_offset.
        classes: Names of the head's classes, as the file of these weights states them, or none.

    Raises:
        ValueError: Arguments that contradict each other; the message names both.
    """

    image_spec: ImageSpec | None
    thresholds: dict[str, float]
    classes: tuple[str, ...]

    def __init__(
        self,
        img_size: int | Size | list[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (7, 7, 14, 7),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        use_checkpoint: bool = False,
        mbconv_expand_ratio: float = 4.0,
        local_conv_size: int = 3,
        layer_lr_decay: float = 1.0,
        *,
        strides: Sequence[int] | None = None,
        stem: Stem = "conv",
        neck_dim: int | None = 256,
        neck_size: int | None = None,
        head: bool = True,
    ) -> None:
        super().__init__()
        self.image_spec = None
        self.thresholds, self.classes = {}, ()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dims = tuple(embed_dims)
        self.depths = tuple(depths)
        self.num_heads = tuple(num_heads)
        self.window_sizes = tuple(window_sizes)
        self.num_layers = len(self.depths)
        self.strides = check_strides(strides, self.num_layers)
        check_stages(
            self.num_layers,
            embed_dims=self.embed_dims,
            num_heads=self.num_heads,
            window_sizes=self.window_sizes,
        )
        self.mlp_ratio = mlp_ratio
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate
        self.mbconv_expand_ratio = mbconv_expand_ratio
        self.local_conv_size = local_conv_size
        self.stem: Stem = stem
        self.neck_dim, self.neck_size = neck_dim, neck_size
        size = to_pair(img_size, "img_size")
        self.img_size: int | Size = size[0] if size[0] == size[1] else size
        self.patch_embed = PatchEmbed(in_chans, self.embed_dims[0], size, nn.GELU, stem)
        self.patches_resolution = self.patch_embed.patches_resolution
        self.layers = make_stages(self, use_checkpoint)
        self.apply(init_weights)
        self.norm_head: nn.Module | None = None
        self.head: nn.Module | None = None
        if head:
            self.reset_classifier(num_classes)
        self.neck = make_neck(self.embed_dims[-1], neck_dim, neck_size)
        self.set_layer_lr_decay(layer_lr_decay)
        self.register_load_state_dict_post_hook(_restore_lr_scales)  # type: ignore[no-untyped-call]

    def stages(self) -> list[Stage]:
        """The stages in depth order, as what they are."""
        return [stage for stage in self.layers if isinstance(stage, Stage)]

    # -- image in, features out -------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Image embedding of a model with a neck; logits of one without.

        Args:
            x: [B, in_chans, H, W], floating point, normalised.

        Returns:
            [B, neck_dim, h, w], h = neck_size or, for SAM's strides, ceil(H / 16); without a neck
            [B, num_classes], or the last stage's map where there is no head either.

        Raises:
            ValueError: ``x`` has another rank or number of channels, or no pixels.
            TypeError: ``x`` is not floating point.
        """
        if self.neck is None and self.head is not None:
            return self.classify(x)
        return self.forward_features(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The neck's output [B, neck_dim, h, w]; without a neck the last stage's map."""
        x = self.forward_backbone(x)
        return x if self.neck is None else self.neck(x)

    def forward_backbone(self, x: Tensor) -> Tensor:
        """The last stage's map, [B, embed_dims[-1], h, w], before neck and head."""
        return self._forward_stages(x, (), self.num_layers - 1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the positions, ``norm_head``, ``head``.

        Args:
            x: The last stage's map [B, C, h, w], from ``forward_backbone``.
            pre_logits: Stop before ``head``.

        Returns:
            Logits [B, num_classes], or features [B, C].

        Raises:
            ValueError: The model has no head.
        """
        if self.norm_head is None or self.head is None:
            raise ValueError(
                "this TinyViT was built without a classification head; "
                "build it with head=True or call reset_classifier(num_classes)"
            )
        x = self.norm_head(x.mean((2, 3)))
        return x if pre_logits else self.head(x)

    def classify(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_chans, H, W]."""
        return self.forward_head(self.forward_backbone(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps at the end of the stages, before each downsample, as timm gives them.

        Args:
            x: [B, in_chans, H, W].
            indices: Stages, negative from the end; an int n means the last n; None means all.
            stop_early: Do not compute what comes after the last stage asked for; the first value
                returned then is that stage's map.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: Return the list alone.

        Returns:
            (``forward_features``' output, [map of each stage asked for, in depth order]); channels
            and reductions are those of ``feature_info``.

        Raises:
            ValueError: An index or ``output_fmt`` is unknown.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        wanted = select_stages(indices, self.num_layers)
        stop_early = stop_early or intermediates_only
        last = wanted[-1] if stop_early else self.num_layers - 1
        x, maps = self._forward_stages(x, wanted, last)
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        if intermediates_only:
            return maps
        return (x if stop_early or self.neck is None else self.neck(x)), maps

    def forward_hq(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What Light HQ-SAM's mask decoder wants.

        Returns:
            (``forward_features``' output, output of ``layers[1]`` with its downsample as a map
            [B, h, w, embed_dims[2]]).

        Raises:
            ValueError: The model has fewer than three stages.
        """
        if self.num_layers < 3:
            raise ValueError(f"forward_hq wants at least 3 stages, got {self.num_layers}")
        merged: list[Tensor] = []
        x = self._forward_stages(x, (), self.num_layers - 1, merged)[0]
        return (x if self.neck is None else self.neck(x)), merged[1]

    def _forward_stages(
        self, x: Tensor, wanted: Sequence[int], last: int, merged: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the stem and the stages up to ``last``; returns (its map, the wanted stages' maps).

        A stage whose own map is wanted runs in two steps, before and after its downsample.
        ``merged`` receives each stage's output, downsample included, as [B, h, w, C].
        """
        self._check_input(x)
        if not torch.compiler.is_exporting():  # strides are sizes that torch.export must prove
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.patch_embed(x)
        size: Size = (x.shape[2], x.shape[3])
        maps: list[Tensor] = []
        for i, stage in enumerate(self.stages()[: last + 1]):
            where = (size,) if i else ()
            if stage.downsample is None:
                x = stage(x, *where)
            elif i in wanted or i == last:
                x = stage.forward_blocks(x, *where)
            if i in wanted:
                maps.append(_as_map(x, size))
            if i == last:
                break
            x = stage.downsample(x, *where) if i in wanted else stage(x, *where)
            size = stage.output_size(size)
            if merged is not None:
                merged.append(to_map(x, size))
        return _as_map(x, size), maps

    def _check_input(self, x: Tensor) -> None:
        if is_tracing():
            return
        if not isinstance(x, Tensor):
            raise TypeError(
                f"TinyViT wants a tensor [batch, {self.in_chans}, height, width], came "
                f"{type(x).__name__}; tinyvit.Engine takes images of other kinds"
            )
        if x.ndim != 4 or x.shape[1] != self.in_chans or x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(
                f"TinyViT wants images [batch, {self.in_chans}, height, width] of at least 1x1, "
                f"got {list(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"TinyViT wants normalised floating-point images, got {x.dtype}; "
                f"tinyvit.Engine takes uint8 images and prepares them"
            )

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels and reduction of each stage's map, as timm describes them."""
        info = FeatureInfo()
        reduction = self.patch_embed.reduction
        for i, (width, stride) in enumerate(zip(self.embed_dims, (*self.strides, 1), strict=True)):
            info.append({"num_chs": width, "reduction": reduction, "module": f"layers.{i}.blocks"})
            reduction *= stride  # a merge's stride counts for the next stage
        return info

    # -- timm's conveniences -------------------------------------------------------------------

    @property
    def num_features(self) -> int:
        """Channels of the last stage's map, and so of ``forward_head(..., pre_logits=True)``."""
        return self.embed_dims[-1]

    head_hidden_size = num_features

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Size, mean and std (of pixels in 0..1), interpolation and classes, in timm's words."""
        spec = self.image_spec
        size = (self.img_size,) * 2 if isinstance(self.img_size, int) else self.img_size
        config: dict[str, Any] = {
            "architecture": "tiny_vit",
            "num_classes": self.num_classes if self.head is not None else 0,
            "input_size": (self.in_chans, *size),
            "first_conv": "patch_embed.seq.0.c",
            "classifier": "head",
        }
        if spec is not None:
            mean, std = (tuple(v / 255 for v in values) for values in (spec.mean, spec.std))
            config |= {"mean": mean, "std": std, "interpolation": spec.interpolation}
            config["crop_mode"] = "center" if spec.resize == "crop" else spec.resize
            if spec.shorter_side is not None:
                config["crop_pct"] = min(spec.size) / spec.shorter_side
        return config

    default_cfg = pretrained_cfg

    def get_classifier(self) -> nn.Module | None:
        """The linear layer to the classes; None for a model built without a head."""
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for timm's layer-wise learning rates.

        Args:
            coarse: One group a stage instead of one a block.
        """
        blocks: list[tuple[str, tuple[int] | None]] = [(r"^layers\.(\d+)", None)]
        if not coarse:
            blocks = [
                (r"^layers\.(\d+)\.downsample", (0,)),
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            ]
        return {
            "stem": r"^patch_embed",
            "blocks": [*blocks, (r"^(?:norm_head|head|neck)", (99999,))],
        }

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages behind the last one asked for, in place.

        Args:
            indices: As for ``forward_intermediates``.
            prune_norm: Drop ``norm_head``; here it goes with the head.
            prune_head: Drop head and neck, which fit the last stage only.

        Returns:
            The stages asked for.

        Raises:
            ValueError: Head or neck would stay behind another stage.
        """
        wanted = select_stages(indices, self.num_layers)
        count = wanted[-1] + 1
        if prune_head or prune_norm:
            self.norm_head = self.head = self.neck = self.neck_dim = self.neck_size = None
            self.num_classes = 0
        elif count < self.num_layers:
            raise ValueError(
                f"head and neck belong to stage {self.num_layers - 1}, not {count - 1}; "
                "prune them too (prune_head=True)"
            )
        if count < self.num_layers:
            self.layers = self.layers[:count]
            self.stages()[-1].downsample = None
            self.num_layers, self.strides = count, self.strides[: count - 1]
            for name in ("embed_dims", "depths", "num_heads", "window_sizes"):
                setattr(self, name, getattr(self, name)[:count])
        return list(wanted)

    # -- settings ------------------------------------------------------------------------------

    def reset_classifier(self, num_classes: int) -> None:
        """Put in a fresh ``head`` for another number of classes; 0 leaves the linear layer out."""
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        width = self.embed_dims[-1]
        like = next(self.parameters())
        if self.norm_head is None:
            self.norm_head = nn.LayerNorm(width).to(like).train(self.training)
        head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        init_weights(head)
        self.head = head.to(like).train(self.training)
        self.num_classes, self.classes = num_classes, ()
        for parameter in (*self.norm_head.parameters(), *self.head.parameters()):
            parameter.lr_scale = 1.0  # type: ignore[attr-defined]

    def set_imgsz(self, imgsz: int | Size | list[int] = (1024, 1024)) -> None:
        """Declare an image size; never needed, since sizes come from the tensor.

        Raises:
            TypeError: Not whole numbers.
            ValueError: Not one or two positive numbers.
        """
        size = to_pair(imgsz, "imgsz")
        self.img_size = size[0] if size[0] == size[1] else size
        self.patch_embed.declare(size)
        self.patches_resolution = size = self.patch_embed.patches_resolution
        for layer in self.stages():
            size = layer.declare(size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing on or off in every stage."""
        for layer in self.stages():
            layer.use_checkpoint = enable

    def freeze_batch_stats(self, frozen: bool = True) -> Self:
        """Keep all batch norms on their running statistics, also through ``train()``."""
        return freeze_batch_stats(self, frozen)

    def set_layer_lr_decay(self, layer_lr_decay: float) -> None:
        """Set the ``lr_scale`` attribute of every parameter (see ``learning_rates``)."""
        self.layer_lr_decay = float(layer_lr_decay)
        set_lr_scales(self, self.layer_lr_decay)

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[ParamGroup]:
        """Trainable parameters as optimiser groups: layer-wise rates, no decay on vectors.

        Examples:
            >>> import torch, tinyvit
            >>> model = tinyvit.TinyViT(layer_lr_decay=0.8)
            >>> optimizer = torch.optim.AdamW(model.param_groups(lr=1e-3, weight_decay=0.05))
        """
        groups: dict[tuple[float, float], ParamGroup] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            scale: float = getattr(parameter, "lr_scale", 1.0)
            decay = 0.0 if parameter.ndim <= 1 or name.endswith(NO_DECAY) else weight_decay
            group = groups.setdefault(
                (scale, decay),
                {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay},
            )
            group["params"].append(parameter)
        return list(groups.values())

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of the names of parameters that take no weight decay."""
        return {NO_DECAY}

    def no_weight_decay(self) -> set[str]:
        """Names of the attention biases, which take no weight decay (timm's convention)."""
        return {name for name, _ in self.named_parameters() if name.endswith(NO_DECAY)}

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments that give this architecture, as plain JSON-able data."""
        now = {**vars(self), "head": self.head is not None}
        now["use_checkpoint"] = any(stage.use_checkpoint for stage in self.stages())
        values = {name: now[name] for name in inspect.signature(TinyViT).parameters}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle; parameters lose plain attributes on the way."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        set_lr_scales(self, self.layer_lr_decay)


def _as_map(x: Tensor, size: Size) -> Tensor:
    return x if x.ndim == 4 else to_map(x, size).permute(0, 3, 1, 2)  # [B, C, h, w]


def _restore_lr_scales(model: nn.Module, _: object) -> None:
    """After loading with ``assign=True`` the parameters are new objects."""
    if isinstance(model, TinyViT):
        set_lr_scales(model, model.layer_lr_decay)
