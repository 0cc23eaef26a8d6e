import pytest
import torch

from tinyvit.train import TrainSettings
from tinyvit.train.data.sampling import Order, load_batches
from tinyvit.train.distributed import Processes
from tinyvit.train.loop import Learner, accumulate_gradient
from tinyvit.train.optim import learning_mode

from .toy_task import ToyTask, make_model

CPU = torch.device("cpu")


def gradient_of(task, step=0, ranks=1, rank=0, **changes):
    """(what came with it, gradients by name) of a step of eight samples."""
    settings = TrainSettings(folder="x", device="cpu", **changes)
    order = Order(len(task), settings.batch_size, settings.accumulate, ranks)
    learning_mode(task.model, freeze_batch_stats=True)
    task.model.zero_grad()
    learner = Learner(task, settings.precision, CPU)
    batches = load_batches(task, order, rank, range(step, step + 1))
    processes = Processes()
    found = accumulate_gradient(learner, batches, order, step, settings, processes)
    assert next(batches, None) is None  # all that was loaded was used
    grads = {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}
    return found, grads


@pytest.mark.parametrize("step", [0, 2])  # a whole step of 8, and the last of an epoch with 6
@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_parts_give_the_gradient_of_the_whole(step, accumulate):
    task = ToyTask(is_double=True)
    whole, wanted = gradient_of(task, step)
    parts, grads = gradient_of(task, step, accumulate=accumulate)
    assert len(parts.parts) == min(accumulate, 8 if step == 0 else 6)
    assert set(grads) == set(wanted)
    for name, grad in grads.items():
        # float64 sums in another order: 1e-16 times some thousand terms of size up to 1
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-12)
    # figures are float32 means
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.figures == pytest.approx(whole.figures, rel=1e-6)


def test_the_loss_of_a_process_counts_by_its_samples():
    task = ToyTask()
    whole, _ = gradient_of(task)
    shares = [gradient_of(task, ranks=2, rank=rank)[0].loss for rank in range(2)]
    assert sum(shares) == pytest.approx(whole.loss, rel=1e-5)  # float32 means


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
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)  # bf16 keeps 8 bits: 0.4 % a product


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
