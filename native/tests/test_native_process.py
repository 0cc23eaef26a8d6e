"""Threads, forks, memory: what a library does to the process that it lives in."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
from native_models import native
from test_native_encoder import image, small

IMAGE = image(1, 3, 96, 96).numpy()


def test_nets_and_calls_in_many_threads():
    one, two = native(small(), threads=2), native(small(neck_dim=40), threads=2)
    wanted = [one.encode(IMAGE), two.encode(IMAGE)]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not np.array_equal((one, two)[i % 2].encode(IMAGE), wanted[i % 2]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
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


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_out_of_memory_is_an_error_and_no_end():
    script = OUT_OF_MEMORY.replace("IMAGE_OF, small", "image, small").replace(
        "IMAGE_OF", "image(1, 3, 96, 96).numpy()"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    subprocess.run(
        [sys.executable, "-c", "import conftest\n" + script],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
