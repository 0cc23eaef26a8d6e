"""One server for all tests, on a free port of this machine, with the embedded weights."""

import contextlib
import http.client
import json
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from tinyvit.serve import ServeSettings, create_app
from tinyvit.serve.deadline import DeadlineProtocol
from tinyvit.serve.server import listen

IMAGES = Path(__file__).parents[2] / "examples" / "pictures"


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)


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
            return Answer(answer.status, answer.headers, answer.read())

    def upload(self, name="chelsea.png"):
        answer = self("POST", "/v1/images", (IMAGES / name).read_bytes())
        assert answer.status in (200, 201), answer.body
        return answer.json["id"]


@contextlib.contextmanager
def running(settings, segmenter=None):
    """A server of its own; gives (client, service)."""
    own = listen(settings)
    guard = create_app(settings, segmenter)
    protocol = type("Protocol", (DeadlineProtocol,), {"receive_seconds": settings.receive_seconds})
    config = uvicorn.Config(
        guard, http=protocol, loop="asyncio", log_config=None, access_log=False,
        proxy_headers=False, timeout_graceful_shutdown=2, h11_max_incomplete_event_size=16 * 1024,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
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
