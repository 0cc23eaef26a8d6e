"""One server for all tests, on a free port of this machine, with the embedded weights."""

import contextlib
import http.client
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tinyvit.serve import ServeSettings, create_app, schema
from tinyvit.serve.server import Server, config_of, listen

IMAGES = Path(__file__).parents[2] / "examples" / "pictures"


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)


def check(path, answer):
    """Every answer of the API is what the schema says."""
    if answer.headers.get_content_type() == "application/problem+json":
        schema.ProblemBody.model_validate_json(answer.body or b"{}")
        assert answer.status == answer.json["status"] and answer.status != 500
    elif answer.body and answer.headers.get_content_type() == "application/json":
        tail = path.partition("?")[0].rsplit("/", 1)[-1]
        kinds = {"segment": schema.Segmented, "everything": schema.Everything, "v1": schema.About}
        kind = schema.Image if path.startswith("/v1/images") else None
        kind = kinds.get(tail, kind) if path.startswith("/v1") else None
        if kind is not None:
            kind.model_validate_json(answer.body)


class Client:
    """Asks by ``http.client``: no retries, nothing hidden."""

    def __init__(self, port):
        self.port = port

    def __call__(self, method, path, body=None, kind=None, **headers):
        own = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if kind is None and body is not None:
            kind = "image/jpeg"
        if isinstance(body, (dict, list)):
            body, kind = json.dumps(body).encode(), "application/json"
        if kind:
            headers["Content-Type"] = kind
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(own):
            own.request(method, path, body, headers)
            answer = own.getresponse()
            found = Answer(answer.status, answer.headers, answer.read())
        check(path, found)
        return found

    def upload(self, name="chelsea.png"):
        answer = self("POST", "/v1/images", (IMAGES / name).read_bytes())
        assert answer.status in (200, 201), answer.body
        return answer.json["id"]


@contextlib.contextmanager
def running(settings, segmenter=None):
    """A server of its own; gives (client, service)."""
    own = listen(settings)
    guard = create_app(settings, segmenter)
    server = Server(config_of(guard, settings), guard.service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while guard.service.state != "ready":
        assert time.monotonic() < deadline and guard.service.failure is None, guard.service.failure
        time.sleep(0.01)
    try:
        yield Client(own.getsockname()[1]), guard.service
    finally:
        server.should_exit = True
        thread.join(20)
        own.close()


@pytest.fixture(scope="session")
def segmenter():
    from tinyvit import Segmenter

    return Segmenter()


@pytest.fixture(scope="session")
def server(segmenter):
    settings = ServeSettings(port=0, adapters=("label-studio", "x-anylabeling"))
    with running(settings, segmenter) as (client, service):
        client.service = service
        yield client


@pytest.fixture(scope="session")
def serving():
    """``with serving(settings, segmenter=None) as (client, service)``: a server of one's own."""
    return running


@pytest.fixture(scope="session")
def images():
    """The folder of the example images."""
    return IMAGES


def read_brush(values, size):
    """The mask [H, W] bool of a ``brushlabels`` result, read as the format's description says."""
    bits = "".join(f"{value:08b}" for value in values)
    at = 0

    def read(count: int) -> int:
        nonlocal at
        if at + count > len(bits):
            raise ValueError("the brush ends too early")
        at += count
        return int(bits[at - count : at], 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    if total != 4 * size[0] * size[1]:
        raise ValueError(f"the brush has {total} values, wanted {4 * size[0] * size[1]}")
    out, done = np.empty(total, np.uint8), 0
    while done < total:
        is_run, length = read(1), 0
        length = read(sizes[read(2)]) + 1
        if is_run:
            out[done : done + length] = read(word)
        else:
            for place in range(done, done + length):
                out[place] = read(word)
        done += length
    return out.reshape(*size, 4)[..., 3] > 127
