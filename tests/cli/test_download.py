from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from checkpoints.server import serving
from tinyvit.catalog import get_checkpoint
from tinyvit.checkpoints.download import cache_folder

BODY = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A mirror that has one file, of a checkpoint whose hash nobody states."""
    with serving() as server:
        server.files["tinysam_42.3.pth"] = BODY
        monkeypatch.setenv("TINYVIT_MIRROR", server.url("").rstrip("/"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.delenv("TINYVIT_OFFLINE")
        yield server


def test_the_embedded_file_s_path_is_printed(run):
    result = run("download", "tinyvit_starter")
    assert (result.code, result.err) == (0, "")
    assert Path(result.out.removesuffix("\n")).is_file()


def test_fetches_prints_the_path_and_keeps_the_file(run, server):
    path = cache_folder() / "tinysam_42.3.pth"
    result = run("download", "tinysam", "--sha256", DIGEST)
    assert (result.code, result.out) == (0, f"{path}\n")
    assert result.err == (
        "fetching tinysam (Apache-2.0), published at https://github.com/xinghaochen/TinySAM\n"
    )
    assert path.read_bytes() == BODY
    again = run("download", "tinysam", "--sha256", DIGEST)
    assert (again.code, again.out, again.err) == (0, f"{path}\n", "")
    assert len(server.requests) == 1


def test_an_unpinned_file_is_a_warning_of_one_line(run, server):
    result = run("-q", "download", "tinysam")
    assert result.code == 0
    assert result.err.startswith("warning: nobody states a sha256 for tinysam_42.3.pth")
    assert result.err.count("\n") == 1
    assert "give it as --sha256 HASH to pin it" in result.err


def test_json_and_a_folder_of_one_s_own(run, server, tmp_path):
    words = ("--cache-dir", tmp_path / "mine", "--sha256", DIGEST, "--json")
    content = run("download", "tinysam", *words).json
    assert content["path"] == str(tmp_path / "mine" / "tinysam_42.3.pth")
    assert content["bytes"] == len(BODY)
    assert content["sha256"] == DIGEST
    assert content["licence"] == get_checkpoint("tinysam").licence
    assert set(content) == {
        *("name", "path", "bytes", "sha256", "variant", "family", "licence", "source"),
        *("embedded", "note"),
    }


def test_a_wrong_hash_leaves_nothing(run, server):
    result = run("download", "tinysam", "--sha256", "0" * 64)
    assert result.code == 1
    assert "wanted 000" in result.err
    assert result.err.splitlines()[-1].startswith("error: 'tinysam' could not be downloaded")
    assert not (cache_folder() / "tinysam_42.3.pth").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mobile_sm"], "did you mean 'mobile_sam'? List them with 'tinyvit models'"),
        (["mobile_sam", "--sha256", "ab"], "sha256 must be 64 hexadecimal digits"),
        (["mobile_sam"], "TINYVIT_OFFLINE"),
        (["tinyvit_starter", "--sha256", "0" * 64], "was changed"),
    ],
)
def test_errors_are_one_line(run, words, expected):
    result = run("download", *words, "-q")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert expected in result.err
    assert result.err.count("\n") == 1
