"""What a SAM's heads make of two image embeddings, asked with the same random points.

The heads stand between an embedding and what it is for: two embeddings are alike where it counts
when the masks are alike. The heads are frozen; gradients flow through them into the embedding.

Letters: N pictures, P points a picture, M mask tokens, C channels, h w the embedding's grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyvit.sam.hq_mask_decoder import HQMaskDecoder
from tinyvit.sam.mask_decoder import MaskDecoder
from tinyvit.sam.model import Sam
from tinyvit.sam.prompt_encoder import PromptEncoder

__all__ = ["MaskAgreement", "random_points"]


def random_points(placed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points drawn evenly over the pictures, padding left out.

    Args:
        placed: [N, 2] (height, width) of the pictures within the frame, as parts of it, 0..1.
        count: P.
        generator: On the CPU; the source of chance.

    Returns:
        [N, P, 2], (x, y) as parts of the frame, 0..1, on the device of ``placed``.
    """
    drawn = torch.rand(placed.shape[0], count, 2, generator=generator).to(placed.device)
    return drawn * placed.flip(1)[:, None]  # (height, width) -> (x, y)


class MaskAgreement:
    """The frozen heads of a SAM.

    Args:
        sam: Gives its prompt encoder and mask decoder, which are set to eval mode and frozen.

    Raises:
        ValueError: Its decoder is Light HQ-SAM's, which wants more than an embedding.
    """

    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder

    def __init__(self, sam: Sam) -> None:
        if isinstance(sam.mask_decoder, HQMaskDecoder):
            raise ValueError(
                "the mask decoder of Light HQ-SAM wants an early map beside the embedding, which "
                "no store holds; give a SAM with the plain decoder, or mask_weight=0"
            )
        self.prompt_encoder = sam.prompt_encoder.eval().requires_grad_(False)
        self.mask_decoder = sam.mask_decoder.eval().requires_grad_(False)

    @property
    def channels(self) -> int:
        """C of the embeddings that the heads want."""
        return self.prompt_encoder.embed_dim

    def masks(self, embeddings: Tensor, points: Tensor) -> Tensor:
        """All masks of single points: the one for clear prompts, and those for ambiguous ones.

        Args:
            embeddings: [N, C, h, w]; every grid will do, and it covers the whole frame.
            points: [N, P, 2], (x, y) as parts of the frame, 0..1.

        Returns:
            Logits [N * P * M, 4h, 4w].
        """
        prompt_encoder = self.prompt_encoder.to(embeddings.device)
        decoder = self.mask_decoder.to(embeddings.device)
        height, width = prompt_encoder.input_image_size
        grid = (embeddings.shape[2], embeddings.shape[3])
        pixels = points.flatten(0, 1)[:, None] * points.new_tensor([width, height]) - 0.5
        labels = torch.ones(pixels.shape[:2], device=points.device)
        sparse, dense = prompt_encoder((pixels, labels), None, None, embedding_size=grid)
        positions = prompt_encoder.pe_layer(grid, grid)[None]  # cells of a whole frame
        each = embeddings.repeat_interleave(points.shape[1], dim=0)  # [N * P, C, h, w]
        masks, _ = decoder.predict_masks(each, positions, sparse, dense)
        return masks.flatten(0, 1)
