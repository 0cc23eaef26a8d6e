"""One picture's features and its prompts in, low-res logits out; made anew when weights change.

What runs is a frozen copy of the prompt encoder and the mask decoder: the fast form of
``deployed_decoder`` for Segment Anything's own decoder, the modules as they are for Light HQ-SAM's
and for others. Knows tensors in the model's frame only.

Letters: N prompts, K masks of a prompt, C channels, h w the embedding's grid, h4 w4 four times as
many, D channels of the early map.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tinyvit.inference.watch import ModelWatch

from .deployed_decoder import DeployedMaskDecoder, SharedImage
from .hq_mask_decoder import HQMaskDecoder
from .mask_decoder import MaskDecoder
from .mask_prompts import Size
from .model import Sam
from .prompt_encoder import PromptEncoder
from .prompt_tensors import PromptTensors

__all__ = ["PromptDecoder"]

CHUNK = 8
"""Prompts that are computed together where each has image-side work of its own, which is large."""

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}

Answer = tuple[Tensor, Tensor]


class PromptDecoder:
    """Decodes prompts on the features of pictures with the weights that a model has now.

    May be used by several threads.

    Args:
        model: The model; never changed.
        device: A torch device to compute on.
        precision: "fp32"; or "fp64", three times slower, for numbers exact to float32's last digit.

    Raises:
        ValueError: Another precision.
    """

    def __init__(self, model: Sam, device: str = "cpu", precision: str = "fp32") -> None:
        if precision not in DTYPES:
            raise ValueError(
                f"the decoder's precision must be one of {tuple(DTYPES)}, came {precision!r}"
            )
        self.device = device
        self._dtype = DTYPES[precision]
        self._model = model
        self._lock = threading.Lock()
        self._made: _Made | None = None
        self._seen: _Seen | None = None

    @property
    def pitch(self) -> float:
        """Pixels of the model's frame for one low-res logit."""
        encoder = self._model.prompt_encoder
        return encoder.input_image_size[0] / encoder.mask_input_size[0]

    def low_res_size(self, features: Tensor) -> Size:
        """(h4, w4) of the low-res logits of features [..., h, w]."""
        return 4 * features.shape[-2], 4 * features.shape[-1]

    def frame(self, features: Tensor) -> Size:
        """(height, width) of what features [..., h, w] cover, in pixels of the model's frame."""
        height, width = self.low_res_size(features)
        return round(height * self.pitch), round(width * self.pitch)

    def decode(
        self,
        features: Tensor,
        prompts: PromptTensors,
        multimask_output: bool = True,
        *,
        interm_features: Tensor | None = None,
        hq_token_only: bool = False,
    ) -> Answer:
        """Decode prompts of one kind on one picture.

        What the prompts on one picture share is kept until features of another picture come.

        Args:
            features: [1, C, h, w] or [C, h, w].
            prompts: In the model's frame, on any device.
            multimask_output: Give the masks of an ambiguous prompt instead of the single one.
            interm_features: [h, w, D] for Light HQ-SAM's decoder.
            hq_token_only: For Light HQ-SAM's decoder: give the high-quality mask alone.

        Returns:
            (low-res logits [N, K, h4, w4], predicted IoU [N, K]), float32 on ``device``.

        Raises:
            ValueError: Shapes do not go together; the decoder's early map is missing;
                ``hq_token_only`` for a decoder that has no such token.
        """
        features = features if features.ndim == 4 else features[None]
        if hq_token_only and not isinstance(self._model.mask_decoder, HQMaskDecoder):
            raise ValueError("hq_token_only=True wants a model with Light HQ-SAM's mask decoder")
        if prompts.masks is not None:
            size = self.low_res_size(features)
            if tuple(prompts.masks.shape[2:]) != size:
                raise ValueError(
                    f"mask_input must be low-res logits of this picture, [B, 1, {size[0]}, "
                    f"{size[1]}]; came {list(prompts.masks.shape)}"
                )
        if not len(prompts):
            return self._nothing(features, multimask_output)
        runner = self._runner()
        if isinstance(runner, _Plain):
            return runner.decode(
                features, prompts, multimask_output, interm_features, hq_token_only
            )
        if prompts.masks is None:
            shared = self._shared(runner, features)
            return runner.decode(features, prompts, multimask_output, shared)
        return _in_chunks(
            prompts, lambda part: runner.decode(features, part, multimask_output, None)
        )

    def _nothing(self, features: Tensor, multimask_output: bool) -> Answer:
        """The answer to no prompts: [0, K, h4, w4] and [0, K]."""
        decoder = self._model.mask_decoder
        is_one = not multimask_output or isinstance(decoder, HQMaskDecoder)
        masks = 1 if is_one else decoder.num_multimask_outputs
        logits = torch.empty(0, masks, *self.low_res_size(features), device=self.device)
        return logits, torch.empty(0, masks, device=self.device)

    def _runner(self) -> _Deployed | _Plain:
        model = self._model
        with self._lock:
            made = self._made
            if made is None or made.has_changed(model):
                watches = ModelWatch(model.prompt_encoder), ModelWatch(model.mask_decoder)
                is_plain = type(model.mask_decoder) is not MaskDecoder
                runner = (_Plain if is_plain else _Deployed)(model, self.device, self._dtype)
                made = _Made(model.prompt_encoder, model.mask_decoder, watches, runner)
                self._made, self._seen = made, None
            return made.runner

    def _shared(self, runner: _Deployed, features: Tensor) -> list[SharedImage]:
        seen = self._seen
        version = 0 if features.is_inference() else features._version
        key = (id(runner), features.data_ptr(), tuple(features.shape), version)
        if seen is None or seen.key != key:
            seen = _Seen(key, features, runner, runner.deployed.look(features))
            self._seen = seen
        return seen.shared


@dataclass(frozen=True)
class _Seen:
    """What was computed of the last picture; holds its features, so that their address stays."""

    key: tuple[object, ...]
    features: Tensor
    runner: _Deployed
    shared: list[SharedImage]


@dataclass(frozen=True)
class _Made:
    """A runner, what it was made of, and whether that is still so."""

    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder
    watches: tuple[ModelWatch, ModelWatch]
    runner: _Deployed | _Plain

    def has_changed(self, model: Sam) -> bool:
        if model.prompt_encoder is not self.prompt_encoder:
            return True
        if model.mask_decoder is not self.mask_decoder:
            return True
        return any(watch.has_changed() for watch in self.watches)


class _Deployed:
    """The fast form."""

    def __init__(self, model: Sam, device: str, dtype: torch.dtype) -> None:
        heads = model.prompt_encoder, model.mask_decoder
        self.deployed = DeployedMaskDecoder(*heads, device, dtype)
        self.masks = model.mask_decoder.num_multimask_outputs

    def decode(
        self,
        features: Tensor,
        prompts: PromptTensors,
        multimask_output: bool,
        shared: list[SharedImage] | None,
    ) -> Answer:
        if shared is None:
            shared = self.deployed.look(features, prompts.masks)
        decoded = self.deployed.decode(shared, prompts.points, prompts.boxes, multimask_output)
        shape = len(prompts), self.masks if multimask_output else 1
        # Clones can be written to and take part in autograd; tensors of inference mode cannot.
        logits, iou = decoded.low_res_logits.clone(), decoded.iou_predictions.clone()
        return logits.view(*shape, *logits.shape[1:]), iou.view(shape)


class _Plain:
    """Frozen copies of the modules."""

    def __init__(self, model: Sam, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.prompt_encoder = copy.deepcopy(model.prompt_encoder).eval().to(device, dtype)
        self.mask_decoder = copy.deepcopy(model.mask_decoder).eval().to(device, dtype)

    @torch.no_grad()
    def decode(
        self,
        features: Tensor,
        prompts: PromptTensors,
        multimask_output: bool,
        interm_features: Tensor | None,
        hq_token_only: bool,
    ) -> Answer:
        x = features.to(self.device, self.dtype)
        grid = int(x.shape[2]), int(x.shape[3])
        position = self.prompt_encoder.get_dense_pe(grid)
        more: tuple[object, ...] = ()
        if isinstance(self.mask_decoder, HQMaskDecoder):
            if interm_features is None:
                raise ValueError(
                    "Light HQ-SAM's mask decoder wants interm_features, the encoder's early map, "
                    "and this embedding has none; encode the picture with the HQ model"
                )
            more = (hq_token_only, interm_features[None].to(self.device, self.dtype))

        def answer(part: PromptTensors) -> Answer:
            part = _to(part, self.device, self.dtype)
            sparse, dense = self.prompt_encoder(part.points, part.boxes, part.masks, grid)
            logits, iou = self.mask_decoder(x, position, sparse, dense, multimask_output, *more)
            return logits.float(), iou.float()

        return _in_chunks(prompts, answer)


class _Answering(Protocol):
    def __call__(self, part: PromptTensors, /) -> Answer: ...


def _in_chunks(prompts: PromptTensors, answer: _Answering) -> Answer:
    """Answers to a few prompts at a time, joined."""
    parts = [answer(prompts.part(i, i + CHUNK)) for i in range(0, len(prompts), CHUNK)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([iou for _, iou in parts])


def _to(prompts: PromptTensors, device: str, dtype: torch.dtype) -> PromptTensors:
    points, boxes, masks = prompts.points, prompts.boxes, prompts.masks
    return PromptTensors(
        None if points is None else (points[0].to(device, dtype), points[1].to(device)),
        None if boxes is None else boxes.to(device, dtype),
        None if masks is None else masks.to(device, dtype),
    )
