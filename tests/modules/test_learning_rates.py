"""learning_rates.py: lr_scale through every way a model changes hands, and optimiser groups."""

import copy
import io
import pickle
import re

import pytest
import torch

from tinyvit.modules import FeatureMaps, TinyViT

DECAY = 0.8
DEPTHS = (1, 1, 2, 1)


def wanted_scales(model, decay=DECAY):
    """By name alone: block i of n has decay ** (n - 1 - i)."""
    depths = model.depths
    scales = {}
    for name, _ in model.named_parameters():
        i = None
        if name.startswith("patch_embed."):
            i = 0
        elif match := re.match(r"layers\.(\d)\.blocks\.(\d)\.", name):
            i = sum(depths[: int(match[1])]) + int(match[2])
        elif match := re.match(r"layers\.(\d)\.downsample\.", name):
            i = sum(depths[: int(match[1]) + 1]) - 1
        scales[name] = 1.0 if i is None else decay ** (sum(depths) - 1 - i)
    return scales


def scales(model):
    return {name: parameter.lr_scale for name, parameter in model.named_parameters()}


@pytest.fixture
def model(make_tiny_vit):
    return make_tiny_vit(layer_lr_decay=DECAY)


def test_after_construction(model):
    assert scales(model) == pytest.approx(wanted_scales(model))
    assert model.layer_lr_decay == DECAY
    got = scales(model)
    assert got["patch_embed.seq.0.c.weight"] == pytest.approx(0.8**4)
    assert got["layers.2.blocks.0.attn.attention_biases"] == pytest.approx(0.8**2)
    assert got["layers.2.downsample.conv1.c.weight"] == pytest.approx(0.8)
    assert got["layers.3.blocks.0.mlp.fc1.weight"] == 1.0
    assert {got[n] for n in got if n.startswith(("head.", "norm_head.", "neck."))} == {1.0}


def test_published_depths():
    with torch.device("meta"):
        model = TinyViT(layer_lr_decay=DECAY)
    assert scales(model) == pytest.approx(wanted_scales(model))


def test_no_decay_means_one(make_tiny_vit):
    assert set(scales(make_tiny_vit()).values()) == {1.0}


def test_set_again(model):
    model.set_layer_lr_decay(0.5)
    assert model.layer_lr_decay == 0.5
    assert scales(model) == pytest.approx(wanted_scales(model, 0.5))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_assign(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def through_meta(model):
    with torch.device("meta"):
        empty = TinyViT(**model.arguments())
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    return empty


def through_meta_assign(model):
    with torch.device("meta"):
        empty = TinyViT(**model.arguments())
    empty.load_state_dict(model.state_dict(), assign=True)
    return empty


def through_wrapper(model):
    wrapper = copy.deepcopy(FeatureMaps(model))
    wrapper.load_state_dict(wrapper.state_dict(), assign=True)
    return wrapper.encoder


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        through_file,
        through_assign,
        through_meta,
        through_meta_assign,
        through_wrapper,
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16).train(),
    ],
    ids=[
        *("deepcopy", "pickle", "torch.save", "assign", "meta", "meta-assign"),
        *("wrapper", "double", "bfloat16"),
    ],
)
def test_survives(model, change):
    other = change(model)
    assert scales(other) == pytest.approx(wanted_scales(other))


def test_new_head_has_one(model):
    model.reset_classifier(7)
    assert scales(model) == pytest.approx(wanted_scales(model))


class TestParamGroups:
    def test_every_trainable_parameter_once(self, model):
        groups = model.param_groups(lr=0.1, weight_decay=0.05)
        listed = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())

    def test_rates_and_decay(self, model):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        wanted = wanted_scales(model)
        groups = model.param_groups(lr=0.1, weight_decay=0.05)
        for group in groups:
            assert set(group) == {"params", "lr", "lr_scale", "weight_decay"}
            for parameter in group["params"]:
                name = names[id(parameter)]
                assert group["lr_scale"] == pytest.approx(wanted[name])
                assert group["lr"] == pytest.approx(0.1 * wanted[name])
                plain = parameter.ndim == 1 or name.endswith("attention_biases")
                assert group["weight_decay"] == (0.0 if plain else 0.05)
        settings = [(group["lr_scale"], group["weight_decay"]) for group in groups]
        assert len(set(settings)) == len(settings) == 2 * sum(DEPTHS)

    def test_frozen_ones_are_left_out(self, model):
        model.patch_embed.requires_grad_(False)
        model.head.bias.requires_grad_(False)
        listed = {id(p) for group in model.param_groups(0.1) for p in group["params"]}
        trainable = {id(p) for p in model.parameters() if p.requires_grad}
        assert listed == trainable
        assert id(model.head.bias) not in listed

    def test_an_optimiser_takes_them(self, model, image):
        optimiser = torch.optim.AdamW(model.param_groups(lr=0.01, weight_decay=0.05))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        out = model.train()(image(2, 32, 32)).square().sum()
        (out + model.classify(image(2, 32, 32)).square().sum()).backward()
        optimiser.step()
        same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
        assert same == []

    def test_no_weight_decay_by_default(self, model):
        assert {group["weight_decay"] for group in model.param_groups(0.1)} == {0.0}


def test_names_without_weight_decay(model):
    assert model.no_weight_decay_keywords() == {"attention_biases"}
    blocks = [f"layers.{i}.blocks.{j}" for i in (1, 2, 3) for j in range(DEPTHS[i])]
    assert model.no_weight_decay() == {f"{block}.attn.attention_biases" for block in blocks}
