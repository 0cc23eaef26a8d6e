"""Serve a segmenter over HTTP, with a page to click on: ``tinyvit serve``.

Needs the extra ``serve`` (FastAPI, uvicorn, prometheus_client, sse-starlette).
"""

from __future__ import annotations

from importlib.util import find_spec

from tinyvit.errors import MissingExtraError
from tinyvit.lazy import attach

for _name in ("fastapi", "uvicorn", "prometheus_client", "sse_starlette"):
    if find_spec(_name) is None:
        raise MissingExtraError(f"{_name} is not installed; pip install 'tinyvit[serve,torch]'")

__getattr__, __dir__, __all__ = attach(__name__, __file__)
