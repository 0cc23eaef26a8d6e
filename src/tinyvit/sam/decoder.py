"""Many prompts as the tensors that a decoder takes, in the model's frame.

Prompts are never padded to the same number of points: a padding point is a token of its own, and
other tokens look at it, so the answer would change. They are grouped instead, and those of one
group stacked. Knows no model: where an image lies in the model's frame comes from a ``Placement``,
how fine its low-res logits are from the caller.

Letters: N (B in errors) prompts, P points, h4 w4 the low-res logits.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.image_spec import Placement
from tinyvit.inference.derived import ModelWatch
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder
from tinyvit.modules.sam.prompt_encoder import PromptEncoder

from .embedding import ImageEmbedding
from .fast_decoder import Decoded, DeployedMaskDecoder, SharedImage
from .model import Sam
from .prompts import Kind, Prompt, Size, mask_to_logits


@dataclass(frozen=True)
class PromptTensors:
    """Prompts of one kind as a decoder takes them.

    Attributes:
        points: (coordinates [N, P, 2] float32 as (x, y) in pixels of the model's frame, labels
            [N, P] int64: 1, 0, or -1 for no point at all), or None.
        boxes: [N, 4] float32 xyxy in the model's frame, or None.
        masks: [N, 1, h4, w4] float32 logits, or None.

    Raises:
        ValueError: Nothing is prompted, a shape is wrong, a coordinate is not finite, a label is
            unknown, or the numbers of prompts differ.
    """

    points: tuple[Tensor, Tensor] | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        counts = {}
        if self.points is not None:
            coords, labels = self.points
            _check_tensor("point_coords", coords, ("B", "N", 2))
            _check_tensor("point_labels", labels, tuple(coords.shape[:2]))
            unknown = sorted(set(labels.flatten().tolist()) - {-1, 0, 1})
            if unknown:
                raise ValueError(
                    f"labels of points must be 1, 0, or -1 for no point at all; came {unknown}"
                )
            counts["point_coords"] = len(coords)
        if self.boxes is not None:
            _check_tensor("boxes", self.boxes, ("B", 4))
            counts["boxes"] = len(self.boxes)
        if self.masks is not None:
            _check_tensor("mask_input", self.masks, ("B", 1, "h4", "w4"))
            counts["mask_input"] = len(self.masks)
        if not counts:
            raise ValueError("nothing is prompted; give points, boxes or masks")
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{count} in {name}" for name, count in counts.items())
            raise ValueError(f"every kind of prompt must be about the same objects; came {shown}")

    def __len__(self) -> int:
        given = self.points[0] if self.points is not None else self.boxes
        return len(cast(Tensor, self.masks if given is None else given))

    def part(self, start: int, stop: int) -> PromptTensors:
        """The prompts from ``start`` up to ``stop``."""
        return PromptTensors(
            None
            if self.points is None
            else (self.points[0][start:stop], self.points[1][start:stop]),
            None if self.boxes is None else self.boxes[start:stop],
            None if self.masks is None else self.masks[start:stop],
        )


def group_prompts(prompts: Sequence[Prompt]) -> dict[Kind, list[int]]:
    """Positions of the prompts of each kind; each kind can be decoded together.

    Args:
        prompts: Any mixture.

    Returns:
        Kind -> positions in ``prompts``, both in the order of their first appearance.
    """
    groups: dict[Kind, list[int]] = {}
    for position, prompt in enumerate(prompts):
        groups.setdefault(prompt.kind, []).append(position)
    return groups


def stack_prompts(
    prompts: Sequence[Prompt], placement: Placement, low_res_size: Size, frame: Size
) -> PromptTensors:
    """Prompts of one kind, moved to the model's frame and stacked.

    Args:
        prompts: At least one, all of one kind, checked by ``Prompt.check_in``.
        placement: Where the image lies in the model's frame.
        low_res_size: (h4, w4) of the image's low-res logits.
        frame: (height, width) of what the low-res logits cover, in pixels of the model's frame.

    Returns:
        The tensors, on the CPU.

    Raises:
        ValueError: The prompts are of different kinds.
    """
    if len({prompt.kind for prompt in prompts}) > 1:
        raise ValueError("only prompts of one kind can be stacked; see group_prompts")
    points = boxes = masks = None
    count, has_box, has_mask = prompts[0].kind
    if count:
        coords = np.stack([cast(Any, prompt.points) for prompt in prompts])
        labels = np.stack([cast(Any, prompt.labels) for prompt in prompts])
        points = _float(placement.points_to_model(coords)), torch.from_numpy(labels)
    if has_box:
        boxes = _float(placement.boxes_to_model(np.stack([cast(Any, p.box) for p in prompts])))
    if has_mask:
        logits = [
            mask_to_logits(prompt.mask, placement, low_res_size, frame)
            for prompt in prompts
            if prompt.mask is not None
        ]
        masks = torch.stack(logits)[:, None]
    return PromptTensors(points, boxes, masks)


def _float(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Check a tensor's shape, in which a letter stands for any number, and that it is finite."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, came {type(tensor).__name__}")
    fits = len(shape) == tensor.ndim and all(
        isinstance(want, str) or want == side
        for want, side in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have the shape [{wanted}]; came {list(tensor.shape)}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite numbers; came some that are NaN or infinite")


pass


CHUNK = 8
"""Prompts that are computed together where each has image-side work of its own, which is large."""

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}

Answer = tuple[Tensor, Tensor]


class PromptDecoder:
    """Decodes prompts on the features of images with the weights that a model has now.

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
        """Decode prompts of one kind on one image.

        What the prompts on one image share is kept until features of another image come.

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
                    f"mask_input must be low-res logits of this image, [B, 1, {size[0]}, "
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
    """What was computed of the last image; holds its features, so that their address stays."""

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
                    "and this embedding has none; encode the image with the HQ model"
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


pass
pass


class PointDecoder:
    """Decodes points with the weights that a model has now.

    Args:
        model: The model; never changed.
        device: A torch device to compute on.
    """

    def __init__(self, model: Sam, device: str = "cpu") -> None:
        self._model = model
        self._device = device
        self._whole = PromptDecoder(model, device)
        self._made: _MadeForPoints | None = None

    @property
    def pitch(self) -> float:
        """Pixels of the model's frame for one low-res logit."""
        return self._whole.pitch

    def on(self, embedding: ImageEmbedding) -> PointsOn:
        """Look at an image once, for all points on it."""
        if type(self._model.mask_decoder) is not MaskDecoder:
            return PointsOn(embedding, self._whole, None)
        deployed = self._deployed()
        return PointsOn(embedding, self._whole, (deployed, deployed.look(embedding.features)))

    def _deployed(self) -> DeployedMaskDecoder:
        prompts, masks = self._model.prompt_encoder, self._model.mask_decoder
        made = self._made
        if made is None or not made.is_of(prompts, masks):
            deployed = DeployedMaskDecoder(prompts, masks, self._device)
            watches = ModelWatch(prompts), ModelWatch(masks)
            self._made = made = _MadeForPoints(prompts, masks, watches, deployed)
        return made.deployed


class PointsOn:
    """Points on one image; ``PointDecoder.on`` makes it.

    Args:
        embedding: The image.
        whole: Decodes any decoder's prompts.
        fast: The frozen form and its look at the image, if there is one.
    """

    def __init__(
        self,
        embedding: ImageEmbedding,
        whole: PromptDecoder,
        fast: tuple[DeployedMaskDecoder, list[SharedImage]] | None,
    ) -> None:
        self._embedding = embedding
        self._whole = whole
        self._fast = fast

    def decode(self, coords: Tensor, least_iou: float | None) -> Decoded:
        """The masks of single foreground points.

        Args:
            coords: [N, 2] float32, (x, y) in pixels of the model's frame.
            least_iou: Masks are wanted whose predicted IoU is above it; None wants all.

        Returns:
            The M masks wanted, in the order of (point, token), on the CPU.
        """
        points = coords[:, None], torch.ones(len(coords), 1, dtype=torch.int64)
        bound = -math.inf if least_iou is None else least_iou
        if self._fast is not None:
            deployed, shared = self._fast
            found = deployed.decode(shared, points, wanted=lambda iou: iou > bound)
            return _on_cpu(found)
        logits, iou = self._whole.decode(
            self._embedding.features,
            PromptTensors(points),
            interm_features=self._embedding.interm_features,
        )
        where = (iou > bound).nonzero()  # [M, 2]
        chosen = where[:, 0], where[:, 1]
        return _on_cpu(Decoded(logits[chosen], iou[chosen], *chosen))


@dataclass(frozen=True)
class _MadeForPoints:
    """A frozen form, and what it was made of."""

    prompt_encoder: torch.nn.Module
    mask_decoder: torch.nn.Module
    watches: tuple[ModelWatch, ModelWatch]
    deployed: DeployedMaskDecoder

    def is_of(self, prompt_encoder: torch.nn.Module, mask_decoder: torch.nn.Module) -> bool:
        """Whether it is still the form of these modules."""
        same = self.prompt_encoder is prompt_encoder and self.mask_decoder is mask_decoder
        return same and not any(watch.has_changed() for watch in self.watches)


def _on_cpu(found: Decoded) -> Decoded:
    parts = found.low_res_logits, found.iou_predictions, found.prompts, found.tokens
    return Decoded(*(part.cpu() for part in parts))
