"""X-AnyLabeling's remote server: three requests.

It sends the whole image each time; the hash of its bytes finds the embedding.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from tinyvit.images.mask_ops import is_outer, outlines
from tinyvit.sam.prompts import Prompt
from tinyvit.sam.segmenter import Masks
from tinyvit.serve import bodies, schema
from tinyvit.serve.problems import Problem
from tinyvit.serve.service import Service
from tinyvit.serve.settings import ServeSettings

WIDGETS = (
    "button_run", "button_add_point", "button_remove_point", "button_add_rect", "button_clear",
    "button_finish_object", "mask_fineness_slider",
)  # fmt: skip
PATH = "/x-anylabeling"
LABEL = "AUTOLABEL_OBJECT"


class Mark(BaseModel):
    """A click or a rectangle."""

    type: Literal["point", "rectangle"]
    data: list[schema.Finite]
    label: Any = 1


class Params(BaseModel):
    """What the tool sets."""

    marks: Annotated[list[Mark], Field(max_length=schema.MOST_POINTS)] | None = None
    epsilon_factor: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.001


class Asked(BaseModel):
    """A request for masks; what else it has is of no use here."""

    image: str
    params: Params | None = None


def add(api: FastAPI, service: Service, settings: ServeSettings) -> None:
    """The routes under ``/x-anylabeling``."""

    @api.get(f"{PATH}/health", include_in_schema=False)
    async def health() -> Response:
        return JSONResponse({"status": "healthy"})

    @api.get(f"{PATH}/v1/models", include_in_schema=False)
    async def models() -> Response:
        model: dict[str, Any] = {
            "display_name": f"tinyvit ({service.model.name})",
            "widgets": [{"name": name, "value": None} for name in WIDGETS],
            "params": {},
            "batch_processing_mode": None,
        }
        return JSONResponse({"success": True, "data": {"tinyvit": model}})

    @api.post(f"{PATH}/v1/predict", include_in_schema=False)
    async def predict(request: Request) -> Response:
        most = 2 * settings.max_image_mb * 2**20
        asked = schema.validate(Asked, await bodies.read_json(request, service.bodies, most))
        params = asked.params or Params()
        client = str(request.state.client)
        stored = await service.encode(bodies.image_in_json(asked.image), client)
        prompt = _prompt(params.marks or [])
        shapes: list[dict[str, Any]] = []
        if prompt is not None:
            then = lambda masks: _shapes(masks, params.epsilon_factor)  # noqa: E731
            shapes, _ = await service.segment(stored.id, [prompt], "auto", client, then=then)
        data = {"shapes": shapes, "description": "", "replace": False}
        return JSONResponse({"success": True, "data": data})


def _prompt(marks: list[Mark]) -> Prompt | None:
    """The marks as one prompt; the last rectangle counts."""
    points = [mark.data for mark in marks if mark.type == "point"]
    labels = [int(bool(mark.label)) for mark in marks if mark.type == "point"]
    boxes = [mark.data for mark in marks if mark.type == "rectangle"]
    if not points and not boxes:
        return None
    try:
        box = np.sort(np.reshape(boxes[-1], (2, 2)), axis=0).ravel() if boxes else None
        return Prompt(points or None, labels or None, box)
    except ValueError as err:
        raise Problem("bad-prompt", f"a mark is wrong: {str(err)[:200]}") from err


def _shapes(masks: Masks, fineness: float) -> list[dict[str, Any]]:
    """The best mask as polygons; the tolerance is a share of each outline's length."""
    mask = masks.mask(0)
    tolerance = fineness * 2 * (mask.shape[0] + mask.shape[1])
    score = float(masks.predicted_ious[0].max())
    found = []
    for ring in outlines(mask, min(tolerance, 0.02 * max(mask.shape))):
        if is_outer(ring):  # the tool's polygons have no holes
            points = [*ring.tolist(), ring[0].tolist()]
            shape = {"label": LABEL, "shape_type": "polygon", "points": points, "score": score}
            found.append(shape)
    return found
