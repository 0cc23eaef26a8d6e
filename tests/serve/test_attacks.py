"""What attackers, broken clients and proxies send; good requests are answered meanwhile."""

import contextlib
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from tinyvit.serve import ServeSettings

CLICK = {"points": [[172, 118]]}
LOCAL = b"HTTP/1.1\r\nHost: 127.0.0.1\r\n"
KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")


def connect(server):
    own = socket.create_connection(("127.0.0.1", server.port))
    own.settimeout(10)
    return own


def everything_from(own):
    """All bytes until the other side hangs up."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := own.recv(65_536):
            found += chunk
    own.close()
    return found


# -- pages of others, tokens ----------------------------------------------------------------------


def test_rebinding_cross_site_forms_and_origins(server):
    wrong = server("GET", "/v1", Host="evil.example")
    assert (wrong.status, wrong.json["type"]) == (421, "/problems/wrong-host")
    assert server("GET", "/healthz", Host="evil.example").status == 421
    assert server("GET", "/healthz", Host="127.0.0.1:1").status == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example"):
        page = server("POST", "/v1/images", b"x", Origin=origin)
        assert (page.status, page.json["type"]) == (403, "/problems/wrong-origin")
    assert server("POST", "/v1/images", b"x", Sec_Fetch_Site="cross-site").status == 403
    assert server("GET", "/v1", Sec_Fetch_Site="cross-site").status == 403
    assert server("GET", "/", Sec_Fetch_Site="cross-site").status == 200
    own = server("GET", "/v1", Origin=f"http://127.0.0.1:{server.port}")
    assert own.status == 200
    assert "access-control-allow-origin" not in own.headers
    headers = server("GET", "/").headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_tokens_and_allowed_origins(serving, segmenter):
    import base64

    token = "t" * 20
    settings = ServeSettings(port=0, token=token, allow_origins=("https://tool.example",))
    with serving(settings, segmenter) as (client, _):
        for path in ("/healthz", "/readyz", "/", "/page/app.js", "/problems/busy"):
            assert client("GET", path).status == 200
        for path in ("/v1", "/metrics", "/v1/openapi.json", "/nothing"):
            missing = client("GET", path)
            assert (missing.status, missing.headers["WWW-Authenticate"]) == (401, "Bearer")
        for wrong in ("Bearer " + "u" * 20, "Bearer", "Basic !!", "Basic ////", "Digest x", "\xff"):
            assert client("GET", "/v1", Authorization=wrong).status == 401
        basic = base64.b64encode(b"anybody:" + token.encode()).decode()
        for right in (f"Bearer {token}", f"Basic {basic}"):
            assert client("GET", "/v1", Authorization=right).status == 200
        assert client("GET", "/v1", Token=token).status == 200
        asked = {"Origin": "https://tool.example", "Access_Control_Request_Method": "POST"}
        allowed = client("OPTIONS", "/v1/images", **asked)
        assert allowed.status == 204
        assert allowed.headers["Access-Control-Allow-Origin"] == "https://tool.example"
        assert allowed.headers.get_all("Cross-Origin-Resource-Policy") == ["cross-origin"]


def test_numbers_and_addresses_of_a_server_that_others_reach(serving, segmenter):
    settings = ServeSettings(port=0, host="0.0.0.0", no_token=True, trust_proxy="127.0.0.1")
    with serving(settings, segmenter) as (client, _):
        assert client("GET", "/metrics").status == 200
        assert client("GET", "/metrics", X_Forwarded_For="1.1.1.1, 203.0.113.9").status == 401
        assert client("GET", "/healthz", Host="127.0.0.1").status == 200
        assert client("GET", "/healthz", Host="203.0.113.9").status == 421


def test_a_proxy_may_leave_its_prefix_in_the_path(serving, segmenter):
    with serving(ServeSettings(port=0, proxy_prefix="/sam"), segmenter) as (client, _):
        for path in ("/sam/", "/", "/sam/v1", "/sam/page/app.js"):
            assert client("GET", path).status == 200


# -- broken HTTP ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, status",
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"POST /v1/images " + LOCAL + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabc", 400),
        (
            b"POST /v1/images "
            + LOCAL
            + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            None,
        ),
        (b"POST /v1/images " + LOCAL + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /healthz " + LOCAL + b"X: " + b"y" * 20_000 + b"\r\n\r\n", 400),
        (b"GET /healthz " + LOCAL + b"Host: evil.example\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00" + b"\r\n\r\n", 400),
        (b"GET /healthz " + LOCAL + b"\r\nrubbish\r\n\r\n", 200),
        (b"GET /healthz " + LOCAL + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 200),
    ],
)
def test_broken_http(server, raw, status):
    own = connect(server)
    own.sendall(raw)
    own.shutdown(socket.SHUT_WR)
    found = everything_from(own)
    assert b" 500 " not in found
    if status is not None:
        assert found.startswith(b"HTTP/1.1 %d" % status)
    if status == 400:
        head, _, body = found.partition(b"\r\n\r\n")
        problem = json.loads(body)
        assert problem["type"] == "/problems/bad-request"
        assert problem["request_id"].encode() in head
    assert server("GET", "/healthz").status == 200


def test_pipelined_requests_are_answered_in_turn(server):
    own = connect(server)
    own.sendall(
        b"GET /healthz " + LOCAL + b"\r\nGET /nothing " + LOCAL + b"Connection: close\r\n\r\n"
    )
    found = everything_from(own)
    assert found.index(b" 200 ") < found.index(b" 404 ")


# -- slow clients ---------------------------------------------------------------------------------


def test_three_hundred_slow_clients_while_others_are_served(serving, segmenter):
    half = b"POST /v1/images " + LOCAL
    body = b"Content-Length: 99999\r\nContent-Type: image/png\r\n\r\nabc"
    with serving(ServeSettings(port=0, receive_seconds=2.0), segmenter) as (client, _):
        own = [connect(client) for _ in range(300)]
        for number, one in enumerate(own):
            if number % 3 == 2:  # a whole request first, so that the connection is kept
                one.sendall(b"GET /healthz " + LOCAL + b"\r\n")
                one.recv(4096)
            one.sendall(half + (body if number % 3 == 1 else b"X: y\r\n"))
        start = time.monotonic()
        assert client("GET", "/healthz").status == 200
        assert client.upload()
        found = [everything_from(one) for one in own]
        assert time.monotonic() - start < 15
        assert sum(b"/problems/too-slow" in one for one in found) == 300
        assert client("GET", "/healthz").status == 200


def test_a_client_that_never_reads_is_hung_up_on(serving, segmenter):
    with serving(ServeSettings(port=0, receive_seconds=1.0), segmenter) as (client, _):
        image_id = client.upload()
        path = f"/v1/images/{image_id}/embedding".encode()
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.connect(("127.0.0.1", client.port))
        own.settimeout(10)
        own.sendall((b"GET " + path + b" " + LOCAL + b"\r\n") * 60)
        time.sleep(2.5)
        assert client("POST", f"/v1/images/{image_id}/segment", {"prompts": [CLICK]}).status == 200
        received = len(everything_from(own))
        assert received < 40 * 2**18  # not all sixty


def test_bodies_of_64_mb(server):
    size = 64 * 2**20
    declared = server("POST", "/v1/images", b"x" * size)
    assert (declared.status, declared.json["type"]) == (413, "/problems/too-large")
    own = connect(server)
    own.sendall(b"POST /v1/images " + LOCAL + b"Transfer-Encoding: chunked\r\n\r\n")
    piece = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    with contextlib.suppress(ConnectionError):
        for _ in range(64):
            own.sendall(piece)
        own.sendall(b"0\r\n\r\n")
    own.shutdown(socket.SHUT_WR)
    assert b" 413 " in everything_from(own)
    json_body = b'{"prompts": [' + b" " * (20 * 2**20)
    path = f"/v1/images/{'0' * 64}/segment"
    assert server("POST", path, json_body, "application/json").status == 413


def test_bodies_together_are_bounded(serving, segmenter):
    with serving(ServeSettings(port=0, max_image_mb=1), segmenter) as (client, service):
        own = [connect(client) for _ in range(16)]
        for one in own:
            one.sendall(b"POST /v1/images " + LOCAL + b"Content-Length: 1048576\r\n\r\nab")
        deadline = time.monotonic() + 5
        while service.bodies.free:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        full = client("POST", "/v1/images", b"x")
        assert (full.status, full.json["type"]) == (503, "/problems/busy")
        assert full.headers["Retry-After"] == "1"
        for one in own:
            one.close()
        while service.bodies.free < 16 * 2**20:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert client.upload("rocket.jpg")


def test_hundreds_of_clients_that_hang_up(serving, segmenter, caplog):
    caplog.set_level("INFO", "tinyvit.serve")
    with serving(ServeSettings(port=0), segmenter) as (client, service):
        image_id = client.upload()
        body = json.dumps({"prompts": [CLICK]}).encode()
        head = f"POST /v1/images/{image_id}/segment ".encode() + LOCAL
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        for number in range(500):
            with contextlib.closing(connect(client)) as own:
                own.sendall(head + body[: None if number % 2 else 5])
        deadline = time.monotonic() + 20
        while len(service.decode_lane.queue) or service.decode_lane.queue.running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert client("GET", "/healthz").status == 200
        time.sleep(0.3)
    assert max(len(record.getMessage()) for record in caplog.records) <= 300
    assert not [record for record in caplog.records if record.exc_info]


# -- images ---------------------------------------------------------------------------------------


def start_of_png(width, height):
    """The first bytes of a PNG of zeros, which tell its size."""

    def chunk(name, data):
        checked = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checked)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    first_rows = zlib.compress(bytes(16 * (1 + 3 * width)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", first_rows)[:4096]


BOMBS = """
import io, resource, sys
import numpy as np
from PIL import Image
from tinyvit import Segmenter
from tinyvit.serve import ServeSettings
from tinyvit.serve.problems import Problem
from tinyvit.serve.service import Service
import asyncio

service = Service(ServeSettings())
service.load()
rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 1_300_000_000,) * 2)

async def main():
    for kind in sys.argv[1:]:
        data = open(kind, "rb").read()
        try:
            stored = await service.encode(data, "a")
            print(kind.rsplit("/")[-1], "encoded", stored.embedding.original_size)
        except Problem as problem:
            print(kind.rsplit("/")[-1], problem.name)

asyncio.run(main())
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - rest)
"""


def test_bombs_of_seven_kinds_within_bounded_memory(tmp_path):
    files = []
    fast = {"lossless": True, "method": 0, "quality": 0}
    options = {"TIFF": {"compression": "tiff_deflate"}, "WEBP": fast}
    for kind in KINDS:
        file = tmp_path / f"bomb.{kind.lower()}"
        flat = Image.new("P" if kind == "GIF" else "RGB", (7000, 7000))
        flat.save(file, kind, **options.get(kind, {}))
        files.append(file)
    over = tmp_path / "over.png"
    over.write_bytes(start_of_png(60_000, 60_000))
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, *map(str, [*files, over])],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines[:7]] == ["encoded"] * 7, done.stdout
    assert lines[7] == "over.png too-many-pixels"
    assert int(lines[8].split()[1]) < 1_300_000_000


def small_images():
    found = {}
    pixels = np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)
    for kind in KINDS:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        found[kind] = stream.getvalue()
    return found


def mutated(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 8)):
        kind = rng.randrange(3)
        place = rng.randrange(len(data))
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 200)]
        else:
            data[place:place] = rng.randbytes(rng.randrange(1, 50))
        if not data:
            return b""
    return bytes(data)


ODD = (
    *("{}", "[]", "null", "1", '"x"', '{"prompts": 5}', '{"prompts": [' + "[" * 100_000),
    '{"prompts": [{"points": [[' + "9" * 5000 + ",1]]}]}",
    '{"prompts": [{"points": [[1e400, 1]]}]}',
    '{"prompts": [{"points": [[NaN, 1]]}]}',
    '{"prompts": [{"name": "\\ud800", "points": [[1,1]]}]}',
    *('{"\\ud800": 1}', "\ufeff{}", "\udc80"),
)
PATHS = (
    *("/..", "/%2e%2e/%2e%2e", "/v1/images/" + "a" * 3000, "/page/%00", "/v1/images//segment"),
    *("/v1/./x", "/page/..%2fapp.py", "/v1/images/%c3%28", "/?token=" + "x" * 3000),
)
RAW = (
    b"GET /healthz HTTP/1.1\r\n\r\n",
    b"\x00\x01\x02\r\n\r\n",
    b"GET /\xff " + LOCAL + b"\r\n",
    b"POST /v1/images " + LOCAL + b"Content-Length: -1\r\n\r\n",
    b"POST /v1/images " + LOCAL + b"Content-Length: 9" + b"9" * 40 + b"\r\n\r\n",
    b"GET /healthz " + LOCAL + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
)
ADAPTERS = ("/label-studio/predict", "/label-studio/setup", "/x-anylabeling/v1/predict")


def one_wrong_request(server, rng, number, image_id, small):
    """Sends one; gives the answer, or None where there may be none."""
    good = json.dumps({"prompts": [CLICK, {"box": [1, 2, 30, 40]}], "include": ["low_res"]})
    segment, json_ = f"/v1/images/{image_id}/segment", "application/json"
    what = number % 8
    if what == 0:
        return server("POST", segment, mutated(rng, good.encode()), json_)
    if what == 1:
        return server("POST", segment, rng.choice(ODD).encode("utf-8", "surrogatepass"), json_)
    if what == 2:
        return server("POST", "/v1/images", mutated(rng, small[rng.choice(KINDS)]))
    if what == 3:
        methods = ["GET", "PUT", "PATCH", "DELETE", "POST", "OPTIONS", "TRACE", "BREW"]
        return server(rng.choice(methods), rng.choice(PATHS))
    if what == 4:
        kind = rng.choice([json_, "image/png", "text/html", "", "application/json; charset=x"])
        return server("POST", rng.choice(["/v1/images", *ADAPTERS]), rng.randbytes(200), kind)
    if what == 5:
        grid = mutated(rng, b'{"points_per_side": 1}')
        return server("POST", f"/v1/images/{image_id}/everything", grid, json_)
    if what == 6:
        given = rng.choice([b'{"tasks": [{}], "params": {"context": {"result": [1]}}}', b"{}"])
        return server("POST", rng.choice(ADAPTERS), mutated(rng, given), json_)
    own = connect(server)
    own.sendall(rng.choice(RAW))
    own.shutdown(socket.SHUT_WR)
    assert b" 500 " not in everything_from(own)
    return None


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def fuzz(server, count, seed):
    rng, small, image_id = random.Random(seed), small_images(), server.upload()
    for number in range(count):
        if number == count // 2:
            before = resident() - server.service.cache.nbytes
        answer = one_wrong_request(server, rng, number, image_id, small)
        if answer is None:
            continue
        assert answer.status < 500 or answer.status == 503, (number, answer.body[:300])
        if answer.status >= 400 and answer.body:
            assert len(answer.body) < 1500
    assert resident() - server.service.cache.nbytes - before < 30 * 2**20
    assert server("POST", f"/v1/images/{image_id}/segment", {"prompts": [CLICK]}).status == 200


def test_two_thousand_wrong_requests(server):
    fuzz(server, 2000, 1)


@pytest.mark.slow  # ten minutes on two busy cores
def test_ten_thousand_wrong_requests(server):
    fuzz(server, 10_000, 2)


def test_health_is_told_while_everything_is_busy(serving, segmenter):
    with serving(ServeSettings(port=0), segmenter) as (client, _):
        image_id = client.upload()
        stop, spent = threading.Event(), []

        def work():
            rng = np.random.default_rng(threading.get_ident() % 1000)
            while not stop.is_set():
                stream = io.BytesIO()
                pixels = rng.integers(0, 255, (300, 400, 3), np.uint8)
                Image.fromarray(pixels).save(stream, "PNG")
                client("POST", "/v1/images", stream.getvalue())
                client("POST", f"/v1/images/{image_id}/segment", {"prompts": [CLICK]})

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(40):
            start = time.monotonic()
            assert client("GET", "/healthz").status == 200
            spent.append(time.monotonic() - start)
            time.sleep(0.02)
        stop.set()
        for thread in threads:
            thread.join()
        assert max(spent) < 1.0
