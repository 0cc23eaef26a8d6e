"""Reference outputs: the model itself in float64, by its own modules and no code of the graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyvit.image_spec import ImageSpec
from tinyvit.modules import TinyViT
from tinyvit.sam.model import Sam

from .graphs import plain

Arrays = Mapping[str, NDArray[Any]]


class Reference:
    """A model in float64 with the inputs that exported graphs take.

    Args:
        model: A SAM, or an image encoder or classifier alone.
        spec: How images are prepared.
        facts: Of the export.
    """

    def __init__(self, model: nn.Module, spec: ImageSpec, facts: Mapping[str, Any]) -> None:
        own = plain(model, torch.float64)
        self.sam = own if isinstance(own, Sam) else None
        self.encoder: nn.Module = own.image_encoder if isinstance(own, Sam) else own
        self.spec, self.facts = spec, facts

    def run(self, part: str, inputs: Arrays) -> list[NDArray[Any]]:
        """Outputs of a part."""
        if part == "decoder":
            return self._decode_each(inputs)
        return self.encode(inputs) if part == "encoder" else self.describe(part, inputs)

    def positions(self) -> NDArray[np.float32]:
        """Positions of the embedding's grid, which transformers.js hands to the decoder."""
        return self._sam().prompt_encoder.get_dense_pe().float().numpy()

    @torch.no_grad()
    def describe(self, part: str, inputs: Arrays) -> list[NDArray[Any]]:
        """Logits of a classifier, or the map of each stage."""
        (values,) = inputs.values()
        x = torch.from_numpy(np.asarray(values, np.float64))
        model = cast(TinyViT, self.encoder)
        if part == "classifier":
            return [model.forward_head(model.forward_backbone(x)).numpy()]
        return [model.forward_intermediates(x, [stage], intermediates_only=True)[0].numpy()
                for stage in range(model.num_layers)]  # fmt: skip

    @torch.no_grad()
    def encode(self, inputs: Arrays) -> list[NDArray[Any]]:
        """Outputs of the encoder."""
        (values,) = inputs.values()
        x = torch.from_numpy(np.asarray(values, np.float64))
        side, factor = int(self.facts["side"]), int(self.facts["factor"])
        if self.facts["layout"] == "hwc":
            mean, std = (
                torch.tensor(v, dtype=torch.float64) for v in (self.spec.mean, self.spec.std)
            )
            pixels = ((x - mean) / std).permute(2, 0, 1)
            x = torch.zeros(1, 3, side, side, dtype=torch.float64)
            x[0, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        if factor > 1:
            n, c, h, w = x.shape
            x = x.view(n, c, h // factor, factor, w // factor, factor).mean((3, 5))
        found: Tensor = self.encoder(x)
        if factor > 1:
            found = F.interpolate(found, scale_factor=factor, mode="nearest")
        outputs = [found.numpy()]
        if self.facts["style"] == "transformers" and self.sam is not None:
            outputs.append(
                self.sam.prompt_encoder.get_dense_pe().expand(len(x), -1, -1, -1).numpy()
            )
        return outputs

    def _decode_each(self, inputs: Arrays) -> list[NDArray[Any]]:
        """Outputs of the decoder; prompts one after the other."""
        if self.facts["style"] == "transformers" or len(inputs["point_coords"]) == 1:
            return self.decode(inputs)
        names = ("point_coords", "point_labels")
        rows = [self.decode({**inputs, **{name: inputs[name][row : row + 1] for name in names}})
                for row in range(len(inputs["point_coords"]))]  # fmt: skip
        return [np.concatenate(found) for found in zip(*rows, strict=True)]

    @torch.no_grad()
    def decode(self, inputs: Arrays) -> list[NDArray[Any]]:
        """Outputs of the decoder for one prompt."""
        sam = self._sam()
        given = {
            name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in inputs.items()
        }
        if self.facts["style"] == "transformers":
            return self._decode_transformers(sam, given)
        factor = int(self.facts["factor"])
        image = given["image_embeddings"][:, :, ::factor, ::factor]
        coords, labels = (given["point_coords"] + 0.5) / factor - 0.5, given["point_labels"]
        if self.facts.get("drop_padding") and 2 in labels:
            kept = [place for place, label in enumerate(labels[0]) if label != -1]
            coords, labels = coords[:, kept], labels[:, kept]
        sparse = self._tokens(sam, coords, labels)
        none = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        dense = none.expand(1, -1, *image.shape[-2:])
        if given["has_mask_input"].item() > 0.5:
            mask = given["mask_input"]
            if factor > 1:
                n, c, h, w = mask.shape
                mask = mask.view(n, c, h // factor, factor, w // factor, factor).mean((3, 5))
            dense = sam.prompt_encoder.mask_downscaling(mask)
        pe = sam.prompt_encoder.get_dense_pe()
        low_res, scores = sam.mask_decoder.predict_masks(image, pe, sparse, dense)
        if self.facts["single_mask"]:
            favoured, padding = scores.clone(), int((labels == -1).sum())
            favoured[:, 0] += (labels.shape[1] - max(padding - 1, 0) - 2.5) * 1000
            best = int(favoured[0].argmax())
            low_res, scores = low_res[:, best : best + 1], scores[:, best : best + 1]
        shown = (
            low_res if factor == 1 else F.interpolate(low_res, scale_factor=factor, mode="bilinear")
        )
        if "masks" not in self.facts["decoder_outputs"]:
            return [scores.numpy(), shown.numpy()]
        height, width = (int(v) for v in given["orig_im_size"])
        place = ImageSpec.sam(sam.prompt_encoder.input_image_size[0]).place(height, width)
        full = sam.postprocess_masks(low_res, place.resized_size, place.original_size)
        outputs = [full.numpy(), scores.numpy(), shown.numpy()]
        if "xtl" in self.facts["decoder_outputs"]:  # CVAT's, see verify.uncut
            outputs[0] = outputs[0] > sam.mask_threshold
        return outputs

    def _tokens(self, sam: Sam, coords: Tensor, labels: Tensor) -> Tensor:
        """Prompt tokens by the prompt encoder's own ways for points and boxes, one at a time."""
        own, found = sam.prompt_encoder, []
        for place in range(labels.shape[1]):
            point, label = coords[:, place : place + 1], labels[:, place : place + 1]
            if label.item() in (2, 3):
                box = point.repeat(1, 2, 1).reshape(1, 4)
                corner = int(label.item()) - 2
                found.append(own._embed_boxes(box)[:, corner : corner + 1])
            else:
                found.append(own._embed_points(point, label.to(torch.int64), pad=False))
        return torch.cat(found, 1)

    def _decode_transformers(self, sam: Sam, given: Mapping[str, Tensor]) -> list[NDArray[Any]]:
        image, labels = given["image_embeddings"], given["input_labels"].to(torch.int64)
        ious, logits = [], []
        for number in range(labels.shape[1]):
            points = given["input_points"][0, number][None], labels[0, number][None].clamp(min=-1)
            sparse, dense = sam.prompt_encoder(points, None, None)
            pe = sam.prompt_encoder.get_dense_pe()
            masks, scores = sam.mask_decoder(image, pe, sparse, dense, True)
            ious.append(scores)
            logits.append(masks)
        return [torch.stack(ious, 1).numpy(), torch.stack(logits, 1).numpy()]

    def _sam(self) -> Sam:
        if self.sam is None:
            raise ValueError("this model has no mask decoder")
        return self.sam
