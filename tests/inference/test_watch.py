"""Every way of changing a model is noticed."""

import copy

import pytest
import torch

from tinyvit.inference.derived import ModelWatch


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()


def ema(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.lerp_(torch.ones_like(parameter), 0.1)


CHANGES = {
    "optimiser step": step,
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "assign=True": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "EMA": ema,
    "write through data": lambda m: m.neck[0].weight.data.mul_(1.5),
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
