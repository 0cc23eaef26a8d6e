"""Processes that die, race, or have no room: what was reported stays, and nothing is wrong."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

import tiny
from tinyvit import CheckpointError, EmbeddingStore, embed_images
from tinyvit.embed import commits, run
from tinyvit.embed.attempts import DEADLY, FOLDER, REASON, Attempts

WRITER = Path(__file__).with_name("writer.py")


def write_many(folder, count, size=20):
    for number in range(count):
        tiny.write_image(folder / f"{number // 10:02}" / f"{number}.png", size, size, seed=number)
    return folder


@pytest.fixture
def many(tmp_path):
    return write_many(tmp_path / "photos", 150)


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(WRITER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def reported(lines):
    """Paths of what a writer told; "" is the end of one that had nothing left to do."""
    told = [line.strip() for line in lines if line and not line.startswith("ready")]
    return [line.split(" ", 1)[1] for line in told]


def check_rows(url, engine, photos, at_least=()):
    """Each row of a store is there once, whole and right; give their number."""
    store = EmbeddingStore.open(url)
    rows = list(store.iterate(raw=True))
    names = [path for path, _ in rows]
    assert len(set(names)) == len(names) == store.dataset.count_rows()
    assert set(at_least) <= set(names)
    encoded = engine.stream([photos / name for name in names], pooled=True)
    for (name, row), wanted in zip(rows, encoded, strict=True):
        error = np.abs(row.features.astype(np.float32) - wanted.features).max()
        assert error < 1e-2, name
        assert np.allclose(row.pooled, wanted.pooled, atol=1e-5), name
    return len(rows)


def kill_often(many, url, engine, kills, upkeep, seed):
    rng, stored = random.Random(seed), set()
    for _ in range(kills):
        writer = start(many, url, 0.02, upkeep)
        lines = [writer.stdout.readline()]
        if rng.random() < 0.7:
            lines.append(writer.stdout.readline())  # work has begun
        time.sleep(rng.random() * 0.4)
        writer.kill()
        lines += writer.communicate()[0].splitlines()
        assert writer.returncode in (0, -signal.SIGKILL)
        stored.update(reported(lines))
        if EmbeddingStore.find(url) is not None:
            check_rows(url, engine, many, stored)
    embed_images(many, url, engine)
    assert check_rows(url, engine, many, stored) == 150
    assert embed_images(many, url, engine).kept == 150


def test_what_was_reported_survives_kills(many, url, engine):
    kill_often(many, url, engine, 3, upkeep=1, seed=1)


@pytest.mark.slow  # 3 and 7 minutes, on a busy machine
@pytest.mark.parametrize("upkeep", [0, 1])
def test_what_was_reported_survives_twenty_kills(many, url, engine, upkeep):
    kill_often(many, url, engine, 20, upkeep, seed=2 + upkeep)


@pytest.mark.parametrize("writers", [2, pytest.param(4, marks=pytest.mark.slow)])  # 4: 60 s
def test_writers_of_the_same_images(many, url, engine, writers):
    started = [start(many, url, 0.02, 1) for _ in range(writers)]
    for one in started:
        one.communicate()
    assert [one.returncode for one in started] == [0] * writers
    assert check_rows(url, engine, many) == 150


@pytest.mark.slow  # 35 and 60 s
@pytest.mark.parametrize("writers", [2, 4])
def test_writers_of_parts(many, url, engine, writers):
    started = [start(many, url, 0.02, 0, number, writers) for number in range(writers)]
    lines = [one.communicate()[0].splitlines() for one in started]
    assert [one.returncode for one in started] == [0] * writers
    counts = Counter(name for told in lines for name in reported(told))
    assert len(counts) == 150 and set(counts.values()) == {1}
    assert check_rows(url, engine, many) == 150


def test_readers_while_rows_are_written_compacted_and_cleaned(many, url, engine, monkeypatch):
    monkeypatch.setattr(run, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(run, "COMMITS_BETWEEN", 1)
    monkeypatch.setattr(commits, "KEPT", timedelta(0))
    stored, faults, reads = [], [], [0]
    is_over = threading.Event()

    def read(seed):
        rng = random.Random(seed)
        try:
            store = EmbeddingStore.open(url)
            while not is_over.is_set():
                names = [rng.choice(stored) for _ in range(3)]
                for name, found in zip(names, store.get_many(names), strict=True):
                    assert found.original_size == (20, 20), name
                sum(1 for _ in store.iterate(part=(0, 4)))
                store.similar(names[0], 2)
                reads[0] += 1
        except BaseException as err:
            faults.append(err)
            raise

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]

    def tell(outcome):
        stored.append(outcome.path)
        if len(stored) == 1:
            for reader in readers:
                reader.start()

    embed_images(many / "00", url, engine, tell=tell)
    for number in range(2):
        for path in (many / "00").iterdir():
            tiny.write_image(path, 20, 20, seed=1000 + number)
        embed_images(many / "00", url, engine)
    is_over.set()
    for reader in readers:
        reader.join()
    assert not faults and reads[0] > 3


def test_a_full_disk(many, url, engine, monkeypatch):
    monkeypatch.setattr(run, "COMMIT_SECONDS", 0.0)
    stored = []

    def tell(outcome):
        stored.append(outcome.path)
        if len(stored) == 20:
            limit(20_000)
            run.COMMIT_SECONDS = 60.0

    def limit(size):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    try:
        with pytest.raises(CheckpointError) as caught:
            embed_images(many, url, engine, tell=tell)
    finally:
        limit(before)
    words = str(caught.value)
    assert f"no room is left for {url}" in words and "File too large" in words
    assert f"{len(stored)} images of this run are stored; make room, and the same command" in words
    assert check_rows(url, engine, many, stored) == len(stored) >= 20
    assert embed_images(many, url, engine).kept == len(stored)
    assert check_rows(url, engine, many) == 150


def test_rows_are_on_the_disk_before_they_are_reported(photos, url, engine, monkeypatch):
    synced, fsync = [], os.fsync

    def noting(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        return fsync(handle)

    EmbeddingStore.create(url, engine)
    monkeypatch.setattr(os, "fsync", noting)
    there = []
    embed_images(photos, url, engine, tell=lambda outcome: there.append(list(synced)))
    folders = [Path(name).parent.name for name in there[0]]
    assert folders.index("data") < folders.index("_versions")
    assert str(url / "data") in there[0] and str(url / "_versions") in there[0]
    version = EmbeddingStore.open(url).dataset.version
    assert version > 0 and any(name.endswith(".manifest") for name in there[0])


# -- images that end the process -------------------------------------------------------------------


def die(attempts):
    """What the death of a process leaves of it: its file, which nobody holds."""
    attempts._file.close()


def test_suspects_of_a_process_that_died(tmp_path):
    first = Attempts(tmp_path).__enter__()
    for name in ("a", "b\n", "c"):
        first.begin(name)
    first.end("a")
    with Attempts(tmp_path) as other:
        assert not other.suspects  # its owner lives
    die(first)
    for deaths in range(DEADLY + 1):
        attempts = Attempts(tmp_path).__enter__()
        assert attempts.suspects == {"b\n": deaths, "c": 0}
        assert attempts.deadly == (["b\n"] if deaths == DEADLY else [])
        attempts.begin("b\n", alone=True)
        attempts.commit()
        die(attempts)
    with Attempts(tmp_path) as attempts:
        attempts.begin("c", alone=True)
        attempts.end("c")
        assert "c" not in attempts.suspects
    assert not list((tmp_path / FOLDER).iterdir())  # an orderly end leaves nothing


def test_without_a_folder_nothing_is_noted():
    with Attempts(None) as attempts:
        attempts.begin("a")
        attempts.commit()
        attempts.end("a")
        assert attempts.deadly == []


def test_a_deadly_image_is_passed_over(many, url, engine):
    embed_images(many / "00", url, engine)
    for _ in range(DEADLY):
        attempts = Attempts(url).__enter__()
        attempts.begin("00.png", alone=True)
        die(attempts)
    tiny.write_image(many / "01" / "00.png", 20, 20, seed=500)
    report = embed_images(many / "01", url, engine)
    assert report.stored == 10
    assert report.failed == [("00.png", f"{str(many / '01' / '00.png')!r}: {REASON}")]
    assert embed_images(many / "01", url, engine, retry_failed=True).stored == 1


@pytest.mark.slow  # 80 s
def test_a_crash_of_the_decoder(many, url, engine):
    for _ in range(1 + DEADLY):
        writer = start(many, url, 60, 0, DEADLY_IMAGE="/77.png")
        writer.communicate()
        assert writer.returncode == -9
    writer = start(many, url, 60, 0, DEADLY_IMAGE="/77.png")
    assert writer.communicate()[0].splitlines()[1] == "failed 07/77.png"
    assert writer.returncode == 0
    assert EmbeddingStore.open(url).get("07/77.png") is None
    assert len(EmbeddingStore.open(url)) == 149
