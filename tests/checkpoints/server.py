"""A real HTTP server in a thread, with the faults that real ones have."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves ``files``; ``faults`` are used up one per request.

    A fault is ``"500"``, ``"404"`` …, ``"cut:N"`` (closes after N bytes of the body), ``"html"``
    (a page with status 200), ``"shifted"`` (continues at the wrong place), ``"slow"`` (waits).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.ranges = True
        self.lengths = True
        self.requests: list[tuple[str, str | None]] = []
        self.slowly = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        body = self.server.files.get(self.path.lstrip("/"))
        if fault.isdigit() or body is None:
            self.send_error(int(fault) if fault.isdigit() else 404)
            return
        if fault == "slow":
            self.server.slowly.wait(5)
        if fault == "html":
            body = b"<!DOCTYPE html><title>Log in</title>"
        start = 0
        match = re.match(r"bytes=(\d+)-$", wanted or "")
        if match and self.server.ranges and fault != "html":
            start = int(match[1])
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            first = start + (3 if fault == "shifted" else 0)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        rest = body[start:]
        if self.server.lengths:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: int(fault[4:])] if fault.startswith("cut:") else rest)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.slowly.set()
        server.shutdown()
        server.server_close()
        thread.join()
