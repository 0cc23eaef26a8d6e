"""The command as a process: ready line, signals, exit codes, ports, workers that share a folder."""

import asyncio
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import Client
from tinyvit.cli.main import app
from tinyvit.serve import ServeSettings
from tinyvit.serve.server import listen

ROOT = Path(__file__).parents[2]
NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


@contextlib.contextmanager
def command(*words, **environment):
    """``tinyvit serve`` on a free port; gives (process, its ready line)."""
    argv = [sys.executable, "-m", "tinyvit", "serve", "--port", "0", *words]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        yield process, line
    finally:
        process.kill()
        process.communicate()


def client_of(line):
    return Client(int(re.search(r":(\d+)/", line)[1]))


def test_small_answers_are_sent_at_once():
    """Not after the 40 ms that Nagle's algorithm waits for an acknowledgement."""

    async def option():
        loop, own = asyncio.get_running_loop(), listen(ServeSettings(port=0))
        found = loop.create_future()

        class Accepted(asyncio.Protocol):
            def connection_made(self, transport):
                accepted = transport.get_extra_info("socket")
                found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        async with await loop.create_server(Accepted, sock=own):
            with socket.create_connection(own.getsockname()):
                return await found

    assert asyncio.run(option())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_ready_line_and_a_signal(number):
    with command("--threads", "2", "--cache-mb", "64") as (process, line):
        assert re.fullmatch(
            r"serving tinyvit_sam_2m on http://127\.0\.0\.1:\d+/ "
            r"\(2 threads, fp32, 64 MB of embeddings\)\n",
            line,
        )
        client = client_of(line)
        image_id = client.upload()
        process.send_signal(number)
        with contextlib.suppress(OSError):  # it may have ended by now
            after = client("GET", "/readyz")
            assert (after.status, after.json["type"]) == (503, "/problems/draining")
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0
        rows = [json.loads(row) for row in err.splitlines()]
        assert rows[0]["image"] == image_id[:12] and rows[0]["status"] == 201
        assert out == ""


def test_what_runs_is_answered_before_the_end():
    with command() as (process, line):
        client = client_of(line)
        image_id = client.upload("coffee.png")
        own = socket.create_connection(("127.0.0.1", client.port))
        body = b'{"points_per_side": 24}'
        own.sendall(
            f"POST /v1/images/{image_id}/everything HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        own.settimeout(20)
        assert own.recv(100).startswith((b"HTTP/1.1 200", b"HTTP/1.1 503"))
        own.close()
        assert process.wait(20) == 0


def test_a_second_ctrl_c_ends_at_once():
    with command() as (process, line):
        client = client_of(line)
        image_id = client.upload()
        own = socket.create_connection(("127.0.0.1", client.port))
        body = b'{"points_per_side": 64}'
        own.sendall(
            f"POST /v1/images/{image_id}/everything HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        assert time.monotonic() - start < 2
        own.close()


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tinyvit", "serve", *words],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip


def test_a_port_that_is_taken_and_wrong_usage(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("--port", port)
    assert done.returncode == 1
    owner = f"(process {os.getpid()})"
    assert f"error: port {port} of 127.0.0.1 is taken by " in done.stderr and owner in done.stderr
    for words in (["--allow-origin", "*"], ["--adapter", "cvat"], ["--port", "70000"]):
        assert CliRunner().invoke(app, ["serve", *words]).exit_code == 2
    missing = run("--checkpoint", str(tmp_path / "none.safetensors"))
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith("error: ")
    no_token = CliRunner().invoke(app, ["serve", "--token-file", str(tmp_path / "none")])
    assert no_token.exit_code == 1


def test_a_token_is_made_on_other_addresses_and_read_from_files(tmp_path):
    with command("--host", "0.0.0.0") as (_, line):
        token = re.search(r"http://127\.0\.0\.1:\d+/#token=([\w-]{43}) ", line)[1]
        client = client_of(line)
        assert client("GET", "/v1").status == 401
        assert client("GET", "/v1", Authorization=f"Bearer {token}").status == 200
    file = tmp_path / "token.txt"
    file.write_text("a-token-of-mine-12345\n")
    with command("--json", "--token-file", str(file)) as (process, line):
        said = json.loads(line)
        assert said["token"] == "a-token-of-mine-12345" and said["pid"] == process.pid
        assert client_of(said["url"])("GET", "/v1", Token=said["token"]).status == 200


def test_no_token_on_other_addresses_is_warned_of(monkeypatch):
    monkeypatch.delenv("TINYVIT_TOKEN", raising=False)
    told = []
    monkeypatch.setattr("tinyvit.serve.server.run", lambda settings, ready: told.append(settings))
    monkeypatch.setattr("tinyvit.cli.serve._log_to_stderr", lambda: None)
    done = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0", "--no-token"])
    assert done.exit_code == 0 and told[0].no_token and told[0].token is None
    assert "warning: no token is asked for" in done.stderr
    for words in (["--no-token"], ["--host", "0.0.0.0"]):
        done = CliRunner().invoke(app, ["serve", *words])
        assert done.exit_code == 0 and done.stderr == ""


def test_two_workers_share_a_folder_and_outlive_a_kill(tmp_path):
    words = ("--keep", str(tmp_path / "kept"), "--log", "text", "--no-log-clients")
    with command(*words) as (first, one), command(*words) as (second, two):
        asked = {"prompts": [{"points": [[172, 118]]}], "include": ["low_res"]}
        image_id = client_of(one).upload()
        path = f"/v1/images/{image_id}/segment"
        assert client_of(two)("POST", path, asked).status == 200
        first.kill()
        assert client_of(two)("POST", path, asked).status == 200
        second.terminate()
        _, err = second.communicate()
        assert "client=" not in err and f"image={image_id[:12]}" in err
    left = [file.name for file in (tmp_path / "kept").rglob("*") if file.is_file()]
    assert left == [f"{image_id}.safetensors"]


class Proxied(Client):
    """What every client should do: send an image again that is not known."""

    def __init__(self, port):
        super().__init__(port)
        self.sent = 0
        self.context = ssl.create_default_context()
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE

    def __call__(self, method, path, body=None, kind="application/octet-stream"):
        own = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context, timeout=60)
        headers = {"Host": "images.example.org", "Content-Type": kind}
        headers["Origin"] = "https://images.example.org"
        with contextlib.closing(own):
            own.request(method, path, body, headers)
            answer = own.getresponse()
            return answer.status, answer.read()

    def click(self, data):
        path = f"/v1/images/{hashlib.sha256(data).hexdigest()}"
        body = json.dumps({"prompts": [{"points": [[9, 9]]}], "include": ["low_res"]})
        asked = ("POST", f"{path}/segment", body, "application/json")
        status, found = self(*asked)
        if status == 404:
            self.sent += 1
            assert self("PUT", path, data)[0] in (200, 201)
            status, found = self(*asked)
        assert status == 200, found


@pytest.mark.slow  # half a minute alone, five on a busy machine
@pytest.mark.skipif(None in (NGINX, shutil.which("openssl")), reason="no nginx, or no openssl")
def test_nginx_sends_an_image_to_the_worker_that_has_it(tmp_path):
    """The committed configuration with TLS, two workers, and one of them killed."""
    words = ("--trust-proxy", "127.0.0.1", "--allow-host", "images.example.org")
    key, certificate = tmp_path / "own.key", tmp_path / "own.pem"
    names = ["-subj", "/CN=images.example.org", "-keyout", str(key), "-out", str(certificate)]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *names]
    subprocess.run(make, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with command(*words) as (first, one), command(*words) as (_, two):
        text = (ROOT / "deploy" / "nginx.conf").read_text(encoding="utf-8")
        for old, new in (
            ("127.0.0.1:8765", f"127.0.0.1:{client_of(one).port}"),
            ("127.0.0.1:8766", f"127.0.0.1:{client_of(two).port}"),
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("/etc/ssl/images.example.org.pem", str(certificate)),
            ("/etc/ssl/images.example.org.key", str(key)),
        ):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        folders = "".join(
            f"{kind}_temp_path {tmp_path};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        head = f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}"
        file = tmp_path / "nginx.conf"
        file.write_text(f"{head} http {{ access_log off; {folders} {text} }}", encoding="utf-8")
        nginx = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(file)])
        try:
            client, images = Proxied(port), [image_of(seed) for seed in range(30)]
            deadline = time.monotonic() + 20
            while True:
                with contextlib.suppress(OSError):
                    assert client("GET", "/readyz")[0] == 200
                    break
                assert nginx.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            for _ in range(3):
                for data in images:
                    client.click(data)
            assert client.sent == 30  # each once: its clicks found the worker that has it
            knows = [gauge(client_of(line), "tinyvit_cache_images") for line in (one, two)]
            assert sum(knows) == 30 and min(knows) >= 5
            first.kill()
            for data in images:
                client.click(data)
            assert client.sent == 30 + knows[0]
            path = f"/v1/images/{hashlib.sha256(images[0]).hexdigest()}/everything"
            assert client("POST", path, b'{"points_per_side": 4}', "application/json")[0] == 200
            assert client("GET", "/")[0] == 200
        finally:
            nginx.terminate()
            nginx.wait(10)


def image_of(seed):
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (seed, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def gauge(client, name):
    rows = client("GET", "/metrics").body.decode().splitlines()
    return int(float(next(row for row in rows if row.startswith(name + " ")).split()[1]))
