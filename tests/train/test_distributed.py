import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tinyvit.train import TrainSettings, train
from tinyvit.train.optim import Processes, _own_device, join_processes
from tinyvit.train.run_folder import read_state

from .toy_task import ToyTask, make_model, numbers

PROGRAM = Path(__file__).with_name("toy_task.py")


def test_one_process_is_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    layer = nn.Linear(1, 1)
    with join_processes("cpu") as processes:
        assert (processes.rank, processes.count, processes.is_first) == (0, 1, True)
        assert processes.share(layer) is layer
        assert processes.sum(torch.tensor(3.0)) == 3
        processes.wait()
    assert not torch.distributed.is_initialized()


def test_each_process_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert _own_device("cuda", 1) == torch.device("cuda:1")
    assert chosen == [1]
    assert _own_device("cpu", 5) == torch.device("cpu")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: there are 2"):
        _own_device("cuda", 2)
    assert not Processes(rank=1, count=2).is_first


def start(rank, count, port, folder, *pairs):
    """A process as ``torchrun`` starts it."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(PROGRAM), str(folder), *pairs],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_are_one_with_the_same_batch(tmp_path):
    """22 samples by 8: the last step of an epoch has 6, split 2, 2, 1, 1 and 3, 3."""
    pairs = ["steps=4", "accumulate=2", "learning_rate=0.003", "ema_decay=0.9", "log_every=1"]
    port = free_port()
    running = [start(rank, 2, port, tmp_path / "two", *pairs, "is_double=1") for rank in range(2)]
    one = TrainSettings(
        folder=str(tmp_path / "one"),
        steps=4,
        learning_rate=0.003,
        ema_decay=0.9,
        log_every=1,
        device="cpu",
        tensorboard=False,
    )
    train(ToyTask(make_model(), is_double=True), one)
    told = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert told[0][0].splitlines()[-1] == "done 4"
    assert told[1][0] == ""  # the second process tells nobody
    mine = read_state(tmp_path / "one").tensors
    both = read_state(tmp_path / "two").tensors
    assert set(mine) == set(both)
    for key, value in mine.items():
        # float64, so that AdamW does not blow up rounding where a gradient is 0 but for it
        # (biases before a softmax); the sums of a batch are taken in another order: 1e-16 each,
        # divided by gradients down to AdamW's 1e-8
        torch.testing.assert_close(both[key], value, rtol=1e-7, atol=1e-9, msg=key)
    losses = [[line["loss"] for line in numbers(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the log's losses are float32
