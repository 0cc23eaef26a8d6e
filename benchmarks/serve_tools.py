"""What ``benchmarks/serve.py`` measures with: servers to compare with, and clients.

The bare handler is what people write: one route, the image in every request, decoding in the event
loop, the mask as lists. osam's server (``osam[serve]==0.8.1``, in an environment of its own) gets
the same weights, as ``tinyvit export --for osam`` writes them.
"""

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

JSON = {"Content-Type": "application/json"}
BARE = """
import base64, io, sys
import numpy as np, uvicorn
from fastapi import FastAPI
from PIL import Image
from tinyvit import Segmenter
segmenter = Segmenter(sys.argv[2] or None)
app = FastAPI()
@app.get("/healthz")
async def health(): return "ok"
@app.post("/predict")
async def predict(body: dict):
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["image"]))).convert("RGB"))
    for masks in segmenter.segment([image], [[{"points": body["points"]}]]):
        return {"mask": masks.mask(0).tolist(), "score": float(masks.scores[0].max())}
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""
OSAM = """
import hashlib, os, pathlib, shutil, sys
import uvicorn
from osam import apis, types
from osam._models.sam._models import Sam
blobs = pathlib.Path.home() / ".cache/osam/models/blobs"
blobs.mkdir(parents=True, exist_ok=True)
found = {}
for part in ("encoder", "decoder"):
    file = pathlib.Path(sys.argv[2]) / f"{part}.onnx"
    found[part] = hashlib.sha256(file.read_bytes()).hexdigest()
    shutil.copy(file, blobs / f"sha256-{found[part]}")
class TinyViT(Sam):
    name = "tinyvit:latest"
    _blobs = {part: types.Blob(url="", hash=f"sha256:{one}") for part, one in found.items()}
apis.registered_model_types.append(TinyViT)
from osam._server import app
@app.get("/healthz")
async def health(): return "ok"
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""
HEALTH = """
import http.client, sys, time
own = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    own.request("GET", "/healthz")
    assert own.getresponse().read()
    print(1000 * (time.perf_counter() - start))
    time.sleep(0.01)
"""
BASELINE = """
import sys, time
import numpy as np
from tinyvit import Segmenter
image = np.full((64, 64, 3), 128, np.uint8)
for masks in Segmenter(sys.argv[1] or None).segment([image], [[{"points": [[32, 32]]}]]):
    masks.mask(0)
"""


class Asker:
    """One client with a connection and an address of its own."""

    count = 0

    def __init__(self, port: int, patient: bool = True) -> None:
        Asker.count += 1
        self.patient = patient
        self.address = {"X-Forwarded-For": f"10.0.{Asker.count // 250}.{Asker.count % 250}"}
        self.refused, self.statuses = 0, set()
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> bytes:
        """The answer's body; waits as long as a refusal says."""
        while True:
            try:
                self.connection.request(method, path, body, headers | self.address)
                answer = self.connection.getresponse()
                found = answer.read()
            except (ConnectionError, http.client.HTTPException):
                self.connection.close()  # the server has closed it while it was idle: a new one
                continue
            self.statuses.add(answer.status)
            if answer.status not in (429, 503):
                if answer.status >= 400:
                    raise RuntimeError(found.decode())
                return found
            self.refused += 1
            wait = int(answer.headers["Retry-After"]) if self.patient else 0.05
            time.sleep(wait * np.random.uniform(0.8, 1.2))

    def upload(self, data: bytes) -> str:
        """The id of an image that is sent."""
        return str(
            json.loads(self("POST", "/v1/images", data, **{"Content-Type": "image/png"}))["id"]
        )

    def click(self, image_id: str, x: float, y: float) -> bytes:
        """A click, answered by low-res logits."""
        asked = {"prompts": [{"points": [[x, y]]}], "include": ["low_res"]}
        return self("POST", f"/v1/images/{image_id}/segment", json.dumps(asked), **JSON)


@contextmanager
def process(
    argv: Sequence[str], port: int, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, ready."""
    with tempfile.TemporaryFile() as log:
        own = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=log, env=environment)
        own.log = log  # type: ignore[attr-defined]
        try:
            while True:
                with suppress(OSError):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                    connection.request("GET", "/readyz" if "serve" in argv else "/healthz")
                    if connection.getresponse().status == 200:
                        break
                if own.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode()[-2000:])
                time.sleep(0.02)
            yield own
        finally:
            own.send_signal(signal.SIGTERM)
            own.wait(30)


def free_port() -> int:
    """A port nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as own:
        return int(own.getsockname()[1])


def resident(own: subprocess.Popen[bytes]) -> float:
    """MB of a process."""
    pages = int(Path(f"/proc/{own.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def requests_of(asker: Asker) -> float:
    """How many requests a server has answered."""
    rows = asker("GET", "/metrics").decode().splitlines()
    counts = [row for row in rows if row.startswith("tinyvit_requests_total{")]
    return sum(float(row.split()[-1]) for row in counts)


def seconds_of(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def together(count: int, work: Callable[[int], Any]) -> list[float]:
    """Seconds of each of so many threads."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: seconds_of(lambda: work(number)), range(count)))


@contextmanager
def meanwhile(work: Callable[[], Any]) -> Iterator[None]:
    """Does something again and again."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def pixels_of(seed: int) -> Any:
    """An image [300, 450, 3] of blurred spots."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (12, 18, 3), np.uint8))
    return np.array(small.resize((450, 300), Image.Resampling.BICUBIC))


_PIXELS = pixels_of(0).tobytes()


def image_of(seed: int) -> bytes:
    """A PPM that no other seed gives; made in no time, since clients compute on the same cores."""
    return b"P6 450 300 255\n" + seed.to_bytes(3, "little") + _PIXELS[3:]


def png_of(seed: int) -> bytes:
    """A PNG, as people send them."""
    stream = io.BytesIO()
    Image.fromarray(pixels_of(seed)).save(stream, "PNG")
    return stream.getvalue()


def health(port: int, count: int) -> list[float]:
    """Milliseconds that ``/healthz`` takes, asked by a process of its own."""
    argv = [sys.executable, "-c", HEALTH, str(port), str(count)]
    found = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return [float(line) for line in found.split()]


class Sampler:
    """The most memory of a process, looked at ten times a second."""

    def __init__(self, own: subprocess.Popen[bytes]) -> None:
        self.most, self._own, self._stop = 0.0, own, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.1) and self._own.poll() is None:
            self.most = max(self.most, resident(self._own))

    def close(self) -> float:
        """The most MB so far; looks no more."""
        self._stop.set()
        self._thread.join()
        return self.most


def p95(numbers: Sequence[float]) -> float:
    """The 95th percentile."""
    return float(np.percentile(numbers, 95))
