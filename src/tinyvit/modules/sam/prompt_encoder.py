"""The prompt encoder of Segment Anything (Kirillov et al., 2023): prompts become tokens and a map.

Coordinates are pixels of the model's input.

Shapes: B prompts, P points of a prompt, C channels, H W the input, h w the embedding's grid.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from tinyvit.modules import LayerNorm2d

_PADDING = -1  # the label of a point that is none


class PositionEmbeddingRandom(nn.Module):
    """Positions as sines and cosines of random frequencies, of standard deviation ``scale``."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, num_pos_feats: int = 64, scale: float | None = None) -> None:
        super().__init__()
        scale = 1.0 if scale is None or scale <= 0.0 else scale
        frequencies = nn.init.normal_(torch.empty(2, num_pos_feats), std=scale)
        self.register_buffer("positional_encoding_gaussian_matrix", frequencies)

    def forward(self, size: tuple[int, int], full_size: tuple[int, int] | None = None) -> Tensor:
        """Positions [C, h, w] of the centres of a grid of ``size`` (h, w).

        ``full_size`` is the grid that spans 0..1, whose upper left part is wanted; None: ``size``.
        """
        device = self.positional_encoding_gaussian_matrix.device
        dtype = self._exact_dtype()
        height, width = size if full_size is None else full_size
        y = (torch.arange(size[0], device=device, dtype=dtype) + 0.5) / height
        x = (torch.arange(size[1], device=device, dtype=dtype) + 0.5) / width
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [h, w, 2]
        return self._encode(grid).permute(2, 0, 1)

    def forward_with_coords(self, coords_input: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Positions [..., C] of points [..., 2], (x, y) in pixels of an input of ``image_size``."""
        height, width = image_size
        coords = coords_input.to(self._exact_dtype())
        return self._encode(torch.stack((coords[..., 0] / width, coords[..., 1] / height), dim=-1))

    def _encode(self, coords: Tensor) -> Tensor:
        """[..., 2] in 0..1 -> [..., C].

        Sums of products instead of a matrix product: autocast would round a product's angles to
        bf16, and these are large.
        """
        matrix = self.positional_encoding_gaussian_matrix
        frequencies, coords = matrix.to(coords.dtype), 2 * coords - 1
        angles = coords[..., :1] * frequencies[0] + coords[..., 1:] * frequencies[1]
        angles = 2 * math.pi * angles
        return torch.cat((angles.sin(), angles.cos()), dim=-1).to(matrix.dtype)

    def _exact_dtype(self) -> torch.dtype:
        return torch.promote_types(self.positional_encoding_gaussian_matrix.dtype, torch.float32)


class PromptEncoder(nn.Module):
    """Prompts in, sparse (tokens) and dense (map) embeddings out.

    Args:
        embed_dim: Channels C of the image embedding.
        image_embedding_size: (h, w) of the image embedding of a padded image.
        input_image_size: (H, W) of the model's input in pixels, padding included.
        mask_in_chans: Hidden channels for mask prompts.
        activation: Class of the activation for mask prompts.

    Attributes:
        mask_input_size: (4h, 4w), the size of a padded image's mask prompts and low-res logits.
    """

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.input_image_size = input_image_size
        self.image_embedding_size = image_embedding_size
        self.mask_input_size = (4 * image_embedding_size[0], 4 * image_embedding_size[1])
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        self.num_point_embeddings = 4  # not the object, the object, a box's two corners
        self.point_embeddings = nn.ModuleList(
            nn.Embedding(1, embed_dim) for _ in range(self.num_point_embeddings)
        )
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            activation(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans),
            activation(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def get_dense_pe(self, embedding_size: tuple[int, int] | None = None) -> Tensor:
        """Positions of the image tokens.

        Args:
            embedding_size: (h, w) of the embedding of an image without padding; its tokens keep
                their stride. None means that of a padded image.

        Returns:
            [1, C, h, w].
        """
        full_size = self.image_embedding_size
        dense_pe: Tensor = self.pe_layer(embedding_size or full_size, full_size)
        return dense_pe.unsqueeze(0)

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        embedding_size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed prompts; all that are given are about the same B objects.

        Args:
            points: (coordinates [B, P, 2] as (x, y) in pixels of the input, labels [B, P]: 1 the
                object, 0 not the object, -1 no point at all).
            boxes: [B, 4] or [B, 1, 4], (x0, y0, x1, y1) in pixels of the input.
            masks: [B, 1, 4h, 4w] logits.
            embedding_size: (h, w) of the image embedding; None means that of a padded image.

        Returns:
            (sparse embeddings [B, T, C]: the points, a padding point where there is no box, the
            box's two corners; dense embeddings [B, C, h, w]). Without any prompt B is 1 and T 0.

        Raises:
            ValueError: Points without labels, a prompt of another shape, or prompts that disagree
                about B.
        """
        grid = embedding_size or self.image_embedding_size
        batch = self._batch_size(points, boxes, masks, grid)
        no_mask = self.no_mask_embed.weight
        sparse = no_mask.new_empty((batch, 0, self.embed_dim))
        if points is not None:
            sparse = torch.cat((sparse, self._embed_points(*points, pad=boxes is None)), dim=1)
        if boxes is not None:
            sparse = torch.cat((sparse, self._embed_boxes(boxes)), dim=1)
        if masks is not None:
            dense: Tensor = self.mask_downscaling(masks.to(no_mask.dtype))
        else:
            dense = no_mask.reshape(1, -1, 1, 1).expand(batch, -1, *grid)
        return sparse, dense

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        """[B, P, 2] and [B, P] -> [B, P (+ 1), C]."""
        points = points + 0.5  # the pixel's centre
        if pad:
            points = torch.cat((points, torch.zeros_like(points[:, :1])), dim=1)
            labels = torch.cat((labels, torch.full_like(labels[:, :1], _PADDING)), dim=1)
        position = self.pe_layer.forward_with_coords(points, self.input_image_size)
        labels = labels.unsqueeze(-1)  # [B, P, 1]
        none = torch.zeros_like(position)
        position = torch.where(labels == _PADDING, none, position)
        weights = {_PADDING: self.not_a_point_embed.weight, 0: self._point(0), 1: self._point(1)}
        for label, weight in weights.items():
            position = position + torch.where(labels == label, weight, torch.zeros_like(weight))
        return position

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        """[B, 4] -> [B, 2, C]."""
        corners = (boxes + 0.5).reshape(boxes.shape[0], 2, 2)  # a corner is a pixel, too
        position = self.pe_layer.forward_with_coords(corners, self.input_image_size)
        return position + torch.cat((self._point(2), self._point(3)))

    def _point(self, kind: int) -> Tensor:
        """The learned vector [1, C] of one kind of point."""
        return cast("nn.Embedding", self.point_embeddings[kind]).weight

    def _batch_size(
        self,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        grid: tuple[int, int],
    ) -> int:
        counts: dict[str, int] = {}
        if points is not None:
            coords, labels = points
            if coords.ndim != 3 or coords.shape[2] != 2 or labels.shape != coords.shape[:2]:
                raise ValueError(
                    "points must be coordinates [B, P, 2] with labels [B, P], got "
                    f"{list(coords.shape)} and {list(labels.shape)}"
                )
            counts["points"] = coords.shape[0]
        if boxes is not None:
            if boxes.ndim not in (2, 3) or boxes[:1].numel() not in (0, 4) or boxes.shape[-1] != 4:
                raise ValueError(f"boxes must be [B, 4] as x0, y0, x1, y1, got {list(boxes.shape)}")
            counts["boxes"] = boxes.shape[0]
        if masks is not None:
            size = [1, 4 * grid[0], 4 * grid[1]]
            if masks.ndim != 4 or list(masks.shape[1:]) != size:
                raise ValueError(
                    f"masks must be [B, {', '.join(map(str, size))}], four for each image "
                    f"token, got {list(masks.shape)}; low_res_logits of an earlier "
                    "prediction on the same image have that shape"
                )
            counts["masks"] = masks.shape[0]
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{number} {name}" for name, number in counts.items())
            raise ValueError(f"prompts must be about the same number of objects, got {shown}")
        return next(iter(counts.values()), 1)
