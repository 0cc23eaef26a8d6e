"""A SAM's decoder in the native engine: prompts on an embedding -> low-res logits, scores, masks.

It follows the weights of a ``Sam``, and leaves what it does not know to torch's decoder; for a
``StoredSam`` torch is never loaded. Numpy at the surface, see ``inference.backend``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import CheckpointError
from tinyvit.image_spec import Placement
from tinyvit.images.mask_ops import Found
from tinyvit.inference.derived import TOLERANCE, Derived
from tinyvit.inference.native_backend import default_threads, native_library

from .embedding import ImageEmbedding
from .open import StoredSam, is_hq
from .prompts import PromptBatch

if TYPE_CHECKING:
    from torch import nn

    from .decoder import TorchDecoder
    from .model import Sam

Floats: TypeAlias = NDArray[np.float32]

Heads: TypeAlias = "tuple[Any, TorchDecoder | None]"
"""Prompt encoder and mask decoder in the library, with the weights of a moment; or torch's."""

BATCH = 64
"""Prompts whose logits are made before they are joined: 50 MB with three masks of 256x256."""


class NativePrepared:
    """What ``NativeDecoder.prepare`` made of an embedding; held by the caller, kept up to date."""

    def __init__(self, embedding: ImageEmbedding) -> None:
        self.embedding = embedding
        self.heads: object = None  # that made `image`
        self.image: Any = None

    @property
    def nbytes(self) -> int:
        """How much memory it holds."""
        early = self.embedding.interm_features
        given = self.embedding.features.nbytes + (0 if early is None else early.nbytes)
        return given + (0 if self.image is None else int(self.image.nbytes))


class NativeDecoder:
    """Decodes prompts in the native library; may be used by several threads.

    The model is never changed; ``threads`` is as for ``NativeBackend``.

    Raises:
        MissingExtraError: tinyvit_native is not installed, or is of another version.
        CheckpointError: The tensors of a ``StoredSam`` make no decoder.
    """

    device = "cpu"

    def __init__(self, model: Sam | StoredSam, threads: int | None = None) -> None:
        native_library()
        self._model = model
        self._threads = default_threads() if threads is None else threads
        self._derived = Derived(self._modules, self._make)
        if isinstance(model, StoredSam):
            self._derived.get()  # says what is wrong with the file

    @property
    def logit_stride(self) -> float:
        """Input pixels per low-res logit."""
        (height, _), (covered, _) = self._grids()
        return covered / (4 * height)

    def explain(self) -> str:
        """What runs, and why, in words."""
        return self._derived.get()[1]

    def prepare(self, embedding: ImageEmbedding) -> NativePrepared:
        """What all prompts on this embedding share, computed once."""
        prepared = NativePrepared(embedding)
        self._share(prepared)
        return prepared

    def decode(
        self,
        prepared: NativePrepared,
        prompts: PromptBatch,
        multimask_output: bool = True,
        *,
        min_iou: float | None = None,
        hq_token_only: bool = False,
    ) -> tuple[Floats, Floats]:
        """As ``TorchDecoder.decode``."""
        library, torch = self._share(prepared)
        prompts.check_masks(prepared.embedding.low_res_size)
        if hq_token_only and not is_hq(self._model):
            raise ValueError("hq_token_only=True wants a model with Light HQ-SAM's mask decoder")
        if torch is not None:
            kind: dict[str, Any] = {"min_iou": min_iou, "hq_token_only": hq_token_only}
            return torch.decode(prepared.image, prompts, multimask_output, **kind)
        found = [
            library.decode(
                prepared.image,
                **_of_library(prompts.part(start, start + BATCH)),
                multimask=multimask_output,
                min_score=min_iou,
                hq_only=hq_token_only,
            )
            for start in range(0, max(len(prompts), 1), BATCH)
        ]
        if len(found) == 1:
            return cast("tuple[Floats, Floats]", found[0])
        logits, scores = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return logits, scores

    def masks(
        self, low_res_logits: Floats, placement: Placement, threshold: float | None
    ) -> NDArray[Any]:
        """Low-res logits [..., h4, w4] -> masks [..., H, W] bool; float32 logits for None."""
        library = native_library()
        return cast(
            "NDArray[Any]",
            library.enlarge(low_res_logits, self._lies(low_res_logits.shape, placement), threshold),
        )

    def find(
        self,
        prepared: NativePrepared,
        prompts: PromptBatch,
        placement: Placement,
        *,
        min_iou: float,
        **how: Any,
    ) -> tuple[Iterator[Found], Floats]:
        """As ``TorchDecoder.find``; neither masks nor their logits are ever kept."""
        library, torch = self._share(prepared)
        if torch is not None:
            return torch.find(prepared.image, prompts, placement, min_iou=min_iou, **how)
        lies = self._lies(prepared.embedding.low_res_size, placement)
        points = cast("tuple[Floats, NDArray[np.int64]]", prompts.points)
        regions, scores = library.find(
            prepared.image, lies, points=points, min_score=min_iou, **how
        )
        found = (
            Found(one.prompt, one.mask, one.score, one.stability, one.box, one.counts)
            for one in regions
        )
        return found, scores

    def _share(self, prepared: NativePrepared) -> Heads:
        """The heads as they are now, with the embedding made ready for them."""
        heads = library, torch = self._derived.get()[0]
        if prepared.heads is not heads:
            embedding, early = prepared.embedding, prepared.embedding.interm_features
            if torch is not None:
                prepared.image = torch.prepare(embedding)
            elif is_hq(self._model) and early is None:
                raise ValueError(
                    "Light HQ-SAM's mask decoder wants interm_features, the encoder's early map, "
                    "and this embedding has none; encode the image with the HQ model"
                )
            else:
                more = early if is_hq(self._model) else None
                prepared.image = library.prepare(embedding.features, more)
            prepared.heads = heads
        return heads

    def _lies(self, shape: tuple[int, ...], placement: Placement) -> Any:
        """Where an image lies in what logits [..., h4, w4] cover, as the library has it."""
        covered = tuple(round(side * self.logit_stride) for side in shape[-2:])
        sizes = placement.resized_size, placement.original_size
        return native_library().Placement(covered, *sizes)

    def _modules(self) -> Sequence[nn.Module]:
        model = self._model
        if isinstance(model, StoredSam):
            return []
        return model.prompt_encoder, model.mask_decoder

    def _grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The encoder's grid for a padded image, and the pixels of the input that it covers."""
        if isinstance(self._model, StoredSam):
            return self._model.grids
        prompts = self._model.prompt_encoder
        return prompts.image_embedding_size, prompts.input_image_size

    def _make(self) -> tuple[Heads, str]:
        model, (grid, covered) = self._model, self._grids()
        how = {"grid": grid, "input_size": covered, "threads": self._threads}
        make: Any = native_library().Decoder
        if isinstance(model, StoredSam):
            try:
                return (make(model.heads, num_heads=8, **how), None), "native"
            except (ValueError, RuntimeError) as err:
                raise CheckpointError(f"these weights make no mask decoder: {err}") from err
        from .decoder import TorchDecoder, compare, why_unknown

        reason = why_unknown(model)
        if reason is None:
            try:
                attention = cast(Any, model.mask_decoder.transformer).final_attn_token_to_image
                library = make(_tensors_of(model), num_heads=int(attention.num_heads), **how)
                error = compare(model, partial(_run, library))
                if error <= TOLERANCE["fp32"]:
                    return (library, None), f"native (checked: error {error:.0e})"
                reason = f"the native form differs by {error:.1e}"
            except (ValueError, RuntimeError) as err:
                reason = str(err)
        return (None, TorchDecoder(model)), f"torch ({reason})"


def _run(
    library: Any, features: Floats, early: Floats | None, prompts: PromptBatch, multimask: bool
) -> tuple[Floats, Floats]:
    """What ``compare`` compares."""
    image = library.prepare(features, early)
    found = library.decode(image, **_of_library(prompts), multimask=multimask)
    return cast("tuple[Floats, Floats]", found)


def _of_library(prompts: PromptBatch) -> dict[str, Any]:
    return {"points": prompts.points, "boxes": prompts.boxes, "masks": prompts.masks}


def _tensors_of(model: Sam) -> dict[str, NDArray[Any]]:
    from tinyvit.inference.fast_encoder import arrays_of

    heads = {"prompt_encoder.": model.prompt_encoder, "mask_decoder.": model.mask_decoder}
    return {name + key: x for name, head in heads.items() for key, x in arrays_of(head).items()}
