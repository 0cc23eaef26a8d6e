"""A run killed at any moment, in a process of its own, resumes and ends the same bit for bit."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinyvit.train import TrainSettings, train
from tinyvit.train.run_folder import read_state

from .toy_task import ToyTask, make_model, numbers

PROGRAM = Path(__file__).with_name("toy_task.py")
STEPS = 8
CHOICES = {
    "steps": STEPS,
    "batch_size": 8,
    "accumulate": 2,
    "learning_rate": 0.003,
    "ema_decay": 0.9,
    "log_every": 2,
    "save_every": 3,
    "batch_stats": "own",
}


def settings(folder):
    return TrainSettings(folder=str(folder), device="cpu", tensorboard=False, **CHOICES)


def task():
    return ToyTask(make_model(drop_path=0.2, drop=0.2), noise=0.5)


def kill_at_random(folder):
    """Start a run with workers, kill it after a step drawn at random; gives the step."""
    last = random.SystemRandom().randrange(1, STEPS)
    pairs = [f"{name}={value!r}" for name, value in {**CHOICES, "workers": 2}.items()]
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), *pairs, "noise=0.5", "slow=0.02"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        for line in process.stdout:
            if line.split() == ["train", str(last)]:
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return last


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_and_resumed(tmp_path):
    unbroken, folder = tmp_path / "unbroken", tmp_path / "run"
    train(task(), settings(unbroken))
    step = kill_at_random(folder)
    train(task(), settings(folder), resume=True)  # without workers: they change nothing
    wanted, found = read_state(unbroken), read_state(folder)
    where = f"killed after step {step}"
    assert set(wanted.tensors) == set(found.tensors), where
    different = [k for k, v in wanted.tensors.items() if not torch.equal(v, found.tensors[k])]
    assert not different, where
    assert found.facts["tally"] == wanted.facts["tally"], where
    assert numbers(folder) == numbers(unbroken), where
    for name in ("best.safetensors", "last.safetensors"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), where
    left = {path.name for path in folder.iterdir()} ^ {path.name for path in unbroken.iterdir()}
    assert not left, where
