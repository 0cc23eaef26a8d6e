"""The two ways of ``tinyvit segment`` to find masks: by prompts, and everything by a grid.

Both give annotations as COCO has them. Known here is how the library is called; nothing of files.

Letters: K masks of a prompt, h w the embedding's grid.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from tinyvit.cli.segment_files import MADE_BY, Names
from tinyvit.cli.segmenting import Annotation, Answer, Prompts, Reading
from tinyvit.images.preprocess import to_tensor
from tinyvit.inference import Engine
from tinyvit.sam import HQMaskDecoder, SamAutomaticMaskGenerator, Segmenter, rle
from tinyvit.sam.encoding import spec_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tinyvit.inference.pictures import Prepared
    from tinyvit.sam import ImageEmbedding, Masks, Prompt, Sam

__all__ = ["ByGrid", "ByPrompts", "Settings", "by_grid", "by_prompts", "recipe"]

Progress = Callable[[int, "int | None"], None]


@dataclass(frozen=True)
class Settings:
    """How a model runs, as ``tinyvit.Engine`` has it.

    Attributes:
        device: A torch device or "auto".
        precision: "fp32", "bf16" or "auto".
        batch_size: Pictures encoded together, at most.
        pad: False leaves out the padding; None does as the model says.
    """

    device: str = "auto"
    precision: str = "fp32"
    batch_size: int = 1
    pad: bool | None = None


@dataclass(frozen=True)
class ByPrompts:
    """Masks of prompts: one encoding of a picture, one decoding of all its prompts.

    Attributes:
        segmenter: Runs the model.
        multimask: Whether to write all three masks of each prompt.
        with_logits: Whether to write low-res logits.
    """

    segmenter: Segmenter
    multimask: bool = False
    with_logits: bool = False

    @property
    def engine(self) -> Engine:
        """As ``Method``."""
        return self.segmenter.encoder.engine

    def facts(self, prompts: Prompts) -> dict[str, object]:
        """As ``Method``."""
        return {
            "mode": "prompts",
            "multimask": self.multimask,
            "logits": self.with_logits,
            "prompts": [_described(prompt) for prompt in prompts],
        }

    def names(self, folder: Path, stem: str, prompts: Prompts) -> Names:
        """As ``Method``."""
        decoder = self.segmenter.model.mask_decoder
        has_more = self.multimask and not isinstance(decoder, HQMaskDecoder)  # it picks one itself
        candidates = decoder.num_multimask_outputs if has_more else 1
        return Names.of(folder, stem, len(prompts), candidates, self.with_logits)

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """As ``Method``."""
        return to_tensor(image, self.segmenter.encoder.image_spec)

    def answers(self, readings: Iterator[Reading]) -> Generator[Answer, None, None]:
        """As ``Method``; encodes pictures of one shape together, where batches are wanted."""
        waiting: deque[Reading] = deque()
        waited = 0.0

        def inputs() -> Generator[Prepared, None, None]:
            nonlocal waited
            while True:
                start = perf_counter()
                reading = next(readings, None)
                waited += perf_counter() - start
                if reading is None or reading.prepared is None:
                    return
                waiting.append(reading)
                yield reading.prepared

        with closing(inputs()) as prepared:
            embeddings = iter(self.segmenter.encoder.encode_prepared(prepared))
            while True:
                start, waited = perf_counter(), 0.0
                embedding = next(embeddings, None)
                if embedding is None:
                    return
                reading = waiting.popleft()
                reading.seconds["encode"] = perf_counter() - start - waited
                yield self._answer(reading, embedding)

    def _answer(self, reading: Reading, embedding: ImageEmbedding) -> Answer:
        prompts, features = reading.task.prompts, embedding.features
        if not features.isfinite().all():
            words = "its features are not all finite numbers; try --precision fp32"
            return Answer(reading, failure=words)
        low_res_size = 4 * features.shape[1], 4 * features.shape[2]
        for number, prompt in enumerate(prompts, 1):
            try:
                prompt.check_in(embedding.original_size, low_res_size)
            except ValueError as err:
                which = "" if len(prompts) == 1 else f"object {number}: "
                return Answer(reading, failure=f"{which}{err}")
        start = perf_counter()
        multimask: bool | Literal["auto"] = True if self.multimask else "auto"
        (masks,) = self.segmenter.segment([embedding], [prompts], multimask)
        reading.seconds["decode"] = perf_counter() - start
        best = masks.best()
        logits = [
            one[int(chosen)].numpy()
            for one, chosen in zip(masks.low_res_logits, best, strict=True)
            if self.with_logits
        ]
        return Answer(reading, self._annotations(reading, masks), logits)

    def _annotations(
        self, reading: Reading, masks: Masks
    ) -> Iterator[tuple[Annotation, NDArray[np.bool_]]]:
        """The masks in the picture's size, one at a time; that is a part of decoding."""
        best = masks.best()
        for number, prompt in enumerate(masks.prompts):
            scores, chosen = masks.predicted_ious[number], int(best[number])
            for token in range(len(scores)) if self.multimask else (chosen,):
                start = perf_counter()
                mask = masks.mask(number, token)
                reading.seconds["decode"] += perf_counter() - start
                annotation = _annotation(mask, float(scores[token]), prompt)
                annotation["object"] = number + 1
                if len(scores) > 1 and self.multimask:
                    annotation.update(candidate=token + 1, is_best=token == chosen)
                yield annotation, mask


@dataclass(frozen=True)
class ByGrid:
    """Masks of everything in a picture.

    Attributes:
        engine: Runs the encoder.
        generator: Runs the model; its masks are run lengths.
        arguments: Those of the generator that were given, for ``facts``.
        progress: Opens a progress bar for a picture's name.
    """

    engine: Engine
    generator: SamAutomaticMaskGenerator
    arguments: Mapping[str, object]
    progress: Callable[[str], AbstractContextManager[Progress]]

    def facts(self, prompts: Prompts) -> dict[str, object]:
        """As ``Method``."""
        return {"mode": "everything", **self.arguments}

    def names(self, folder: Path, stem: str, prompts: Prompts) -> Names:
        """As ``Method``."""
        return Names.of(folder, stem, 0, 1, False)

    def prepare(self, image: NDArray[np.uint8]) -> None:
        """As ``Method``; the generator cuts crops out of the picture itself."""

    def answers(self, readings: Iterator[Reading]) -> Generator[Answer, None, None]:
        """As ``Method``."""
        for reading in readings:
            start = perf_counter()
            with self.progress(reading.task.picture.name) as update:
                records = self.generator.generate(reading.image, progress=update)
            reading.seconds["generate"] = perf_counter() - start
            annotations = [
                ({"image_id": 1, "category_id": 1, "iscrowd": 0, **record}, None)
                for record in records
            ]
            yield Answer(reading, annotations)


def by_prompts(sam: Sam, settings: Settings, multimask: bool, with_logits: bool) -> ByPrompts:
    """A method that segments by prompts.

    Raises:
        ValueError: A setting that ``Engine`` refuses.
    """
    segmenter = Segmenter(
        sam,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        pad=settings.pad,
    )
    segmenter.encoder.weights_sha256()  # now, and not while the first picture is timed
    return ByPrompts(segmenter, multimask, with_logits)


def by_grid(
    sam: Sam,
    settings: Settings,
    arguments: Mapping[str, int | float],
    progress: Callable[[str], AbstractContextManager[Progress]],
) -> ByGrid:
    """A method that segments everything.

    Args:
        sam: The model.
        settings: How it runs.
        arguments: Those of the generator that are not its own defaults.
        progress: Opens a progress bar for a picture's name.

    Raises:
        ValueError: A setting that ``Engine`` refuses, or an argument out of its range.
    """
    engine = Engine(
        sam.image_encoder,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        image_spec=spec_of(sam),
        pad=settings.pad,
    )
    generator = SamAutomaticMaskGenerator(
        sam,
        **cast("dict[str, Any]", dict(arguments)),
        output_mode="coco_rle",
        engine=engine,
        device=settings.device,
    )
    return ByGrid(engine, generator, arguments, progress)


def recipe(sam: Sam, engine: Engine, checkpoint: str) -> dict[str, object]:
    """What documents say about the model; plain data that JSON gives back unchanged.

    Args:
        sam: The model.
        engine: Runs its encoder.
        checkpoint: What the user called it.

    Returns:
        The facts.
    """
    facts = {
        "made_by": MADE_BY,
        "tinyvit_version": version("tinyvit"),
        "checkpoint": checkpoint,
        "model_sha256": _hash_of(sam),
        "image_spec": engine.image_spec.to_dict(),
        "precision": getattr(engine.backend, "precision", "fp32"),
        "device": engine.backend.device,
    }
    plain: dict[str, object] = json.loads(json.dumps(facts))
    return plain


def _annotation(mask: NDArray[np.bool_], score: float, prompt: Prompt) -> Annotation:
    lengths = rle.encode(mask)
    return {
        "image_id": 1,
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": lengths,
        "bbox": list(rle.to_box(lengths)),
        "area": rle.area(lengths),
        "score": score,
        "prompt": prompt.describe(),
    }


def _described(prompt: Prompt) -> dict[str, object]:
    """A prompt as plain data, of a mask its hash."""
    facts = prompt.describe()
    if prompt.mask is not None:
        head = f"{prompt.mask.dtype} {prompt.mask.shape}\n".encode()
        facts["mask"] = hashlib.sha256(head + prompt.mask.tobytes()).hexdigest()
    return facts


def _hash_of(sam: Sam) -> str:
    """SHA-256 of all tensors (names, dtypes, shapes, bytes): tells models apart."""
    digest = hashlib.sha256()
    for key, tensor in sorted(sam.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()
