"""X-AnyLabeling's remote server: three requests.

It sends the whole image each time; the hash of its bytes finds the embedding.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from tinyvit.images.mask_ops import is_outer, outlines
from tinyvit.sam.prompts import Prompt
from tinyvit.sam.segmenter import Masks
from tinyvit.serve import bodies
from tinyvit.serve.problems import Problem
from tinyvit.serve.service import Service
from tinyvit.serve.settings import ServeSettings

WIDGETS = (
    "button_run", "button_add_point", "button_remove_point", "button_add_rect", "button_clear",
    "button_finish_object", "mask_fineness_slider",
)  # fmt: skip
LABEL = "AUTOLABEL_OBJECT"
MOST_MARKS = 1_000


def add(api: FastAPI, service: Service, settings: ServeSettings) -> None:
    """The routes under ``/x-anylabeling``."""

    async def health() -> Response:
        return JSONResponse({"status": "healthy"})

    async def models() -> Response:
        model: dict[str, Any] = {
            "display_name": f"tinyvit ({service.model.name})",
            "widgets": [{"name": name, "value": None} for name in WIDGETS],
            "params": {},
            "batch_processing_mode": None,
        }
        return JSONResponse({"success": True, "data": {"tinyvit": model}})

    async def predict(request: Request) -> Response:
        asked = await bodies.read_json(request, service.bodies, 2 * settings.max_image_mb * 2**20)
        image, marks, fineness = _parts(asked)
        client = str(request.state.client)
        stored = await service.encode(image, client)
        prompt = _prompt(marks)
        shapes: list[dict[str, Any]] = []
        if prompt is not None:
            then = lambda masks: _shapes(masks, fineness)  # noqa: E731
            shapes, _ = await service.segment(stored.id, [prompt], "auto", client, then=then)
        data = {"shapes": shapes, "description": "", "replace": False}
        return JSONResponse({"success": True, "data": data})

    path = "/x-anylabeling"
    api.add_api_route(f"{path}/health", health, methods=["GET"], include_in_schema=False)
    api.add_api_route(f"{path}/v1/models", models, methods=["GET"], include_in_schema=False)
    api.add_api_route(f"{path}/v1/predict", predict, methods=["POST"], include_in_schema=False)


def _parts(asked: Any) -> tuple[bytes, list[Any], float]:
    """The image's bytes, the marks, the fineness of outlines."""
    if not isinstance(asked, dict):
        raise Problem("bad-request", "wanted a JSON object with image and params")
    text, params = asked.get("image"), asked.get("params") or {}
    if not isinstance(text, str) or not isinstance(params, dict):
        raise Problem("bad-request", "image must be base64, params an object")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        image = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise Problem("not-an-image", "image must be base64") from err
    marks = params.get("marks") or []
    if not isinstance(marks, list) or len(marks) > MOST_MARKS:
        raise Problem("bad-prompt", f"marks must be a list of at most {MOST_MARKS}")
    fineness = params.get("epsilon_factor", 0.001)
    is_number = isinstance(fineness, (int, float)) and not isinstance(fineness, bool)
    if not is_number or not 0 <= fineness <= 1:
        raise Problem("bad-parameters", "epsilon_factor must be from 0 to 1")
    return image, marks, float(fineness)


def _prompt(marks: list[Any]) -> Prompt | None:
    """The marks as one prompt; the last rectangle counts."""
    points: list[list[float]] = []
    labels: list[int] = []
    box = None
    try:
        for mark in marks:
            if mark["type"] == "point":
                points.append([float(value) for value in mark["data"]])
                labels.append(1 if mark.get("label", 1) else 0)
            elif mark["type"] == "rectangle":
                x0, y0, x1, y1 = (float(value) for value in mark["data"])
                box = [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
            else:
                raise Problem("bad-prompt", "a mark is a point or a rectangle")
        if not points and box is None:
            return None
        return Prompt(points or None, labels or None, box)
    except (KeyError, TypeError, ValueError) as err:
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
