"""A ``Sam`` asked by its own modules, as they are now: for measuring in the middle of training.

``SamPredictor`` runs folded copies, which are made anew whenever weights change, and only of
modules that it knows. Here nothing is copied or kept but the picture's embedding; adapters inside
of the modules, averaged weights and any device are just what they are.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.image_spec import Placement
from tinyvit.images.preprocess import to_tensor
from tinyvit.sam.encoding import spec_of
from tinyvit.sam.hq_mask_decoder import HQMaskDecoder
from tinyvit.sam.masks import enlarge
from tinyvit.sam.model import Sam
from tinyvit.sam.prompt_tensors import stack_prompts
from tinyvit.sam.prompts import Prompt

__all__ = ["PlainPredictor"]


class PlainPredictor:
    """Segments one picture by prompts, with the two methods of ``SamPredictor`` that matter.

    Args:
        sam: The model; asked as it is, so it should be in eval mode.
    """

    def __init__(self, sam: Sam) -> None:
        self.model = sam
        self._placement: Placement | None = None
        self._features: Tensor | None = None
        self._early: Tensor | None = None

    @torch.no_grad()
    def set_image(self, image: NDArray[np.uint8]) -> None:
        """Encode a picture, RGB [H, W, 3] uint8, for the predictions that follow.

        Raises:
            ValueError: The array is no such picture.
        """
        prepared, self._placement = to_tensor(image, spec_of(self.model))
        batch = prepared[None].to(self.model.device, self.model.pixel_mean.dtype)
        if isinstance(self.model.mask_decoder, HQMaskDecoder):
            self._features, self._early = self.model.image_encoder.forward_hq(batch)
        else:
            self._features = self.model.image_encoder(batch)

    @torch.no_grad()
    def predict(
        self,
        point_coords: NDArray[np.generic] | None = None,
        point_labels: NDArray[np.generic] | None = None,
        box: NDArray[np.generic] | None = None,
        mask_input: NDArray[np.generic] | None = None,
        multimask_output: bool = True,
    ) -> tuple[NDArray[np.generic], NDArray[np.float32], NDArray[np.float32]]:
        """As ``SamPredictor.predict``: (masks [K, H, W] bool, predicted IoU [K], low-res logits).

        Raises:
            RuntimeError: No picture is set.
            ValueError: The prompt is none, or of a wrong shape.
        """
        if self._features is None or self._placement is None:
            raise RuntimeError("no picture is set; call .set_image(...) first")
        sam, features = self.model, self._features
        prompts = sam.prompt_encoder
        grid = int(features.shape[2]), int(features.shape[3])
        low_res_size = 4 * grid[0], 4 * grid[1]
        pitch = prompts.input_image_size[0] / prompts.mask_input_size[0]
        frame = round(low_res_size[0] * pitch), round(low_res_size[1] * pitch)
        prompt = Prompt(point_coords, point_labels, box, mask_input)
        tensors = stack_prompts([prompt], self._placement, low_res_size, frame)
        points = None
        if tensors.points is not None:
            points = tensors.points[0].to(sam.device), tensors.points[1].to(sam.device)
        boxes, masks = (
            None if part is None else part.to(sam.device) for part in (tensors.boxes, tensors.masks)
        )
        sparse, dense = prompts(points, boxes, masks, grid)
        arguments = features, prompts.get_dense_pe(grid), sparse, dense, multimask_output
        if isinstance(sam.mask_decoder, HQMaskDecoder):
            logits, scores = sam.mask_decoder(*arguments, False, self._early)
        else:
            logits, scores = sam.mask_decoder(*arguments)
        low_res = logits[0].float().cpu()
        found = enlarge(low_res, self._placement, pitch, sam.mask_threshold)
        return found.numpy(), scores[0].float().cpu().numpy(), low_res.numpy()
