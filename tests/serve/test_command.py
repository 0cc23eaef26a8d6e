"""The command as a process: ready line, signals, exit codes, ports, workers that share a folder."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from conftest import Client
from tinyvit.serve import ServeSettings
from tinyvit.serve.server import listen


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
            r"serving tinyvit_starter on http://127\.0\.0\.1:\d+/ "
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
        assert run(*words).returncode == 2
    missing = run("--checkpoint", str(tmp_path / "none.safetensors"))
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith("error: ")
    assert run("--token-file", str(tmp_path / "none")).returncode == 1


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
    with command("--host", "0.0.0.0", "--no-token") as (process, line):
        assert client_of(line)("GET", "/v1").status == 200
        process.terminate()
        assert "warning: no token is asked for" in process.communicate()[1]


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
