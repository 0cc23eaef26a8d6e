"""Every way of changing a model is noticed."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tinyvit.inference.derived import Derived, ModelWatch


def step(model, optimiser=torch.optim.SGD, **choices):
    model(torch.ones(1, 3, 32, 32)).square().mean().backward()
    optimiser(model.parameters(), lr=0.1, **choices).step()


def ema(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.lerp_(torch.ones_like(parameter), 0.1)


CHANGES = {
    "optimiser step": step,
    "fused AdamW": lambda m: step(m, torch.optim.AdamW, fused=True),  # torch counts no change
    "foreach AdamW": lambda m: step(m, torch.optim.AdamW, foreach=True),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "assign=True": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "EMA": ema,
    "write through data": lambda m: m.neck[0].weight.data.mul_(1.5),
    "one buffer": lambda m: m.patch_embed.seq[0].bn.running_mean.add_(1),
    "part of a bias table": lambda m: (
        m.layers[2].blocks[1].attn.attention_biases.data[0, 3:].add_(3)
    ),
    "half": lambda m: m.half(),
    "new head": lambda m: m.reset_classifier(7),
    "new parameter": lambda m: setattr(m.neck[1], "bias", torch.nn.Parameter(torch.ones(16))),
    "hook-free replacement": lambda m: m.neck.__setitem__(1, torch.nn.Identity()),
    "batch statistics": lambda m: m.train()(torch.randn(2, 3, 32, 32)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_noticed(make_tiny_vit, change):
    model = make_tiny_vit()
    watch = ModelWatch(model)
    assert not watch.has_changed()
    change(model)
    assert watch.has_changed()


def test_using_a_model_is_no_change(make_tiny_vit):
    model = make_tiny_vit()
    watch = ModelWatch(model)
    model(torch.randn(1, 3, 40, 24))
    model.train().eval()
    model.requires_grad_(False)
    copy.deepcopy(model)
    model.state_dict()
    assert not watch.has_changed()


def test_tensors_made_under_inference_mode_can_be_watched(make_tiny_vit):
    with torch.inference_mode():
        model = make_tiny_vit()
    watch = ModelWatch(model)
    assert not watch.has_changed()
    model.neck[0].weight.data.mul_(2)
    assert watch.has_changed()


class Owner:
    """Derives the first weight of its model, and counts how often."""

    def __init__(self, model):
        self.model, self.made = model, 0
        self.first = Derived(self.modules, self.make)

    def modules(self):
        return [self.model]

    def make(self):
        self.made += 1
        return next(self.model.parameters()).flatten()[0].item()


def test_a_value_is_made_once_until_the_model_changes_or_is_replaced(make_tiny_vit):
    owner = Owner(make_tiny_vit())
    assert owner.first.get() == owner.first.get()
    assert owner.made == 1
    ema(owner.model)
    assert owner.first.get() == next(owner.model.parameters()).flatten()[0].item()
    assert owner.made == 2
    owner.model = copy.deepcopy(owner.model)
    owner.first.get()
    assert owner.made == 3
    owner.first.drop()
    owner.first.get()
    assert owner.made == 4


def test_a_value_is_made_once_by_several_threads(make_tiny_vit):
    owner = Owner(make_tiny_vit())
    with ThreadPoolExecutor(4) as pool:
        values = set(pool.map(lambda _: owner.first.get(), range(16)))
    assert len(values) == 1 and owner.made == 1


def test_an_error_leaves_nothing_behind(make_tiny_vit):
    values = [1]
    derived = Derived(lambda: [make_tiny_vit()], lambda: values.pop())
    assert derived.get() == 1
    with pytest.raises(IndexError):
        derived.get()
    values.append(2)
    assert derived.get() == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_derives_from_the_copied_model(make_tiny_vit, copied):
    owner = Owner(make_tiny_vit())
    before = owner.first.get()
    twin = copied(owner)
    ema(twin.model)
    assert twin.first.get() != before
    assert owner.first.get() == before
