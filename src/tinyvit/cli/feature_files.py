"""The files that ``tinyvit encode`` writes for one picture, and whether those there still hold.

``STEM.safetensors`` has the tensor ``features`` [C, h, w] float32 and, in its header, how it came
about; each text there is JSON. ``STEM.png`` shows the features beside the photograph. The first is
written first and names the second, so that a PNG of the user's own is never taken for one of ours.

Knows no model and no folder; C channels, h w of the map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from tinyvit.checkpoints import write_state_dict
from tinyvit.images import draw

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from tinyvit.image_spec import Placement

__all__ = ["Found", "draw_features", "drawing_of", "facts_of_picture", "look", "write"]

COLUMNS = 3  # of panels in a picture of features

_DECIDE = {  # fact in the header -> what another value means
    "weights_sha256": "made by another model",
    "strides": "made with other strides",
    "image_spec": "made with another preparation of pictures",
    "precision": "made in another precision",
    "picture": "made of another picture",
    "picture_bytes": "made of a picture that has changed since",
    "picture_mtime_ns": "made of a picture that has changed since",
}
_MARK = "tinyvit_version"


@dataclass(frozen=True)
class Found:
    """What is where an output is to be.

    Attributes:
        state: ``"nothing"``; ``"current"``: what would be written now; ``"outdated"``: ours, but
            made otherwise; ``"foreign"``: not ours.
        reason: What makes it outdated or foreign, in words.
        drawing: Name of our picture of the features beside it, or None.
    """

    state: Literal["nothing", "current", "outdated", "foreign"]
    reason: str = ""
    drawing: str | None = None


def facts_of_picture(path: Path, name: str) -> dict[str, object]:
    """What tells whether a picture is still the one that was encoded.

    Raises:
        OSError: The file is gone.
    """
    state = path.stat()
    return {"picture": name, "picture_bytes": state.st_size, "picture_mtime_ns": state.st_mtime_ns}


def drawing_of(target: Path) -> Path:
    """Where the drawing for a safetensors file goes."""
    return target.with_suffix(".png")


def look(target: Path, facts: Mapping[str, object], with_drawing: bool) -> Found:
    """Say what is there already.

    Args:
        target: The safetensors file; the drawing is beside it.
        facts: What the header would say now.
        with_drawing: Whether a drawing is wanted.

    Returns:
        The answer.
    """
    drawing = drawing_of(target)
    if not target.exists():
        if with_drawing and drawing.exists():
            return Found("foreign", f"{drawing} is there already and was not made by this command")
        return Found("nothing")
    header = _header(target)
    if header is None:
        return Found("foreign", f"{target} is there already and was not made by this command")
    own = drawing.name if header.get("drawing") == drawing.name else None
    if with_drawing and own is None and drawing.exists():
        return Found("foreign", f"{drawing} is there already and was not made by this command")
    for fact, meaning in _DECIDE.items():
        if header.get(fact) != facts[fact]:
            return Found("outdated", meaning, own)
    if with_drawing and not (own and drawing.exists()):
        return Found("outdated", "without a picture of the features", own)
    return Found("current", "", own)


def write(
    target: Path,
    features: Tensor,
    facts: Mapping[str, object],
    drawing: NDArray[np.uint8] | None = None,
) -> None:
    """Write the features, and the drawing if there is one; each whole or not at all.

    Args:
        target: The safetensors file, in a folder that is made if need be.
        features: [C, h, w] float32.
        facts: For the header.
        drawing: [H, W, 3] uint8.

    Raises:
        CheckpointError: The features cannot be written.
        OSError: The folder cannot be made, or the drawing cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    name = None if drawing is None else drawing_of(target).name
    header = {key: json.dumps(value) for key, value in {**facts, "drawing": name}.items()}
    write_state_dict(target, {"features": features}, metadata=header)
    if drawing is not None:
        draw.save_png(drawing_of(target), drawing)


def remove_drawing(target: Path, found: Found) -> None:
    """Remove our drawing of features that are no longer there."""
    if found.drawing is not None:
        target.with_name(found.drawing).unlink(missing_ok=True)


def draw_features(
    image: NDArray[np.uint8], stages: Sequence[Tensor], features: Tensor, placement: Placement
) -> NDArray[np.uint8]:
    """The photograph, the map of each stage, and the features, in rows of three.

    Args:
        image: The photograph, [H, W, 3] uint8, of any size; ``draw.panel`` makes it small.
        stages: The map of each stage, [C, h, w].
        features: [C, h, w]; not drawn again where it is the last stage's map.
        placement: Where the photograph lies in the model's input, for its original size.

    Returns:
        [H, W, 3] uint8.
    """
    placement = replace(placement, original_size=(image.shape[0], image.shape[1]))
    maps, captions = list(stages), ["photograph"]
    is_new = features.shape != maps[-1].shape or not np.array_equal(features, maps[-1])
    captions += [f"stage {number}: {_shape(stage)}" for number, stage in enumerate(maps, 1)]
    if is_new:
        maps.append(features)
        captions.append(f"features: {_shape(features)}")
    strip = draw.stage_grid(image, maps, placement, captions)
    panels = 1 + len(maps)
    pitch = (strip.shape[1] - draw.GAP) // panels  # a panel and the gap before it
    width = COLUMNS * pitch + draw.GAP
    rows = [strip[:, i * pitch : i * pitch + width] for i in range(0, panels, COLUMNS)]
    missing = width - rows[-1].shape[1]
    paper = ((0, 0), (0, missing), (0, 0))
    rows[-1] = np.pad(rows[-1], paper, constant_values=draw.PAPER[0])
    return np.vstack(rows)


def _shape(features: Tensor) -> str:
    return " x ".join(str(side) for side in features.shape)


def _header(target: Path) -> dict[str, object] | None:
    """What the header of one of our files says; None for any other file."""
    try:
        with safe_open(target, framework="numpy") as file:
            texts = file.metadata() or {}
        header = {key: json.loads(text) for key, text in texts.items() if key != "format"}
    except (OSError, SafetensorError, ValueError):
        return None
    return header if _MARK in header else None
