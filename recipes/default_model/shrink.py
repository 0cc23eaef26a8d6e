"""From trained weights to the file that ships: half precision, without what nobody needs.

What ``choose.py`` chose goes in: offsets of the predicted IoU into the biases of the layer that
predicts it, thresholds into the header.

Batch statistics and the positional matrix stay float32: statistics are divided by, and the matrix
is multiplied by up to 2 pi and put into sines. Attention biases are stored in half precision, too.
Left out are the classification head and the counters of batches. The header stays as it was. The
written file is read again, strictly, and the masks of both are compared.

Letters: K masks, h w of the low-resolution logits, C channels, H W the image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.checkpoints import read_state_dict, write_state_dict
from tinyvit.checkpoints.files import THRESHOLDS, check_thresholds, file_sha256, write_text
from tinyvit.sam import SamPredictor

MOST_BYTES = 16_000_000
"""The most that the file may take in the package."""

IOU_HEAD = "mask_decoder.iou_prediction_head.layers."
DROPPED = ("image_encoder.norm_head.", "image_encoder.head.")
FLOAT32 = (".running_mean", ".running_var", ".positional_encoding_gaussian_matrix")
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Shrunk:
    """What became of the weights.

    Attributes:
        file: Name of the file.
        bytes: Its size.
        sha256: Its hash.
        tensors: In it.
        embedding_error: Largest difference of the embeddings, as a share of their largest value.
        logit_error: Largest difference of the low-resolution logits, the same way.
        mask_agreement: Share of the masks' pixels that stay the same, the least of all prompts.
    """

    file: str
    bytes: int
    sha256: str
    tensors: int
    embedding_error: float
    logit_error: float
    mask_agreement: float


def shrink_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Half precision where it does no harm."""
    kept: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(DROPPED) or key.endswith(".num_batches_tracked"):
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key} holds values that are no finite numbers; train again")
        if key.endswith(FLOAT32):
            kept[key] = tensor.float()
            continue
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if largest > _LARGEST:
            raise ValueError(
                f"{key} holds {largest:g}, and half precision ends at {_LARGEST:g}; name it in "
                "FLOAT32"
            )
        kept[key] = tensor.half()
    return kept


def example_image(side: int = 256) -> NDArray[np.uint8]:
    """An image with soft ground and sharp objects, RGB [H, W, 3] uint8; always the same."""
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 4 / 3 : (side * 4 // 3) * 1j]
    ground = np.stack([120 + 60 * x, 160 - 80 * y, 90 + 40 * np.sin(6 * x)], -1)
    ground[np.hypot(x - 0.4, y - 0.5) < 0.22] = (200, 50, 40)
    ground[(abs(x - 0.98) < 0.2) & (abs(y - 0.45) < 0.3)] = (40, 70, 180)
    noise = np.random.default_rng(0).normal(0, 6, ground.shape)
    pixels: NDArray[np.uint8] = np.clip(ground + noise, 0, 255).astype(np.uint8)
    return pixels


def add_offsets(tensors: Mapping[str, Tensor], offsets: Sequence[float]) -> dict[str, Tensor]:
    """The tensors with each mask's offset in the bias of its predicted IoU."""
    key = max(key for key in tensors if key.startswith(IOU_HEAD) and key.endswith(".bias"))
    if len(offsets) != len(tensors[key]):
        raise ValueError(f"{key} has {len(tensors[key])} masks, and {len(offsets)} offsets came")
    return {**tensors, key: tensors[key] + torch.tensor(offsets)}


def build(
    source: Path,
    target: Path,
    offsets: Sequence[float] = (),
    thresholds: Mapping[str, float] | None = None,
) -> Shrunk:
    """Write the file that ships, and compare it with its source."""
    read = read_state_dict(source)
    tensors = shrink_tensors(add_offsets(read.tensors, offsets) if offsets else read.tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > MOST_BYTES:
        raise ValueError(
            f"{source} would still take {size} bytes, and at most {MOST_BYTES} ship; train a "
            "smaller variant"
        )
    header = {key: text for key, text in read.metadata.items() if key != "format"}
    if thresholds:
        header[THRESHOLDS] = json.dumps(check_thresholds(dict(thresholds)))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_state_dict(target, tensors, metadata=header)
    found = Shrunk(
        target.name,
        target.stat().st_size,
        file_sha256(target),
        len(tensors),
        *_compare(source, target),
    )
    write_text(target.with_suffix(".json"), json.dumps(asdict(found), indent=2))
    return found


def _compare(source: Path, target: Path) -> tuple[float, float, float]:
    """(error of the embedding, error of the logits, agreement of the masks)."""
    image = example_image()
    height, width = image.shape[:2]
    before, after = (SamPredictor.from_checkpoint(path) for path in (source, target))
    embeddings = []
    for predictor in (before, after):
        predictor.set_image(image)
        embeddings.append(predictor.get_image_embedding().cpu().numpy())
    logit_error, agreement = 0.0, 1.0
    box = np.array([width * 0.12, height * 0.25, width * 0.5, height * 0.75])
    for points, prompt_box in (([[0.3, 0.5]], None), ([[0.73, 0.45]], None), (None, box)):
        coordinates = None if points is None else np.array(points) * [width, height]
        labels = None if points is None else np.ones(len(points), np.int64)
        (ours, _, logits), (theirs, _, others) = (
            one.predict(coordinates, labels, prompt_box) for one in (before, after)
        )
        logit_error = max(logit_error, _relative(logits, others))
        agreement = min(agreement, float((ours == theirs).mean()))
    return _relative(*embeddings), logit_error, agreement


def _relative(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(np.abs(first - second).max() / np.abs(first).max())
