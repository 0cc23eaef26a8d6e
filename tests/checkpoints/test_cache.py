from __future__ import annotations

from pathlib import Path

import pytest

from tinyvit.checkpoints.download import cache_folder, is_offline, is_strict, locked, mirror
from tinyvit.errors import DownloadError


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TINYVIT_CACHE", "XDG_CACHE_HOME", "TINYVIT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TINYVIT_MIRROR", "TINYVIT_REQUIRE_SHA256"):
        monkeypatch.delenv(name, raising=False)


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == Path.home() / ".cache" / "tinyvit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tinyvit"
    monkeypatch.setenv("TINYVIT_CACHE", "~/weights")
    assert cache_folder() == Path.home() / "weights"
    assert cache_folder(tmp_path / "mine") == tmp_path / "mine"


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_offline()
    assert not is_strict()
    assert mirror() is None
    monkeypatch.setenv("TINYVIT_OFFLINE", "0")
    assert not is_offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "True")
    monkeypatch.setenv("TINYVIT_REQUIRE_SHA256", "1")
    monkeypatch.setenv("TINYVIT_MIRROR", "https://mirror/weights/")
    assert is_offline()
    assert is_strict()
    assert mirror() == "https://mirror/weights"


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.pt.lock"
    second = locked(path, patience=0)
    with locked(path, patience=0), pytest.raises(DownloadError, match=r"another process .* a\.pt "):
        second.__enter__()
    with locked(path, patience=0):
        pass
