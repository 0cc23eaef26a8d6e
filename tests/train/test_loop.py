import errno
import json
import math
import os
import signal
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tinyvit.checkpoints.files import read_state_dict
from tinyvit.errors import CheckpointError
from tinyvit.modules import TinyViT
from tinyvit.train import NonFiniteLossError, TrainSettings, train
from tinyvit.train.loop import Counters, Run, TaskLoss, stop_on_signal
from tinyvit.train.optim import Processes, train_mode
from tinyvit.train.run_folder import read_state
from tinyvit.train.task import Order, load_batches

from .toy_task import ToyTask, interrupt, make_model, numbers


@pytest.fixture
def settings(tmp_path):
    return TrainSettings(
        folder=str(tmp_path / "run"),
        epochs=2,
        log_every=1,
        learning_rate=3e-3,
        device="cpu",
        tensorboard=False,
    )


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_it_learns_and_leaves_everything_behind(settings):
    settings = replace(settings, epochs=3, ema_decay=0.5, validate_at_start=True)
    seen = []
    torch.manual_seed(8)
    before = torch.get_rng_state()
    task = ToyTask()
    result = train(task, settings, report=seen.append)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's chance was not spent
    assert not task.model.training
    lines = numbers(settings.folder)
    checks = [line for line in lines if line["kind"] == "validate"]
    assert [line["step"] for line in checks] == [0, 3, 6, 9]
    assert checks[-1]["loss"] < checks[0]["loss"]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 10))
    assert result.steps == 9
    assert result.metrics == {name: checks[-1][name] for name in ("accuracy", "loss")}
    assert result.best == max(line["accuracy"] for line in checks)
    assert {path.name for path in result.folder.iterdir()} == {
        "settings.toml",
        "log.jsonl",
        "curves.png",
        "state.safetensors",
        "state.previous.safetensors",
        "best.safetensors",
        "last.safetensors",
    }
    assert TrainSettings.from_toml(result.folder / "settings.toml") == settings
    phases = [(progress.phase, progress.step) for progress in seen]
    assert phases[:3] == [("train", 0), ("validate", 0), ("train", 1)]
    assert phases[-2:] == [("validate", 9), ("done", 9)]
    assert seen[-1].seconds_left == 0 and seen[-1].images_per_second > 0
    assert (seen[4].epoch, seen[-1].epoch, seen[-1].epochs) == (1, 3, 3)


def test_what_is_saved_is_what_was_measured(settings):
    result = train(ToyTask(), replace(settings, ema_decay=0.5))
    tensors = read_state_dict(result.last_weights).tensors
    state = read_state(result.folder)
    average = {k.removeprefix("average/"): v for k, v in state.tensors.items() if k[:3] == "ave"}
    assert equal(tensors, average)
    model = make_model(seed=1).eval()
    model.load_state_dict(tensors)
    with torch.no_grad():
        assert ToyTask().validate(model) == pytest.approx(result.metrics)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_run_that_goes_on_is_the_unbroken_one(settings, tmp_path, optimiser):
    settings = replace(settings, ema_decay=0.9, accumulate=2, save_every=1, log_every=4)
    settings = replace(settings, optimiser=optimiser)
    whole = train(ToyTask(noise=0.5), settings)

    class Stopping(Exception):
        pass

    def stop(progress):
        if progress.step == 2 and progress.phase == "train":
            raise Stopping

    again = replace(settings, folder=str(tmp_path / "again"))
    with pytest.raises(Stopping):
        train(ToyTask(noise=0.5), again, report=stop)
    result = train(ToyTask(noise=0.5), again, resume=True)
    assert equal(read_state(whole.folder).tensors, read_state(result.folder).tensors)
    assert numbers(whole.folder) == numbers(result.folder)  # also the mean over a stop's two sides
    assert (whole.best, whole.best_step) == (result.best, result.best_step)
    finished = train(ToyTask(noise=0.5), again, resume=True)  # there is nothing left to do
    assert (finished.steps, finished.metrics) == (6, whole.metrics)


def test_ctrl_c_saves_and_says_how_to_go_on(settings):
    def press(progress):
        if progress.step == 2:
            interrupt()

    words = r"stopped after step 3 of 6, with its state in .*run; resume it"
    with pytest.raises(KeyboardInterrupt, match=words):
        train(ToyTask(), replace(settings, validate_every=6), report=press)
    assert read_state(Path(settings.folder)).facts["tally"]["step"] == 3


def test_two_runs_are_not_mixed(settings):
    train(ToyTask(), replace(settings, steps=1))
    with pytest.raises(CheckpointError, match="already holds a run; resume it"):
        train(ToyTask(), settings)
    words = "with other settings.*steps was 1 and is None; seed was 0 and is 5"
    with pytest.raises(ValueError, match=words):
        train(ToyTask(), replace(settings, seed=5), resume=True)
    words = "the number of samples was 22 and is 9"
    with pytest.raises(ValueError, match=words):
        train(ToyTask(samples=9), replace(settings, steps=1), resume=True)


def test_a_loss_of_nan_stops_before_the_optimiser_and_keeps_the_batch(settings):
    class Diverging(ToyTask):
        def loss(self, model, batch, generator):
            loss, figures = super().loss(model, batch, generator)
            calls.append(1)
            return (loss * float("nan") if len(calls) == 3 else loss), figures

    calls = []
    task = Diverging()
    words = r"step 3 gave a loss of nan .*batch is kept in .*diverged_step_3_rank_0.safetensors"
    with pytest.raises(NonFiniteLossError, match=words):
        train(task, replace(settings, save_every=1))
    state = read_state(Path(settings.folder))
    assert state.facts["tally"]["step"] == 2
    assert all(
        torch.equal(p, state.tensors[f"model/{name}"]) for name, p in task.model.named_parameters()
    )
    kept = read_state_dict(Path(settings.folder) / "diverged_step_3_rank_0.safetensors")
    assert kept.tensors["0/images"].shape == (6, 3, 16, 16)


def test_an_infinite_gradient_of_a_finite_loss_stops_too(settings):
    class Steep(ToyTask):
        def loss(self, model, batch, generator):
            loss, figures = super().loss(model, batch, generator)
            return loss + (model.head.bias - model.head.bias.detach()).abs().sqrt().sum(), figures

    with pytest.raises(NonFiniteLossError, match=r"gradient of norm (nan|inf)"):
        train(Steep(), settings)


def test_a_full_disk_leaves_the_state_before(settings, monkeypatch):
    real = safetensors.torch.save_file

    def fill(progress):
        if progress.step == 3:
            monkeypatch.setattr("safetensors.torch.save_file", full)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = replace(settings, save_every=1, validate_every=6)
    with pytest.raises(CheckpointError, match=r"state could not be saved.*No space.*resume"):
        train(ToyTask(), settings, report=fill)
    monkeypatch.setattr("safetensors.torch.save_file", real)
    assert read_state(Path(settings.folder)).facts["tally"]["step"] == 3
    assert train(ToyTask(), settings, resume=True).steps == 6


def test_the_best_weights_are_those_of_the_best_step(settings):
    class Moody(ToyTask):
        def validate(self, model):
            return {"accuracy": measured.pop(0)}

        def save(self, model, path):
            if path.name == "last.safetensors":
                saved.append({k: v.clone() for k, v in model.state_dict().items()})
            super().save(model, path)

    saved, measured = [], [0.1, 0.9, 0.3]
    result = train(Moody(), replace(settings, steps=3, validate_every=1))
    assert (result.best, result.best_step) == (0.9, 2)
    assert equal(read_state_dict(result.best_weights).tensors, saved[1])
    assert equal(read_state_dict(result.last_weights).tensors, saved[2])


def test_nothing_held_out(settings):
    task = ToyTask()
    task.validate = lambda model: {}
    result = train(task, settings)
    assert (result.best, result.best_weights, result.metrics) == (None, None, {})
    assert result.last_weights.exists()


def test_batch_statistics_stay_where_they_were_learnt_and_move_where_asked(settings, tmp_path):
    before = {k: v for k, v in make_model().state_dict().items() if "running" in k}
    task = ToyTask()
    train(task, replace(settings, steps=2))
    assert all(torch.equal(task.model.state_dict()[key], value) for key, value in before.items())
    task = ToyTask()
    train(task, replace(settings, steps=2, batch_stats="own", folder=str(tmp_path / "own")))
    assert not any(
        torch.equal(task.model.state_dict()[key], value) for key, value in before.items()
    )


def test_what_auto_chose_is_kept_when_a_run_goes_on(settings):
    def fresh():
        return TinyViT(
            embed_dims=(4, 8),
            depths=(1, 1),
            num_heads=(1, 2),
            window_sizes=(2, 2),
            num_classes=2,
            neck_dim=None,
        )

    task = ToyTask(fresh())
    settings = replace(settings, steps=4, save_every=1)

    def press(progress):
        if progress.step == 1:
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        train(task, settings, report=press)
    key = "patch_embed.seq.0.bn.num_batches_tracked"
    train(task, settings, resume=True)  # its statistics have been learnt by now
    assert int(task.model.state_dict()[key]) == 4


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    settings = TrainSettings(folder=str(tmp_path / "file" / "run"), device="cpu")
    with pytest.raises(CheckpointError, match="cannot be made a folder"):
        train(ToyTask(), settings)


def test_lora_is_saved_as_a_plain_network(settings):
    task = ToyTask()
    before = make_model().state_dict()
    result = train(task, replace(settings, trainable="lora", lora_rank=2, weight_decay=0.0))
    tensors = read_state_dict(result.last_weights).tensors
    assert set(tensors) == set(before)
    assert any(not torch.equal(tensors[key], before[key]) for key in before)
    again = ToyTask()
    assert (
        train(
            again, replace(settings, trainable="lora", lora_rank=2, weight_decay=0.0), resume=True
        ).steps
        == 6
    )


def test_means_since_the_last_line_of_figures_that_not_every_step_has():
    counters = Counters()
    counters.add({"loss": 1.0, "iou": 0.5})
    counters.add({"loss": 3.0})
    assert counters.means() == {"loss": 2.0, "iou": 0.5}
    assert counters.means() == {}


@pytest.mark.parametrize("way, values", [("max", [0.1, 0.3, 0.3, 0.2]), ("min", [9, 7, 7, 8])])
def test_the_best_is_the_first_of_the_best(way, values):
    counters = Counters()
    taken = []
    for step, value in enumerate(values):
        counters.step = step
        taken.append(counters.validated({"figure": value, "other": step}, ("figure", way)))
    assert taken == [True, True, False, False]
    assert (counters.best, counters.best_step) == (values[1], 1)
    assert counters.figures == {"figure": values[3], "other": 3}


def test_what_is_no_number_is_never_the_best():
    counters = Counters()
    assert not counters.validated({"figure": math.nan}, ("figure", "min"))
    assert counters.validated({"figure": 5.0}, ("figure", "min"))
    assert not counters.validated({"figure": math.nan}, ("figure", "min"))


def test_nothing_held_out_is_no_mistake_but_a_wrong_name_is():
    counters = Counters()
    assert not counters.validated({}, ("figure", "max"))
    with pytest.raises(ValueError, match=r"goal of this task is 'figure'.* gives loss"):
        counters.validated({"loss": 1.0}, ("figure", "max"))


def test_it_survives_json_to_the_last_bit():
    counters = Counters(step=3, best=0.1 + 0.2, best_step=2)
    counters.add({"loss": 1 / 3})
    assert Counters(**json.loads(json.dumps(asdict(counters)))) == counters


CPU = torch.device("cpu")


def gradient_of(task, step=0, ranks=1, rank=0, **changes):
    """(what came with it, gradients by name) of a step of eight samples."""
    settings = TrainSettings(folder="x", device="cpu", **changes)
    run = Run(task, settings, Processes(), None)
    run.order = Order(len(task), settings.batch_size, settings.accumulate, ranks)
    train_mode(task.model, freeze_batch_stats=True)
    task.model.zero_grad()
    run.task_loss = TaskLoss(task, settings.precision, CPU)
    batches = load_batches(task, run.order, rank, range(step, step + 1))
    found = run.accumulate_gradient(batches, step)
    assert next(batches, None) is None  # all that was loaded was used
    grads = {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}
    return found, grads


@pytest.mark.parametrize("step", [0, 2])  # a whole step of 8, and the last of an epoch with 6
@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_parts_give_the_gradient_of_the_whole(step, accumulate):
    task = ToyTask(is_double=True)
    whole, wanted = gradient_of(task, step)
    parts, grads = gradient_of(task, step, accumulate=accumulate)
    assert len(parts[2]) == min(accumulate, 8 if step == 0 else 6)
    assert set(grads) == set(wanted)
    for name, grad in grads.items():
        # float64 sums in another order: 1e-16 times some thousand terms of size up to 1
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-12)
    # figures are float32 means
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)


def test_the_loss_of_a_process_counts_by_its_samples():
    task = ToyTask()
    whole, _ = gradient_of(task)
    shares = [gradient_of(task, ranks=2, rank=rank)[0][0] for rank in range(2)]
    assert sum(shares) == pytest.approx(whole[0], rel=1e-5)  # float32 means


def test_checkpointing_gives_the_same_gradient_with_chance_in_it():
    plain = ToyTask(make_model(drop_path=0.3, drop=0.3), noise=0.5)
    _, wanted = gradient_of(plain)
    plain.model.set_grad_checkpointing(True)
    _, grads = gradient_of(plain)
    assert set(grads) == set(wanted)
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


def test_all_chance_comes_from_the_seed():
    task = ToyTask(make_model(drop_path=0.5, drop=0.5), noise=1.0)
    torch.manual_seed(1)
    _, first = gradient_of(task, seed=3)
    torch.manual_seed(2)
    _, again = gradient_of(task, seed=3)
    _, other = gradient_of(task, seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_bf16_is_near_and_not_the_same():
    task = ToyTask()
    exact, _ = gradient_of(task)
    rough, _ = gradient_of(task, precision="bf16")
    assert rough[0] != exact[0]
    assert rough[0] == pytest.approx(exact[0], rel=0.02)  # bf16 keeps 8 bits: 0.4 % a product


def test_channels_last_memory_and_things_that_are_no_tensors():
    class Looking(ToyTask):
        def collate(self, samples):
            return {**super().collate(samples), "names": ["a", "b"]}

        def loss(self, model, batch, generator):
            seen.append((batch["images"].stride()[1], batch["names"]))
            return super().loss(model, batch, generator)

    seen = []
    gradient_of(Looking(), channels_last=True)
    gradient_of(Looking(), channels_last=False)
    assert seen == [(1, ["a", "b"]), (256, ["a", "b"])]


def test_a_loss_must_be_a_scalar():
    class Wide(ToyTask):
        def loss(self, model, batch, generator):
            loss, figures = super().loss(model, batch, generator)
            return loss.expand(3), figures

    with pytest.raises(ValueError, match=r"loss must be a scalar, got one of shape \[3\]"):
        gradient_of(Wide())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_to_stop(number):
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop.is_set()
        interrupt(number)
        assert stop.is_set()
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        interrupt()
        interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_nothing_is_changed():
    found = []

    def look():
        with stop_on_signal() as stop:
            found.append((signal.getsignal(signal.SIGINT), stop.is_set()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGINT), False)]
