"""The networks as other programs load them: wrappers with the inputs and outputs they rely on.

The decoder has the interface of segment-anything's ONNX exporter, which labelling tools have in
common. Weights of another input size than the 1024 that such tools hard-code are adapted: the
padded input is shrunk by a whole factor before the encoder, and coordinates, masks and embeddings
are carried over in the graph.

Traced by torch's TorchScript exporter: the newer one (torch 2.13) fails on the encoder at dynamic
sizes; ``tests/export/test_export.py`` says when it no longer does.

Shapes: P points, K masks, C channels, S the input's side, g the embedding's grid, H W the image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.image_spec import ImageSpec
from tinyvit.modules import TinyViT
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder
from tinyvit.modules.sam.prompt_encoder import PromptEncoder
from tinyvit.sam.model import Sam

Graph: TypeAlias = (
    "tuple[nn.Module, Sequence[Tensor], Sequence[str], Sequence[str], Mapping[str, dict[int, str]]]"
)
"""(module, example, inputs, outputs, axes that may have any length)."""

MaskOutput = Literal["full", "low-res", "crop"]
Part = Literal["encoder", "classifier", "features"]
"""What a network alone gives: an image embedding, logits, or the maps of all stages."""

STRIDE = 16  # pixels of a cell of the embedding
POINT_LABELS = (-1, 0, 1, 2, 3)  # padding, not the object, the object, a box's two corners


class EncoderGraph(nn.Module):
    """An image encoder with what its consumer leaves to it.

    Args:
        encoder: The network.
        spec: How images are prepared.
        layout: "nchw": normalised [N, 3, H, W]; "hwc": one RGB image [H, W, 3] in 0..255, which is
            normalised and padded in the graph.
        side: The input's side S that the consumer works with.
        factor: By which the input is shrunk before the encoder; 1 for weights of that side.
        positions: Give these positions of the embedding's grid, too.
    """

    def __init__(
        self,
        encoder: nn.Module,
        spec: ImageSpec,
        layout: Literal["nchw", "hwc"] = "nchw",
        side: int = 1024,
        factor: int = 1,
        positions: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.layout, self.side, self.factor = encoder, layout, side, factor
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1))
        self.positions: Tensor | None
        self.register_buffer("positions", positions)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The input as the layout says -> [N, C, g, g]."""
        if self.layout == "hwc":
            x = (x.permute(2, 0, 1) - cast(Tensor, self.mean)) / cast(Tensor, self.std)
            x = F.pad(x, (0, self.side - x.shape[2], 0, self.side - x.shape[1]))[None]
        if self.factor > 1:
            x = F.avg_pool2d(x, self.factor)
        x = self.encoder(x)
        if self.factor > 1:
            x = x.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)
        if self.positions is None:
            return x
        return x, self.positions.expand(x.shape[0], -1, -1, -1)


class DecoderGraph(nn.Module):
    """Prompt encoder and mask decoder behind segment-anything's six inputs.

    Args:
        sam: The model.
        single_mask: Give the best mask alone; the mask of a clear prompt as soon as there are more
            than two points. All padding points count as one.
        masks: "full": logits in the image's own pixels; "low-res": leave them out; "crop": CVAT's
            uint8 mask [1, 1, h, w], cut to its box, with the box.
        factor: As of the encoder.
        drop_padding: Ignore padding points where a box is given.
    """

    def __init__(
        self,
        sam: Sam,
        *,
        single_mask: bool = False,
        masks: MaskOutput = "full",
        factor: int = 1,
        drop_padding: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(sam.mask_decoder, HQMaskDecoder):
            raise ValueError(
                "Light HQ-SAM needs a second embedding, which no consumer hands over; export a "
                "model with segment-anything's mask decoder"
            )
        self.prompt_encoder: PromptEncoder = sam.prompt_encoder
        self.mask_decoder: MaskDecoder = sam.mask_decoder
        self.threshold = sam.mask_threshold
        self.single_mask, self.masks, self.factor = single_mask, masks, factor
        self.drop_padding = drop_padding
        self.register_buffer("image_pe", sam.prompt_encoder.get_dense_pe())

    @torch.no_grad()
    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What the six inputs mean stands in ``tinyvit.export.presets``."""
        k = self.factor
        if k > 1:
            image_embeddings = image_embeddings[:, :, ::k, ::k]
            point_coords = (point_coords + 0.5) / k - 0.5
            mask_input = F.avg_pool2d(mask_input, k)
        if self.drop_padding:
            keep = (point_labels != -1) | ~(point_labels == 2).any()
            point_coords, point_labels = point_coords[:, keep[0]], point_labels[:, keep[0]]
        sparse = self.embed_points(point_coords, point_labels)
        dense = self.embed_mask(mask_input, has_mask_input)
        low_res, scores = self.mask_decoder.predict_masks(
            image_embeddings,
            cast(Tensor, self.image_pe),
            sparse,
            dense.expand(sparse.shape[0], -1, -1, -1),
        )
        if self.single_mask:
            low_res, scores = self.best(low_res, scores, point_labels)
        shown = F.interpolate(low_res, scale_factor=k, mode="bilinear") if k > 1 else low_res
        if self.masks == "low-res":
            return scores, shown
        full = self.enlarge(low_res, cast(Tensor, orig_im_size))
        if self.masks == "crop":
            return (*self.crop(full, scores, shown),)
        return full, scores, shown

    def embed_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        """[N, P, 2] and [N, P] -> [N, P, C]; a label of ``POINT_LABELS`` for each point."""
        own = self.prompt_encoder
        labels = labels[..., None]
        found = own.pe_layer.forward_with_coords(coords + 0.5, own.input_image_size)
        found = torch.where(labels == -1, torch.zeros_like(found), found)
        found = found + own.not_a_point_embed.weight * (labels == -1)
        for kind in range(own.num_point_embeddings):
            table = cast("nn.Embedding", own.point_embeddings[kind])
            found = found + table.weight * (labels == kind)
        return found

    def embed_mask(self, mask: Tensor, has_mask: Tensor) -> Tensor:
        """[1, 1, 4g, 4g] -> [1, C, g, g]; a selection, since what is not given may be NaN."""
        own = self.prompt_encoder
        is_given = has_mask.reshape(-1, 1, 1, 1) > 0.5
        mask = torch.where(is_given, mask, torch.zeros_like(mask))
        none = own.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return torch.where(is_given, own.mask_downscaling(mask), none)

    def best(self, masks: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mask with the best score; the first one's is favoured by many points."""
        is_padding = (labels == -1).to(scores)
        points = (1 - is_padding).sum(1, keepdim=True) + is_padding.amax(1, keepdim=True)
        bonus = torch.tensor([[1000.0] + [0.0] * (self.mask_decoder.num_mask_tokens - 1)]).to(
            scores
        )
        chosen = (scores + (points - 2.5) * bonus).argmax(1)
        rows = torch.arange(masks.shape[0])
        return masks[rows, chosen][:, None], scores[rows, chosen][:, None]

    def enlarge(self, low_res: Tensor, size: Tensor) -> Tensor:
        """Low-res logits -> logits in the image's own pixels, by way of the input's."""
        side = self.prompt_encoder.input_image_size[0]
        masks = F.interpolate(low_res, size=(side, side), mode="bilinear", align_corners=False)
        scale = side / size.max()
        used = torch.floor(size * scale + 0.5).clamp(min=1).to(torch.int64)
        masks = masks[..., : used[0], : used[1]]
        whole = size.to(torch.int64)
        shape = cast("list[int]", (whole[0], whole[1]))  # numbers of the graph while tracing
        return F.interpolate(masks, size=shape, mode="bilinear", align_corners=False)

    def crop(self, full: Tensor, scores: Tensor, low_res: Tensor) -> list[Tensor]:
        """CVAT's outputs: the mask as uint8 within its box, and the box, ends included."""
        mask = full[0, 0] > self.threshold
        rows, columns = mask.any(1), mask.any(0)
        zero = torch.zeros(1, dtype=torch.int64)
        ys = torch.cat([zero, torch.where(rows)[0]])
        xs = torch.cat([zero, torch.where(columns)[0]])
        is_empty = (ys.shape[0] == 1) * torch.ones((), dtype=torch.int64)
        top = torch.where(is_empty > 0, ys[0], ys[1:].amin() if ys.shape[0] > 1 else ys[0])
        left = torch.where(is_empty > 0, xs[0], xs[1:].amin() if xs.shape[0] > 1 else xs[0])
        bottom, right = ys.amax(), xs.amax()
        cut = mask[top : bottom + 1, left : right + 1].to(torch.uint8)[None, None]
        return [cut, scores, low_res, left, top, right, bottom]


class PromptsOfTransformers(nn.Module):
    """Prompt encoder and mask decoder as transformers.js calls them: points alone, three masks."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.decoder = DecoderGraph(sam)

    @torch.no_grad()
    def forward(
        self,
        image_embeddings: Tensor,
        image_positional_embeddings: Tensor,
        input_points: Tensor,
        input_labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """[B, C, g, g] twice, [B, N, P, 2], [B, N, P] int64 -> ([B, N, 3], [B, N, 3, 4g, 4g])."""
        own, (batch, count) = self.decoder, input_labels.shape[:2]
        coords = input_points.flatten(0, 1)
        labels = input_labels.flatten(0, 1)
        labels = torch.where(labels == -10, torch.full_like(labels, -1), labels)
        coords = torch.cat([coords, torch.zeros_like(coords[:, :1])], 1)
        labels = torch.cat([labels, torch.full_like(labels[:, :1], -1)], 1)
        sparse = own.embed_points(coords, labels)
        none = own.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        grid = image_embeddings.shape[-2:]
        dense = none.expand(sparse.shape[0], -1, *grid)
        image = image_embeddings.repeat_interleave(count, 0)
        masks, scores = own.mask_decoder.predict_masks(
            image, image_positional_embeddings[:1], sparse, dense
        )
        masks, scores = masks[:, 1:], scores[:, 1:]
        shape = (batch, count)
        return scores.reshape(*shape, -1), masks.reshape(*shape, *masks.shape[1:])


class PartGraph(nn.Module):
    """A network alone.

    Args:
        model: The network.
        part: What it gives.
    """

    def __init__(self, model: TinyViT, part: Part) -> None:
        super().__init__()
        self.model, self.part = model, part

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised [N, 3, H, W] -> [N, C, g, g], [N, classes], or [N, C, h, w] of each stage."""
        if self.part == "features":
            maps = self.model.forward_intermediates(x, intermediates_only=True)
            return tuple(cast("list[Tensor]", maps))
        return self.model.classify(x) if self.part == "classifier" else self.model(x)


def plain(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """A copy in eval mode on the CPU, which training never reaches."""
    return copy.deepcopy(module).eval().to("cpu", dtype).requires_grad_(False)


def resized(sam: Sam, side: int) -> Sam:
    """The same model for another input side; it is changed."""
    own = sam.prompt_encoder
    grid = -(-side // STRIDE)
    channels = cast("nn.Conv2d", own.mask_downscaling[0]).out_channels * 4
    other = PromptEncoder(own.embed_dim, (grid, grid), (side, side), channels)
    other.load_state_dict(own.state_dict())
    sam.prompt_encoder = other.eval()
    return sam
