"""``SamAutomaticMaskGenerator``: the masks of everything in an image, from a grid of points.

Until it is known which masks stay they are kept as run lengths: hundreds of masks of a large
photograph take a few megabytes, where whole ones would take gigabytes. Grids and crops have
segment-anything's names: layer 0 is the whole image, layer i has 2^i crops a side.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinyvit.images import mask_ops
from tinyvit.images.decode import ImageSource, decode
from tinyvit.inference.bundle import is_exported

from .embedding import ImageEmbedding, ImageEncoder
from .open import AnySam, ExportedSam, StoredSam, choose_decoder, open_sam
from .prompts import PromptBatch, Size

if TYPE_CHECKING:
    import torch

    from tinyvit.inference.backend import Backend, BackendName
    from tinyvit.inference.engine import Engine

    from .model import Sam


THRESHOLDS: Mapping[str, float] = {
    "pred_iou_thresh": 0.88,
    "stability_score_thresh": 0.95,
    "stability_score_offset": 1.0,
}
"""Segment-anything's, for checkpoints that have none of their own."""

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]
Progress: TypeAlias = "Callable[[int, int], None]"

_RANGES: Mapping[str, tuple[float, float, str]] = {  # argument: (least, most, in words)
    "points_per_batch": (1, np.inf, "at least 1"),
    "pred_iou_thresh": (0, 1, "from 0 to 1"),
    "stability_score_thresh": (0, 1, "from 0 to 1"),
    "stability_score_offset": (0, np.inf, "at least 0"),
    "box_nms_thresh": (0, 1, "from 0 to 1"),
    "crop_n_layers": (0, np.inf, "at least 0"),
    "crop_nms_thresh": (0, 1, "from 0 to 1"),
    "crop_overlap_ratio": (0, np.nextafter(1, 0), "at least 0 and below 1"),
    "min_mask_region_area": (0, np.inf, "at least 0"),
}


@dataclass(frozen=True)
class Candidate:
    """One mask in the image, and what is known of it."""

    counts: NDArray[np.int64]  # run lengths of the mask, see ``mask_ops.runs``
    box: tuple[int, int, int, int]  # first and last pixels, xyxy, as segment-anything has it
    predicted_iou: float
    stability: float  # IoU of the masks at a higher and a lower threshold; nan for no pixels
    point: tuple[float, float]  # (x, y) that was prompted, in pixels of the image
    crop_box: CropBox


class MaskRecord(TypedDict):
    """One mask, as ``SamAutomaticMaskGenerator.generate`` gives it.

    Attributes:
        segmentation: [H, W] bool; or run lengths as COCO has them, with ``counts`` as a list
            ("uncompressed_rle") or a string ("coco_rle").
        area: Pixels.
        bbox: [x, y, width, height] in pixels; as in segment-anything width and height are the
            distances of the first and the last pixel, 0 for a mask of one.
        predicted_iou: The network's own estimate.
        point_coords: [[x, y]], the point that was prompted.
        stability_score: IoU of the masks at a higher and a lower threshold.
        crop_box: [x, y, width, height] of the crop in which it was found.
    """

    segmentation: NDArray[np.bool_] | mask_ops.RLE
    area: int
    bbox: list[int]
    predicted_iou: float
    point_coords: list[list[float]]
    stability_score: float
    crop_box: list[int]


class SamAutomaticMaskGenerator:
    """Finds the masks of everything in an image.

    May be used by several threads; it can be copied and pickled. A model with Light HQ-SAM's
    decoder works too, without the fast form of the decoder. The three thresholds that are None by
    default are those of the checkpoint where it has some, else segment-anything's: 0.88, 0.95, 1.0.

    Args:
        model: The model, which is never changed; or the name of a checkpoint, or the path of a file
            or folder that holds a whole SAM; or a folder of ``tinyvit export`` with all masks. When
            its weights change, what was derived of them is rebuilt.
        points_per_side: Points along each side of the image; None where ``point_grids`` are
            given.
        points_per_batch: Points decoded between two filterings: more take more memory.
        pred_iou_thresh: Masks are kept whose predicted IoU is above it, 0..1; 0 keeps all.
        stability_score_thresh: Masks are kept whose stability is at least this, 0..1; 0 keeps all.
        stability_score_offset: Stability compares the masks this much above and below the
            threshold.
        box_nms_thresh: Of two masks of one crop whose boxes have a higher IoU, the one with the
            lower predicted IoU goes.
        crop_n_layers: Layers of crops beyond the whole image; layer i has 2^i crops a side.
        crop_nms_thresh: As ``box_nms_thresh`` between crops; the mask of the larger crop goes.
        crop_overlap_ratio: How far crops overlap, as a share of the shorter side.
        crop_n_points_downscale_factor: In layer i the points a side are divided by this to the
            power i.
        point_grids: Instead of ``points_per_side``, for each layer points [P, 2] in 0..1.
        min_mask_region_area: Holes and islands of fewer pixels are filled and removed; 0 leaves
            them.
        output_mode: The form of the masks: "binary_mask", "uncompressed_rle" or "coco_rle".
        engine: Runs ``model.image_encoder``; None makes one from the arguments that follow.
        backend: As for ``tinyvit.Engine``.
        precision: As for ``tinyvit.Engine``; the decoder always computes in fp32.
        device: Where to compute: a torch device, "auto", or None for where the model is now.
        pad: As for ``tinyvit.Engine``: False spends no work on padding, with other numbers.

    Raises:
        TypeError: ``model`` is neither a ``Sam`` nor the name or path of one.
        ValueError: A value is out of its range, or two do not go together.
        MissingExtraError: The package of the backend is not installed.

    Examples:
        >>> import numpy as np
        >>> from tinyvit.sam import SamAutomaticMaskGenerator, build_sam
        >>> generator = SamAutomaticMaskGenerator(
        ...     build_sam("tinyvit_sam_2m"), 2, pred_iou_thresh=0, stability_score_thresh=0
        ... )
        >>> records = generator.generate(np.zeros((48, 64, 3), np.uint8))
    """

    def __init__(
        self,
        model: AnySam | str | os.PathLike[str],
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float | None = None,
        stability_score_thresh: float | None = None,
        stability_score_offset: float | None = None,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[ArrayLike] | None = None,
        min_mask_region_area: int = 0,
        output_mode: OutputMode = "binary_mask",
        *,
        engine: Engine | None = None,
        backend: BackendName | Backend = "auto",
        precision: str = "fp32",
        device: str | torch.device | None = None,
        pad: bool | None = None,
        workers: int | None = None,
    ) -> None:
        if output_mode not in get_args(OutputMode):
            raise ValueError(
                f"output_mode must be one of {get_args(OutputMode)}, came {output_mode!r}"
            )
        self.point_grids = _grids(
            points_per_side, point_grids, crop_n_layers, crop_n_points_downscale_factor
        )
        kind = backend if engine is None or is_exported(model) else "torch"
        name = "SamAutomaticMaskGenerator"
        self._model = open_sam(model, name, kind, device, precision=precision)
        self._encoding = engine, backend, precision, device, pad, workers
        thresholds = {**THRESHOLDS, **self._model.thresholds}
        self.points_per_batch = points_per_batch
        given = pred_iou_thresh, stability_score_thresh, stability_score_offset
        self.pred_iou_thresh, self.stability_score_thresh, self.stability_score_offset = (
            thresholds[name] if value is None else value
            for name, value in zip(THRESHOLDS, given, strict=True)
        )
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        for name, (least, most, wanted) in _RANGES.items():
            value = getattr(self, name)
            if not np.isfinite(value) or not least <= value <= most:
                raise ValueError(f"{name} must be {wanted}, came {value}")
        self._use(self._model)

    def _use(self, model: AnySam) -> None:
        self._model = model
        self._encoder = ImageEncoder(model, *self._encoding)
        self._decoder = choose_decoder(model, self._encoder.engine, self._encoder.device)
        if isinstance(model, ExportedSam) and model.num_multimask_outputs == 1:
            raise ValueError(
                "everything mode wants all masks of a point, and this exported decoder gives the "
                "best one alone; export again with --all-masks"
            )

    @property
    def model(self) -> Sam:
        """The model; one that was opened without torch is built when it is asked for."""
        if isinstance(self._model, StoredSam):
            self._use(self._model.build())
        return cast("Sam", self._model)

    def generate(
        self, image: ImageSource | ImageEmbedding, progress: Progress | None = None
    ) -> list[MaskRecord]:
        """Find the masks of everything in an image.

        Args:
            image: [H, W, 3] uint8 RGB, 0..255. Also anything that ``tinyvit.images.decode`` reads:
                a path, bytes, a PIL image, arrays in grey or with transparency; or the embedding of
                an image, where there are no crops.
            progress: Called with (points decoded, points in all) after each batch of points.

        Returns:
            One record for each mask, none where nothing passes. The order is segment-anything's:
            best predicted IoU first; with layers of crops, smaller crops first, and within crops of
            one size in the order of crops; with ``min_mask_region_area``, masks that it changed
            last.

        Raises:
            ImageError: The image cannot be read, or the array is no image.
            TypeError: It is nothing that could be an image.
            ValueError: An embedding with ``crop_n_layers``, or one of another encoder.
        """
        if isinstance(image, ImageEmbedding):
            if self.crop_n_layers:
                raise ValueError("crops want the image itself; an embedding has no pixels")
            self._encoder.check(image)
            size, embeddings = image.original_size, iter([image])
        else:
            rgb = decode(image)
            size = int(rgb.shape[0]), int(rgb.shape[1])
            boxes, _ = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
            embeddings = self._encoder.encode(rgb[y0:y1, x0:x1] for x0, y0, x1, y1 in boxes)
        candidates = self._candidates(size, embeddings, progress)
        if self.min_mask_region_area > 0:
            candidates = self._without_small_regions(candidates, size)
        return [self._record(candidate, size) for candidate in candidates]

    def _candidates(
        self, size: Size, embeddings: Iterable[ImageEmbedding], progress: Progress | None
    ) -> list[Candidate]:
        """What is found in all crops, without duplicates."""
        boxes, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        rejected = _Rejected(sum(len(self.point_grids[layer]) for layer in layers), progress)
        found: list[Candidate] = []
        for box, layer, embedding in zip(boxes, layers, embeddings, strict=True):
            here = list(self._in_crop(embedding, self.point_grids[layer], box, size, rejected))
            found += _distinct(here, [one.predicted_iou for one in here], self.box_nms_thresh)
        if not found:
            rejected.warn(self.pred_iou_thresh, self.stability_score_thresh)
        if len(boxes) == 1:
            return found
        areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (one.crop_box for one in found)]
        return _distinct(found, [1 / area for area in areas], self.crop_nms_thresh)

    def _in_crop(
        self,
        embedding: ImageEmbedding,
        grid: NDArray[np.float64],
        box: CropBox,
        size: Size,
        rejected: _Rejected,
    ) -> Iterator[Candidate]:
        """The masks of one crop that pass the filters."""
        height, width = embedding.placement.original_size
        points = grid * np.array([width, height])
        in_model = embedding.placement.points_to_model(points).astype(np.float32)
        in_image = points + np.array(box[:2])
        prepared: Any = self._decoder.prepare(embedding)
        crop_box = np.array([*box[:2], *box[:2]])
        min_iou = self.pred_iou_thresh if self.pred_iou_thresh > 0 else -np.inf
        orig_box = [0, 0, size[1], size[0]]
        for start in range(0, len(points), self.points_per_batch):
            few = in_model[start : start + self.points_per_batch, None]  # [n, 1, 2]
            batch = PromptBatch((few, np.ones((len(few), 1), np.int64)))
            found, scores = self._decoder.find(
                prepared,
                batch,
                embedding.placement,
                min_iou=min_iou,
                threshold=self._model.mask_threshold,
                offset=self.stability_score_offset,
                min_stability=float(np.float32(self.stability_score_thresh)),
                frame=size,
                corner=(box[1], box[0]),
            )
            for one in found:
                rejected.stabilities.append(one.stability)
                if one.counts is None:
                    continue
                if is_box_near_crop_edge(np.array(one.box) - crop_box, box, orig_box)[0]:
                    continue
                x, y = in_image[start + one.prompt].tolist()
                yield Candidate(one.counts, one.box, one.score, one.stability, (x, y), box)
            rejected.add(scores)

    def _without_small_regions(self, candidates: list[Candidate], size: Size) -> list[Candidate]:
        """Fill small holes, remove small islands, and then duplicates; changed masks yield."""
        tidied: list[Candidate] = []
        scores: list[float] = []
        for one in candidates:
            mask, is_changed = mask_ops.fill(size, one.counts), False
            for mode in get_args(mask_ops.RegionKind):
                mask, changes = mask_ops.remove_small_regions(mask, self.min_mask_region_area, mode)
                is_changed |= changes
            if is_changed:
                corner = one.crop_box[1], one.crop_box[0]
                counts, around = mask_ops.runs_and_box(mask, 0, 0, size, corner)
                one = replace(one, counts=counts, box=around)
            tidied.append(one)
            scores.append(0.0 if is_changed else 1.0)
        return _distinct(tidied, scores, max(self.box_nms_thresh, self.crop_nms_thresh))

    def _record(self, one: Candidate, size: Size) -> MaskRecord:
        x0, y0, x1, y1 = one.box
        left, top, right, bottom = one.crop_box
        segmentation: NDArray[np.bool_] | mask_ops.RLE
        if self.output_mode == "binary_mask":
            segmentation = mask_ops.fill(size, one.counts)
        else:
            segmentation = mask_ops.to_rle(size, one.counts, self.output_mode == "coco_rle")
        return {
            "segmentation": segmentation,
            "area": int(one.counts[1::2].sum()),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "predicted_iou": one.predicted_iou,
            "point_coords": [list(one.point)],
            "stability_score": one.stability,
            "crop_box": [left, top, right - left, bottom - top],
        }

    def __repr__(self) -> str:
        return (
            f"SamAutomaticMaskGenerator({sum(map(len, self.point_grids[:1]))} points, "
            f"{self.crop_n_layers} layers of crops, pred_iou_thresh={self.pred_iou_thresh:g}, "
            f"stability_score_thresh={self.stability_score_thresh:g})"
        )


class _Rejected:
    """Counts points, tells a caller, and says why nothing has passed."""

    def __init__(self, points: int, tell: Progress | None) -> None:
        self._done, self._points, self._tell = 0, points, tell
        self._best_iou = -np.inf
        self.stabilities: list[float] = []  # of the masks whose predicted IoU was good enough

    def add(self, scores: NDArray[np.float32]) -> None:
        """The predicted IoU [n, K] of a batch of points."""
        self._best_iou = max(self._best_iou, float(scores.max(initial=-np.inf)))
        self._done += len(scores)
        if self._tell is not None:
            self._tell(self._done, self._points)

    def warn(self, pred_iou_thresh: float, stability_score_thresh: float) -> None:
        """Which threshold rejected how many, and what would have passed."""
        count, what, best = self._points, "points", self._best_iou
        name, bound = "pred_iou_thresh", pred_iou_thresh
        if self.stabilities:
            count, what = len(self.stabilities), "masks"
            best = float(np.nanmax([0.0, *self.stabilities]))
            name, bound = "stability_score_thresh", stability_score_thresh
        words = f"0 of {count} {what} passed {name} {bound:g} (best {best:.2f}); try {name} "
        words += f"{max(0.0, np.floor(best * 9) / 10):g}"
        if self.stabilities and best >= bound:
            words = f"all of {count} masks were cut off at the edge of a crop"
        warnings.warn(f"no masks: {words}", stacklevel=4)


def _distinct(candidates: list[Candidate], scores: list[float], bound: float) -> list[Candidate]:
    """Without those whose box is nearly that of a better one; the best first."""
    boxes = np.array([one.box for one in candidates], np.float64).reshape(-1, 4)
    kept = mask_ops.non_maximum_suppression(boxes, np.array(scores, np.float64), bound)
    return [candidates[i] for i in kept]


def _grids(
    points_per_side: int | None,
    point_grids: Sequence[ArrayLike] | None,
    n_layers: int,
    scale_per_layer: int,
) -> list[NDArray[np.float64]]:
    """The points of each layer, from whichever of the two arguments is given."""
    if (points_per_side is None) == (point_grids is None):
        given = "none" if point_grids is None else "both"
        raise ValueError(
            f"exactly one of points_per_side and point_grids must be given, came {given}; to give "
            "point_grids, set points_per_side=None"
        )
    if points_per_side is not None:
        return build_all_layer_point_grids(points_per_side, n_layers, scale_per_layer)
    return check_point_grids(point_grids or [], n_layers)


CropBox: TypeAlias = "list[int]"
"""[x0, y0, x1, y1] in whole pixels of the image."""

EDGE = 20.0
"""A box that ends within so many pixels of a crop's edge may be cut off there."""


def build_point_grid(n_per_side: int) -> NDArray[np.float64]:
    """Points in the middles of equal squares: [n_per_side ** 2, 2] float64 in 0..1, row by row.

    Examples:
        >>> build_point_grid(2).tolist()
        [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    """
    if n_per_side < 1:
        raise ValueError(f"a grid needs at least 1 point a side, came {n_per_side}")
    middle = 1 / (2 * n_per_side)
    side = np.linspace(middle, 1 - middle, n_per_side)
    x, y = np.meshgrid(side, side)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def build_all_layer_point_grids(
    n_per_side: int, n_layers: int, scale_per_layer: int
) -> list[NDArray[np.float64]]:
    """A grid [P, 2] in 0..1 a layer; layer i has points / ``scale_per_layer`` ** i a side."""
    for name, value, least in (
        ("points_per_side", n_per_side, 1),
        ("crop_n_layers", n_layers, 0),
        ("crop_n_points_downscale_factor", scale_per_layer, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, came {value}")
    counts = [int(n_per_side / scale_per_layer**layer) for layer in range(n_layers + 1)]
    if counts[-1] < 1:
        raise ValueError(
            f"points_per_side={n_per_side} divided by {scale_per_layer} for each of {n_layers} "
            f"layers of crops leaves layer {counts.index(0)} without points; use more points, "
            "fewer layers or a smaller crop_n_points_downscale_factor"
        )
    return [build_point_grid(count) for count in counts]


def check_point_grids(point_grids: Sequence[ArrayLike], n_layers: int) -> list[NDArray[np.float64]]:
    """A caller's grids, for each layer points [P, 2] in 0..1, as checked arrays of float64."""
    if len(point_grids) < n_layers + 1:
        raise ValueError(
            f"point_grids must hold a grid for the image and for each of {n_layers} layers of "
            f"crops, {n_layers + 1} in all; came {len(point_grids)}"
        )
    grids = []
    for layer, given in enumerate(point_grids):
        grid = np.asarray(given, np.float64)
        if grid.ndim != 2 or grid.shape[1] != 2:
            raise ValueError(f"point_grids[{layer}] must be [P, 2], came {list(grid.shape)}")
        if not ((grid >= 0) & (grid <= 1)).all():
            raise ValueError(
                f"point_grids[{layer}] must lie in 0..1, shares of the width and the height; came "
                f"{grid.min():g} to {grid.max():g}"
            )
        grids.append(grid)
    return grids


def generate_crop_boxes(
    im_size: tuple[int, int], n_layers: int, overlap_ratio: float
) -> tuple[list[CropBox], list[int]]:
    """Crops of an image of (height, width), layer by layer, column by column; the layer of each.

    Crops of layer 1 overlap by ``overlap_ratio`` of the shorter side; later layers by as much less
    as their crops are smaller. An image of few pixels has fewer crops: empty ones are left out.

    Examples:
        >>> boxes, layers = generate_crop_boxes((100, 200), 1, 0.2)
        >>> boxes[:3], layers
        ([[0, 0, 200, 100], [0, 0, 110, 60], [0, 40, 110, 100]], [0, 1, 1, 1, 1])
    """
    height, width = im_size
    boxes, layers = [[0, 0, width, height]], [0]
    for layer in range(1, n_layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / count))
        crop_w, crop_h = (
            math.ceil((overlap * (count - 1) + side) / count) for side in (width, height)
        )
        for i in range(count):
            for j in range(count):
                x0, y0 = i * (crop_w - overlap), j * (crop_h - overlap)
                box = [x0, y0, min(x0 + crop_w, width), min(y0 + crop_h, height)]
                if box[0] < box[2] and box[1] < box[3]:
                    boxes.append(box)
                    layers.append(layer)
    return boxes, layers


def is_box_near_crop_edge(
    boxes: ArrayLike, crop_box: Sequence[float], orig_box: Sequence[float], atol: float = EDGE
) -> NDArray[np.bool_]:
    """Which masks a crop may have cut off, [N] bool: their box ends at its edge, not the image's.

    ``boxes`` [N, 4] are in pixels of the crop, ``orig_box`` is the image, [0, 0, width, height].
    """
    x0, y0 = crop_box[:2]
    placed = np.asarray(boxes, np.float64).reshape(-1, 4) + np.array([x0, y0, x0, y0])
    near_crop = np.abs(placed - np.asarray(crop_box)) <= atol
    near_image = np.abs(placed - np.asarray(orig_box)) <= atol
    return np.asarray((near_crop & ~near_image).any(axis=1), np.bool_)
