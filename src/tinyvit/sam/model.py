"""``Sam``: image encoder, prompt encoder and mask decoder as one module, and how one is built.

Names, arguments and results are those of segment-anything. A file is read once; prompt encoder and
mask decoder are built to the encoder's width, grid and strides, and filled. The heads' numbers are
Segment Anything's (Kirillov et al., 2023), as in MobileSAM.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.catalog import DEFAULT_CHECKPOINT, VARIANTS, get_checkpoint, get_variant
from tinyvit.checkpoints.open import OpenedCheckpoint, check_parts, open_checkpoint
from tinyvit.factory import create_model, load_exactly
from tinyvit.image_spec import IMAGENET_MEAN, IMAGENET_STD, ImageSpec
from tinyvit.images.preprocess import normalise_and_pad
from tinyvit.modules import TinyViT
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder as HQMaskDecoder
from tinyvit.modules.sam.mask_decoder import MaskDecoder as MaskDecoder
from tinyvit.modules.sam.mask_decoder import TwoWayTransformer as TwoWayTransformer
from tinyvit.modules.sam.prompt_encoder import PromptEncoder as PromptEncoder

from .embedding import spec_of
from .prompts import Size

if TYPE_CHECKING:
    from typing_extensions import NotRequired


class SamInput(TypedDict):
    """One image and its prompts, as ``Sam.forward`` takes them.

    Attributes:
        image: [3, h, w] RGB in 0..255, resized to the model's input size, not padded.
        original_size: (H, W) of the image before resizing.
        point_coords: [B, P, 2], (x, y) in pixels of the model's input.
        point_labels: [B, P]: 1 the object, 0 not the object, -1 no point at all.
        boxes: [B, 4], (x0, y0, x1, y1) in pixels of the model's input.
        mask_inputs: [B, 1, mask h, mask w] low-res logits of an earlier prediction.
    """

    image: Tensor
    original_size: Size
    point_coords: NotRequired[Tensor]
    point_labels: NotRequired[Tensor]
    boxes: NotRequired[Tensor]
    mask_inputs: NotRequired[Tensor]


class SamOutput(TypedDict):
    """What ``Sam.forward`` finds in one image.

    Attributes:
        masks: [B, C, H, W] bool, in the original image.
        iou_predictions: [B, C], the network's own estimate of each mask's IoU.
        low_res_logits: [B, C, mask h, mask w], for a further prediction.
    """

    masks: Tensor
    iou_predictions: Tensor
    low_res_logits: Tensor


class Sam(nn.Module):
    """Promptable segmentation.

    Args:
        image_encoder: A TinyViT with a neck.
        prompt_encoder: Of the encoder's grid.
        mask_decoder: Of the encoder's width.
        pixel_mean: Three numbers, subtracted from RGB in 0..255.
        pixel_std: Three numbers by which the difference is divided.

    Attributes:
        mask_threshold: Logits above it are mask.
        image_format: The order of an image's channels.
        thresholds: Of these weights' masks, as their file states them: a subset of mask_threshold,
            pred_iou_thresh, stability_score_thresh and stability_score_offset.
    """

    mask_threshold: float = 0.0
    image_format: str = "RGB"
    thresholds: dict[str, float]
    image_encoder: TinyViT
    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        image_encoder: TinyViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.thresholds = {}
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        mean, std = (torch.tensor(list(v)).view(-1, 1, 1) for v in (pixel_mean, pixel_std))
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    @torch.no_grad()
    def forward(
        self,
        batched_input: Sequence[SamInput],
        multimask_output: bool,
        hq_token_only: bool = False,
    ) -> list[SamOutput]:
        """Segment images, each by prompts of its own.

        Images that have one size after ``preprocess`` are encoded together. No gradients: to
        train, call the three parts.

        Args:
            batched_input: One ``SamInput`` for each image.
            multimask_output: Give the masks of an ambiguous prompt instead of the single one.
            hq_token_only: For Light HQ-SAM: give the high-quality mask alone.

        Returns:
            One ``SamOutput`` for each image.

        Raises:
            ValueError: An image or a prompt has a wrong shape, or points come without labels.
        """
        encoded = self._encode([self.preprocess(record["image"]) for record in batched_input])
        outputs: list[SamOutput] = []
        for record, (embedding, early) in zip(batched_input, encoded, strict=True):
            low_res, iou = self._decode(record, embedding, early, multimask_output, hq_token_only)
            size = record["image"].shape[-2:]
            masks = self.postprocess_masks(low_res, size, record["original_size"])
            masks = masks > self.mask_threshold
            outputs.append({"masks": masks, "iou_predictions": iou, "low_res_logits": low_res})
        return outputs

    def preprocess(self, x: Tensor) -> Tensor:
        """Normalise pixels, and pad with zeros at the bottom and right to the model's input size.

        An encoder whose ``image_spec`` says ``pad=False`` takes images of any size unpadded.

        Args:
            x: RGB in 0..255, [3, h, w] or [N, 3, h, w].

        Returns:
            The same rank, in the model's floating-point type: [..., 3, H, W].

        Raises:
            ValueError: The image is larger than the model's input, or has no three channels.
        """
        spec = spec_of(self)
        if not spec.pad and x.ndim > 1:
            spec = replace(spec, size=(int(x.shape[-2]), int(x.shape[-1])))
        normalised = normalise_and_pad(x.to(self.pixel_mean.dtype), spec)
        return normalised if x.ndim == 4 else normalised[0]

    def postprocess_masks(
        self, masks: Tensor, input_size: Sequence[int], original_size: Sequence[int]
    ) -> Tensor:
        """Bring low-res logits into the original image: enlarge, cut the padding off, resize.

        Args:
            masks: [B, C, mask h, mask w] logits.
            input_size: (h, w) of the image in the model's input, without padding.
            original_size: (H, W) of the original image.

        Returns:
            [B, C, H, W] logits.
        """
        if masks.shape[0] == 0:
            return masks.new_zeros((0, masks.shape[1], *original_size))
        prompts = self.prompt_encoder
        covered = [  # by these masks: less than the whole input for an image without padding
            round(side * pixels / logits)
            for side, pixels, logits in zip(
                masks.shape[-2:], prompts.input_image_size, prompts.mask_input_size, strict=True
            )
        ]
        masks = F.interpolate(masks, covered, mode="bilinear", align_corners=False)
        masks = masks[..., : input_size[0], : input_size[1]]
        return F.interpolate(masks, list(original_size), mode="bilinear", align_corners=False)

    def _encode(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Each [3, H, W] -> (embedding [1, C, h, w], early map for an HQ decoder)."""
        found: dict[int, tuple[Tensor, Tensor | None]] = {}
        for shape in {image.shape: None for image in images}:
            members = [index for index, image in enumerate(images) if image.shape == shape]
            batch = torch.stack([images[index] for index in members])
            rows: Iterable[tuple[Tensor, Tensor | None]]
            if isinstance(self.mask_decoder, HQMaskDecoder):
                embeddings, early = self.image_encoder.forward_hq(batch)
                rows = zip(embeddings[:, None], early[:, None], strict=True)
            else:
                rows = ((row, None) for row in self.image_encoder(batch)[:, None])
            found.update(zip(members, rows, strict=True))
        return [found[index] for index in range(len(images))]

    def _decode(
        self,
        record: SamInput,
        embedding: Tensor,
        early: Tensor | None,
        multimask_output: bool,
        hq_token_only: bool,
    ) -> tuple[Tensor, Tensor]:
        """(low-res logits, predicted IoU) of one image's prompts."""
        coords, labels = record.get("point_coords"), record.get("point_labels")
        if (coords is None) != (labels is None):
            raise ValueError(
                "point_coords [B, P, 2] and point_labels [B, P] go together as tensors, got "
                f"{type(coords).__name__} and {type(labels).__name__}"
            )
        points = None if coords is None or labels is None else (coords, labels)
        prompts = points, record.get("boxes"), record.get("mask_inputs")
        more = (hq_token_only, early) if isinstance(self.mask_decoder, HQMaskDecoder) else ()
        heads = self.prompt_encoder, self.mask_decoder
        return decode_prompts(heads, embedding, prompts, multimask_output, *more)


def decode_prompts(
    heads: tuple[PromptEncoder, MaskDecoder],
    embedding: Tensor,
    prompts: tuple[tuple[Tensor, Tensor] | None, Tensor | None, Tensor | None],
    *more: object,
) -> tuple[Tensor, Tensor]:
    """(low-res logits, predicted IoU) of points, boxes and masks on an embedding [1, C, h, w].

    ``more`` are the mask decoder's arguments after the four tensors.
    """
    prompt_encoder, mask_decoder = heads
    grid = embedding.shape[2], embedding.shape[3]
    sparse, dense = prompt_encoder(*prompts, grid)
    logits, iou = mask_decoder(embedding, prompt_encoder.get_dense_pe(grid), sparse, dense, *more)
    return logits, iou


# -- building -------------------------------------------------------------------------------------

_SAMS = [row.name for row in VARIANTS if row.task == "sam"]
_UNTRAINED = "tiny_vit_5m_sam"
_MASK_IN_CHANS = 16
_DEPTH, _HEADS, _MLP_DIM = 2, 8, 2048  # of the transformer


def build_sam(
    checkpoint: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    *,
    img_size: int | Size | None = None,
    is_hq: bool = False,
    sha256: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Sam:
    """Build a promptable model, in eval mode on the CPU.

    Args:
        checkpoint: A name of ``tinyvit.list_checkpoints()``, or the path of a file of any family
            that holds a whole SAM. None gives an untrained model, as segment-anything does.
        variant: A SAM variant of ``tinyvit.list_models()``. None takes the checkpoint's sizes, or
            without one those of MobileSAM.
        img_size: Side of the model's input in pixels, or its (height, width); None takes the
            checkpoint's or variant's. The weights fit every size.
        is_hq: Give an untrained model Light HQ-SAM's mask decoder; a checkpoint shows it.
        sha256: Hash that a downloaded file must have.
        progress: Called with (bytes there, bytes in all or None) during a download.

    Returns:
        The model. With Light HQ-SAM's weights its mask decoder is an ``HQMaskDecoder``.

    Raises:
        ValueError: An unknown variant, or one that is no SAM.
        CheckpointError: The file cannot be read, holds no prompt encoder or mask decoder, or does
            not fit; every missing and unexpected key and every wrong shape is named.
        DownloadError: The checkpoint cannot be fetched.

    Warns:
        UserWarning: Neither checkpoint nor variant is given, so the model is untrained.

    Examples:
        >>> from tinyvit.sam import build_sam
        >>> sam = build_sam("tinyvit_sam_2m")
        >>> sam.prompt_encoder.image_embedding_size, sam.prompt_encoder.mask_input_size
        ((16, 16), (64, 64))
    """
    if variant is not None and get_variant(variant).task != "sam":
        raise ValueError(f"{variant!r} is a classifier; a SAM is one of {', '.join(_SAMS)}")
    if checkpoint is None:
        if variant is None:
            warnings.warn(
                "this SAM is untrained, and its masks mean nothing until weights are loaded; for "
                f"trained ones give a checkpoint, such as build_sam({DEFAULT_CHECKPOINT!r})",
                stacklevel=2,
            )
        return _assemble(create_model(variant or _UNTRAINED), is_hq, img_size)
    opened, is_whole = open_checkpoint(checkpoint, sha256, progress, compare=False), False
    check_parts(opened.found.parts, opened.path, opened.found.family)
    try:
        is_hq = "hq_decoder" in opened.found.parts
        sam = _assemble(create_model(variant, opened), is_hq, img_size)
        _fill_heads(sam, opened)
        own = {k.removeprefix("image_encoder."): t.shape for k, t in sam.state_dict().items()}
        found = {key: tensor.shape for key, tensor in opened.tensors.items()}
        extra = own.items() ^ found.items()
        is_whole = all(k.endswith("num_batches_tracked") and k not in found for k, _ in extra)
    finally:
        if not is_whole:  # more, less or other than the model: refuse what does not add up itself
            open_checkpoint(opened.path)
    sam.thresholds = dict(opened.thresholds)
    sam.mask_threshold = sam.thresholds.get("mask_threshold", sam.mask_threshold)
    return sam


def _assemble(encoder: TinyViT, is_hq: bool, img_size: int | Size | None) -> Sam:
    """Heads for an encoder: of its width, and of its grid at the size it is declared for."""
    if img_size is not None:
        encoder.set_imgsz(img_size)
    width = encoder.embed_dims[-1] if encoder.neck_dim is None else encoder.neck_dim
    declared = encoder.img_size
    size = (declared, declared) if isinstance(declared, int) else declared
    spec = encoder.image_spec if encoder.image_spec is not None else ImageSpec.sam(size)
    encoder.image_spec = spec = spec if spec.size == size else replace(spec, size=size)
    stride = encoder.patch_embed.reduction * math.prod(encoder.strides)
    grid = (-(-size[0] // stride), -(-size[1] // stride))
    # Whole strides: where the stride does not divide a side, a part of the last token is empty.
    covered = (grid[0] * stride, grid[1] * stride)
    kind = partial(HQMaskDecoder, vit_dim=encoder.embed_dims[2]) if is_hq else MaskDecoder
    transformer = TwoWayTransformer(_DEPTH, width, _HEADS, _MLP_DIM)
    decoder = kind(transformer_dim=width, transformer=transformer, iou_head_hidden_dim=width)
    prompt_encoder = PromptEncoder(width, grid, covered, _MASK_IN_CHANS)
    return Sam(encoder, prompt_encoder, decoder, spec.mean, spec.std).eval()


def _fill_heads(sam: Sam, opened: OpenedCheckpoint) -> None:
    """Load prompt encoder and mask decoder: all of both, or an error that names everything."""
    heads = nn.ModuleDict({"prompt_encoder": sam.prompt_encoder, "mask_decoder": sam.mask_decoder})
    state = {k: v for k, v in opened.tensors.items() if k.partition(".")[0] in heads}
    width = sam.prompt_encoder.embed_dim
    whose = f"{opened.path} ({opened.found.family})"
    load_exactly(heads, state, f"{whose} does not fit the heads of a SAM of width {width}")


def _build_default(
    checkpoint: str | os.PathLike[str] | None = DEFAULT_CHECKPOINT,
    *,
    img_size: int | Size | None = None,
) -> Sam:
    """The embedded weights, or any other checkpoint; None gives those sizes untrained."""
    variant = get_checkpoint(DEFAULT_CHECKPOINT).variant if checkpoint is None else None
    return build_sam(checkpoint, variant, img_size=img_size)


class UnknownModelError(KeyError):
    """A name that ``sam_model_registry`` does not have."""

    __str__ = Exception.__str__  # KeyError's puts quotation marks around


class _Registry(dict[str, Callable[..., Sam]]):
    def __missing__(self, name: str) -> Callable[..., Sam]:
        raise UnknownModelError(
            f"unknown SAM {name!r}; tinyvit reads SAMs with a TinyViT encoder only, such as "
            f"MobileSAM ('vit_t'), and not Segment Anything's ViT-B, L and H; there are "
            f"{', '.join(self)}"
        )


sam_model_registry: Mapping[str, Callable[..., Sam]] = MappingProxyType(
    _Registry(
        {
            "default": _build_default,
            "vit_t": partial(build_sam, variant="tiny_vit_5m_sam"),
            "tiny_vit_5m": partial(build_sam, variant="tiny_vit_5m_sam"),
            "tiny_vit_11m": partial(build_sam, variant="tiny_vit_11m_sam"),
            "tiny_vit_21m": partial(build_sam, variant="tiny_vit_21m_sam"),
            **{name: partial(build_sam, variant=name) for name in _SAMS},
        }
    )
)
"""Name -> builder, as in segment-anything: ``sam_model_registry["vit_t"](checkpoint="…")``.

``vit_t`` is MobileSAM. Every builder gives an untrained model without a checkpoint, but for
``default``, which takes the embedded one."""
