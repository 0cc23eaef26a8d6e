"""Serve a segmenter over HTTP, with a page to click on: ``tinyvit serve``.

Needs the extra ``serve`` (FastAPI, uvicorn, prometheus_client, sse-starlette). Settings are read
without it.
"""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
