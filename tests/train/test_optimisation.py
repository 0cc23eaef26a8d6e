import math

import pytest
import torch
from torch import nn

from tinyvit.train import TrainSettings
from tinyvit.train.optim import (
    Schedule,
    clip_gradients,
    make_optimiser,
    parameter_groups,
    set_rates,
)


def test_rates_by_hand():
    schedule = Schedule(1.0, steps=6, warmup_steps=2, final_rate=0.1)
    half_cosine = [0.5 * (1 + math.cos(math.pi * part)) for part in (0.25, 0.5, 0.75, 1.0)]
    wanted = [0.5, 1.0, *(0.1 + 0.9 * value for value in half_cosine)]
    assert [schedule(step) for step in range(6)] == pytest.approx(wanted)
    assert schedule(5) == pytest.approx(0.1)
    assert schedule(3) == pytest.approx(0.55)  # the middle of the fall


def test_without_a_rise_and_with_nothing_else():
    assert Schedule(2.0, 4)(0) == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert Schedule(2.0, 4)(3) == pytest.approx(0)
    assert [Schedule(2.0, 2, 2)(step) for step in range(2)] == [1.0, 2.0]
    with pytest.raises(ValueError, match="warmup_steps must be at most the 4 steps"):
        Schedule(1.0, 4, 5)


def test_groups_are_complete_and_disjoint(make_tiny_vit):
    model = make_tiny_vit()
    model.tokens = nn.Embedding(2, 4)
    model.neck.requires_grad_(False)
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    names = [name for group in groups for name in group["names"]]
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(names) == sorted(moving)
    listed = [id(p) for group in groups for p in group["params"]]
    assert listed == [id(moving[name]) for name in names]
    assert len({(group["lr_scale"], group["weight_decay"]) for group in groups}) == len(groups)


def test_what_decays(make_tiny_vit):
    model = make_tiny_vit()
    model.tokens = nn.Embedding(2, 4)
    groups = parameter_groups(model, 0.05)
    decaying = {name for group in groups if group["weight_decay"] for name in group["names"]}
    modules = dict(model.named_modules())
    for name, _ in model.named_parameters():
        owner, _, last = name.rpartition(".")
        is_kernel = last == "weight" and isinstance(modules[owner], nn.Linear | nn.Conv2d)
        assert (name in decaying) == is_kernel, name


def test_layer_wise_rates(make_tiny_vit):
    model = make_tiny_vit()  # blocks 1, 1, 2, 1: five in depth order
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["patch_embed.seq.0.c.weight"] == 0.5**4
    assert scale["layers.0.blocks.0.conv1.c.weight"] == 0.5**4
    assert scale["layers.2.blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["layers.3.blocks.0.mlp.fc1.weight"] == 1
    assert scale["neck.0.weight"] == scale["head.weight"] == 1
    optimiser = make_optimiser(model, TrainSettings(folder="x", layer_decay=0.5, beta2=0.95))
    set_rates(optimiser, 0.01)
    assert sorted({group["lr"] for group in optimiser.param_groups}) == pytest.approx(
        [0.01 * 0.5**power for power in (4, 3, 2, 1, 0)]
    )
    assert all(group["betas"] == (0.9, 0.95) for group in optimiser.param_groups)


def test_nothing_to_learn(make_tiny_vit):
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        parameter_groups(make_tiny_vit().requires_grad_(False), 0.05)


@pytest.mark.parametrize("most, wanted", [(1.0, [0.6, 0.8]), (0.0, [3.0, 4.0]), (9.0, [3.0, 4.0])])
def test_clipping_by_hand(most, wanted):
    layer = nn.Linear(2, 1, bias=False)
    optimiser = make_optimiser(layer, TrainSettings(folder="x"))
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(clip_gradients(optimiser, most)) == 5
    # torch adds 1e-6 to the norm before it divides
    torch.testing.assert_close(layer.weight.grad, torch.tensor([wanted]), rtol=1e-6, atol=0)


class TestMuon:
    def test_matrices_of_linear_layers_go_to_muon_and_the_rest_to_adamw(self, make_tiny_vit):
        model = make_tiny_vit()
        model.tokens = nn.Embedding(2, 4)
        optimiser = make_optimiser(model, TrainSettings(folder="x", optimiser="muon"))
        names = [name for group in optimiser.param_groups for name in group["names"]]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        by_muon = {
            name
            for group in optimiser.param_groups
            if "ns_steps" in group
            for name in group["names"]
        }
        linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert by_muon == linear
        assert {g["weight_decay"] for g in optimiser.param_groups if "ns_steps" in g} == {0.05}

    def test_a_step_is_as_long_as_adamws_and_orthogonal(self):
        layer = nn.Linear(32, 64)
        before = layer.weight.detach().clone()
        optimiser = make_optimiser(
            layer, TrainSettings(folder="x", optimiser="muon", weight_decay=0.0)
        )
        set_rates(optimiser, 0.01)
        generator = torch.Generator().manual_seed(0)
        layer.weight.grad = torch.randn(64, 32, generator=generator)
        layer.bias.grad = torch.ones(64)
        bias = layer.bias.detach().clone()
        optimiser.step()
        moved = (layer.weight.detach() - before) / 0.01
        scale = 0.2 * 64**0.5  # Liu et al.: a root mean square of 0.2, for a matrix of full rank
        values = torch.linalg.svdvals(moved) / scale
        assert 0.5 < values.min() < values.max() < 1.3  # five Newton-Schulz steps come that near
        torch.testing.assert_close(bias - layer.bias.detach(), torch.full((64,), 0.01))

    def test_nothing_for_it(self):
        with pytest.raises(ValueError, match="adamw where no linear layer is trained"):
            make_optimiser(nn.Conv2d(3, 4, 3), TrainSettings(folder="x", optimiser="muon"))

    def test_a_torch_without_it(self, monkeypatch):
        monkeypatch.delattr(torch.optim, "Muon")
        with pytest.raises(ValueError, match=r"Muon is in 2.9 and later"):
            make_optimiser(nn.Linear(8, 8), TrainSettings(folder="x", optimiser="muon"))
