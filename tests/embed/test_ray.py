"""Actors of Ray: the rows of the plain command, whatever is killed. Ray starts in 10 to 60 s."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tiny
from tinyvit import EmbeddingStore, MissingExtraError, embed_images
from tinyvit.embed import RayWorkers
from tinyvit.embed.actors import PATIENCE, EmbedActor, versions
from tinyvit.embed.attempts import REASON
from tinyvit.embed.verify import verify_store
from tinyvit.errors import CheckpointError

DRIVER = """
import sys, time
sys.path.insert(0, {tests!r})
import tiny
from tinyvit.embed import RayWorkers, actors, embed_images, run

def slow():
    from tinyvit.embed import work

    prepare = work.prepare

    def sleeps(file, spec, **options):
        time.sleep({cost})
        return prepare(file, spec, **options)

    work.prepare = sleeps

if {cost}:
    actors.load_ray().init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={{"worker_process_setup_hook": slow}},
    )
run.COMMIT_SECONDS, actors.PIECE_SECONDS = 0.2, {piece}
report = embed_images(
    sys.argv[1], sys.argv[2], tiny.make_tiny_engine(), dtype="fp32",
    ray=RayWorkers(count=2, cpus=0.5), tell=lambda outcome: print("told", outcome.path, flush=True),
)
print("stored", report.stored, "kept", report.kept, flush=True)
"""


@pytest.fixture
def many(tmp_path):
    for number in range(400):
        tiny.write_image(tmp_path / "photos" / f"{number % 7}/{number}.png", 40, 48, seed=number)
    return tmp_path / "photos"


@pytest.fixture
def ray():
    """Ray on this machine; ends after the test."""
    found = pytest.importorskip("ray")
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    yield found
    found.shutdown()


def rows_of(url):
    return {row.path: row for row in EmbeddingStore.open(url).rows()}


def check_equal(url, plain):
    """Rows of both stores are the same but for their time."""
    ours, theirs = EmbeddingStore.open(url), EmbeddingStore.open(plain)
    assert ours.dataset.count_rows() == theirs.dataset.count_rows() == len(rows_of(url))
    assert rows_of(url).keys() == rows_of(plain).keys()
    for path, row in ours.iterate(raw=True):
        other = theirs.read_rows([path])[path]
        assert (row.sha256, row.size, row.mtime_ns) == (other.sha256, other.size, other.mtime_ns)
        assert row.placement == other.placement
        assert np.allclose(row.features, other.features, atol=1e-5)
        assert np.allclose(row.pooled, other.pooled, atol=1e-5)
    reasons = [{row.path: row.reason for row in one.rows("failed")} for one in (ours, theirs)]
    assert reasons[0] == reasons[1]


def start(photos, url, cost=0.0, piece=0.2):
    """A driver; ``cost`` in seconds makes each image slower."""
    code = DRIVER.format(tests=str(Path(__file__).parents[1]), cost=cost, piece=piece)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(photos), str(url)], stdout=subprocess.PIPE, text=True
    )


def actors_below(pid):
    """Processes of actors at work that descend from this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found = []
    for one in parents:
        above = one
        while above in parents and above != pid:
            above = parents[above]
        try:
            words = Path(f"/proc/{one}/cmdline").read_bytes()
        except OSError:
            continue
        if above == pid and words.startswith(b"ray::EmbedActor.work"):
            found.append(one)
    return found


def finish(photos, url, plain):
    embed_images(photos, plain, tiny.make_tiny_engine(), dtype="fp32")
    check_equal(url, plain)


def told_in(lines):
    return [line.strip()[5:] for line in lines if line.startswith("told ")]


def check_whole(url, told):
    """What was told is there, each row once and as it was written."""
    store = EmbeddingStore.open(url)
    report = verify_store(store)
    assert report.damaged == report.twice == []
    assert set(told) <= {row.path for row in store.rows()}


@pytest.mark.slow  # 50 s on a busy machine
def test_a_killed_actor(many, url, tmp_path):
    pytest.importorskip("ray")
    driver = start(many, url)
    first = driver.stdout.readline()  # something is committed
    for _ in range(200):
        found = actors_below(driver.pid)
        if found:
            os.kill(found[0], signal.SIGKILL)
            break
        time.sleep(0.01)
    else:
        pytest.fail("no actor was seen at work")
    lines = [first.strip(), *driver.communicate()[0].splitlines()]
    assert driver.returncode == 0 and lines[-1] == "stored 400 kept 0"
    told = [line for line in lines if line.startswith("told ")]  # Ray speaks of the death, too
    assert len(told) == len(set(told)) == 400
    finish(many, url, tmp_path / "plain.lance")


@pytest.mark.slow  # 55 s on a busy machine
def test_a_killed_driver(many, url, tmp_path):
    pytest.importorskip("ray")
    driver = start(many, url)
    lines = [driver.stdout.readline().strip()]
    driver.kill()
    lines += driver.communicate()[0].splitlines()
    told = [line[5:] for line in lines if line.startswith("told ")]
    assert told
    stored = len(EmbeddingStore.open(url))
    assert set(told) <= set(EmbeddingStore.open(url)) and stored < 400
    again = start(many, url)
    last = again.communicate()[0].splitlines()[-1]
    assert last == f"stored {400 - stored} kept {stored}"
    finish(many, url, tmp_path / "plain.lance")


@pytest.mark.slow  # 2.5 minutes, 12 on a busy machine; each of 400 images takes 0.3 s
def test_twenty_killed_actors(many, url, tmp_path):
    pytest.importorskip("ray")
    rng, kills, lines = random.Random(1), 0, []
    driver = start(many, url, cost=0.3, piece=1.0)
    reader = threading.Thread(target=lambda: lines.extend(iter(driver.stdout.readline, "")))
    reader.start()
    while kills < 20 and driver.poll() is None:
        before = len(lines)
        while len(lines) < before + 2 and driver.poll() is None:
            time.sleep(0.05)  # work goes on since the last kill
        time.sleep(rng.random() * 2)
        found = actors_below(driver.pid)
        if found:
            os.kill(rng.choice(found), signal.SIGKILL)
            kills += 1
    reader.join()
    driver.stdout.close()
    told = told_in(lines)
    assert driver.wait() == 0 and kills == 20 and len(told) == len(set(told)) == 400
    check_whole(url, told)
    failed = [row.path for row in EmbeddingStore.open(url).rows("failed")]
    assert len(failed) < 20  # an image that was alone with actors as they were killed, twice
    embed_images(many, url, retry_failed=True)
    finish(many, url, tmp_path / "plain.lance")


@pytest.mark.slow  # 3.5 minutes: Ray starts 20 times
def test_twenty_killed_drivers(many, url, tmp_path):
    pytest.importorskip("ray")
    rng, told = random.Random(2), set()
    for _ in range(20):
        driver = start(many, url, cost=0.1)
        lines = [driver.stdout.readline()] if rng.random() < 0.8 else []  # work has begun
        time.sleep(rng.random() * 2)
        driver.kill()
        told.update(told_in([*lines, *driver.communicate()[0].splitlines()]))
        if EmbeddingStore.find(url) is not None:
            check_whole(url, told)
    assert told
    stored = len(EmbeddingStore.open(url))
    last = start(many, url).communicate()[0].splitlines()[-1]
    assert last == f"stored {400 - stored} kept {stored}"
    finish(many, url, tmp_path / "plain.lance")


def crash():
    """Runs in each of Ray's processes: an image that ends the decoder's."""
    from tinyvit.embed import work

    prepare = work.prepare

    def dies(file, spec, **options):
        if file.name.endswith("/1.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return prepare(file, spec, **options)

    work.prepare = dies


@pytest.mark.slow  # 45 s on a busy machine
@pytest.mark.filterwarnings("ignore:lance is not fork-safe", "ignore:.*__warn_on_fork")
def test_an_image_that_ends_actors(ray, photos, url, engine):
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    ray.init(
        address="local", num_cpus=2, include_dashboard=False,
        runtime_env={"worker_process_setup_hook": crash},
    )  # fmt: skip
    (photos / "a" / "broken.png").write_bytes(b"no image")
    report = embed_images(photos, url, engine, ray=RayWorkers(count=2))
    assert report.stored == 5 and report.kept == 0
    reasons = dict(report.failed)
    assert reasons["b/1.png"].endswith(REASON) and "broken.png" in reasons["a/broken.png"]
    assert {row.path for row in EmbeddingStore.open(url).rows("failed")} == reasons.keys()
    assert ray.is_initialized()  # it was not started there


@pytest.mark.slow  # 10 s on a busy machine
def test_more_workers_than_fit(ray, photos, url, engine):
    with pytest.raises(ValueError, match="4096 workers of 1 CPUs and 0 GPUs do not fit on this"):
        embed_images(photos, url, engine, ray=RayWorkers(count=4096))
    assert not ray.is_initialized()


@pytest.mark.slow  # 45 s on a busy machine
def test_the_command(photos, url, tmp_path):
    pytest.importorskip("ray")
    words = [sys.executable, "-m", "tinyvit", "embed", str(photos), "--json", "--dtype", "fp32"]
    more = ["--ray", "local", "--workers", "2", "--cpus-per-worker", "0.5"]
    for wanted in (6, 0):
        found = subprocess.run([*words, "-o", str(url), *more], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["stored"] == wanted
    subprocess.run([*words, "-o", str(tmp_path / "plain.lance")], check=True, capture_output=True)
    check_equal(url, tmp_path / "plain.lance")


# -- without Ray -----------------------------------------------------------------------------------


def test_ray_is_an_extra(photos, url, engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tinyvit\[ray\]'"):
        embed_images(photos, url, engine, ray=RayWorkers())
    assert not url.exists()


def test_workers_that_cannot_be():
    for wrong in ({"count": 0}, {"cpus": 0}, {"gpus": -1}):
        with pytest.raises(ValueError, match="an actor needs more than 0 CPUs"):
            RayWorkers(**wrong)


def test_an_actor_by_itself(photos, url, engine, tmp_path):
    """What it returns, and which nodes it refuses to work on."""
    embed_images(photos / "a", url, engine, dtype="fp32")
    store = EmbeddingStore.open(url)
    task = {
        **{"url": str(url), "storage_options": None, "recipe": store.recipe, "cpus": 1.0},
        **{"versions": versions(), "places": [str(photos)], "max_pixels": None},
        **{"is_exported": False, "engine": {"backend": "torch", "batch_size": 8}},
    }
    from tinyvit.embed.sources import list_sources

    sources, _ = list_sources(str(photos / "b"), str(url))
    fragments, outcomes, nbytes, seconds = EmbedActor(task).work(sources)
    assert [one.state for one in outcomes] == ["stored"] * 3 and len(fragments) == 1
    assert nbytes > 0 and seconds > 0 and len(EmbeddingStore.open(url)) == 3  # nothing committed

    with pytest.raises(CheckpointError, match="does not see '/nowhere'; every node must see"):
        EmbedActor({**task, "places": ["/nowhere"]}).begin()
    other = {**versions(), "tinyvit": "0.0.1"}
    with pytest.raises(CheckpointError, match=r"but the driver has .*0\.0\.1"):
        EmbedActor({**task, "versions": other}).begin()
    embed_images(photos, tmp_path / "other.lance", tiny.make_tiny_engine(seed=1))
    with pytest.raises(CheckpointError, match=r"weights_sha256 is .* in the store and .* here"):
        EmbedActor({**task, "url": str(tmp_path / "other.lance")}).begin()
