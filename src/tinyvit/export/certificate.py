"""The certificate of an exported folder: cases made from seeds, reference values, a comparison.

It can be repeated later, anywhere, without torch.

Inputs come from numpy's PCG64 by name, so that they can be made again. Reference outputs of the
model itself, in float64, are kept at most 4096 values a case, at places drawn from the same seed.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyvit.checkpoints.files import check_format, write_bytes, write_text
from tinyvit.errors import CheckpointError

Floats = NDArray[np.float32]
Run = Callable[[Mapping[str, Floats]], Sequence[NDArray[Any]]]
"""One graph: inputs by name -> outputs in order."""

FORMAT = 1
TOLERANCES_VERSION = 1
MOST_VALUES = 4096
ALLOWED = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest error by the largest value; measured in fp32: 2e-6 to 1e-5."""
_ALLOWED_PIXELS = 1e-3

PARTS = ("encoder", "decoder", "classifier", "features")
"""What a file can be; facts name the file, the outputs and, of images, the input of each."""

NAME, REFERENCES = "certificate.json", "certificate.npz"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        id: Its name, from which its inputs are made.
        part: One of ``PARTS``.
        shape: Numbers that its inputs are made with.
    """

    id: str
    part: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Compared:
    """The outcome of one case.

    Attributes:
        id: Of the case.
        output: Name of the output.
        value: Largest error by the largest value; of a mask the share of pixels that differ.
        allowed: What it may be.
        passed: Whether it is.
        reference_sha256: Of the whole reference output in float32.
    """

    id: str
    output: str
    value: float
    allowed: float
    passed: bool
    reference_sha256: str = ""


@dataclass
class Certificate:
    """What a folder says of itself."""

    tinyvit: str
    made_with: dict[str, str]
    machine: str
    preset: str
    weights_sha256: str
    reference: str
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    masks: dict[str, Any] = field(default_factory=dict)
    verdict: str = "failed"
    tolerances_version: int = TOLERANCES_VERSION
    format: int = FORMAT

    def write(self, folder: Path, references: Mapping[str, NDArray[Any]]) -> None:
        """Write certificate and references into the folder."""
        write_text(folder / NAME, json.dumps(asdict(self), indent=1) + "\n")
        stream = io.BytesIO()
        np.savez_compressed(stream, **dict(references))  # type: ignore[arg-type]
        write_bytes(folder / REFERENCES, stream.getvalue())

    @classmethod
    def read(cls, folder: Path) -> Certificate:
        """The certificate of a folder.

        Raises:
            CheckpointError: There is none, or it is damaged or of a newer format.
        """
        path = folder / NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            check_format(values.get("format", 0), FORMAT, values.get("tinyvit"), str(path))
            return cls(**values)
        except FileNotFoundError as err:
            raise CheckpointError(
                f"{folder} has no {NAME}; it was not written by 'tinyvit export'. Compare its "
                "files with a checkpoint by --against"
            ) from err
        except (ValueError, TypeError) as err:
            raise CheckpointError(f"{path} is damaged: {err}") from err


def image_cases(part: str, facts: Mapping[str, Any]) -> list[Case]:
    """Cases of what takes images: its own size; others, batches, odd shapes where it takes them."""
    side = int(facts["side"])
    if facts["layout"] == "hwc":
        sizes = [(side, side), (side * 3 // 4, side), (side, side // 2)]
        return [Case(f"{part}-{h}x{w}", part, (h, w, 3)) for h, w in sizes]
    shapes = [(1, 3, side, side)]
    if facts["style"] == "transformers":
        shapes.append((2, 3, side, side))
    elif not facts["is_static"] and facts["factor"] == 1:
        shapes += [(1, 3, 75, 58), (1, 3, 1, 1), (1, 3, 17, 300), (2, 3, 64, 96)]
    return [Case(f"{part}-" + "x".join(map(str, s)), part, s) for s in shapes]


def decoder_cases(facts: Mapping[str, Any]) -> list[Case]:
    """Cases of a decoder: points, labels, sizes of images, masks given or not."""
    found = []
    sizes = [(480, 640), (640, 480), (33, 100), (1500, 2250)]
    counts = (facts["num_points"],) * 3 if facts.get("num_points") else (1, 2, 7)
    for number, (points, has_mask) in enumerate(
        (points, has_mask) for points in counts for has_mask in (0, 1, -1)
    ):
        if has_mask < 0 and facts.get("is_foreign"):
            continue  # other exporters multiply by it, and their clients send 0 or 1
        height, width = sizes[number % len(sizes)]
        case: tuple[int, ...] = (points, number % 5, height, width, has_mask)
        case += (1 + number % 3,) if facts.get("many_prompts") else ()
        found.append(Case("decoder-" + "_".join(map(str, case)), "decoder", case))
    return found


def make_inputs(case: Case, facts: Mapping[str, Any]) -> dict[str, Floats]:
    """The inputs of a case, from its name."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(case.id.encode())))
    if case.part != "decoder":
        if facts["layout"] == "hwc":
            values = rng.integers(0, 256, case.shape).astype(np.float32)
        else:
            values = rng.standard_normal(case.shape, np.float32)
        return {str(facts[f"{case.part}_input"]): values}
    points, first_label, height, width, has_mask, *more = case.shape
    count = more[0] if more else 1
    side, grid, channels = int(facts["side"]), int(facts["grid"]), int(facts["channels"])
    scale = side / max(height, width)
    reach = np.array([width, height]) * scale
    labels = (np.arange(points) + first_label + np.arange(count)[:, None]) % 5 - 1
    mask = rng.standard_normal((1, 1, 4 * grid, 4 * grid), np.float32) * 4
    if has_mask != 1:  # what is not given must not matter; other exporters multiply by 0
        mask[:] = 0 if facts.get("is_foreign") else np.nan
    k = int(facts["factor"])
    embedding = rng.standard_normal((1, channels, grid // k, grid // k), np.float32)
    inputs = {
        "image_embeddings": embedding.repeat(k, 2).repeat(k, 3),
        "point_coords": (rng.random((count, points, 2)) * reach).astype(np.float32),
        "point_labels": labels.astype(np.float32),
        "mask_input": mask,
        "has_mask_input": np.array([has_mask], np.float32),
        "orig_im_size": np.array([height, width], np.float32),
    }
    return {name: inputs[name] for name in facts["decoder_inputs"]}


def keep(values: NDArray[Any], case_id: str) -> NDArray[np.float32]:
    """The values of a reference that are kept, at places drawn from the case's name."""
    flat = np.asarray(values, np.float32).ravel()
    if flat.size <= MOST_VALUES:
        return flat
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"places {case_id}".encode())))
    kept: NDArray[np.float32] = flat[rng.choice(flat.size, MOST_VALUES, replace=False)]
    return kept


def compare(
    case: Case, output: str, came: NDArray[Any], kept: NDArray[Any], allowed: float
) -> Compared:
    """Compare an output with the kept values of its reference.

    Of a mask it is the share of its pixels that differ, since one alone may always do so: a
    thousandth may.
    """
    mine = keep(came, f"{case.id} {output}")
    name = f"{case.id} {output}"
    if mine.shape != kept.shape or not np.isfinite(mine).all():
        return Compared(name, output, float("inf"), allowed, False)
    if came.dtype == np.bool_:
        error, allowed = float((mine != kept).mean()), max(allowed, _ALLOWED_PIXELS)
        return Compared(name, output, error, allowed, error <= allowed)
    largest = max(float(np.abs(kept).max(initial=0)), 1e-6)
    error = float(np.abs(mine.astype(np.float64) - kept).max(initial=0)) / largest
    return Compared(name, output, error, allowed, bool(error <= allowed))


def file_facts(path: Path) -> dict[str, Any]:
    """Hash and size of a file."""
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def machine() -> str:
    """The processor, without the host's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        names = [
            line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line
        ]
        return f"{names[0]}, {len(names)} threads" if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions."""
    return {"tinyvit": version("tinyvit"), **{name: version(name) for name in packages}}
