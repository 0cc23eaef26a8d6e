"""One decoder for all callers, by torch: prompts on an embedding -> low-res logits, scores, masks.

The fast form (``FastMaskDecoder``) is made from the weights that the model has now, and again when
they change. Light HQ-SAM's decoder, and one of parts that the fast form does not know, run as
frozen copies of their modules; ``fast=False`` runs the modules themselves, as training wants it.
Numpy at the surface, see ``inference.backend``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyvit.image_spec import Placement
from tinyvit.images.mask_ops import Found
from tinyvit.inference.derived import Derived, error_of
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder, TwoWayTransformer
from tinyvit.modules.sam.prompt_encoder import PromptEncoder

from .embedding import ImageEmbedding
from .fast_decoder import FastMaskDecoder, SharedImage, frozen
from .model import Sam, decode_prompts
from .prompts import PromptBatch
from .upscale import axes, find_regions, upscale

CHUNK = 8
"""Prompts that are computed together where each has image-side work of its own, which is large."""

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}

Heads: TypeAlias = "FastMaskDecoder | tuple[PromptEncoder, MaskDecoder]"


class PreparedEmbedding:
    """What ``TorchDecoder.prepare`` made of an embedding; held by the caller, kept up to date."""

    def __init__(self, features: Tensor, early: Tensor | None) -> None:
        self.features = features  # [1, C, h, w]
        self.early = early  # [1, h, w, D] for Light HQ-SAM
        self.heads: Heads | None = None
        self.shared: list[SharedImage] = []

    @property
    def nbytes(self) -> int:
        """How much memory it holds."""
        early = 0 if self.early is None else self.early.nbytes
        shared = sum(x.nbytes for image in self.shared for x in image[1:])
        return self.features.nbytes + early + shared


class TorchDecoder:
    """Decodes prompts with the weights that a model has now; may be used by several threads.

    The model is never changed. ``precision`` "fp64" is three times slower, for numbers exact to
    float32's last digit. ``fast=False`` runs the model's own modules where and as they are.
    """

    def __init__(
        self, model: Sam, device: str = "cpu", precision: str = "fp32", fast: bool = True
    ) -> None:
        if precision not in DTYPES:
            raise ValueError(
                f"the decoder's precision must be one of {tuple(DTYPES)}, came {precision!r}"
            )
        if precision != "fp32" and not fast:
            raise ValueError(
                "fast=False runs the model as it is; leave the precision out, or convert the model"
            )
        self._device = device
        self._dtype = DTYPES[precision]
        self._model = model
        self._fast = fast
        self._heads: Derived[Heads] = Derived(self._modules, self._make_heads)

    @property
    def device(self) -> str:
        """Where it computes."""
        return self._device if self._fast else str(self._model.device)

    @property
    def logit_stride(self) -> float:
        """Input pixels per low-res logit."""
        encoder = self._model.prompt_encoder
        return encoder.input_image_size[0] / encoder.mask_input_size[0]

    def explain(self) -> str:
        """What runs, in a word."""
        return "torch"

    def prepare(self, embedding: ImageEmbedding) -> PreparedEmbedding:
        """What all prompts on this embedding share, computed once."""
        features = torch.from_numpy(embedding.features)[None].to(self.device)
        early = embedding.interm_features
        prepared = PreparedEmbedding(
            features, None if early is None else torch.from_numpy(early)[None].to(self.device)
        )
        self._share(prepared)
        return prepared

    def decode(
        self,
        prepared: PreparedEmbedding,
        prompts: PromptBatch,
        multimask_output: bool = True,
        *,
        min_iou: float | None = None,
        hq_token_only: bool = False,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Prompts of one kind -> (low-res logits [N, K, h4, w4], predicted IoU [N, K]).

        ``multimask_output`` gives the masks of an ambiguous prompt instead of the single one,
        ``hq_token_only`` Light HQ-SAM's high-quality mask alone. With ``min_iou`` only those masks
        are computed whose predicted IoU exceeds it, and the logits are [M, h4, w4] in the order of
        ``np.argwhere(scores > min_iou)``.
        """
        decoder = self._model.mask_decoder
        if hq_token_only and not isinstance(decoder, HQMaskDecoder):
            raise ValueError("hq_token_only=True wants a model with Light HQ-SAM's mask decoder")
        size = 4 * prepared.features.shape[2], 4 * prepared.features.shape[3]
        prompts.check_masks(size)
        if not len(prompts):
            is_one = not multimask_output or isinstance(decoder, HQMaskDecoder)
            count = 1 if is_one else decoder.num_multimask_outputs
            shape = (0, *size) if min_iou is not None else (0, count, *size)
            return np.empty(shape, np.float32), np.empty((0, count), np.float32)
        heads, shared = self._share(prepared)
        shared = None if prompts.masks is not None else shared
        step = CHUNK if shared is None else len(prompts)
        found = []
        for start in range(0, len(prompts), step):
            part = prompts.part(start, start + step)
            if isinstance(heads, FastMaskDecoder):
                points, boxes, masks_in = _tensors(part)
                images = heads.prepare(prepared.features, masks_in) if shared is None else shared
                found.append(heads.decode(images, points, boxes, multimask_output, min_iou))
            else:
                masks, iou = _decode_plain(heads, prepared, part, multimask_output, hq_token_only)
                found.append((masks if min_iou is None else masks[iou > min_iou], iou))
        logits, scores = (torch.cat(tensors).cpu().numpy() for tensors in zip(*found, strict=True))
        return (logits if min_iou is not None else logits.reshape(*scores.shape, *size)), scores

    def masks(
        self, low_res_logits: NDArray[np.float32], placement: Placement, threshold: float | None
    ) -> NDArray[Any]:
        """Low-res logits [..., h4, w4] -> masks [..., H, W] bool; float32 logits for None."""
        stride = self.logit_stride
        if torch.device(self.device).type == "cpu":
            return upscale(low_res_logits, placement, stride, threshold)
        rows, columns = (
            torch.from_numpy(axis.matrix).to(self.device)
            for axis in axes(low_res_logits.shape[-2:], placement, stride)
        )
        kind = np.float32 if threshold is None else np.bool_
        masks = np.empty((*low_res_logits.shape[:-2], *placement.original_size), kind)
        for source, target in zip(  # one at a time: in logits they may be large
            low_res_logits.reshape(-1, *low_res_logits.shape[-2:]),
            masks.reshape(-1, *placement.original_size),
            strict=True,
        ):
            logits = rows @ torch.from_numpy(source).to(self.device) @ columns.T
            target[...] = (logits if threshold is None else logits > threshold).cpu().numpy()
        return masks

    def find(
        self,
        prepared: PreparedEmbedding,
        prompts: PromptBatch,
        placement: Placement,
        *,
        min_iou: float,
        **how: Any,
    ) -> tuple[Iterator[Found], NDArray[np.float32]]:
        """The masks of many points whose predicted IoU exceeds ``min_iou``, one at a time.

        ``how`` are the last arguments of ``find_regions``: ``threshold``, ``offset`` and
        ``min_stability`` of the masks, ``frame``, the size (H, W) of the image that this one is a
        crop of, and ``corner`` (y, x), where it begins. Also gives the predicted IoU [N, K] of all.
        """
        masks, scores = self.decode(prepared, prompts, min_iou=min_iou)
        return find_regions(masks, scores, min_iou, placement, self.logit_stride, **how), scores

    def _modules(self) -> Sequence[nn.Module]:
        return self._model.prompt_encoder, self._model.mask_decoder

    def _make_heads(self) -> Heads:
        prompts, masks = self._model.prompt_encoder, self._model.mask_decoder
        is_known = type(masks) is MaskDecoder and type(masks.transformer) is TwoWayTransformer
        if is_known and isinstance(masks.output_upscaling[2], nn.GELU):
            return FastMaskDecoder(prompts, masks, self._device, self._dtype)
        how = self._device, self._dtype
        return frozen(prompts, *how), frozen(masks, *how)

    def _share(self, prepared: PreparedEmbedding) -> tuple[Heads, list[SharedImage] | None]:
        """The heads as they are now, and what the fast form shares on an image."""
        if not self._fast:
            return (self._model.prompt_encoder, self._model.mask_decoder), None
        heads = self._heads.get()
        if not isinstance(heads, FastMaskDecoder):
            return heads, None
        if prepared.heads is not heads:
            prepared.heads, prepared.shared = heads, heads.prepare(prepared.features)
        return heads, prepared.shared


def _decode_plain(
    heads: tuple[PromptEncoder, MaskDecoder],
    prepared: PreparedEmbedding,
    prompts: PromptBatch,
    multimask_output: bool,
    hq_token_only: bool,
) -> tuple[Tensor, Tensor]:
    """A few prompts by the modules, without gradients and autocast."""
    like = next(heads[1].parameters())
    more: tuple[object, ...] = ()
    if isinstance(heads[1], HQMaskDecoder):
        if prepared.early is None:
            raise ValueError(
                "Light HQ-SAM's mask decoder wants interm_features, the encoder's early map, "
                "and this embedding has none; encode the image with the HQ model"
            )
        more = hq_token_only, prepared.early.to(like)
    points, boxes, masks = _tensors(prompts)
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        placed = points and (points[0].to(like), points[1].to(like.device))
        boxes, masks = (x if x is None else x.to(like) for x in (boxes, masks))
        given, features = (placed, boxes, masks), prepared.features.to(like)
        logits, iou = decode_prompts(heads, features, given, multimask_output, *more)
    return logits.float(), iou.float()


def why_unknown(model: Sam) -> str | None:
    """Why a form made of a SAM's weights alone cannot stand for its heads; None where it can."""
    masks = model.mask_decoder
    if type(masks) not in (MaskDecoder, HQMaskDecoder):
        return f"its mask decoder is a {type(masks).__qualname__}"
    if type(masks.transformer) is not TwoWayTransformer:
        return f"its transformer is a {type(masks.transformer).__qualname__}"
    for head in (model.prompt_encoder, masks):
        for name, module in head.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{name or 'a head'} has a forward hook"
    return None


def compare(
    model: Sam,
    run: Callable[
        [NDArray[np.float32], NDArray[np.float32] | None, PromptBatch, bool],
        tuple[NDArray[np.float32], NDArray[np.float32]],
    ],
) -> float:
    """The largest error of another form of a SAM's heads on a small image, relative to the output.

    ``run`` takes features [C, h, w], the early map or None, prompts, and ``multimask_output``.
    """
    prompt_encoder = frozen(model.prompt_encoder, "cpu", torch.float32)
    masks = frozen(model.mask_decoder, "cpu", torch.float32)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(masks.transformer_dim, 5, 7)).astype(np.float32)
    early = None
    if isinstance(masks, HQMaskDecoder):
        early = rng.normal(size=(5, 7, masks.vit_dim)).astype(np.float32)
    height, width = prompt_encoder.input_image_size
    places = np.array([[[0.3, 0.6], [0.7, 0.1]]], np.float32) * np.array(
        [width, height], np.float32
    )
    prompts = PromptBatch((places, np.array([[1, 0]])))
    prepared = PreparedEmbedding(
        torch.from_numpy(features)[None], None if early is None else torch.from_numpy(early)[None]
    )
    errors: list[float] = []
    for multimask in (True, False):
        wanted = _decode_plain((prompt_encoder, masks), prepared, prompts, multimask, False)
        found = zip(run(features, early, prompts, multimask), wanted, strict=True)
        errors += [error_of(got, exact.numpy()) for got, exact in found]
    return float(np.max(errors))


def _tensors(
    prompts: PromptBatch,
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None, Tensor | None]:
    points, others = prompts.points, (prompts.boxes, prompts.masks)
    boxes, masks = (x if x is None else torch.from_numpy(x) for x in others)
    return points and (torch.from_numpy(points[0]), torch.from_numpy(points[1])), boxes, masks
