"""``tinyvit segment`` without its command line: masks of prompts, or of everything, as files.

``STEM.json`` is a document as COCO has them: ``info`` says how it came about and names all other
files, ``annotations`` has one entry for each mask. ``STEM.overlay.png`` shows masks and prompts
over the image; ``STEM.mask-1.png`` is a mask, ``STEM.logits-1.npy`` its low-res logits. While files
are written, ``info.is_complete`` is false: what an interruption leaves is known and replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from tinyvit.checkpoints.files import weights_sha256, write_bytes, write_text
from tinyvit.images import draw, mask_ops
from tinyvit.images.decode import MAX_PIXELS, decode
from tinyvit.images.preprocess import to_input
from tinyvit.sam.masks import draw_prompts
from tinyvit.sam.open import ExportedSam

from .images import Item
from .runner import FolderWork, Job, facts_of_engine, facts_of_image, find_existing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tinyvit.sam import ImageEmbedding, Masks, Prompt, Segmenter
    from tinyvit.sam.automatic import MaskRecord, SamAutomaticMaskGenerator

    Progress: TypeAlias = Callable[[int, "int | None"], None]
    Annotation: TypeAlias = dict[str, Any]
    Found: TypeAlias = "Masks | list[MaskRecord]"

NOT_TOLD = {"segmentation", "prompt", "image_id", "category_id", "iscrowd"}  # in short


class SegmentFolder(FolderWork["Masks | list[MaskRecord]"]):
    """How images are segmented and where to.

    ``everything`` has arguments for ``SamAutomaticMaskGenerator`` that differ from its own; with it
    there are no prompts. ``progress`` opens a bar for the name of an image that is worked on.

    Facts of an outcome are ``document`` and ``overlay``, the names of these files, and if they
    were written ``count`` of masks, ``seconds`` of each step and, of prompts, ``masks``: their
    annotations without run lengths and prompt.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        folder: Path,
        checkpoint: str,
        *,
        multimask: bool = False,
        with_logits: bool = False,
        everything: Mapping[str, int | float] | None = None,
        progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
        overwrite: bool = False,
        max_pixels: int | None = MAX_PIXELS,
    ) -> None:
        engine = segmenter.encoder.engine
        super().__init__(engine, folder, overwrite, max_pixels)
        self.segmenter = segmenter
        model = segmenter.source
        if isinstance(model, ExportedSam):
            sha256 = model.pair.sha256
        else:
            sha256 = weights_sha256(model.state_dict())
        known = {"made_by": "tinyvit segment", "model_sha256": sha256}
        self.facts = facts_of_engine(engine, checkpoint, **known)
        self.multimask, self.with_logits = multimask, with_logits
        self.progress, self.everything = progress, everything
        self.generator: SamAutomaticMaskGenerator | None = None
        if everything is not None:
            from tinyvit.sam.automatic import SamAutomaticMaskGenerator

            self.generator = SamAutomaticMaskGenerator(
                segmenter.source,
                **cast("dict[str, Any]", everything),
                output_mode="coco_rle",
                engine=engine,
                device=engine.backend.device,
            )
        self._candidates = segmenter.candidates if multimask else 1

    def run(self, items: Sequence[Item], tell: Callable[[Job], object] = bool) -> Iterator[Job]:
        """Segment images."""
        self.segmenter.encoder.weights_sha256()  # now, and not while the first image is timed
        return super().run(items, tell)

    def _path(self, item: Item, ending: str) -> Path:
        return self.folder / f"{item.stem}.{ending}"

    def _beside(self, item: Item) -> tuple[Path, list[Path], list[Path]]:
        """The overlay, masks in the order of the annotations, and logits of each object."""
        numbers = range(1, len(item.prompts) + 1)
        endings = [
            f"{number}" if self._candidates == 1 else f"{number}-{candidate}"
            for number in numbers
            for candidate in range(1, self._candidates + 1)
        ]
        masks = [self._path(item, f"mask-{ending}.png") for ending in endings]
        logits = [self._path(item, f"logits-{n}.npy") for n in numbers if self.with_logits]
        return self._path(item, "overlay.png"), masks, logits

    def _plan(self, item: Item) -> Job:
        overlay, masks, logits = self._beside(item)
        document, beside = self._path(item, "json"), [overlay, *masks, *logits]
        task: dict[str, object] = {"mode": "everything", **(self.everything or {})}
        if self.generator is None:
            task = {"mode": "prompts", "multimask": self.multimask, "logits": self.with_logits}
            task["prompts"] = [_described(prompt) for prompt in item.prompts]
        facts = {**self.facts, **facts_of_image(item), "task": task}
        told = {"document": str(document), "overlay": str(overlay)}
        found = find_existing(document, beside, facts)
        return Job(item, facts, found, told, (document, *beside))

    def _read(self, job: Job) -> None:
        start = perf_counter()
        job.image = decode(job.item.path, max_pixels=self.max_pixels)
        if self.generator is None:
            job.prepared = to_input(job.image, self.segmenter.encoder.image_spec)
        job.seconds["read"] = perf_counter() - start

    def _compute(self, jobs: Iterator[Job]) -> Generator[Found | Job, None, None]:
        """One encoding of each image, and one decoding."""
        if (generator := self.generator) is not None:
            for job in jobs:
                start, name = perf_counter(), job.item.name
                with nullcontext(None) if self.progress is None else self.progress(name) as update:
                    records = generator.generate(job.image, progress=update)
                job.seconds["generate"] = perf_counter() - start
                yield records
            return
        for job, embedding in self._encoded(jobs, self.segmenter.encoder.encode_prepared):
            is_good = not isinstance(embedding, Job)
            yield self._decoded(job, embedding) if is_good else embedding

    def _decoded(self, job: Job, embedding: ImageEmbedding) -> Masks | Job:
        prompts, features = job.item.prompts, embedding.features
        low_res_size = 4 * features.shape[1], 4 * features.shape[2]
        for number, prompt in enumerate(prompts, 1):
            try:
                prompt.check_in(embedding.original_size, low_res_size)
            except ValueError as err:
                which = "" if len(prompts) == 1 else f"object {number}: "
                return job.failed(f"{which}{err}")
        start = perf_counter()
        multimask: bool | Literal["auto"] = True if self.multimask else "auto"
        (masks,) = self.segmenter.segment([embedding], [prompts], multimask)
        job.seconds["decode"] = perf_counter() - start
        return masks

    def _write(self, job: Job, found: Found) -> dict[str, object]:
        item, own, pixels = job.item, job.existing.own, job.image
        overlay, masks, logits = self._beside(item)
        document, beside = self._path(item, "json"), [overlay, *masks, *logits]
        start, decoded = perf_counter(), job.seconds.get("decode", 0.0)
        document.parent.mkdir(parents=True, exist_ok=True)
        names = sorted({path.name for path in (*beside, *own)})
        _write_json(document, {"info": {**job.facts, "files": names, "is_complete": False}})
        annotations = self._write_masks(job, found, masks, logits)
        draw.save_png(overlay, _overlay(pixels, item.prompts, annotations))
        for path in set(own) - set(beside):
            path.unlink(missing_ok=True)
        spent = job.seconds.get("decode", 0.0) - decoded  # on masks in the image's size
        job.seconds["write"] = perf_counter() - start - spent
        seconds = {step: round(value, 4) for step, value in job.seconds.items()}
        info = {**job.facts, "seconds": seconds, "files": sorted(path.name for path in beside)}
        height, width = pixels.shape[:2]
        image = {"id": 1, "file_name": item.name, "height": height, "width": width}
        content = {
            "info": {**info, "is_complete": True},
            "images": [image],
            "annotations": [{"id": number, **one} for number, one in enumerate(annotations, 1)],
            "categories": [{"id": 1, "name": "object"}],
        }
        _write_json(document, content)
        told = [
            {key: value for key, value in one.items() if key not in NOT_TOLD}
            for one in annotations
            if item.prompts
        ]
        return {"count": len(annotations), "seconds": seconds, "masks": told}

    def _write_masks(
        self, job: Job, found: Found, paths: Sequence[Path], logits: Sequence[Path]
    ) -> list[Annotation]:
        """Write masks and logits of prompts, one mask at a time; all annotations."""
        fixed: Annotation = {"image_id": 1, "category_id": 1, "iscrowd": 0}
        if isinstance(found, list):
            return [{**fixed, **record} for record in found]
        annotations: list[Annotation] = []
        for number, best in enumerate(found.best().tolist()):
            scores = found.predicted_ious[number]
            for candidate in range(len(scores)) if self.multimask else (best,):
                start = perf_counter()
                mask = found.mask(number, candidate)  # in the image's size: a part of decoding
                job.seconds["decode"] += perf_counter() - start
                path = paths[len(annotations)]
                draw.save_mask(path, mask)
                lengths = mask_ops.encode(mask)
                annotation = {
                    **fixed,
                    "segmentation": lengths,
                    "bbox": list(mask_ops.to_box(lengths)),
                    "area": mask_ops.area(lengths),
                    "score": float(scores[candidate]),
                    "prompt": found.prompts[number].describe(),
                    "object": number + 1,
                }
                if len(scores) > 1 and self.multimask:
                    annotation |= {"candidate": candidate + 1, "is_best": candidate == best}
                annotations.append({**annotation, "mask": path.name})
            if self.with_logits:
                write_logits(logits[number], np.asarray(found.low_res_logits[number][best]))
        return annotations


def write_logits(path: Path, logits: NDArray[np.float32]) -> None:
    """Write low-res logits [h4, w4] as an array of numpy, whole or not at all."""
    data = BytesIO()
    np.save(data, logits, allow_pickle=False)
    write_bytes(path, data.getvalue())


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _overlay(
    image: NDArray[np.uint8], prompts: Sequence[Prompt], annotations: Sequence[Annotation]
) -> NDArray[np.uint8]:
    """The image, the best mask of each object, large ones first, and the prompts over them."""
    shown = [one["segmentation"] for one in annotations if one.get("is_best", True)]
    order = sorted(range(len(shown)), key=lambda number: -mask_ops.area(shown[number]))
    masks = (mask_ops.decode(shown[number]) for number in order)
    out = draw.draw_masks(image, masks, [draw.colour(number) for number in order])
    return draw_prompts(out, prompts)


def _described(prompt: Prompt) -> dict[str, object]:
    """A prompt as plain data, of a mask its hash."""
    facts = prompt.describe()
    if prompt.mask is not None:
        head = f"{prompt.mask.dtype} {prompt.mask.shape}\n".encode()
        facts["mask"] = hashlib.sha256(head + prompt.mask.tobytes()).hexdigest()
    return facts
