"""segment-anything's ``utils.onnx``: prompt encoder and mask decoder as one exportable module."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.modules.sam.mask_decoder import HQMaskDecoder
from tinyvit.sam.model import Sam

from .amg import calculate_stability_score


class SamOnnxModel(nn.Module):
    """Masks of one prompt on an embedding, as segment-anything exports it.

    Args:
        model: The model.
        return_single_mask: Give the best mask alone: the single one for three points and more
            (a box counts as two, and a padding point as one), else the best of the others.
        use_stability_score: Score by stability instead of the predicted IoU.
        return_extra_metrics: Give stability and area of each mask too.
    """

    def __init__(
        self,
        model: Sam,
        return_single_mask: bool,
        use_stability_score: bool = False,
        return_extra_metrics: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(model.mask_decoder, HQMaskDecoder):
            raise TypeError("Light HQ-SAM's mask decoder wants an early map beside the embedding")
        self.model = model
        self.mask_decoder = model.mask_decoder
        self.img_size = max(model.prompt_encoder.input_image_size)
        self.return_single_mask = return_single_mask
        self.use_stability_score = use_stability_score
        self.stability_score_offset = 1.0
        self.return_extra_metrics = return_extra_metrics

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, ...]:
        """Decode.

        Args:
            image_embeddings: [1, C, h, w].
            point_coords: [1, P, 2] in pixels of the model's input.
            point_labels: [1, P] floats: 1 the object, 0 not the object, 2 and 3 a box's corners,
                -1 no point at all.
            mask_input: [1, 1, 4h, 4w] low-res logits of an earlier prediction.
            has_mask_input: [1]: 1 where ``mask_input`` counts, 0 where not.
            orig_im_size: [2], (H, W) of the original image.

        Returns:
            (logits [1, K, H, W], scores [1, K], low-res logits [1, K, 4h, 4w]); with extra metrics
            stability scores [1, K] and areas [1, K] come before the low-res logits.
        """
        sparse = self._embed_points(point_coords, point_labels)
        dense = self._embed_masks(mask_input, has_mask_input)
        masks, scores = self.mask_decoder.predict_masks(
            image_embeddings, self.model.prompt_encoder.get_dense_pe(), sparse, dense
        )
        threshold, offset = self.model.mask_threshold, self.stability_score_offset
        if self.use_stability_score:
            scores = calculate_stability_score(masks, threshold, offset)
        if self.return_single_mask:
            masks, scores = self.select_masks(masks, scores, point_coords.shape[1])
        upscaled = self.mask_postprocessing(masks, orig_im_size)
        if not self.return_extra_metrics:
            return upscaled, scores, masks
        stability = calculate_stability_score(upscaled, threshold, offset)
        return upscaled, scores, stability, (upscaled > threshold).sum((-1, -2)), masks

    def select_masks(
        self, masks: Tensor, iou_preds: Tensor, num_points: int
    ) -> tuple[Tensor, Tensor]:
        """The best mask of each prompt: [N, 1, h4, w4] and its score [N, 1]."""
        is_single = torch.zeros_like(iou_preds)
        is_single[:, 0] = 1000.0
        best = (iou_preds + (num_points - 2.5) * is_single).argmax(1)
        rows = torch.arange(masks.shape[0], device=masks.device)
        return masks[rows, best].unsqueeze(1), iou_preds[rows, best].unsqueeze(1)

    def mask_postprocessing(self, masks: Tensor, orig_im_size: Tensor) -> Tensor:
        """Low-res logits in the original image."""
        height, width = self.model.prompt_encoder.input_image_size
        masks = F.interpolate(masks, (height, width), mode="bilinear", align_corners=False)
        sizes = orig_im_size.to(torch.float32)
        resized = torch.floor(self.img_size / sizes.max() * sizes + 0.5).to(torch.int64)
        masks = masks[..., : resized[0], : resized[1]]
        size = cast("tuple[int, int]", tuple(orig_im_size.to(torch.int64)))  # tensors, if traced
        return F.interpolate(masks, size, mode="bilinear", align_corners=False)

    def _embed_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        encoder = self.model.prompt_encoder
        positions = encoder.pe_layer.forward_with_coords(coords + 0.5, encoder.input_image_size)
        labels = labels.unsqueeze(-1)
        sparse = positions * (labels != -1)
        sparse = sparse + encoder.not_a_point_embed.weight * (labels == -1)
        for kind, table in enumerate(encoder.point_embeddings):
            sparse = sparse + cast("nn.Embedding", table).weight * (labels == kind)
        return sparse

    def _embed_masks(self, mask: Tensor, has_mask: Tensor) -> Tensor:
        encoder = self.model.prompt_encoder
        no_mask = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        dense: Tensor = has_mask * encoder.mask_downscaling(mask) + (1 - has_mask) * no_mask
        return dense
