"""``Segmenter``: many pictures, many prompts on each, of any mixture of kinds.

Pictures are read ahead and encoded in batches by ``tinyvit.Engine``; prompts of one kind on one
picture are decoded together, and each answer is the one that the prompt would get alone.

Holds no picture. Letters: N prompts of a picture, K masks of a prompt.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.inference import Backend, Picture
from tinyvit.inference.backend import BackendName, choose_device
from tinyvit.inference.pictures import each

from .build import build_sam
from .decoding import PromptDecoder
from .embedding import ImageEmbedding
from .encoding import PictureEncoder
from .masks import Masks
from .model import Sam
from .prompt_tensors import group_prompts, stack_prompts
from .prompts import Prompt, PromptLike, to_prompt

__all__ = ["Masks", "Segmenter"]

Multimask: TypeAlias = "bool | Literal['auto']"


class Segmenter:
    """Segments pictures by prompts.

    May be used by several threads: nothing is kept of a picture but what its next prompts share.

    Args:
        sam: A ``Sam``, which is never changed; or the name of a checkpoint or the path of a file
            that holds a whole SAM; None takes the embedded weights.
        backend: As for ``tinyvit.Engine``; it runs the image encoder.
        precision: As for ``tinyvit.Engine``; the decoder always computes in fp32.
        device: Where to compute: a torch device, or "auto".
        batch_size: Pictures that are encoded together, at most.
        pad: As for ``tinyvit.Engine``: False spends no work on padding, with other numbers.

    Raises:
        CheckpointError: The file cannot be read, or holds no whole SAM.
        DownloadError: The checkpoint cannot be fetched.
        MissingExtraError: The package of the backend is not installed.
        ValueError: A value that ``Engine`` refuses.

    Example:
        >>> import numpy as np
        >>> from tinyvit.sam import Prompt, Segmenter
        >>> picture = np.zeros((48, 64, 3), np.uint8)
        >>> prompts = [Prompt(points=[[32, 24]]), Prompt(box=[8, 8, 40, 40])]
        >>> for masks in Segmenter().segment([picture], [prompts]):
        ...     print(masks)
        Masks(2 prompts, up to 3 masks each, picture 48x64)
    """

    def __init__(
        self,
        sam: Sam | str | os.PathLike[str] | None = None,
        *,
        backend: BackendName | Backend = "auto",
        precision: str = "fp32",
        device: str = "auto",
        batch_size: int = 8,
        pad: bool | None = None,
    ) -> None:
        place = choose_device(device)
        if not isinstance(sam, Sam):
            sam = build_sam(DEFAULT_CHECKPOINT if sam is None else sam)
        self.model = sam
        self._encoder = PictureEncoder(
            sam,
            backend=backend,
            precision=precision,
            device=place if isinstance(backend, str) else "auto",
            batch_size=batch_size,
            pad=pad,
        )
        self._decoder = PromptDecoder(sam, place)

    @property
    def encoder(self) -> PictureEncoder:
        """What encodes pictures; its ``engine`` explains itself."""
        return self._encoder

    def embed(self, images: Picture | Iterable[Picture]) -> Iterator[ImageEmbedding]:
        """Encode pictures, one by one, in order, in bounded memory.

        Args:
            images: One picture or many, as for ``Engine.stream``; may be a generator.

        Yields:
            One embedding for each picture; it can be saved, and segmented later or elsewhere.

        Raises:
            ImageError: A picture cannot be read; those before it have been yielded.
        """
        return self._encoder.encode(images)

    def segment(
        self,
        images: Picture | ImageEmbedding | Iterable[Picture] | Iterable[ImageEmbedding],
        prompts: Iterable[Sequence[PromptLike]],
        multimask: Multimask = "auto",
    ) -> Iterator[Masks]:
        """Segment pictures, one by one, in order, in bounded memory.

        Args:
            images: One or many pictures, or embeddings of such; may be a generator.
            prompts: For each picture a list of prompts (may be empty), each a ``Prompt`` or a
                dictionary of its arguments.
            multimask: True: the three masks of an ambiguous prompt; False: one mask; "auto": three
                for a single point without box and mask, which is ambiguous, one for all others.

        Yields:
            The masks of each picture.

        Raises:
            ImageError: A picture cannot be read; those before it have been segmented.
            ValueError: ``multimask`` is unknown, there are more or fewer pictures than lists of
                prompts, a prompt is wrong (it says on which picture), or an embedding was made by
                another encoder.
            TypeError: A list of prompts holds something else, or pictures and embeddings are mixed.
        """
        if multimask not in (True, False, "auto"):
            raise ValueError(f"multimask must be True, False or 'auto', came {multimask!r}")
        if isinstance(prompts, (Prompt, Mapping)):
            raise TypeError("prompts must be one list of prompts for each picture, came one prompt")
        return self._segment(images, iter(prompts), multimask)

    def _segment(
        self,
        images: Picture | ImageEmbedding | Iterable[Picture] | Iterable[ImageEmbedding],
        prompts: Iterator[Sequence[PromptLike]],
        multimask: Multimask,
    ) -> Iterator[Masks]:
        number = -1
        for number, embedding in enumerate(self._embeddings(images)):
            wanted = next(prompts, None)
            if wanted is None:
                raise ValueError(
                    f"picture {number} has no list of prompts: there are only {number} lists; give "
                    "one for each picture, [] for none"
                )
            yield self._answer(embedding, _checked(wanted, number), number, multimask)
        if next(prompts, None) is not None:
            raise ValueError(
                f"there are more lists of prompts than the {number + 1} pictures; give one list "
                "for each picture"
            )

    def _embeddings(
        self, images: Picture | ImageEmbedding | Iterable[Picture] | Iterable[ImageEmbedding]
    ) -> Iterator[ImageEmbedding]:
        """Embeddings as they are, checked; pictures encoded. The first one tells which."""
        if isinstance(images, ImageEmbedding):
            images = [images]
        items = iter(each(cast(Any, images)))
        first = next(items, None)
        if first is None:
            return
        rest: Iterator[Any] = chain([first], items)
        if not isinstance(first, ImageEmbedding):
            yield from self._encoder.encode(_pictures(rest))
            return
        for item in rest:
            if not isinstance(item, ImageEmbedding):
                raise TypeError(
                    f"after embeddings came a {type(item).__name__}; segment pictures and "
                    "embeddings in calls of their own"
                )
            self._encoder.check(item)
            yield item

    def _answer(
        self,
        embedding: ImageEmbedding,
        prompts: tuple[Prompt, ...],
        number: int,
        multimask: Multimask,
    ) -> Masks:
        """The masks of all prompts on one picture."""
        decoder, features, placement = self._decoder, embedding.features, embedding.placement
        low_res_size, frame = decoder.low_res_size(features), decoder.frame(features)
        for position, prompt in enumerate(prompts):
            try:
                prompt.check_in(placement.original_size, low_res_size)
            except ValueError as err:
                raise ValueError(f"prompt {position} of picture {number}: {err}") from err
        logits: list[Tensor | None] = [None] * len(prompts)
        ious: list[NDArray[np.float32] | None] = [None] * len(prompts)
        for kind, members in group_prompts(prompts).items():
            tensors = stack_prompts([prompts[i] for i in members], placement, low_res_size, frame)
            is_ambiguous = kind == (1, False, False)
            many = is_ambiguous if multimask == "auto" else multimask
            low_res, scores = decoder.decode(
                features, tensors, many, interm_features=embedding.interm_features
            )
            for i, one, iou in zip(members, low_res.cpu(), scores.cpu().numpy(), strict=True):
                logits[i], ious[i] = one, iou
        return Masks(
            prompts,
            tuple(cast("list[Tensor]", logits)),
            tuple(cast("list[NDArray[np.float32]]", ious)),
            placement,
            decoder.pitch,
            self.model.mask_threshold,
        )


def _pictures(items: Iterable[Any]) -> Iterator[Picture]:
    """Pictures, and no embeddings among them."""
    for item in items:
        if isinstance(item, ImageEmbedding):
            raise TypeError(
                "after pictures came an ImageEmbedding; segment pictures and embeddings in calls "
                "of their own"
            )
        yield item


def _checked(prompts: Sequence[PromptLike], number: int) -> tuple[Prompt, ...]:
    """A picture's prompts, or an error that says which one is wrong."""
    if isinstance(prompts, (Prompt, Mapping, str)) or not isinstance(prompts, Iterable):
        raise TypeError(
            f"the prompts of picture {number} must be a list of prompts, came "
            f"{type(prompts).__name__}; give one list for each picture"
        )
    checked = []
    for position, prompt in enumerate(prompts):
        try:
            checked.append(to_prompt(prompt))
        except (TypeError, ValueError) as err:
            words = f"prompt {position} of picture {number}: {err}"
            raise (TypeError if isinstance(err, TypeError) else ValueError)(words) from err
    return tuple(checked)
