"""Light HQ-SAM's mask decoder: one more token, and finer features for its mask.

The architecture is of Ke et al., "Segment Anything in High Quality", 2023 (sam-hq, Apache-2.0). To
Segment Anything's decoder it adds a high-quality token whose mask is made from the upscaled
embedding fused with the final and an early map of the image encoder.

Shapes: N prompts, C channels, h w the image embedding's grid, D channels of the early map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinyvit.modules import LayerNorm2d

from .mask_decoder import MLP, MaskDecoder, multiply_masks

__all__ = ["HQMaskDecoder"]


class HQMaskDecoder(MaskDecoder):
    """A mask decoder that corrects its best mask by a high-quality one.

    Args:
        transformer_dim: Channels C of the image embedding.
        transformer: A ``TwoWayTransformer`` of that width.
        num_multimask_outputs: Masks for an ambiguous prompt; the best of them is corrected.
        activation: Class of the activation between the upscalings.
        iou_head_depth: Linear layers of the quality head.
        iou_head_hidden_dim: Its hidden width.
        vit_dim: Channels D of the encoder's early map.
    """

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: nn.Module,
        num_multimask_outputs: int = 3,
        activation: type[nn.Module] = nn.GELU,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
        vit_dim: int = 160,
    ) -> None:
        super().__init__(
            transformer_dim=transformer_dim,
            transformer=transformer,
            num_multimask_outputs=num_multimask_outputs,
            activation=activation,
            iou_head_depth=iou_head_depth,
            iou_head_hidden_dim=iou_head_hidden_dim,
        )
        dim, quarter, eighth = transformer_dim, transformer_dim // 4, transformer_dim // 8
        self.vit_dim = vit_dim
        self.hf_token = nn.Embedding(1, dim)
        self.hf_mlp = MLP(dim, dim, eighth, 3)
        self.compress_vit_feat = _upscaling(vit_dim, dim, eighth)
        self.embedding_encoder = _upscaling(dim, quarter, eighth)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(eighth, quarter, kernel_size=3, padding=1),
            LayerNorm2d(quarter),
            nn.GELU(),
            nn.Conv2d(quarter, eighth, kernel_size=3, padding=1),
        )

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        hq_token_only: bool = False,
        interm_embeddings: Tensor | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict one mask for each prompt.

        Args:
            image_embeddings: [1, C, h, w] of one picture for all prompts, or [N, C, h, w].
            image_pe: [1, C, h, w], from ``PromptEncoder.get_dense_pe``.
            sparse_prompt_embeddings: [N, T, C]; N may be 0.
            dense_prompt_embeddings: [N, C, h, w].
            multimask_output: Correct the mask of the highest predicted IoU among those of an
                ambiguous prompt, instead of the single one.
            hq_token_only: Return the high-quality mask alone.
            interm_embeddings: The encoder's early map [1 or N, h, w, D], as ``TinyViT.forward_hq``
                gives it, or a list that begins with it.

        Returns:
            (low-res logits [N, 1, 4h, 4w], predicted IoU [N, 1]). The IoU is that of the mask
            that is corrected: the high-quality one has none of its own.

        Raises:
            ValueError: The shapes do not go together, or there is no early map.
        """
        masks, iou_predictions = self.predict_masks(
            image_embeddings,
            image_pe,
            sparse_prompt_embeddings,
            dense_prompt_embeddings,
            interm_embeddings,
        )
        plain, fine = masks[:, :-1], masks[:, -1:]
        if multimask_output:
            iou_predictions, best = iou_predictions[:, 1:].max(dim=1, keepdim=True)
            rows = torch.arange(masks.shape[0], device=masks.device)
            plain = plain[rows, best[:, 0] + 1].unsqueeze(1)
        else:
            iou_predictions, plain = iou_predictions[:, :1], plain[:, :1]
        return (fine if hq_token_only else plain + fine), iou_predictions

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        interm_embeddings: Tensor | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All masks of all prompts: the single one first, the high-quality one last.

        Args and errors are those of ``forward``.

        Returns:
            (low-res logits [N, num_mask_tokens + 1, 4h, 4w], predicted IoU [N, num_mask_tokens]).
        """
        early = self._early_map(interm_embeddings, image_embeddings, sparse_prompt_embeddings)
        special = torch.cat((self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight))
        tokens, cells = self.attend(
            special, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings
        )
        upscaled = self.output_upscaling(cells)
        masks = multiply_masks(self.hypernetworks(tokens[:, 1:-1]), upscaled)
        detail = self.embedding_encoder(image_embeddings) + self.compress_vit_feat(early)
        fine = self.embedding_maskfeature(upscaled) + detail
        fine_mask = multiply_masks(self.hf_mlp(tokens[:, -1:]), fine)
        return torch.cat((masks, fine_mask), dim=1), self.iou_prediction_head(tokens[:, 0])

    def _early_map(
        self, given: Tensor | Sequence[Tensor] | None, image: Tensor, sparse: Tensor
    ) -> Tensor:
        """The early map as [1 or N, D, h, w]."""
        early = given if given is None or isinstance(given, Tensor) else given[0]
        wanted = f"[1 or N, {image.shape[2]}, {image.shape[3]}, {self.vit_dim}]"
        if early is None:
            raise ValueError(
                f"HQMaskDecoder wants interm_embeddings, the encoder's early map {wanted}; "
                "TinyViT.forward_hq gives it beside the image embedding"
            )
        fits = early.ndim == 4 and early.shape[0] in (1, sparse.shape[0])
        if not fits or early.shape[1:] != (*image.shape[2:], self.vit_dim):
            raise ValueError(f"interm_embeddings must be {wanted}, got {list(early.shape)}")
        return early.permute(0, 3, 1, 2)


def _upscaling(into: int, middle: int, out: int) -> nn.Sequential:
    """Four times the size in two steps."""
    return nn.Sequential(
        nn.ConvTranspose2d(into, middle, kernel_size=2, stride=2),
        LayerNorm2d(middle),
        nn.GELU(),
        nn.ConvTranspose2d(middle, out, kernel_size=2, stride=2),
    )
