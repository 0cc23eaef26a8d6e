"""The files that ``tinyvit segment`` writes for one image, and whether those there still hold.

``STEM.json`` is a document as COCO has them: ``info`` says how it came about and names all other
files, ``annotations`` has one entry for each mask. While these are written, ``info.is_complete`` is
false: so what an interruption leaves is known for ours, and made anew.

Knows no model and no prompts.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tinyvit.checkpoints.files import write_bytes, write_text
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.images import draw
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_tensor
from tinyvit.inference import Engine
from tinyvit.inference.read_ahead import read_ahead
from tinyvit.sam import HQMaskDecoder, SamAutomaticMaskGenerator, Segmenter, mask_ops
from tinyvit.sam.embedding import spec_of

from .encode import facts_of_image
from .images import ImageFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tinyvit.inference import Engine
    from tinyvit.inference.engine import Prepared
    from tinyvit.sam import ImageEmbedding, Masks, Prompt, Sam

MADE_BY = "tinyvit segment"

_DECIDE = {  # fact in the info -> what another value means
    "model_sha256": "made by another model",
    "image_spec": "made with another preparation of images",
    "precision": "made in another precision",
    "picture": "made of another image",
    "picture_bytes": "made of an image that has changed since",
    "picture_mtime_ns": "made of an image that has changed since",
    "task": "made with other prompts or options",
}


@dataclass(frozen=True)
class Names:
    """Where the files of one image go.

    Attributes:
        document: The JSON file.
        overlay: The image with masks and prompts.
        masks: For each mask an image, in the order of the annotations; may be empty.
        logits: For each object a file of low-res logits; may be empty.
    """

    document: Path
    overlay: Path
    masks: tuple[Path, ...] = ()
    logits: tuple[Path, ...] = ()

    @classmethod
    def of(cls, folder: Path, stem: str, objects: int, candidates: int, with_logits: bool) -> Names:
        """The names for an image.

        Args:
            folder: Where to write.
            stem: What the outputs are called.
            objects: Number of objects whose masks are written.
            candidates: Masks of each object.
            with_logits: Whether logits are written.
        """
        endings = [
            f"{number}" if candidates == 1 else f"{number}-{candidate}"
            for number in range(1, objects + 1)
            for candidate in range(1, candidates + 1)
        ]
        logits = range(1, objects + 1) if with_logits else ()
        return cls(
            folder / f"{stem}.json",
            folder / f"{stem}.overlay.png",
            tuple(folder / f"{stem}.mask-{ending}.png" for ending in endings),
            tuple(folder / f"{stem}.logits-{number}.npy" for number in logits),
        )

    def beside(self) -> tuple[Path, ...]:
        """All files but the document."""
        return (self.overlay, *self.masks, *self.logits)


@dataclass(frozen=True)
class Found:
    """What is where outputs are to be.

    Attributes:
        state: ``"nothing"``; ``"current"``: what would be written now; ``"outdated"``: ours, but
            made otherwise; ``"foreign"``: not ours.
        reason: What makes it outdated or foreign, in words.
        own: Files beside the document that it names, whether they are there or not.
    """

    state: Literal["nothing", "current", "outdated", "foreign"]
    reason: str = ""
    own: tuple[Path, ...] = ()


def look(names: Names, facts: Mapping[str, object]) -> Found:
    """Say what is there already.

    Args:
        names: Where the files are to go.
        facts: What the document's ``info`` would say now.

    Returns:
        The answer.
    """
    info = _info(names.document) if names.document.exists() else {}
    own = () if info is None else tuple(names.document.with_name(n) for n in _names_in(info))
    strangers = [path for path in names.beside() if path not in own and path.exists()]
    if info is None:
        strangers.insert(0, names.document)
    if strangers:
        reason = f"{strangers[0]} is there already and was not made by this command"
        return Found("foreign", reason, own)
    if not info:
        return Found("nothing")
    if not info.get("is_complete"):
        return Found("outdated", "left unfinished", own)
    for fact, meaning in _DECIDE.items():
        if info.get(fact) != facts[fact]:
            return Found("outdated", meaning, own)
    if not all(path.exists() for path in names.beside()):
        return Found("outdated", "not all there any more", own)
    return Found("current", "", own)


def begin(names: Names, facts: Mapping[str, object], own: Sequence[Path]) -> None:
    """Say that the files of an image are being written.

    Args:
        names: Where they go; the folder is made if need be.
        facts: For the document's ``info``.
        own: Files of an earlier answer.

    Raises:
        CheckpointError: The document cannot be written.
        OSError: The folder cannot be made.
    """
    names.document.parent.mkdir(parents=True, exist_ok=True)
    files = sorted({path.name for path in (*names.beside(), *own)})
    _write_json(names.document, {"info": {**facts, "files": files, "is_complete": False}})


def finish(names: Names, content: Mapping[str, object], own: Sequence[Path]) -> None:
    """Write the document, now that all files beside it are there, and remove what it replaces.

    Args:
        names: Where they went.
        content: From ``document``.
        own: Files of an earlier answer.

    Raises:
        CheckpointError: The document cannot be written.
        OSError: A file cannot be removed.
    """
    for path in set(own) - set(names.beside()):
        path.unlink(missing_ok=True)
    _write_json(names.document, content)


def document(
    names: Names,
    facts: Mapping[str, object],
    size: tuple[int, int],
    annotations: Sequence[Mapping[str, object]],
) -> dict[str, object]:
    """All that is known of an image's masks, as COCO has it.

    Args:
        names: Where the files are.
        facts: For ``info``.
        size: (height, width) of the upright image.
        annotations: One for each mask, without ``id``.

    Returns:
        Plain data.
    """
    height, width = size
    image = {"id": 1, "file_name": facts["picture"], "height": height, "width": width}
    files = sorted(path.name for path in names.beside())
    return {
        "info": {**facts, "files": files, "is_complete": True},
        "images": [image],
        "annotations": [{"id": number, **one} for number, one in enumerate(annotations, 1)],
        "categories": [{"id": 1, "name": "object"}],
    }


def write_logits(path: Path, logits: NDArray[np.float32]) -> None:
    """Write low-res logits [h4, w4] as an array of numpy, whole or not at all.

    Raises:
        CheckpointError: The file cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, logits, allow_pickle=False)
    write_bytes(path, buffer.getbuffer())


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _info(path: Path) -> dict[str, object] | None:
    """What one of our documents says of itself; None for any other file."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))["info"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    is_ours = isinstance(info, dict) and info.get("made_by") == MADE_BY
    return info if is_ours else None


def _names_in(info: Mapping[str, object]) -> list[str]:
    """Names of files that a document tells; nothing that leads out of its folder."""
    files = info.get("files")
    names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    return [name for name in names if Path(name).name == name]


pass
pass


Progress = Callable[[int, "int | None"], None]


@dataclass(frozen=True)
class Settings:
    """How a model runs, as ``tinyvit.Engine`` has it.

    Attributes:
        device: A torch device or "auto".
        precision: "fp32", "bf16" or "auto".
        batch_size: Images encoded together, at most.
        pad: False leaves out the padding; None does as the model says.
    """

    device: str = "auto"
    precision: str = "fp32"
    batch_size: int = 1
    pad: bool | None = None


@dataclass(frozen=True)
class ByPrompts:
    """Masks of prompts: one encoding of an image, one decoding of all its prompts.

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
        """As ``Method``; encodes images of one shape together, where batches are wanted."""
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
        """The masks in the image's size, one at a time; that is a part of decoding."""
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
    """Masks of everything in an image.

    Attributes:
        engine: Runs the encoder.
        generator: Runs the model; its masks are run lengths.
        arguments: Those of the generator that were given, for ``facts``.
        progress: Opens a progress bar for an image's name.
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
        """As ``Method``; the generator cuts crops out of the image itself."""

    def answers(self, readings: Iterator[Reading]) -> Generator[Answer, None, None]:
        """As ``Method``."""
        for reading in readings:
            start = perf_counter()
            with self.progress(reading.task.image.name) as update:
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
    segmenter.encoder.weights_sha256()  # now, and not while the first image is timed
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
        progress: Opens a progress bar for an image's name.

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
    lengths = mask_ops.encode(mask)
    return {
        "image_id": 1,
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": lengths,
        "bbox": list(mask_ops.to_box(lengths)),
        "area": mask_ops.area(lengths),
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


pass


Annotation: TypeAlias = "dict[str, object]"
Prompts: TypeAlias = "tuple[Prompt, ...]"


@dataclass(frozen=True)
class Task:
    """An image that is to be segmented.

    Attributes:
        image: The image.
        prompts: One for each object; none where everything is segmented.
        names: Where its files go.
        facts: What their document says of how they came about.
        found: What is there already.
    """

    image: ImageFile
    prompts: Prompts
    names: Names
    facts: Mapping[str, object]
    found: Found


@dataclass(frozen=True)
class Reading:
    """An image that has been read.

    Attributes:
        task: What is to be done.
        image: [H, W, 3] uint8, upright.
        prepared: What the method's ``prepare`` made of it.
        seconds: Seconds for each step so far.
    """

    task: Task
    image: NDArray[np.uint8]
    prepared: Prepared | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What a method found in an image.

    Attributes:
        reading: The image.
        annotations: For each mask its annotation, with the mask itself where it is to be written
            as an image. Asked for once, in a thread that writes; may add to ``reading.seconds``.
        logits: Low-res logits of each object, [h4, w4] float32, where they are to be written.
        failure: Why there are no masks; empty where there may be some.
    """

    reading: Reading
    annotations: Iterable[tuple[Annotation, NDArray[np.bool_] | None]] = ()
    logits: Sequence[NDArray[np.float32]] = ()
    failure: str = ""


class Method(Protocol):
    """A way to find masks."""

    @property
    def engine(self) -> Engine:
        """What runs the encoder."""
        ...

    def facts(self, prompts: Prompts) -> dict[str, object]:
        """What is asked of an image, as plain data: other facts, other masks."""
        ...

    def names(self, folder: Path, stem: str, prompts: Prompts) -> Names:
        """Where the files of an image go."""
        ...

    def prepare(self, image: NDArray[np.uint8]) -> Prepared | None:
        """Work on an image that can be done ahead, in a thread of its own."""
        ...

    def answers(self, readings: Iterator[Reading]) -> Generator[Answer, None, None]:
        """One answer for each reading, in order."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    Attributes:
        image: The image.
        state: ``"written"``, ``"skipped"`` (there already) or ``"failed"``.
        reason: Why it failed, with the file's name; or what the files were that it replaced.
        names: Where its files are.
        masks: For each mask what its annotation says, but for its run lengths and its prompt;
            only where prompts were given.
        count: Number of masks.
        seconds: Seconds for each step.
    """

    image: ImageFile
    state: Literal["written", "skipped", "failed"]
    reason: str = ""
    names: Names | None = None
    masks: tuple[Annotation, ...] = ()
    count: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """How images are segmented and where to.

    Attributes:
        method: Finds the masks.
        folder: Where the files go.
        recipe: What their documents say about the model.
        workers: Threads that read, and as many that write.
        ahead: Images read ahead, at most.
        overwrite: Whether to make everything anew, and to replace files that are not ours.
    """

    method: Method
    folder: Path
    recipe: Mapping[str, object]
    workers: int = 1
    ahead: int = 2
    overwrite: bool = False

    def run(self, work: Sequence[tuple[ImageFile, Prompts]]) -> Iterator[Outcome]:
        """Segment images: first those are named with which nothing is to be done.

        Args:
            work: Each image with its prompts, one for each object.

        Yields:
            One outcome for each image.

        Raises:
            CheckpointError: The disk cannot be written to; what is written so far is whole.
            OSError: Likewise.
        """
        inputs = {os.path.realpath(image.path) for image, _ in work}
        wanted: list[tuple[ImageFile, Prompts]] = []
        for image, prompts in work:
            task = self._look(image, prompts, inputs)
            if isinstance(task, Outcome):
                yield task
            else:
                wanted.append((image, prompts))
        with closing(self._writings(wanted, inputs)) as writings:
            yield from read_ahead(writings, workers=self.workers, ahead=self.workers + 1)

    def _look(self, image: ImageFile, prompts: Prompts, inputs: set[str]) -> Task | Outcome:
        """What is to be done for an image, or why nothing is."""
        names = self.method.names(self.folder, image.stem, prompts)
        for path in (names.document, *names.beside()):
            if os.path.realpath(path) in inputs:
                reason = f"{image.path}: its output {path} would replace one of the images"
                return Outcome(image, "failed", f"{reason}; write to another folder with -o")
        try:
            facts = {
                **self.recipe,
                **facts_of_image(image.path, image.name),
                "task": self.method.facts(prompts),
            }
            found = look(names, facts)
        except OSError as err:
            return Outcome(image, "failed", f"{image.path}: {err.strerror or err}")
        if not self.overwrite and found.state == "current":
            return Outcome(image, "skipped", "", names)
        if not self.overwrite and found.state == "foreign":
            reason = f"{found.reason}; choose another folder, or --overwrite to replace it"
            return Outcome(image, "failed", f"{image.path}: {reason}")
        return Task(image, prompts, names, facts, found)

    def _read(self, image: ImageFile, prompts: Prompts, inputs: set[str]) -> Reading | Outcome:
        """An image ready for the method, or why it is not; done in a thread of its own.

        Its facts are asked for again: it may have changed while others were segmented.
        """
        task = self._look(image, prompts, inputs)
        if isinstance(task, Outcome):
            return task
        start = perf_counter()
        try:
            rgb = decode(image.path)
        except ImageError as err:
            return Outcome(image, "failed", str(err))
        prepared = self.method.prepare(rgb)
        return Reading(task, rgb, prepared, {"read": perf_counter() - start})

    def _writings(
        self, work: Sequence[tuple[ImageFile, Prompts]], inputs: set[str]
    ) -> Generator[Callable[[], Outcome], None, None]:
        """What is left to do for each image once the model has seen it."""
        failed: deque[Outcome] = deque()

        def good() -> Generator[Reading, None, None]:
            jobs = (partial(self._read, image, prompts, inputs) for image, prompts in work)
            with closing(read_ahead(jobs, workers=self.workers, ahead=self.ahead)) as readings:
                for reading in readings:
                    if isinstance(reading, Outcome):
                        failed.append(reading)
                    else:
                        yield reading

        with closing(good()) as readings, closing(self.method.answers(readings)) as answers:
            for answer in answers:
                while failed:
                    yield partial(_same, failed.popleft())
                yield partial(self._write, answer)
        for outcome in failed:
            yield partial(_same, outcome)

    def _write(self, answer: Answer) -> Outcome:
        reading, task = answer.reading, answer.reading.task
        if answer.failure:
            reason = f"{task.image.path}: {answer.failure}"
            return Outcome(task.image, "failed", reason)
        try:
            begin(task.names, task.facts, task.found.own)
            annotations = _write_masks(answer)
            for path, logits in zip(task.names.logits, answer.logits, strict=True):
                write_logits(path, logits)
            draw.save_png(task.names.overlay, _overlay(reading, annotations))
            seconds = {step: round(value, 4) for step, value in reading.seconds.items()}
            facts = {**task.facts, "seconds": seconds}
            size = (reading.image.shape[0], reading.image.shape[1])
            content = document(task.names, facts, size, annotations)
            finish(task.names, content, task.found.own)
        except (CheckpointError, OSError) as err:
            if _errno(err) != errno.ENAMETOOLONG:
                raise
            reason = f"{task.image.path}: its outputs have too long a name: {err}"
            return Outcome(task.image, "failed", reason)
        return Outcome(
            task.image,
            "written",
            task.found.reason if task.found.state == "outdated" else "",
            task.names,
            tuple(_in_short(one) for one in annotations) if task.prompts else (),
            len(annotations),
            seconds,
        )


def _write_masks(answer: Answer) -> list[Annotation]:
    """Write the masks that are to be images, one at a time; all annotations."""
    annotations: list[Annotation] = []
    names = iter(answer.reading.task.names.masks)
    for annotation, mask in answer.annotations:
        if mask is not None:
            path = next(names)
            draw.save_mask(path, mask)
            annotation = {**annotation, "mask": path.name}
        annotations.append(annotation)
    return annotations


def _overlay(reading: Reading, annotations: Sequence[Annotation]) -> NDArray[np.uint8]:
    """The photograph, the best mask of each object, and the prompts over them."""
    shown = [one for one in annotations if one.get("is_best", True)]
    areas = [mask_ops.area(_run_lengths(one)) for one in shown]
    order = sorted(range(len(shown)), key=lambda number: -areas[number])
    masks = (mask_ops.decode(_run_lengths(shown[number])) for number in order)
    out = draw.draw_masks(reading.image, masks, [draw.colour(n) for n in order])
    for number, prompt in enumerate(reading.task.prompts):
        if prompt.box is not None:
            out = draw.draw_boxes(out, prompt.box[None], [draw.colour(number)])
    for prompt in reading.task.prompts:
        if prompt.points is not None and prompt.labels is not None:
            out = draw.draw_points(out, prompt.points, prompt.labels)
    return out


def _run_lengths(annotation: Annotation) -> Mapping[str, object]:
    found = annotation["segmentation"]
    return found if isinstance(found, Mapping) else {}


def _in_short(annotation: Annotation) -> Annotation:
    left_out = ("segmentation", "prompt", "image_id", "category_id", "iscrowd")
    return {key: value for key, value in annotation.items() if key not in left_out}


def _same(outcome: Outcome) -> Outcome:
    return outcome


def _errno(err: BaseException) -> int | None:
    """The operating system's number behind an error."""
    source = err.__cause__ if isinstance(err, CheckpointError) else err
    return source.errno if isinstance(source, OSError) else None
