"""Label Studio's ML backend protocol: smart key points and rectangles become masks.

Coordinates come and go in percent of the image. Images come as URLs or paths; they are fetched
only from the configured host, with its key from ``LABEL_STUDIO_API_KEY``, and never from an
address that a request names.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import urllib.error
import urllib.request
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit
from xml.etree import ElementTree

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray

from tinyvit.images.mask_ops import outlines
from tinyvit.sam.prompts import Prompt
from tinyvit.sam.segmenter import Masks
from tinyvit.serve import answers, bodies
from tinyvit.serve.problems import Problem
from tinyvit.serve.service import Service
from tinyvit.serve.settings import ServeSettings

SECONDS = 30
KNOWN_URLS = 4_096  # whose image's hash is remembered, so that a second click fetches nothing
TAGS = {
    "BrushLabels": "brushlabels",
    "PolygonLabels": "polygonlabels",
    "RectangleLabels": "rectanglelabels",
}
_RUN_BITS = np.array([3, 4, 8, 16])  # of a run's length, in the brush format


def add(api: FastAPI, service: Service, settings: ServeSettings) -> None:
    """The routes under ``/label-studio``."""
    backend = _Backend(service, settings)
    path = "/label-studio"
    for name in ("", "/", "/health"):
        api.get(path + name, include_in_schema=False)(backend.health)
    for handler in (backend.setup, backend.predict, backend.webhook):
        api.post(f"{path}/{handler.__name__}", include_in_schema=False)(handler)


class _Backend:
    def __init__(self, service: Service, settings: ServeSettings) -> None:
        self.service, self.settings = service, settings
        self.fetcher = Fetcher(settings.label_studio_url, settings.max_image_mb * 2**20)
        self._ids: OrderedDict[str, str] = OrderedDict()

    async def health(self) -> Response:
        return JSONResponse({"status": "UP", "model_class": "tinyvit"})

    async def setup(self, request: Request) -> Response:
        await bodies.read_json(request, self.service.bodies)
        return JSONResponse({"model_version": self.service.model.name})

    async def webhook(self, request: Request) -> Response:
        await bodies.read_json(request, self.service.bodies)
        return JSONResponse({})

    async def predict(self, request: Request) -> Response:
        asked = await bodies.read_json(
            request, self.service.bodies, 2 * self.settings.max_image_mb * 2**20
        )
        if not isinstance(asked, dict) or not isinstance(asked.get("tasks"), list):
            raise Problem("bad-request", "wanted tasks, label_config and params")
        context = _results(asked.get("params"))
        config = Config.read(str(asked.get("label_config") or ""))
        client = str(request.state.client)
        results = []
        for task in asked["tasks"][:1] if context else []:
            image_id = await self._image(_source(task, config), client)
            height, width = (await self.service.known(image_id)).original_size
            prompt, label = _prompt(context, width, height)

            def then(masks: Masks, label: str = label) -> list[dict[str, Any]]:
                return _regions(masks, config, label)

            found, _ = await self.service.segment(image_id, [prompt], "auto", client, then=then)
            score = found[0]["score"] if found else 0.0
            version = self.service.model.name
            results.append({"model_version": version, "score": score, "result": found})
        return JSONResponse({"results": results})

    async def _image(self, url: str, client: str) -> str:
        """The id of a task's image, known or encoded now."""
        key = urlsplit(url).path if not url.startswith("data:") else ""
        known = self._ids.get(key) if key else None
        if known is not None and await self.service.find(known) is not None:
            return known
        data = await asyncio.to_thread(self.fetcher.fetch, url)
        stored = await self.service.encode(data, client)
        if key:
            self._ids[key] = stored.id
            while len(self._ids) > KNOWN_URLS:
                self._ids.popitem(last=False)
        return stored.id


@dataclass(frozen=True)
class Config:
    """What a labelling configuration says: the image's variable, and the control to answer by.

    Attributes:
        image: Name of the task's field with the image.
        to_name: Name of the image's tag.
        from_name: Name of the control.
        kind: "brushlabels", "polygonlabels" or "rectanglelabels".
    """

    image: str
    to_name: str
    from_name: str
    kind: str

    @classmethod
    def read(cls, text: str) -> Config:
        """From the configuration's XML.

        Raises:
            Problem: It has no image or no control that takes a mask.
        """
        if "<!" in text:  # entities and document types have no place in it
            raise Problem("bad-request", "label_config must be plain XML tags")
        try:
            root = ElementTree.fromstring(text)
        except ElementTree.ParseError as err:
            raise Problem("bad-request", f"label_config is no XML: {err}") from err
        image = next(iter(root.iter("Image")), None)
        for tag, kind in TAGS.items():
            control = next(iter(root.iter(tag)), None)
            if image is not None and control is not None:
                value = image.get("value", "$image").lstrip("$")
                name = image.get("name", "image")
                return cls(value, control.get("toName", name), control.get("name", kind), kind)
        raise Problem("bad-request", f"label_config wants an Image and one of {', '.join(TAGS)}")


class Fetcher:
    """Fetches images from one host, with its key.

    Args:
        base: The configured address of Label Studio; None fetches nothing.
        most: Bytes of one image.
    """

    def __init__(self, base: str | None, most: int) -> None:
        self.base, self.most = base, most
        self._key = os.environ.get("LABEL_STUDIO_API_KEY", "")
        self._access: str | None = None
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_SameHost)

    def fetch(self, url: str) -> bytes:
        """The bytes behind a task's URL or path.

        Raises:
            Problem: It is of another host, cannot be fetched, or is too large.
        """
        if url.startswith("data:"):
            return bodies.image_in_json(url)
        if self.base is None:
            raise Problem("bad-parameters", "start the server with --label-studio-url")
        own, given = urlsplit(self.base), urlsplit(url)
        if given.netloc and (given.scheme, given.netloc) != (own.scheme, own.netloc):
            raise Problem("bad-parameters", "images are fetched from --label-studio-url alone")
        target = urljoin(self.base, given._replace(scheme="", netloc="").geturl() or "/")
        try:
            try:
                return self._read(target, self._headers())
            except urllib.error.HTTPError as err:
                if err.code != 401 or self._access is None:
                    raise
                self._access = None  # it has expired: exchange the key again
                return self._read(target, self._headers())
        except urllib.error.HTTPError as err:
            words = f"Label Studio answered {err.code} for an image; check LABEL_STUDIO_API_KEY"
            raise Problem("not-an-image", words) from err
        except (OSError, ValueError, KeyError) as err:
            raise Problem("not-an-image", "Label Studio did not give the image") from err

    def _read(self, url: str, headers: dict[str, str], body: bytes | None = None) -> bytes:
        request = urllib.request.Request(url, data=body, headers=headers)
        with self._opener.open(request, timeout=SECONDS) as answer:
            data: bytes = answer.read(self.most + 1)
        if len(data) > self.most:
            raise Problem("too-large", f"an image has more than {self.most / 2**20:g} MiB")
        return data

    def _headers(self) -> dict[str, str]:
        """A personal access token is exchanged for a short-lived one; an older key is sent."""
        if not self._key:
            return {}
        if self._key.count(".") != 2:
            return {"Authorization": f"Token {self._key}"}
        with self._lock:
            if self._access is None:
                body = json.dumps({"refresh": self._key}).encode()
                url = urljoin(self.base or "", "/api/token/refresh")
                answer = self._read(url, {"Content-Type": "application/json"}, body)
                self._access = str(json.loads(answer)["access"])
            return {"Authorization": f"Bearer {self._access}"}


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects within a host only: the key must not leave it."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> Any:
        if urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _results(params: Any) -> list[Any]:
    """What was drawn before the request; [] for a request without a context."""
    context = params.get("context") if isinstance(params, dict) else None
    found = context.get("result") if isinstance(context, dict) else None
    return found if isinstance(found, list) else []


def _source(task: Any, config: Config) -> str:
    url = (task.get("data") or {}).get(config.image) if isinstance(task, dict) else None
    if not isinstance(url, str):
        raise Problem("bad-request", f"the task has no image in its field {config.image!r}"[:200])
    return url


def _prompt(context: list[Any], width: int, height: int) -> tuple[Prompt, str]:
    """All results of one context are one object: points, and the last rectangle."""
    points: list[list[float]] = []
    labels: list[int] = []
    box, label = None, ""
    try:
        for result in context:
            value, kind = result["value"], result["type"]
            x, y = value["x"] * width / 100, value["y"] * height / 100
            if kind.startswith("keypoint"):
                points.append([x, y])
                labels.append(0 if result.get("is_positive") in (0, False) else 1)
            elif kind.startswith("rectangle"):
                right = x + value["width"] * width / 100
                bottom = y + value["height"] * height / 100
                box = [max(x, 0), max(y, 0), min(right, width), min(bottom, height)]
            label = (value.get(kind) or [label])[0]
        return Prompt(points or None, labels or None, box), str(label)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as err:
        raise Problem("bad-prompt", f"the context is wrong: {str(err)[:200]}") from err


def _regions(masks: Masks, config: Config, label: str) -> list[dict[str, Any]]:
    """The best mask as the control wants it."""
    mask, score = masks.mask(0), float(masks.predicted_ious[0].max())
    height, width = mask.shape
    percent = [100 / width, 100 / height]
    values: list[dict[str, Any]]
    if config.kind == "brushlabels":
        values = [{"format": "rle", "rle": brush(mask)}]
    elif config.kind == "polygonlabels":
        rings = outlines(mask, 1.0)
        values = [{"points": (ring * percent).tolist(), "closed": True} for ring in rings]
    else:
        x, y, w, h = answers.mask_box(mask)
        values = [{
            "x": x * percent[0], "y": y * percent[1], "width": w * percent[0],
            "height": h * percent[1], "rotation": 0,
        }]  # fmt: skip
    return [
        {
            "id": os.urandom(5).hex(),
            "from_name": config.from_name,
            "to_name": config.to_name,
            "type": config.kind,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {**value, config.kind: [label] if label else []},
            "score": score,
            "readonly": False,
        }
        for value in values
    ]


def brush(mask: NDArray[np.bool_]) -> list[int]:
    """A mask [H, W] bool as the bytes that a ``brushlabels`` result has in ``rle``.

    Runs of RGBA values, row by row, packed bit by bit: 32 bits number of values, 5 bits word
    size - 1, four times 4 bits size of a run's length - 1; then for each run 1 bit (a run), 2 bits
    which size, length - 1, the value.
    """
    flat, longest = mask.ravel(), 1 << int(_RUN_BITS[-1])
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    lengths = 4 * np.diff(np.concatenate([starts, [len(flat)]]))
    pieces = -(-lengths // longest)
    values = np.repeat(np.where(flat[starts], 255, 0), pieces)
    runs = np.full(len(values), longest, np.int64)
    runs[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * longest
    which = np.searchsorted(1 << _RUN_BITS, runs)
    bits = _RUN_BITS[which]
    head = np.array([(4 * mask.size, 32), (8 - 1, 5), *((one - 1, 4) for one in _RUN_BITS)])
    codes = np.concatenate([head[:, 0], (((4 + which) << bits | (runs - 1)) << 8) | values])
    sizes = np.concatenate([head[:, 1], 3 + bits + 8])
    ends = np.cumsum(sizes)
    place = np.repeat(ends, sizes) - 1 - np.arange(ends[-1])
    packed = np.packbits((np.repeat(codes, sizes) >> place & 1).astype(np.uint8))
    return [int(value) for value in packed]
