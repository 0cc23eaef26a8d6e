"""``Segmenter``: many images, many prompts, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from tinyvit.inference.bundle import open_pair

from .embedding import ImageEmbedding, ImageEncoder
from .masks import Floats
from .masks import Masks as Masks
from .open import WITHOUT_TORCH, AnySam, ExportedSam, StoredSam, choose_decoder, is_hq, open_sam
from .prompts import Kind, Prompt, PromptLike, stack_prompts, to_prompt

if TYPE_CHECKING:
    from tinyvit.image_spec import ImageSpec
    from tinyvit.inference.backend import Backend, BackendName, Prepared
    from tinyvit.inference.engine import Picture

    from .model import Sam

Multimask: TypeAlias = "bool | Literal['auto']"


class Segmenter:
    """Segments images by prompts.

    May be used by several threads: nothing is kept of an image but what its next prompts share. It
    can be copied and pickled.

    Args:
        sam: A ``Sam``, which is never changed; or the name of a checkpoint, or the path of a file
            or folder that holds a whole SAM; or a folder of ``tinyvit export``, for which torch is
            not needed. None takes the embedded weights.
        backend: As for ``tinyvit.Engine``; it runs the image encoder, of an exported folder the
            decoder, too.
        precision: As for ``tinyvit.Engine``; the decoder always computes in fp32.
        device: Where to compute: a torch device, or "auto".
        batch_size: Images that are encoded together, at most.
        pad: As for ``tinyvit.Engine``: False spends no work on padding, with other numbers.
        threads: As for ``tinyvit.Engine``.
        workers: As for ``tinyvit.Engine``.
        encoder: Instead of ``sam``, an exported file: images [N, 3, H, W] -> [N, C, h, w].
        decoder: With ``encoder``: a decoder with the inputs of segment-anything's exporter.
        image_spec: How images are prepared for an ``encoder`` without our metadata.

    Raises:
        CheckpointError: The file cannot be read, or holds no whole SAM; an exported folder lacks a
            part, or its files are of different exports.
        DownloadError: The checkpoint cannot be fetched.
        MissingExtraError: The package of the backend is not installed.
        ValueError: A value that ``Engine`` refuses.

    Examples:
        >>> import numpy as np
        >>> from tinyvit.sam import Prompt, Segmenter
        >>> image = np.zeros((48, 64, 3), np.uint8)
        >>> prompts = [Prompt(points=[[32, 24]]), Prompt(box=[8, 8, 40, 40])]
        >>> for masks in Segmenter().segment([image], [prompts]):
        ...     print(masks)
        Masks(2 prompts, up to 3 masks each, image 48x64)
    """

    def __init__(
        self,
        sam: AnySam | str | os.PathLike[str] | None = None,
        *,
        backend: BackendName | Backend = "auto",
        precision: str = "fp32",
        device: str = "auto",
        batch_size: int = 8,
        pad: bool | None = None,
        threads: int | None = None,
        workers: int | None = None,
        encoder: str | os.PathLike[str] | None = None,
        decoder: str | os.PathLike[str] | None = None,
        image_spec: ImageSpec | None = None,
    ) -> None:
        self._encoding = backend, precision, device, pad, workers, batch_size, True, threads
        if encoder is None and decoder is None:
            if image_spec is not None:
                raise ValueError("image_spec= is for encoder= and decoder=; a model says it itself")
            more = {"precision": precision, "threads": threads}
            self._use(open_sam(sam, "Segmenter", backend, device, **more))  # type: ignore[arg-type]
            return
        if encoder is None or decoder is None or sam is not None or not isinstance(backend, str):
            raise ValueError(
                "give encoder= and decoder= together and no model, or a model alone, such as "
                "Segmenter('exported/')"
            )
        pair = open_pair((encoder, decoder), backend, device, precision, threads, image_spec)
        self._use(ExportedSam(pair))

    def _use(self, model: AnySam) -> None:
        self._model = model
        self._encoder = ImageEncoder(model, None, *self._encoding)
        self._decoder = choose_decoder(model, self._encoder.engine, self._encoder.device)
        self._last: tuple[ImageEmbedding, Any] | None = None

    @property
    def model(self) -> Sam:
        """The model; one that was opened without torch is built when it is asked for."""
        if isinstance(self._model, StoredSam):
            self._use(self._model.build())
        return cast("Sam", self._model)

    @property
    def candidates(self) -> int:
        """Masks of an ambiguous prompt: 3, or 1 where the decoder picks one itself."""
        model = self._model
        decoder: Any = model if isinstance(model, WITHOUT_TORCH) else model.mask_decoder
        return 1 if is_hq(model) else int(decoder.num_multimask_outputs)

    @property
    def source(self) -> AnySam:
        """The model as it runs, which may be one of a file, opened without torch."""
        return self._model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def __repr__(self) -> str:
        return f"Segmenter({self._encoder.engine!r})"

    def explain(self) -> str:
        """What runs the encoder and the decoder, and why, in words."""
        return f"{self._encoder.engine.explain()}; the decoder runs in {self._decoder.explain()}"

    @property
    def encoder(self) -> ImageEncoder:
        """What encodes images; its ``engine`` explains itself."""
        return self._encoder

    def embed(self, images: Picture | Iterable[Picture]) -> Iterator[ImageEmbedding]:
        """Encode images, one by one, in order, in bounded memory.

        Args:
            images: One image or many, as for ``Engine.stream``; may be a generator.

        Yields:
            One embedding for each image; it can be saved, and segmented later or elsewhere.

        Raises:
            ImageError: An image cannot be read; those before it have been yielded.
        """
        return self._encoder.encode(images)

    def segment(
        self,
        images: Picture | ImageEmbedding | Iterable[Picture] | Iterable[ImageEmbedding],
        prompts: Iterable[Sequence[PromptLike]],
        multimask: Multimask = "auto",
    ) -> Iterator[Masks]:
        """Segment images, one by one, in order, in bounded memory.

        Args:
            images: One or many images, or embeddings of such; may be a generator.
            prompts: For each image a list of prompts (may be empty), each a ``Prompt`` or a
                dictionary of its arguments.
            multimask: True: the three masks of an ambiguous prompt; False: one mask; "auto": three
                for a single point without box and mask, which is ambiguous, one for all others.

        Yields:
            The masks of each image.

        Raises:
            ImageError: An image cannot be read; those before it have been segmented.
            ValueError: ``multimask`` is unknown, there are more or fewer images than lists of
                prompts, a prompt is wrong (it says on which image), or an embedding was made by
                another encoder.
            TypeError: A list of prompts holds something else, or images and embeddings are mixed.
        """
        if multimask not in (True, False, "auto"):
            raise ValueError(f"multimask must be True, False or 'auto', came {multimask!r}")
        if isinstance(prompts, (Prompt, Mapping)):
            raise TypeError("prompts must be one list of prompts for each image, came one prompt")
        return self._segment(images, iter(prompts), multimask)

    def _segment(
        self, images: Any, prompts: Iterator[Sequence[PromptLike]], multimask: Multimask
    ) -> Iterator[Masks]:
        number = -1
        for number, embedding in enumerate(self._embeddings(images)):
            wanted = next(prompts, None)
            if wanted is None:
                raise ValueError(
                    f"image {number} has no list of prompts: there are only {number} lists; give "
                    "one for each image, [] for none"
                )
            yield self._predict(embedding, _checked(wanted, number, embedding), multimask)
        if next(prompts, None) is not None:
            raise ValueError(
                f"there are more lists of prompts than the {number + 1} images; give one list "
                "for each image"
            )

    def _embeddings(
        self, images: Picture | ImageEmbedding | Iterable[Picture] | Iterable[ImageEmbedding]
    ) -> Iterator[ImageEmbedding]:
        """Embeddings as they are, checked; images encoded. The first one tells which."""
        from tinyvit.inference.read_ahead import each

        source = [images] if isinstance(images, ImageEmbedding) else each(cast(Any, images))
        items = iter(cast("Iterable[Any]", source))
        first = next(items, None)
        if first is None:
            return
        is_encoded = isinstance(first, ImageEmbedding)

        def alike() -> Iterator[Any]:
            for item in chain([first], items):
                if isinstance(item, ImageEmbedding) != is_encoded:
                    came = "embeddings came a" if is_encoded else "images came an"
                    raise TypeError(
                        f"after {came} {type(item).__name__}; segment images and embeddings in "
                        "calls of their own"
                    )
                yield item

        if not is_encoded:
            yield from self._encoder.encode(alike())
            return
        for item in alike():
            self._encoder.check(item)
            yield item

    def prepare(self, embedding: ImageEmbedding) -> Prepared:
        """What all prompts on one image share, for ``predict``; who alternates images keeps it.

        Args:
            embedding: Of the image, made by this model.

        Returns:
            An opaque value; ``nbytes`` says how much memory it holds.

        Raises:
            ValueError: The embedding was made by another encoder.
        """
        self._encoder.check(embedding)
        return self._decoder.prepare(embedding)

    def predict(
        self,
        embedding: ImageEmbedding,
        prompts: Sequence[PromptLike],
        multimask: Multimask = "auto",
        *,
        prepared: Prepared | None = None,
    ) -> Masks:
        """The masks of prompts on one image that is encoded.

        Args:
            embedding: Of the image.
            prompts: Each a ``Prompt`` or a dictionary of its arguments.
            multimask: As for ``segment``.
            prepared: What ``prepare`` gave for this embedding; None prepares it here.

        Raises:
            ValueError: A prompt is wrong, or the embedding was made by another encoder.
            TypeError: The list of prompts holds something else.
        """
        if prepared is None:
            prepared = self.prepare(embedding)
        return self._predict(embedding, _checked(prompts, 0, embedding), multimask, prepared)

    def _predict(
        self,
        embedding: ImageEmbedding,
        prompts: tuple[Prompt, ...],
        multimask: Multimask,
        prepared: Prepared | None = None,
    ) -> Masks:
        decoder, placement, last = self._decoder, embedding.placement, self._last
        logits: dict[int, Floats] = {}
        ious: dict[int, Floats] = {}
        groups: dict[Kind, list[int]] = {}
        for position, prompt in enumerate(prompts):
            groups.setdefault(prompt.kind, []).append(position)
        if prepared is None and prompts:
            if last is None or last[0] is not embedding:
                self._last = last = embedding, decoder.prepare(embedding)
            prepared = last[1]
        for kind, members in groups.items():
            own = [prompts[i] for i in members]
            batch = stack_prompts(own, placement, embedding.low_res_size, decoder.logit_stride)
            many = kind == (1, False, False) if multimask == "auto" else multimask  # ambiguous
            low_res, scores = decoder.decode(cast(Any, prepared), batch, many)
            logits.update(zip(members, low_res, strict=True))
            ious.update(zip(members, scores, strict=True))
        low_res_logits, predicted_ious = (
            tuple(found[i] for i in range(len(prompts))) for found in (logits, ious)
        )
        stride, threshold = decoder.logit_stride, self._model.mask_threshold
        return Masks(prompts, low_res_logits, predicted_ious, placement, stride, threshold)


def _checked(
    prompts: Sequence[PromptLike], number: int, embedding: ImageEmbedding
) -> tuple[Prompt, ...]:
    """An image's prompts, or an error that says which one is wrong."""
    if isinstance(prompts, (Prompt, Mapping, str)) or not isinstance(prompts, Iterable):
        raise TypeError(
            f"the prompts of image {number} must be a list of prompts, came "
            f"{type(prompts).__name__}; give one list for each image"
        )
    checked = []
    for position, given in enumerate(prompts):
        try:
            prompt = to_prompt(given)
            prompt.check_in(embedding.original_size, embedding.low_res_size)
        except (TypeError, ValueError) as err:
            words = f"prompt {position} of image {number}: {err}"
            raise (TypeError if isinstance(err, TypeError) else ValueError)(words) from err
        checked.append(prompt)
    return tuple(checked)
