import copy
import re

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tinyvit
from tinyvit.errors import CheckpointError
from tinyvit.modules import TinyViT
from tinyvit.modules.sam.mask_decoder import MaskDecoder, TwoWayTransformer
from tinyvit.train.lora import (
    DECODER_TARGETS,
    ENCODER_TARGETS,
    LoraLinear,
    add_lora,
    base_sha256,
    load_lora,
    lora_layers,
    merge_lora,
    save_lora,
)


def tiny(seed=0):
    torch.manual_seed(seed)
    return TinyViT(
        32, embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), window_sizes=(7, 7),
        strides=(2,), neck_dim=8, head=False, layer_lr_decay=0.5,
    ).eval()  # fmt: skip


def learnt(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_up.copy_(torch.randn(layer.lora_up.shape, generator=generator))
    return model


def answer(model):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(x)


def test_a_fresh_addition_changes_nothing_and_keeps_the_base_s_keys():
    model = tiny()
    before, keys = answer(model), list(model.state_dict())
    names = add_lora(model, rank=2)
    assert torch.equal(answer(model), before)
    assert len(names) == 8  # two blocks of four layers
    kept = [key for key in model.state_dict() if "lora" not in key]
    assert kept == keys
    assert len(model.state_dict()) == len(keys) + 2 * len(names)
    model.load_state_dict(tiny(3).state_dict(), strict=False)
    assert torch.equal(answer(model), answer(tiny(3)))


def test_only_the_additions_get_gradients():
    model = tiny().train()
    add_lora(learnt(model), rank=2)
    learnt(model)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        is_ours = name.rpartition(".")[2] in ("lora_down", "lora_up")
        assert parameter.requires_grad == is_ours, name
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == is_ours, name


def test_merged_is_the_plain_architecture_and_computes_the_same():
    model = tiny()
    add_lora(model, rank=3, alpha=6)
    with_additions = answer(learnt(model))
    assert (with_additions - answer(tiny())).abs().max() > 0.1
    merged = copy.deepcopy(model)
    assert len(merge_lora(merged)) == 8
    assert list(merged.state_dict()) == list(tiny().state_dict())
    assert not lora_layers(merged)
    # float32 sums in another order: 1e-5 of values of order one
    assert (answer(merged) - with_additions).abs().max() < 1e-5
    assert torch.equal(answer(model), with_additions)  # the copy did not touch it
    assert merge_lora(merged) == []


def test_a_layer_computes_what_the_paper_says():
    base = nn.Linear(3, 4)
    layer = LoraLinear(base, rank=2, alpha=1.0)
    nn.init.normal_(layer.lora_up)
    x = torch.randn(5, 3)
    added = 0.5 * (layer.lora_up @ layer.lora_down)
    wanted = x @ (base.weight + added).T + base.bias
    assert torch.allclose(layer(x), wanted, atol=1e-6)  # float32, another order
    assert layer.weight is base.weight
    assert "rank=2" in repr(layer)
    without_bias = LoraLinear(nn.Linear(3, 4, bias=False), rank=1, alpha=1.0)
    assert without_bias.bias is None and without_bias.merged().bias is None


def test_dropout_acts_in_training_only():
    layer = LoraLinear(nn.Linear(64, 4), rank=2, alpha=2.0, dropout=0.5)
    nn.init.normal_(layer.lora_up)
    x = torch.randn(3, 64)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_layer_wise_rates_hold_for_additions():
    model = tiny()
    scales = {name: p.lr_scale for name, p in model.named_parameters()}
    add_lora(model, rank=2)
    groups = model.param_groups(lr=1.0)
    assert {group["lr_scale"] for group in groups} == {
        scales["layers.1.blocks.0.attn.qkv.weight"],
        scales["layers.1.blocks.1.attn.qkv.weight"],
    }


def test_targets_choose_layers_of_encoder_and_decoder():
    model = tiny()
    assert [n.rpartition(".")[2] for n in add_lora(model, 2, targets=("fc1",))] == ["fc1"] * 2
    decoder = MaskDecoder(transformer_dim=16, transformer=TwoWayTransformer(2, 16, 2, 32))
    names = add_lora(decoder, 2, targets=DECODER_TARGETS)
    assert len(names) == 4 * (2 * 3 + 1)
    assert all("attn" in name for name in names)
    decoder = MaskDecoder(transformer_dim=16, transformer=TwoWayTransformer(2, 16, 2, 32))
    with pytest.raises(ValueError, match=r"MaskDecoder has no layer called qkv, proj"):
        add_lora(decoder, 2, targets=ENCODER_TARGETS)


def test_again_with_the_same_choices_keeps_what_was_learnt():
    model = tiny()
    add_lora(model, 2)
    before = answer(learnt(model))
    model.requires_grad_(False)
    add_lora(model, 2)
    assert torch.equal(answer(model), before)
    assert sum(p.requires_grad for p in model.parameters()) == 16
    with pytest.raises(ValueError, match=r"on 8 layers .*\(2, 2.0, 0.0\).*\(3, 3.0, 0.0\)"):
        add_lora(model, 3)
    with pytest.raises(ValueError, match=r"wanted 2 layers.*merge_lora first"):
        add_lora(model, 2, targets=("fc1",))


@pytest.mark.parametrize(
    "choices, words",
    [
        ({"rank": 0}, "at least 1, got 0"),
        ({"alpha": 0.0}, "above 0, got 0"),
        ({"dropout": 1.0}, "below 1, got 1"),
        ({"targets": ("fc3",)}, "out of qkv, proj, .* got fc3"),
        ({"targets": ()}, "got none"),
    ],
)
def test_wrong_choices_are_named(choices, words):
    with pytest.raises(ValueError, match=words):
        add_lora(tiny(), **choices)


def test_a_file_holds_the_additions_alone_and_puts_them_back(tmp_path):
    model = tiny()
    add_lora(model, rank=2, alpha=4, targets=("qkv", "fc2"), dropout=0.1)
    learnt(model)
    path = save_lora(model, tmp_path / "additions.safetensors")
    with safe_open(path, framework="pt") as file:
        assert all(key.rpartition(".")[2] in ("lora_down", "lora_up") for key in file.keys())  # noqa: SIM118
    other = tiny()
    assert len(load_lora(other, path)) == 4
    assert torch.equal(answer(other), answer(model))
    assert next(iter(lora_layers(other).values())).alpha == 4.0
    with pytest.raises(ValueError, match="merge_lora first"):
        load_lora(other, path)


def test_another_base_is_refused_with_both_hashes(tmp_path):
    model = tiny()
    add_lora(model, 2)
    path = save_lora(learnt(model), tmp_path / "additions.safetensors")
    other = tiny(seed=9)
    before = answer(other)
    with pytest.raises(CheckpointError) as caught:
        load_lora(other, path)
    assert base_sha256(tiny())[:16] in str(caught.value)
    assert base_sha256(other)[:16] in str(caught.value)
    assert torch.equal(answer(other), before) and not lora_layers(other)


def test_the_base_s_hash_does_not_see_additions():
    model = tiny()
    add_lora(model, 2)
    assert base_sha256(learnt(model)) == base_sha256(tiny()) != base_sha256(tiny(1))


def test_files_of_something_else_are_refused(tmp_path):
    path = tinyvit.checkpoints.write_state_dict(tmp_path / "a.safetensors", tiny().state_dict())
    with pytest.raises(CheckpointError, match="holds no low-rank additions"):
        load_lora(tiny(), path)
    with pytest.raises(ValueError, match="no low-rank additions to save"):
        save_lora(tiny(), path)


def test_a_file_that_does_not_fit_names_everything(tmp_path):
    model = tiny()
    add_lora(model, 2)
    path = save_lora(model, tmp_path / "additions.safetensors")
    file = tinyvit.checkpoints.read_state_dict(path)
    tensors = dict(file.tensors)
    first, second = sorted(tensors)[:2]
    tensors["odd.lora_up"] = tensors.pop(first)
    tensors[second] = torch.zeros(7, 7)
    tinyvit.checkpoints.write_state_dict(path, tensors, metadata=file.metadata)
    base = tiny()
    with pytest.raises(CheckpointError) as caught:
        load_lora(base, path)
    for name, came in (
        (first, "came nothing"),
        ("odd.lora_up", "wanted nothing"),
        (second, "[7, 7]"),
    ):
        assert re.search(rf"{name}: [^;]*{re.escape(came)}", str(caught.value))
    assert not lora_layers(base)


def test_an_engine_runs_the_additions(make_tiny_vit):
    model = make_tiny_vit()
    add_lora(model, rank=2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_up.normal_(std=1e-4)  # too little for a comparison with the model to see
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
    got = tinyvit.Engine(model, image_spec=tinyvit.ImageSpec.sam(64)).backend(x)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
