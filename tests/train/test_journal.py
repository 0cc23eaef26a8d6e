import errno
import json
import os
import sys
import types

import pytest

from tinyvit.errors import TinyViTError
from tinyvit.train import run_folder as room
from tinyvit.train.run_folder import Journal


def steps_of(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_lines_curves_and_what_is_no_number(tmp_path):
    journal = Journal(tmp_path)
    journal.write("train", 1, {"loss": 0.5, "iou": float("nan")})
    journal.write("validate", 1, {"iou": 0.25})
    journal.settle()
    journal.draw()
    journal.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == journal.lines
    assert lines[0] == {"kind": "train", "step": 1, "loss": 0.5, "iou": None}
    assert lines[1] == {"kind": "validate", "step": 1, "iou": 0.25}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_going_on_takes_later_lines_away_and_the_cut_one(tmp_path):
    journal = Journal(tmp_path)
    for step in range(6):
        journal.write("train", step, {"loss": 1.0})
    journal.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    journal = Journal(tmp_path, step=3)
    journal.write("train", 4, {"loss": 1.0})
    journal.close()
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4]
    Journal(tmp_path).close()  # a new run begins a new log
    assert steps_of(tmp_path) == []


def test_a_full_disk_in_words(tmp_path, monkeypatch):
    journal = Journal(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(room.os, "fsync", full)
    with pytest.raises(TinyViTError, match=r"log.jsonl could not be written: No space.*resume"):
        journal.settle()
    monkeypatch.setattr(room, "save_png", full)
    with pytest.raises(TinyViTError, match=r"curves.png could not be written: No space"):
        journal.draw()
    monkeypatch.setattr(
        journal, "_file", types.SimpleNamespace(write=full, close=journal._file.close)
    )
    with pytest.raises(TinyViTError, match=r"log.jsonl could not be written: No space"):
        journal.write("train", 1, {"loss": 1.0})
    journal.close()


def test_tensorboard_if_it_is_installed(tmp_path, monkeypatch):
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, tag, value, step):
            told.append((tag, value, step))

        def close(self):
            told.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    find = room.importlib.util.find_spec
    is_there = {"tensorboard": True}
    monkeypatch.setattr(
        room.importlib.util, "find_spec", lambda name: is_there.get(name) or find(name)
    )
    journal = Journal(tmp_path, step=4, tensorboard=True)
    journal.write("train", 5, {"loss": 0.5})
    journal.close()
    assert told == [(tmp_path / "tensorboard", 5), ("train/loss", 0.5, 5), "closed"]
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    journal = Journal(tmp_path, step=4, tensorboard=True)
    journal.write("train", 5, {"loss": 0.5})
    journal.close()
    assert len(told) == 3
