import errno
import json
import os
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinyvit.checkpoints import files
from tinyvit.checkpoints.files import read_state_dict
from tinyvit.errors import CheckpointError, TinyViTError
from tinyvit.train import DivergedError, NonFiniteLossError, TrainSettings, run_folder, train
from tinyvit.train.optim import Ema, make_optimiser
from tinyvit.train.run_folder import (
    RunLog,
    keep_batch,
    pack,
    read_state,
    remove_temporary_files,
    unpack,
    write_state,
)

from .toy_task import ToyTask, make_model, numbers

FORMATS = Path(__file__).parents[1] / "data" / "formats"


def trained(seed, steps=2, optimiser="adamw"):
    model = make_model(seed).to(memory_format=torch.channels_last)
    settings = TrainSettings(folder="x", learning_rate=0.1, optimiser=optimiser)
    optimiser = make_optimiser(model, settings)
    ema = Ema(model, 0.9)
    for step in range(steps):
        model(torch.randn(2, 3, 16, 16)).square().sum().backward()
        optimiser.step()
        ema.update(model, step)
    return model, ema.model, optimiser


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_everything_comes_back_bit_for_bit(tmp_path, optimiser):
    parts = trained(0, optimiser=optimiser)
    write_state(tmp_path, pack(*parts), {"tally": {"step": 2, "best": 0.1 + 0.2}})
    state = read_state(tmp_path)
    assert state.facts["tally"] == {"step": 2, "best": 0.1 + 0.2}
    others = trained(1, steps=0, optimiser=optimiser)
    unpack(state.tensors, *others)
    was, now = pack(*parts), pack(*others)
    assert set(was) == set(now)
    assert any(key.endswith("/exp_avg_sq") for key in was)
    assert any(key.endswith("/momentum_buffer") for key in was) == (optimiser == "muon")
    assert all(torch.equal(was[key], now[key]) and was[key].dtype == now[key].dtype for key in was)
    kernel = others[0].patch_embed.seq[2].c.weight
    assert others[2].state[kernel]["exp_avg"].stride() == kernel.stride()


def test_the_state_before_is_kept(tmp_path):
    for step in (1, 2, 3):
        write_state(tmp_path, {"model/x": torch.tensor([step])}, {"step": step})
    names = {"state.safetensors": 3, "state.previous.safetensors": 2}
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    for name, step in names.items():
        assert int(files.read_state_dict(tmp_path / name).tensors["model/x"]) == step


def test_half_written_files_are_removed(tmp_path):
    write_state(tmp_path, {"model/x": torch.tensor([1])}, {"step": 1})
    for name in (".state.next.safetensors.0a.tmp", ".curves.png.0b.part", ".log.jsonl.0c.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".mine").write_text("")
    remove_temporary_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"state.safetensors", ".mine"}


def test_no_state_yet(tmp_path):
    assert read_state(tmp_path) is None


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_killed_between_any_two_renames(tmp_path, monkeypatch, cut):
    """One whole state is there at every moment; the newest from when it is complete on."""
    for step in (1, 2):
        write_state(tmp_path, {"model/x": torch.tensor([step])}, {"step": step})
    real, done = os.replace, []

    def dying(source, target):
        if len(done) == cut:
            raise KeyboardInterrupt  # as a kill: nothing catches it
        done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        write_state(tmp_path, {"model/x": torch.tensor([3])}, {"step": 3})
    monkeypatch.undo()
    state = read_state(tmp_path)
    assert state.facts["step"] == int(state.tensors["model/x"]) == (2 if cut == 0 else 3)
    write_state(tmp_path, {"model/x": torch.tensor([4])}, {"step": 4})
    assert read_state(tmp_path).facts["step"] == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch):
    write_state(tmp_path, {"model/x": torch.tensor([1])}, {"step": 1})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    words = (
        r"could not be saved, and the state before it, .*state.safetensors, is whole: .*No space"
    )
    with pytest.raises(CheckpointError, match=words):
        write_state(tmp_path, {"model/x": torch.tensor([2])}, {"step": 2})
    monkeypatch.undo()
    assert read_state(tmp_path).facts["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_state_gives_way_to_the_one_before_and_is_named(tmp_path):
    for step in (1, 2):
        write_state(tmp_path, {"model/x": torch.tensor([step])}, {"step": step})
    (tmp_path / "state.safetensors").write_bytes(b"\x00" * 100)
    state = read_state(tmp_path)
    assert state.facts["step"] == 1
    assert (
        len(state.unreadable) == 1 and "state.safetensors is no whole state" in state.unreadable[0]
    )
    (tmp_path / "state.previous.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no other state is there: begin again"):
        read_state(tmp_path)


def test_a_state_of_another_network(tmp_path, make_tiny_vit):
    model, ema, optimiser = trained(0)
    tensors = pack(model, ema, optimiser)
    other = make_tiny_vit()
    with pytest.raises(CheckpointError, match="the state is of another network"):
        unpack(tensors, other, None, make_optimiser(other, TrainSettings(folder="x")))
    model.head.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"it trained head.bias, head.weight, which is not"):
        unpack(tensors, model, None, make_optimiser(model, TrainSettings(folder="x")))


def steps_of(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_lines_curves_and_what_is_no_number(tmp_path):
    log = RunLog(tmp_path)
    log.write("train", 1, {"loss": 0.5, "iou": float("nan")})
    log.write("validate", 1, {"iou": 0.25})
    log.sync()
    log.draw()
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == log.lines
    assert lines[0] == {"kind": "train", "step": 1, "loss": 0.5, "iou": None}
    assert lines[1] == {"kind": "validate", "step": 1, "iou": 0.25}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_going_on_takes_later_lines_away_and_the_cut_one(tmp_path):
    log = RunLog(tmp_path)
    for step in range(6):
        log.write("train", step, {"loss": 1.0})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    log = RunLog(tmp_path, step=3)
    log.write("train", 4, {"loss": 1.0})
    log.close()
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4]
    RunLog(tmp_path).close()  # a new run begins a new log
    assert steps_of(tmp_path) == []


def test_a_full_disk_in_words(tmp_path, monkeypatch):
    log = RunLog(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(TinyViTError, match=r"log.jsonl could not be written: No space.*resume"):
        log.sync()
    monkeypatch.setattr(run_folder, "save_png", full)
    with pytest.raises(TinyViTError, match=r"curves.png could not be written: No space"):
        log.draw()
    monkeypatch.setattr(log, "_file", types.SimpleNamespace(write=full, close=log._file.close))
    with pytest.raises(TinyViTError, match=r"log.jsonl could not be written: No space"):
        log.write("train", 1, {"loss": 1.0})
    log.close()


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
    find = run_folder.importlib.util.find_spec
    is_there = {"tensorboard": True}
    monkeypatch.setattr(
        run_folder.importlib.util, "find_spec", lambda name: is_there.get(name) or find(name)
    )
    log = RunLog(tmp_path, step=4, tensorboard=True)
    log.write("train", 5, {"loss": 0.5})
    log.close()
    assert told == [(tmp_path / "tensorboard", 5), ("train/loss", 0.5, 5), "closed"]
    monkeypatch.setattr(run_folder.importlib.util, "find_spec", lambda name: None)
    log = RunLog(tmp_path, step=4, tensorboard=True)
    log.write("train", 5, {"loss": 0.5})
    log.close()
    assert len(told) == 3


def test_the_batch_can_be_read_back(tmp_path):
    images = torch.tensor([[float("nan"), 1.0]])
    parts = [([(0, 4)], {"images": images, "names": ["a.png"]}), ([(0, 2)], {"images": images + 1})]
    words = keep_batch(tmp_path, 7, 1, parts)
    path = tmp_path / "diverged_step_7_rank_1.safetensors"
    assert words == f"its batch is kept in {path}"
    file = read_state_dict(path)
    torch.testing.assert_close(file.tensors["0/images"], images, equal_nan=True, rtol=0, atol=0)
    assert set(file.tensors) == {"0/images", "1/images"}
    assert json.loads(file.metadata["0/samples"]) == [[0, 4]]
    assert file.metadata["0/names"] == "['a.png']"


def test_a_folder_that_is_gone_is_said(tmp_path):
    words = keep_batch(tmp_path / "gone", 7, 0, [([(0, 1)], {"images": torch.ones(1)})])
    assert words.startswith("its batch could not be kept (no folder")


def test_it_is_an_error_of_ours():
    assert issubclass(NonFiniteLossError, TinyViTError)
    assert DivergedError is NonFiniteLossError  # the former name


# -- formats -------------------------------------------------------------------------------------


def linear_task():
    torch.manual_seed(0)
    layers = (torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2))
    return ToyTask(torch.nn.Sequential(*layers))


def test_a_run_of_version_0_1_is_resumed(tmp_path):
    """A folder left after step 3 of 6: no number of the format, ``trainable`` called ``moving``."""
    folder = tmp_path / "run"
    shutil.copytree(FORMATS / "run_0", folder)
    assert "moving" in read_state(folder).facts["settings"]
    settings = TrainSettings.from_toml(folder / "settings.toml", folder=str(folder))
    result = train(linear_task(), settings, resume=True)
    whole = train(linear_task(), replace(settings, folder=str(tmp_path / "whole")))
    # the state was written on another machine, whose kernels may add up in another order
    assert result.metrics == pytest.approx(whole.metrics, rel=1e-5)
    state = read_state(folder)
    assert (state.facts["format"], state.facts["settings"]["trainable"]) == (1, "full")
    kinds = [line["kind"] for line in numbers(folder)]
    assert kinds == ["train"] * 6 + ["validate"]


def test_a_state_of_a_newer_version_is_refused(tmp_path):
    write_state(tmp_path, {"model/x": torch.tensor([1])}, {"format": 9, "version": "7.0"})
    with pytest.raises(CheckpointError, match=r"by tinyvit 7.0, format 9; this reads up to 1"):
        read_state(tmp_path)
