import errno
import os

import pytest
import torch

from tinyvit.checkpoints import files
from tinyvit.errors import CheckpointError
from tinyvit.train import TrainSettings
from tinyvit.train.optim import Ema, make_optimiser
from tinyvit.train.run_folder import pack, read_state, sweep, unpack, write_state

from .toy_task import make_model


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
    assert state.facts == {"tally": {"step": 2, "best": 0.1 + 0.2}}
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


def test_half_written_files_are_swept_away(tmp_path):
    write_state(tmp_path, {"model/x": torch.tensor([1])}, {"step": 1})
    for name in (".state.next.safetensors.0a.tmp", ".curves.png.0b.part", ".log.jsonl.0c.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".mine").write_text("")
    sweep(tmp_path)
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
    assert read_state(tmp_path).facts == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_state_gives_way_to_the_one_before_and_is_named(tmp_path):
    for step in (1, 2):
        write_state(tmp_path, {"model/x": torch.tensor([step])}, {"step": step})
    (tmp_path / "state.safetensors").write_bytes(b"\x00" * 100)
    state = read_state(tmp_path)
    assert state.facts["step"] == 1
    assert len(state.trouble) == 1 and "state.safetensors is no whole state" in state.trouble[0]
    (tmp_path / "state.previous.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no other state is there: start anew"):
        read_state(tmp_path)


def test_a_state_of_another_network(tmp_path, make_tiny_vit):
    model, ema, optimiser = trained(0)
    tensors = pack(model, ema, optimiser)
    other = make_tiny_vit()
    with pytest.raises(CheckpointError, match="the state is of another network"):
        unpack(tensors, other, None, make_optimiser(other, TrainSettings(folder="x")))
    model.head.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"it moved head.bias, head.weight, which does not"):
        unpack(tensors, model, None, make_optimiser(model, TrainSettings(folder="x")))
