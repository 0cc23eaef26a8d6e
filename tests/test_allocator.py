from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest

from tinyvit import allocator

FAULTS = """
import resource
import numpy as np
import tinyvit

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(64 << 17)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
print(tinyvit.tune_allocator(), tinyvit.tune_allocator())
faults()  # the memory has to be had once
print(before, faults())
import sys
assert "torch" not in sys.modules
"""


def is_glibc() -> bool:
    return sys.platform.startswith("linux") and not allocator._reason_against()


@pytest.mark.skipif(not is_glibc(), reason="for Linux with glibc's own allocator")
def test_large_blocks_are_kept_and_no_torch_is_loaded() -> None:
    # numpy may ask for pages of 2 MB: then a block of 64 MB costs 32 faults and not 16,000
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FAULTS],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers, counts = done.stdout.splitlines()
    assert answers == "True True"
    before, after = (int(count) for count in counts.split())
    assert before > 200
    assert after < before / 10


class Libc:
    """A C library: which symbols it has, and what mallopt answers to each parameter."""

    def __init__(self, *symbols: str, answers: dict[int, int] | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        for symbol in symbols:
            setattr(self, symbol, None)
        if answers is not None:
            self.answers = answers
            self.gnu_get_libc_version = None
            self.mallopt = self._mallopt

    def _mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return self.answers.get(parameter, 1)


def use(monkeypatch: pytest.MonkeyPatch, libc: Libc, platform: str = "linux") -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(allocator, "_loaded_libraries", lambda: libc)


@pytest.mark.parametrize(
    ("libc", "platform", "words"),
    [
        (Libc(), "darwin", "it is for Linux with glibc, and this is darwin"),
        (Libc(), "win32", "it is for Linux with glibc, and this is win32"),
        (Libc("malloc"), "linux", "the C library here is not glibc"),
        (Libc("mallctl", answers={}), "linux", "jemalloc stands in for glibc's allocator"),
        (
            Libc("MallocExtension_GetNumericProperty", answers={}),
            "linux",
            "tcmalloc stands in for glibc's allocator",
        ),
        (Libc("mi_malloc", answers={}), "linux", "mimalloc stands in for glibc's allocator"),
    ],
)
def test_elsewhere_it_does_nothing_and_says_why(
    libc: Libc,
    platform: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(monkeypatch, libc, platform)
    assert allocator.tune_allocator() is False
    assert caplog.messages == [f"tune_allocator changed nothing: {words}"]
    assert libc.calls == []


@pytest.mark.parametrize(
    ("answers", "calls", "wanted"),
    [
        ({}, [(-3, 1 << 30), (-1, 1 << 30)], True),
        ({-3: 0}, [(-3, 1 << 30), (-4, 0), (-1, 1 << 30)], True),
        ({-3: 0, -4: 0}, [(-3, 1 << 30), (-4, 0), (-1, 1 << 30)], False),
        ({-1: 0}, [(-3, 1 << 30), (-1, 1 << 30)], False),
    ],
)
def test_what_glibc_is_told(
    answers: dict[int, int],
    calls: list[Any],
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    libc = Libc(answers=answers)
    use(monkeypatch, libc)
    with caplog.at_level(logging.INFO, "tinyvit"):
        assert allocator.tune_allocator() is wanted
    assert libc.calls == calls
    assert len(caplog.messages) == 1
    assert ("keeps freed blocks of up to 1024 MB" in caplog.text) is wanted
    assert ("this glibc refuses the settings" in caplog.text) is not wanted
