"""Requests and answers of API v1, as strict models: what they say is the OpenAPI document, too."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinyvit.images import mask_ops
from tinyvit.sam.prompts import Prompt

from .problems import Problem

Finite = Annotated[float, Field(allow_inf_nan=False)]
Point = Annotated[list[Finite], Field(min_length=2, max_length=2)]
Include = Literal["rle", "counts", "polygons", "png", "low_res"]
LowResType = Literal["int8-root", "float16"]

MOST_PROMPTS, MOST_POINTS = 256, 1_000

_ROOT = 32.0


class Strict(BaseModel):
    """No conversions, no unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid")


Asked = TypeVar("Asked", bound=BaseModel)


class RunLengths(Strict):
    """A mask as COCO's run lengths, compressed (text) or not (numbers), column by column."""

    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    counts: str | list[int]


class LowRes(Strict):
    """Low-resolution logits of a mask, row by row.

    ``int8-root``: one signed byte each, sign(l) * clip(rint(32 * sqrt(|l|)), 1, 127).
    """

    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    dtype: LowResType
    input_size: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        description="(height, width) of the model's input that the image covers"
    )
    logit_stride: Finite = Field(description="pixels of the model's input for one logit")
    data: str = Field(description="base64")


class PromptModel(Strict):
    """What to segment: points, a box, a mask, or any of them together, about one object."""

    points: Annotated[list[Point], Field(min_length=1, max_length=MOST_POINTS)] | None = None
    labels: Annotated[list[Literal[0, 1]], Field(max_length=MOST_POINTS)] | None = None
    box: Annotated[list[Finite], Field(min_length=4, max_length=4)] | None = None
    mask: RunLengths | LowRes | None = None
    name: Annotated[str, Field(max_length=200)] | None = None

    def to_prompt(self, image_size: tuple[int, int]) -> Prompt:
        """As the library has it.

        Raises:
            ValueError: It is no valid prompt.
        """
        mask: NDArray[Any] | None = None
        if isinstance(self.mask, LowRes):
            mask = unpack_logits(self.mask)
        elif self.mask is not None:
            if tuple(self.mask.size) != image_size:
                raise ValueError(
                    f"a mask must have the size of the image, {list(image_size)}; "
                    f"came {self.mask.size}"
                )
            mask = mask_ops.decode(self.mask.model_dump())
        return Prompt(self.points, self.labels, self.box, mask, self.name)


_TWO = [
    {"points": [[172, 118], [150, 90]], "labels": [1, 0], "name": "left eye"},
    {"box": [130, 80, 210, 150]},
]
_EXAMPLES: list[Any] = [
    {"prompts": [{"points": [[172, 118]]}]},
    {"prompts": _TWO, "which": "all", "include": ["rle", "low_res"]},
    {"prompts": _TWO[1:], "include": ["polygons"], "tolerance": 1},
]


class SegmentRequest(Strict):
    """Prompts on one image, each about one object."""

    model_config = ConfigDict(json_schema_extra={"examples": _EXAMPLES})

    prompts: Annotated[list[PromptModel], Field(min_length=1, max_length=MOST_PROMPTS)]
    multimask: Literal["auto"] | bool = "auto"
    which: Literal["best", "all"] = "best"
    include: list[Include] = ["rle"]
    low_res_dtype: LowResType = "int8-root"
    tolerance: Annotated[float, Field(ge=0, le=1_000, allow_inf_nan=False)] = 0.0
    preview: bool = False


class SegmentQuery(BaseModel):
    """Prompts in the query, as on the command line."""

    model_config = ConfigDict(extra="forbid")

    point: list[str] = Field(
        [], description="x,y or x,y,label; label 1 is on the object, 0 is not; all are about one"
    )
    box: list[str] = Field([], description="x0,y0,x1,y1")
    each: bool = Field(False, description="every point and every box is an object of its own")
    multimask: Literal["auto"] | bool = "auto"
    which: Literal["best", "all"] = "best"
    include: list[str] = Field(
        ["rle"], description="of rle, counts, polygons, png, low_res; between commas"
    )
    tolerance: float = Field(0.0, description="of polygons, in pixels")

    def to_request(self) -> SegmentRequest:
        """As in the body of a request.

        Raises:
            Problem: ``bad-prompt`` or ``bad-parameters``.
        """
        rows = [_numbers(text, (2, 3), "point") for text in self.point]
        boxes = [{"box": _numbers(text, (4,), "box")} for text in self.box]
        points = [row[:2] for row in rows]
        labels = [row[2] if len(row) == 3 else 1 for row in rows]
        if not set(labels) <= {0, 1}:
            raise Problem("bad-prompt", "a point's label is 1 or 0", where="/query/point")
        labels = [int(label) for label in labels]
        prompts: list[dict[str, Any]]
        if self.each:
            pairs = zip(points, labels, strict=True)
            prompts = [*({"points": [xy], "labels": [label]} for xy, label in pairs), *boxes]
        elif len(boxes) > 1:
            raise Problem("bad-prompt", "one object has one box; each=true for one each")
        else:
            prompts = [{"points": points, "labels": labels} if points else {}]
            prompts[0] |= boxes[0] if boxes else {}
        include = [word for text in self.include for word in text.split(",")]
        others = self.model_dump(include={"multimask", "which", "tolerance"})
        return validate(SegmentRequest, {"prompts": prompts, "include": include, **others})


def _numbers(text: str, counts: tuple[int, ...], name: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in counts:
        raise Problem("bad-prompt", f"{name} must be {' or '.join(map(str, counts))} numbers")
    return found


class EverythingRequest(Strict):
    """Masks of everything: the numbers of ``SamAutomaticMaskGenerator``, each within a bound."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"points_per_side": 4}]})

    points_per_side: Annotated[int, Field(ge=1, le=64)] = 16
    pred_iou_thresh: Annotated[float, Field(ge=0, le=1)] | None = None
    stability_score_thresh: Annotated[float, Field(ge=0, le=1)] | None = None
    stability_score_offset: Annotated[float, Field(ge=0, le=32)] | None = None
    box_nms_thresh: Annotated[float, Field(ge=0, le=1)] = 0.7
    min_mask_region_area: Annotated[int, Field(ge=0, le=10**9)] = 0


class Model(Strict):
    """The model of a server."""

    name: str
    sha256: str | None
    input_size: Annotated[list[int], Field(description="(height, width) of the model's input")]
    precision: str


class About(Strict):
    """What a server says of itself."""

    version: str
    api: int
    state: Literal["loading", "ready", "draining"]
    model: Model | None = None
    thresholds: dict[str, float]
    limits: dict[str, float]
    adapters: list[str]
    links: dict[str, str]


class Image(Strict):
    """An image that the server knows."""

    id: str
    width: int
    height: int
    cached: bool
    model: Model
    timing: dict[str, float]
    view: str | None = None


class MaskModel(Strict):
    """One mask."""

    index: int
    score: float
    area: int | None = None
    box: list[float] | None = None
    rle: RunLengths | None = None
    counts: RunLengths | None = None
    polygons: list[list[Point]] | None = None
    png: str | None = None
    low_res: LowRes | None = None


class Object(Strict):
    """The masks of one prompt."""

    name: str | None = None
    best: int
    masks: list[MaskModel]


class ImageSize(Strict):
    """An image that was segmented."""

    id: str
    width: int
    height: int


class Segmented(Strict):
    """The answer to a ``SegmentRequest``."""

    image: ImageSize
    model: Model
    objects: list[Object]
    timing: dict[str, float]


class Found(Strict):
    """One mask of everything."""

    score: float
    stability: float
    area: int
    box: list[float]
    point: list[float]
    rle: RunLengths


class Everything(Strict):
    """The answer to an ``EverythingRequest``."""

    image: ImageSize
    model: Model
    masks: list[Found]
    hint: str | None = Field(None, description="what to change where no mask was good enough")
    timing: dict[str, float]


class ProblemBody(Strict):
    """What went wrong, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    where: Annotated[str, Field(description="JSON pointer into the request")] | None = None


def pack_logits(
    logits: NDArray[np.float32], input_size: tuple[int, int], stride: float, dtype: LowResType
) -> LowRes:
    """Low-res logits [h4, w4] as a page wants them: the root keeps what is near 0."""
    if dtype == "float16":
        raw = np.clip(logits, -65504, 65504).astype("<f2").tobytes()
    else:
        size = np.clip(np.rint(_ROOT * np.sqrt(np.abs(logits))), 1, 127)
        raw = np.where(logits < 0, -size, size).astype(np.int8).tobytes()
    return LowRes(
        size=list(logits.shape),
        dtype=dtype,
        input_size=list(input_size),
        logit_stride=stride,
        data=base64.b64encode(raw).decode(),
    )


def unpack_logits(value: LowRes) -> NDArray[np.float32]:
    """What ``pack_logits`` has packed, [h4, w4] float32.

    Raises:
        ValueError: The bytes are not base64, or too many or too few.
    """
    try:
        raw = base64.b64decode(value.data, validate=True)
    except binascii.Error as err:
        raise ValueError("low_res.data must be base64") from err
    kind = np.dtype("<f2" if value.dtype == "float16" else np.int8)
    height, width = value.size
    if min(height, width) < 1 or len(raw) != height * width * kind.itemsize:
        raise ValueError(f"low_res.data must be {height} x {width} of {value.dtype}")
    values = np.frombuffer(raw, kind).astype(np.float32).reshape(height, width)
    return values if value.dtype == "float16" else np.sign(values) * (values / _ROOT) ** 2


def validate(kind: type[Asked], value: Any) -> Asked:
    """A model from JSON, or a problem that says where and what, and repeats no input.

    Raises:
        Problem: ``bad-prompt`` below ``/prompts``, else ``bad-parameters``.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as err:
        first = err.errors(include_input=False, include_context=False, include_url=False)[0]
        where = "/" + "/".join(str(part)[:40] for part in first["loc"])
        is_prompt = where.startswith("/prompts")
        where = where.encode("ascii", "replace").decode()
        name = "bad-prompt" if is_prompt else "bad-parameters"
        raise Problem(name, first["msg"], where=where) from err
