"""The stages' maps, learning-rate groups, and how stages, neck and first weights are made."""

import copy
import io
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinyvit.image_spec import ImageSpec
from tinyvit.modules import (
    BasicLayer,
    ConvLayer,
    FeatureInfo,
    FeatureMaps,
    LayerNorm2d,
    PatchMerging,
    TinyViT,
)
from tinyvit.modules.stage import check_strides, make_neck, select_stages
from tinyvit.modules.tiny_vit import init_weights

FORMS = pytest.mark.parametrize(
    "form, reductions",
    [
        ({"strides": (2, 2, 1)}, [4, 8, 16, 16]),
        ({"strides": (2, 2, 2)}, [4, 8, 16, 32]),
        ({"stem": "pointwise"}, [1, 2, 4, 4]),
        ({"strides": (1, 1, 1)}, [4, 4, 4, 4]),
    ],
    ids=["sam", "classifier", "pointwise", "dense"],
)


@pytest.mark.parametrize(
    "indices, stages",
    [
        (None, (0, 1, 2, 3)),
        (1, (3,)),
        (2, (2, 3)),
        (4, (0, 1, 2, 3)),
        ([0], (0,)),
        ((3, 1), (1, 3)),
        ([-1, -4], (0, 3)),
        ([1, -3, 1], (1,)),
        (range(2), (0, 1)),
    ],
)
def test_select_stages(indices, stages):
    assert select_stages(indices, 4) == stages


@pytest.mark.parametrize("indices", [[4], [-5], [0, 7], []])
def test_select_stages_that_do_not_exist(indices):
    with pytest.raises(ValueError) as caught:
        select_stages(indices, 4)
    words = f"indices must name stages 0 to 3 (or -4 to -1), got {tuple(indices)}"
    assert str(caught.value) == words


@pytest.mark.parametrize("count", [0, -1, 9])
def test_select_stages_by_an_impossible_count(count):
    with pytest.raises(ValueError, match="indices must name stages"):
        select_stages(count, 4)


@pytest.mark.parametrize("count", [5, 8])
def test_select_more_stages_than_there_are(count):
    with pytest.raises(ValueError, match="indices must name stages"):
        select_stages(count, 4)


def test_feature_info_is_a_list_with_accessors():
    info = FeatureInfo([{"num_chs": 8, "reduction": 4, "module": "layers.0.blocks"}])
    assert info == [{"num_chs": 8, "reduction": 4, "module": "layers.0.blocks"}]
    assert (info.channels(), info.reduction(), info.module_name()) == (
        [8],
        [4],
        ["layers.0.blocks"],
    )


@FORMS
def test_feature_info(make_tiny_vit, form, reductions):
    model = make_tiny_vit(**form)
    info = model.feature_info
    assert info.channels() == [8, 12, 16, 24]
    assert info.reduction() == reductions
    assert info.module_name() == [f"layers.{i}.blocks" for i in range(4)]
    for name in info.module_name():
        model.get_submodule(name)


@FORMS
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_maps_have_the_channels_and_sizes_of_the_info(make_tiny_vit, form, reductions, size):
    model = make_tiny_vit(**form)
    with torch.no_grad():
        out, maps = model.forward_intermediates(torch.zeros(1, 3, *size))
    for x, reduction, width in zip(maps, reductions, (8, 12, 16, 24), strict=True):
        assert x.shape == (1, width, -(-size[0] // reduction), -(-size[1] // reduction))
    assert out.shape == (1, 16, *maps[-1].shape[2:])


class TestForwardIntermediates:
    def test_maps_are_what_the_blocks_give(self, make_tiny_vit, image):
        model = make_tiny_vit()
        x = image(2, 50, 70)
        seen = {}
        for i, layer in enumerate(model.layers):
            layer.blocks[-1].register_forward_hook(lambda _, a, out, i=i: seen.update({i: out}))
        out, maps = model.forward_intermediates(x)
        for i, map_ in enumerate(maps):
            tokens = map_ if i == 0 else map_.flatten(2).transpose(1, 2)
            assert torch.equal(tokens, seen[i])
        assert torch.equal(out, model.forward_features(x))
        assert torch.equal(model.neck(maps[-1]), out)

    def test_the_last_map_is_the_backbone_s(self, make_tiny_vit, image):
        model = make_tiny_vit(neck_dim=None)
        x = image(1, 40, 40)
        out, [last] = model.forward_intermediates(x, 1)
        assert torch.equal(out, model.forward_backbone(x))
        assert torch.equal(last, out)

    @pytest.mark.parametrize("indices", [1, [0, 2], [-2], None])
    def test_chosen_maps_equal_those_of_all(self, make_tiny_vit, image, indices):
        model = make_tiny_vit()
        x = image(1, 33, 50)
        everything = model.forward_intermediates(x, intermediates_only=True)
        wanted = [everything[i] for i in select_stages(indices, 4)]
        out, maps = model.forward_intermediates(x, indices)
        # the same operations, whichever maps are kept
        assert all(map(torch.equal, maps, wanted))
        assert torch.equal(out, model(x))
        assert all(
            map(torch.equal, model.forward_intermediates(x, indices, intermediates_only=True), maps)
        )

    def test_stop_early_runs_nothing_more(self, make_tiny_vit, image):
        model = make_tiny_vit()
        ran = []
        for i, layer in enumerate(model.layers):
            layer.blocks[0].register_forward_pre_hook(lambda *_, i=i: ran.append(i))
            if layer.downsample is not None:
                layer.downsample.register_forward_pre_hook(lambda *_, i=i: ran.append(f"down{i}"))
        x = image(1, 32, 32)
        out, maps = model.forward_intermediates(x, [0, 1], stop_early=True)
        assert ran == [0, "down0", 1]
        assert torch.equal(out, maps[1])
        assert len(maps) == 2
        ran.clear()
        model.forward_intermediates(x, [0], intermediates_only=True)
        assert ran == [0]

    def test_nhwc(self, make_tiny_vit, image):
        model = make_tiny_vit()
        x = image(2, 30, 45)
        usual = model.forward_intermediates(x, intermediates_only=True)
        turned = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
        assert all(
            torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(usual, turned, strict=True)
        )

    def test_bad_arguments(self, make_tiny_vit, image):
        model = make_tiny_vit()
        with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC', got 'NLC'"):
            model.forward_intermediates(image(1, 16, 16), output_fmt="NLC")
        with pytest.raises(ValueError, match=r"indices must name stages 0 to 3 .*got \(4,\)"):
            model.forward_intermediates(image(1, 16, 16), [4])


class TestFeatureMaps:
    def test_gives_the_chosen_maps(self, make_tiny_vit, image):
        encoder = make_tiny_vit(neck_dim=None, head=False, strides=(2, 2, 2))
        model = FeatureMaps(encoder, (1, -1)).eval()
        x = image(2, 70, 50)
        wanted = encoder.forward_intermediates(x, [1, 3], intermediates_only=True)
        assert all(map(torch.equal, model(x), wanted))
        assert model.out_indices == (1, 3)
        assert model.feature_info.channels() == [12, 24]
        assert model.feature_info.reduction() == [8, 32]

    def test_all_maps_by_default(self, make_tiny_vit, image):
        model = FeatureMaps(make_tiny_vit())
        assert len(model(image(1, 16, 16))) == 4
        assert len(model.feature_info) == 4

    def test_every_parameter_gets_a_gradient(self, make_tiny_vit, image):
        encoder = make_tiny_vit(neck_dim=None, head=False)
        model = FeatureMaps(encoder, (1, 2, 3)).train()
        sum(map_.square().mean() for map_ in model(image(2, 64, 64))).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []

    def test_unknown_stage(self, make_tiny_vit):
        with pytest.raises(ValueError, match=r"indices must name stages 0 to 3 .*got \(1, 9\)"):
            FeatureMaps(make_tiny_vit(), (1, 9))


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


@pytest.mark.parametrize(
    "stages, strides", [(1, ()), (2, (2,)), (3, (2, 2)), (4, (2, 2, 1)), (5, (2, 2, 1, 2))]
)
def test_strides_left_out_are_sam_s(stages, strides):
    assert check_strides(None, stages) == strides


def test_strides_become_a_tuple():
    assert check_strides([2, 1, 2], 4) == (2, 1, 2)


@pytest.mark.parametrize("strides", [(), (2, 2), (2, 2, 3), (0, 2, 2), (2, 2, 1, 1)])
def test_bad_strides(strides):
    with pytest.raises(ValueError) as caught:
        check_strides(strides, 4)
    assert str(caught.value) == (
        f"strides wants 3 numbers (1 or 2), one for each merge between 4 stages, got {strides}"
    )


def test_at_least_one_stage():
    with pytest.raises(ValueError, match="depths must name at least one stage, got none"):
        check_strides(None, 0)


@pytest.mark.parametrize("name", ["embed_dims", "num_heads", "window_sizes"])
@pytest.mark.parametrize("values", [(4, 4, 4), (4, 4, 4, 4, 4)])
def test_every_stage_is_named_once(make_tiny_vit, name, values):
    with pytest.raises(ValueError) as caught:
        make_tiny_vit(**{name: values})
    words = f"{name} wants 4 numbers, one for each stage of depths, got {values}"
    assert str(caught.value) == words


def test_empty_embed_dims(make_tiny_vit):
    with pytest.raises(ValueError, match="embed_dims wants 4 numbers"):
        make_tiny_vit(embed_dims=())


@given(
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    rate=st.floats(0, 1),
)
def test_drop_path_rises_linearly_over_all_blocks(depths, rate):
    stages = len(depths)
    with torch.device("meta"):
        model = TinyViT(
            embed_dims=[4] * stages,
            depths=depths,
            num_heads=[1] * stages,
            window_sizes=[2] * stages,
            drop_path_rate=rate,
        )
    rates = [block.drop_path.drop_prob for layer in model.layers for block in layer.blocks]
    wanted = torch.linspace(0, rate, sum(depths), dtype=torch.float64)
    assert rates == pytest.approx(wanted.tolist(), abs=1e-12)


def test_default_drop_path_rate():
    with torch.device("meta"):
        model = TinyViT()
    assert model.layers[3].blocks[1].drop_path.drop_prob == pytest.approx(0.1)


def test_stages(make_tiny_vit):
    model = make_tiny_vit(strides=(2, 1, 2), mlp_ratio=3.0, drop_rate=0.2, local_conv_size=5)
    assert [type(layer) for layer in model.layers] == [ConvLayer] + 3 * [BasicLayer]
    merges = [layer.downsample for layer in model.layers]
    assert [type(merge) for merge in merges[:3]] == 3 * [PatchMerging]
    assert [merge.stride for merge in merges[:3]] == [2, 1, 2]
    assert [merge.out_dim for merge in merges[:3]] == [12, 16, 24]
    assert merges[3] is None
    block = model.layers[2].blocks[1]
    assert (block.dim, block.num_heads, block.window_size) == (16, 2, 5)
    assert (block.mlp.fc1.out_features, block.mlp.drop.p) == (48, 0.2)
    assert block.local_conv.c.kernel_size == (5, 5)
    assert not any(layer.use_checkpoint for layer in model.layers)
    assert all(layer.use_checkpoint for layer in make_tiny_vit(use_checkpoint=True).layers)


def test_neck():
    neck = make_neck(12, 8, None)
    assert [type(part) for part in neck] == [nn.Conv2d, LayerNorm2d, nn.Conv2d, LayerNorm2d]
    assert {k: tuple(v.shape) for k, v in neck.state_dict().items()} == {
        "0.weight": (8, 12, 1, 1),
        "1.weight": (8,),
        "1.bias": (8,),
        "2.weight": (8, 8, 3, 3),
        "3.weight": (8,),
        "3.bias": (8,),
    }
    assert neck[1].eps == neck[3].eps == 1e-6
    assert neck(torch.zeros(2, 12, 3, 5)).shape == (2, 8, 3, 5)


def test_first_weights():
    model = TinyViT(img_size=32, embed_dims=(8, 16, 64, 128), num_heads=(1, 1, 2, 4))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        if isinstance(module, nn.LayerNorm | LayerNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
    assert torch.equal(model.layers[0].blocks[0].conv3.bn.weight, torch.zeros(8))


def test_init_weights_leaves_other_modules_alone():
    conv = nn.Conv2d(2, 3, 1)
    before = conv.weight.clone()
    init_weights(conv)
    assert torch.equal(conv.weight, before)


class TestTimmsConveniences:
    def test_facts(self, make_tiny_vit):
        model = make_tiny_vit(neck_dim=None, num_classes=5)
        model.image_spec = ImageSpec.timm(64)
        assert model.num_features == model.head_hidden_size == model.embed_dims[-1]
        assert model.get_classifier() is model.head
        config = model.pretrained_cfg
        assert config == model.default_cfg
        assert config["num_classes"] == 5
        assert config["mean"] == pytest.approx((0.485, 0.456, 0.406))
        assert (config["interpolation"], config["crop_mode"]) == ("bicubic", "center")
        assert config["crop_pct"] == pytest.approx(0.95, abs=0.01)

    @pytest.mark.parametrize("coarse", [False, True])
    def test_every_parameter_has_a_group(self, make_tiny_vit, coarse):
        model = make_tiny_vit()
        groups = model.group_matcher(coarse)
        patterns = [groups["stem"], *(pattern for pattern, _ in groups["blocks"])]
        for name, _ in model.named_parameters():
            assert any(re.match(pattern, name) for pattern in patterns), name

    def test_pruned_stages_are_gone(self, make_tiny_vit, image):
        model, whole = make_tiny_vit(), make_tiny_vit()
        x = image(1, 48, 48)
        wanted = whole.forward_intermediates(x, (0, 1), intermediates_only=True)
        assert model.prune_intermediate_layers((0, 1)) == [0, 1]
        found = model.forward_intermediates(x, (0, 1), intermediates_only=True)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        assert torch.equal(model(x), wanted[-1])
        again = TinyViT(**model.arguments())
        again.load_state_dict(model.state_dict())
        assert sum(p.numel() for p in model.parameters()) < sum(
            p.numel() for p in whole.parameters()
        )
        with pytest.raises(ValueError, match="head and neck belong to stage"):
            whole.prune_intermediate_layers((0,), prune_head=False)
