"""Threads, forks, memory: what a library does to the process that it lives in."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from native_models import native
from test_native_decoder import GRID, features, heads, some
from test_native_decoder import native as decoder_of
from test_native_encoder import image, small
from tinyvit_native import Placement

IMAGE = image(1, 3, 96, 96).numpy()


def in_threads(work: Callable[[int], None]) -> None:
    """Call it in four threads at once, each with a number of its own."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def test_nets_and_calls_in_many_threads():
    one, two = native(small(), threads=2), native(small(neck_dim=40), threads=2)
    wanted = [one.encode(IMAGE), two.encode(IMAGE)]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not np.array_equal((one, two)[i % 2].encode(IMAGE), wanted[i % 2]):
                wrong.append(i)

    in_threads(work)
    assert not wrong


def test_a_net_survives_fork():
    net = native(small(), threads=2)
    wanted = net.encode(IMAGE)
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        same = all(np.array_equal(net.encode(IMAGE), wanted) for _ in range(3))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert np.array_equal(net.encode(IMAGE), wanted)


def test_decoders_in_threads_and_after_fork():
    decoders = [decoder_of(heads(), threads=2) for _ in range(2)]
    prompts = some("points", GRID)
    prepared = [decoder.prepare(features(GRID)) for decoder in decoders]
    wanted = decoders[0].decode(prepared[0], **prompts)[0]
    wrong = []

    def work(i: int) -> None:
        for _ in range(5):
            if not np.array_equal(decoders[i % 2].decode(prepared[i % 2], **prompts)[0], wanted):
                wrong.append(i)

    in_threads(work)
    assert not wrong
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        work(0)
        os._exit(len(wrong))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _encode_in_child(_: int) -> bytes:
    return native(small(), threads=2).encode(IMAGE).tobytes()


def test_spawned_processes_give_the_same():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_encode_in_child, [0])[0] == _encode_in_child(0)


def test_500_images_do_not_grow_the_process():
    net = native(small(), threads=2)
    for size in (96, 160):
        net.encode(image(1, 3, size, size).numpy())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(500):
        net.encode(IMAGE if i % 2 else IMAGE[:, :, :50])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB
    kept = net.describe()["workspace_bytes"]
    net.trim()
    assert kept > 0 and net.describe()["workspace_bytes"] == 0
    assert np.isfinite(net.encode(IMAGE)).all()


def test_100_images_with_5_prompts_do_not_grow_the_process():
    decoder = decoder_of(heads(), threads=2)
    place = Placement((64, 64), (64, 50), (90, 70))

    def work(count: int) -> None:
        for i in range(count):
            size = (4, 4 + i % 3)
            prepared = decoder.prepare(features(size))
            for kind in ("points", "boxes masks"):
                decoder.decode(prepared, **some(kind, size, 2))
            if size == (4, 4):
                decoder.find(prepared, place, **some("points", size, 1))

    work(6)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB


OUT_OF_MEMORY = """
import resource, sys
import numpy as np
from native_models import native
from test_native_encoder import IMAGE_OF, small
net = native(small(), threads=1)
wanted = net.encode(IMAGE_OF)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
big = np.zeros((1, 3, 1, 1), np.float32)
try:
    net.encode(big, padded=(8192, 8192))
except MemoryError as err:
    assert "out of memory" in str(err)
else:
    sys.exit("no MemoryError")
assert np.array_equal(net.encode(IMAGE_OF), wanted)
"""

OUT_OF_MEMORY_FOR_PROMPTS = """
import resource, sys
import numpy as np
from test_native_decoder import GRID, features, heads, native, some
decoder = native(heads(), threads=1)
prepared, prompts = decoder.prepare(features(GRID)), some("points", GRID)
wanted = decoder.decode(prepared, **prompts)[0]
big = np.zeros((256, 512, 512), np.float32)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
try:
    decoder.prepare(big)
except MemoryError as err:
    assert "out of memory" in str(err)
else:
    sys.exit("no MemoryError")
assert np.array_equal(decoder.decode(prepared, **prompts)[0], wanted)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("script", [OUT_OF_MEMORY, OUT_OF_MEMORY_FOR_PROMPTS])
def test_out_of_memory_is_an_error_and_no_end(script):
    script = script.replace("IMAGE_OF, small", "image, small").replace(
        "IMAGE_OF", "image(1, 3, 96, 96).numpy()"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    subprocess.run(
        [sys.executable, "-c", "import conftest\n" + script],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
