import copy

import pytest
import torch
from torch import nn

from tinyvit.train.optim import Ema

from .toy_task import make_model


def test_values_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    ema = Ema(layer, 0.5)
    nn.init.constant_(layer.weight, 2.0)
    ema.update(layer, 0)  # memory (1 + 0) / (10 + 0)
    assert float(ema.model.weight) == pytest.approx(0.1 * 1 + 0.9 * 2)
    nn.init.constant_(layer.weight, 0.0)
    ema.update(layer, 100)  # memory 0.5
    assert float(ema.model.weight) == pytest.approx(0.5 * 1.9)
    assert [ema.decay_at(step) for step in (0, 5, 8, 100)] == [0.1, 0.4, 0.5, 0.5]


def test_nothing_in_it_is_older_than_the_step(image):
    model = make_model()
    model.head.weight.requires_grad_(False)
    ema = Ema(model, 0.999)
    ema.model(image(1, 16, 16))  # whatever might be kept from a first call
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    ema.update(model, 10_000)
    for mine, theirs in zip(ema.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(ema.model.head.weight, model.head.weight)
    biases = "layers.1.blocks.0.attn.attention_biases"
    mine, theirs = ema.model.get_parameter(biases), model.get_parameter(biases)
    # a thousandth of the way from theirs - 1 to theirs; float32 rounds at 1e-7 of values near 1
    torch.testing.assert_close(mine, theirs - 0.999, rtol=0, atol=1e-6)
    fresh = make_model(seed=1).eval()
    fresh.load_state_dict(ema.model.state_dict())
    assert torch.equal(ema.model(image(2, 16, 16)), fresh(image(2, 16, 16)))


def test_it_is_a_network_of_its_own():
    model = make_model().train()
    before = copy.deepcopy(model.state_dict())
    ema = Ema(model, 0.9)
    assert not ema.model.training and model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    with torch.no_grad():
        for p in ema.model.parameters():
            p.zero_()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
