from __future__ import annotations

import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints.server import Server, serving
from tinyvit.catalog import CHECKPOINTS, Checkpoint, get_checkpoint
from tinyvit.checkpoints.download import (
    Patience,
    cache_folder,
    cached_path,
    fetch,
    locked,
    transfer,
)
from tinyvit.errors import CheckpointError, DownloadError

BODY = bytes(range(256)) * 4096  # 1 MiB, several chunks
DIGEST = hashlib.sha256(BODY).hexdigest()
QUICK = Patience(attempts=3, first_wait=0.0, timeout=5.0, lock=20.0)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TINYVIT_CACHE", "XDG_CACHE_HOME", "TINYVIT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TINYVIT_MIRROR", "TINYVIT_REQUIRE_SHA256"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == Path.home() / ".cache" / "tinyvit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tinyvit"
    monkeypatch.setenv("TINYVIT_CACHE", "~/weights")
    assert cache_folder() == Path.home() / "weights"
    assert cache_folder(tmp_path / "mine") == tmp_path / "mine"


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.pt.lock"
    second = locked(path, patience=0)
    with locked(path, patience=0), pytest.raises(DownloadError, match=r"another process .* a\.pt "):
        second.__enter__()
    with locked(path, patience=0):
        pass


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


def row(server: Server, sha256: str | None = DIGEST, *names: str) -> Checkpoint:
    urls = tuple(server.url(name) for name in names or ("weights.pt",))
    return Checkpoint(
        "weights", "tiny_vit_5m_sam", "mobile_sam", "weights.pt", "torch", "MIT", "a page",
        urls=urls, sha256=sha256,
    )  # fmt: skip


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- the ordinary way -----------------------------------------------------------------------------


def test_downloads_once_and_reports_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = fetch(row(server), tmp_path, progress=lambda done, all_: seen.append((done, all_)))
    assert path == tmp_path / "weights.pt" == cached_path(row(server), tmp_path)
    assert path.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert names(tmp_path) == {"weights.pt", "weights.pt.sha256", "weights.pt.lock"}
    assert (tmp_path / "weights.pt.sha256").read_text() == f"{DIGEST}  weights.pt\n"
    assert fetch(row(server), tmp_path) == path
    assert len(server.requests) == 1


def test_by_name_in_the_environments_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path))
    monkeypatch.setenv("TINYVIT_OFFLINE", "1")
    with pytest.raises(DownloadError, match=r"mobile_sam\.pt is not there and TINYVIT_OFFLINE"):
        fetch("mobile_sam")
    with pytest.raises(CheckpointError, match="did you mean 'mobile_sam'"):
        fetch("mobile_sma")
    assert names(tmp_path) == set()


# --- faults of the network ------------------------------------------------------------------------


def test_a_later_call_continues_a_pinned_file(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut:300000", "500", "500", "500"]
    with pytest.raises(DownloadError, match=r"HTTP 500, .*, 3 times in a row"):
        fetch(row(server), tmp_path, patience=QUICK)
    assert names(tmp_path) == {"weights.pt.part", "weights.pt.lock"}
    assert fetch(row(server), tmp_path, patience=QUICK).read_bytes() == BODY
    assert server.requests[-1][1] == "bytes=300000-"


def test_an_unpinned_file_is_begun_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pt.part").write_bytes(b"of another file")
    with pytest.warns(UserWarning, match="nobody states a sha256"):
        path = fetch(row(server, None), tmp_path, patience=QUICK)
    assert path.read_bytes() == BODY
    assert server.requests == [("/weights.pt", None)]


def test_a_part_of_other_bytes_is_found_out(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pt.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match=rf"sha256 [0-9a-f]{{64}}, wanted {DIGEST}; it was"):
        fetch(row(server), tmp_path, patience=QUICK)
    assert fetch(row(server), tmp_path, patience=QUICK).read_bytes() == BODY


def test_several_addresses_are_tried_in_order(server: Server, tmp_path: Path) -> None:
    server.files["wrong.pt"] = b"something else"
    several = row(server, DIGEST, "gone.pt", "wrong.pt", "weights.pt")
    assert fetch(several, tmp_path, patience=QUICK).read_bytes() == BODY
    assert [path for path, _ in server.requests] == ["/gone.pt", "/wrong.pt", "/weights.pt"]


def test_a_name_that_cannot_be_resolved_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network each address took four tries with waits between them."""
    asked: list[object] = []

    def no_network(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("no_proxy", "*")
    urls = ("http://one.invalid/a.pt", "http://two.invalid/a.pt")
    several = replace(get_checkpoint("mobile_sam"), urls=urls, file="a.pt", embedded=False)
    with pytest.raises(DownloadError) as caught:
        fetch(several, tmp_path)
    assert asked == ["one.invalid", "two.invalid"]
    assert str(caught.value).splitlines()[1:3] == [
        "  http://one.invalid/a.pt: no address for one.invalid (Name or service not known)",
        "  http://two.invalid/a.pt: no address for two.invalid (Name or service not known)",
    ]


def test_every_reason_is_told(server: Server, tmp_path: Path) -> None:
    server.files["wrong.pt"] = b"something else"
    several = row(server, DIGEST, "gone.pt", "wrong.pt")
    with pytest.raises(
        DownloadError, match=r"(?s)no such file\n .*wrong\.pt gave a file with sha256"
    ) as told:
        fetch(several, tmp_path, patience=QUICK)
    assert str(told.value).endswith(f"by hand to {tmp_path / 'weights.pt'}, or set TINYVIT_MIRROR")
    assert names(tmp_path) == {"weights.pt.lock"}


# --- hashes ---------------------------------------------------------------------------------------


def test_trust_on_first_use(server: Server, tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        fetch(row(server, None), tmp_path)
    assert caught[0].filename == __file__
    assert DIGEST in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch(row(server, None), tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"changed")
    assert fetch(row(server, None), tmp_path).read_bytes() == BODY
    server.files["weights.pt"] = b"the publisher changed it"
    (tmp_path / "weights.pt").unlink()
    with pytest.raises(DownloadError, match=r"recorded in weights\.pt\.sha256; remove that to"):
        fetch(row(server, None), tmp_path, patience=QUICK)


def test_a_file_put_there_by_hand(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"by hand")
    with pytest.warns(UserWarning, match="recorded beside the file"):
        assert fetch(row(server, None), tmp_path).read_bytes() == b"by hand"
    assert fetch(row(server, DIGEST), tmp_path).read_bytes() == BODY


def test_the_callers_hash_counts_first(server: Server, tmp_path: Path) -> None:
    assert fetch(row(server, None), tmp_path, sha256=DIGEST.upper()).read_bytes() == BODY
    with pytest.raises(DownloadError, match=f"wanted {'0' * 64}; it was removed"):
        fetch(row(server), tmp_path, sha256="0" * 64, patience=QUICK)
    with pytest.raises(ValueError, match="must be 64 hexadecimal digits, got 'abc'"):
        fetch(row(server), tmp_path, sha256="abc")


def test_strict_mode(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYVIT_REQUIRE_SHA256", "1")
    with pytest.raises(DownloadError, match="nobody states a sha256 for 'weights'"):
        fetch(row(server, None), tmp_path)
    assert not server.requests
    assert fetch(row(server, None), tmp_path, sha256=DIGEST).exists()


# --- the environment ------------------------------------------------------------------------------


def test_mirror(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["mirror/weights.pt"] = BODY
    monkeypatch.setenv("TINYVIT_MIRROR", server.url("mirror/"))
    fetch(replace(row(server), urls=()), tmp_path)
    assert server.requests == [("/mirror/weights.pt", None)]


@pytest.mark.parametrize("switch", ["TINYVIT_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv(switch, "1")
    with pytest.raises(DownloadError, match=r"put the file there by hand from http://.*, or go"):
        fetch(row(server), tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"broken")
    with pytest.raises(DownloadError, match="has another hash than it must have"):
        fetch(row(server), tmp_path)
    (tmp_path / "weights.pt").write_bytes(BODY)
    assert fetch(row(server), tmp_path).exists()
    assert not server.requests


def test_no_address(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"no address to download from\. Published on Google"):
        fetch("lite_medsam", tmp_path)


def test_a_cache_that_is_no_folder(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be used as a cache"):
        fetch(row(server), tmp_path / "file")


# --- two at once ----------------------------------------------------------------------------------


def test_many_threads_one_download(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut:300000"]
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch(row(server), tmp_path, patience=QUICK)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == BODY for path in paths] == [True] * 5
    assert len(server.requests) == 2


def test_two_processes_one_download(server: Server, tmp_path: Path) -> None:
    code = (
        "import sys; from dataclasses import replace\n"
        "from tinyvit.catalog import get_checkpoint\n"
        "from tinyvit.checkpoints.download import fetch\n"
        "row = replace(get_checkpoint('mobile_sam'), file='weights.pt', urls=(sys.argv[1],), "
        "sha256=sys.argv[2])\n"
        "fetch(row, sys.argv[3])\n"
    )
    command = [sys.executable, "-c", code, server.url("weights.pt"), DIGEST, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "weights.pt").read_bytes() == BODY
    assert len(server.requests) == 1


# --- inside the package ---------------------------------------------------------------------------


def test_embedded() -> None:
    empty = hashlib.sha256(b"").hexdigest()
    inside = replace(get_checkpoint("tinyvit_sam_2m"), file="../py.typed", sha256=empty)
    assert fetch(inside).name == "py.typed"
    with pytest.raises(DownloadError, match="was changed: its sha256 is"):
        fetch(inside, sha256=DIGEST)
    with pytest.raises(DownloadError, match="is not in this installation"):
        fetch(replace(inside, file="nothing"))


def test_the_embedded_file_is_the_catalogs() -> None:
    row = next(row for row in CHECKPOINTS if row.embedded)
    path = Path(sys.modules["tinyvit.catalog"].__file__ or "").parent / "weights" / row.file
    if not path.exists():
        pytest.skip("the weights are not in this tree")
    assert fetch(row) == path
