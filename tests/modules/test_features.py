"""features.py and TinyViT.forward_intermediates: the stages' maps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.modules import FeatureInfo, FeatureMaps
from tinyvit.modules.tiny_vit import select_stages

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
