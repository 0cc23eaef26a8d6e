from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints.server import Server, serving
from tinyvit.checkpoints.download import Patience, transfer
from tinyvit.errors import DownloadError

BODY = bytes(range(256)) * 4096  # 1 MiB, several chunks
QUICK = Patience(attempts=3, first_wait=0.0, timeout=5.0)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.files["weights.pt"] = BODY
        yield server


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "weights.pt.part"


def bring(server: Server, part: Path, patience: Patience = QUICK) -> bytes:
    transfer(server.url("weights.pt"), part, patience=patience)
    return part.read_bytes()


# --- whole files ----------------------------------------------------------------------------------


def test_progress_counts_the_whole_file(server: Server, part: Path) -> None:
    part.write_bytes(BODY[:300_000])
    seen: list[tuple[int, int | None]] = []
    transfer(server.url("weights.pt"), part, lambda done, total: seen.append((done, total)))
    assert part.read_bytes() == BODY
    assert server.requests == [("/weights.pt", "bytes=300000-")]
    assert seen[0][0] > 300_000
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (len(BODY), len(BODY))
    assert {total for _, total in seen} == {len(BODY)}


def test_a_server_that_tells_no_length(server: Server, part: Path) -> None:
    server.lengths = False
    seen: list[tuple[int, int | None]] = []
    transfer(server.url("weights.pt"), part, lambda done, total: seen.append((done, total)))
    assert part.read_bytes() == BODY
    assert seen[-1] == (len(BODY), None)
    assert {total for _, total in seen} == {None}


def test_an_empty_file(server: Server, part: Path) -> None:
    server.files["weights.pt"] = b""
    assert bring(server, part) == b""


# --- continued ------------------------------------------------------------------------------------


def test_a_broken_transfer_is_continued(server: Server, part: Path) -> None:
    server.faults = ["cut:300000", "cut:200000"]
    assert bring(server, part) == BODY
    assert [wanted for _, wanted in server.requests] == [None, "bytes=300000-", "bytes=500000-"]


def test_a_try_that_brings_bytes_does_not_count(server: Server, part: Path) -> None:
    server.faults = ["cut:1000"] * 4
    assert bring(server, part, replace(QUICK, attempts=1)) == BODY
    assert len(server.requests) == 5


def test_what_came_stays_for_the_next_call(server: Server, part: Path) -> None:
    server.faults = ["cut:300000", "500", "500", "500"]
    with pytest.raises(DownloadError, match=r"HTTP 500, .*, 3 times in a row"):
        bring(server, part)
    assert part.read_bytes() == BODY[:300_000]
    assert bring(server, part) == BODY
    assert server.requests[-1] == ("/weights.pt", "bytes=300000-")


def test_a_server_without_ranges_starts_again(server: Server, part: Path) -> None:
    server.ranges = False
    server.faults = ["cut:300000"]
    assert bring(server, part) == BODY
    assert server.requests[-1] == ("/weights.pt", "bytes=300000-")


def test_a_part_longer_than_the_file_is_thrown_away(server: Server, part: Path) -> None:
    part.write_bytes(BODY + b"more")
    assert bring(server, part) == BODY
    assert [wanted for _, wanted in server.requests] == [f"bytes={len(BODY) + 4}-", None]


def test_a_server_that_continues_at_the_wrong_place(server: Server, part: Path) -> None:
    part.write_bytes(BODY[:300_000])
    server.faults = ["shifted"]
    assert bring(server, part) == BODY
    server.faults = ["shifted"] * 3
    part.write_bytes(BODY[:300_000])
    with pytest.raises(DownloadError, match="continued at the wrong place, 3 times in a row"):
        bring(server, part)
    assert part.read_bytes() == BODY[:300_000]


# --- errors ---------------------------------------------------------------------------------------


def test_errors_that_pass(server: Server, part: Path) -> None:
    server.faults = ["500", "429"]
    assert bring(server, part) == BODY


def test_waits_double(server: Server, part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.faults = ["429"] * 4
    with pytest.raises(DownloadError, match="HTTP 429, too many requests, 4 times in a row"):
        bring(server, part, Patience())
    assert waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "HTTP 401, the server wants a login"),
        ("403", "HTTP 403, the server refuses it"),
        ("404", "HTTP 404, there is no such file"),
        ("410", "HTTP 410, the file was withdrawn"),
        ("418", "HTTP 418, "),
    ],
)
def test_errors_that_stay(server: Server, part: Path, fault: str, words: str) -> None:
    server.faults = [fault]
    with pytest.raises(DownloadError) as caught:
        bring(server, part)
    told = f"{server.url('weights.pt')} could not be fetched: {words}"
    assert str(caught.value).startswith(told)
    assert len(server.requests) == 1
    assert not part.exists()


def test_no_server_at_all(part: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match=r"the connection failed \(.*refused.*3 times in a row"):
        transfer(f"http://127.0.0.1:{port}/weights.pt", part, patience=QUICK)


def test_a_server_that_falls_silent(server: Server, part: Path) -> None:
    server.faults = ["slow"]
    assert bring(server, part, replace(QUICK, timeout=0.2)) == BODY
    assert len(server.requests) == 2


def test_a_web_page_instead_of_the_file(server: Server, part: Path) -> None:
    server.faults = ["html"]
    with pytest.raises(DownloadError, match=r"gave a web page instead of a file .*in a browser"):
        bring(server, part)
    assert not part.exists()


@pytest.mark.parametrize("url", ["file:///weights.pt", "ftp://host/weights.pt", "weights.pt"])
def test_only_http(part: Path, url: str) -> None:
    with pytest.raises(DownloadError, match=f"^{url} is no http or https address; mirrors and"):
        transfer(url, part)
    assert not part.exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, rf"no space left in .*: {len(BODY)} bytes are needed; free some, or set"),
        (errno.EIO, r"cannot be written \(.*\); set TINYVIT_CACHE to another folder"),
    ],
)
def test_a_disk_that_fails(
    server: Server, part: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DownloadError, match=words):
        bring(server, part)
    assert len(server.requests) == 1
    assert not part.exists()


@pytest.mark.parametrize("url", ["http://[bad", "http://127.0.0.1:port/file"])
def test_addresses_that_are_none(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="is no usable address: "):
        transfer(url, tmp_path / "part")
