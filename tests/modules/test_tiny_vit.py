"""TinyViT: arguments, keys, any size and configuration, head, copies, pickles, gradients."""

import ast
import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tinyvit.modules
from tinyvit.modules import SAM3Neck, TinyViT

KEYS = Path(__file__).parents[1] / "data" / "keys"

WIDTHS = {
    "5m": {"embed_dims": (64, 128, 160, 320), "num_heads": (2, 4, 5, 10)},
    "11m": {"embed_dims": (64, 128, 256, 448), "num_heads": (2, 4, 8, 14)},
    "21m": {"embed_dims": (96, 192, 384, 576), "num_heads": (3, 6, 12, 18)},
}
CLASSIFIER = {"strides": (2, 2, 2), "neck_dim": None}
WINDOWS_384 = {"img_size": 384, "window_sizes": (12, 12, 24, 12)}
WINDOWS_512 = {"img_size": 512, "window_sizes": (16, 16, 32, 16)}


def on_meta(**arguments):
    with torch.device("meta"):
        return TinyViT(**arguments)


def ceil(number, by):
    return -(-number // by)


class TestContract:
    def test_the_public_names(self):
        ten = "Conv2d_BN PatchEmbed MBConv PatchMerging ConvLayer Mlp Attention TinyViTBlock"
        ten = {*ten.split(), "BasicLayer", "TinyViT"}
        ours = {"MLP", "DropPath", "LayerNorm2d", "FeatureInfo", "FeatureMaps", "SAM3Neck"}
        assert set(tinyvit.modules.__all__) == ten | ours | {"freeze_batch_stats"}
        assert all(hasattr(tinyvit.modules, name) for name in tinyvit.modules.__all__)

    def test_arguments(self, describe_arguments):
        assert describe_arguments(TinyViT) == (
            "img_size=224, in_chans=3, num_classes=1000, embed_dims=(96, 192, 384, 768), "
            "depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_sizes=(7, 7, 14, 7), "
            "mlp_ratio=4.0, drop_rate=0.0, drop_path_rate=0.1, use_checkpoint=False, "
            "mbconv_expand_ratio=4.0, local_conv_size=3, layer_lr_decay=1.0",
            "strides=None, stem='conv', neck_dim=256, neck_size=None, head=True",
        )

    def test_children(self, make_tiny_vit):
        names = {name for name, _ in make_tiny_vit().named_children()}
        assert names == {"patch_embed", "layers", "norm_head", "head", "neck"}

    @pytest.mark.parametrize(
        "file, arguments",
        [
            ("encoder_5m", WIDTHS["5m"]),
            ("encoder_11m", WIDTHS["11m"]),
            ("encoder_21m", WIDTHS["21m"]),
            ("encoder_21m_384", {**WIDTHS["21m"], **WINDOWS_384}),
            ("encoder_litemedsam", {**WIDTHS["5m"], "stem": "pointwise", "head": False}),
        ],
    )
    def test_state_dict_keys_in_their_order(self, file, arguments):
        rows = [line.split("\t") for line in (KEYS / f"{file}.tsv").read_text().splitlines()]
        wanted = [(key, ast.literal_eval(shape), dtype) for key, shape, dtype in rows]
        state = on_meta(**arguments).state_dict()
        got = [(k, tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in state.items()]
        assert sorted(got) == sorted(wanted)

    @pytest.mark.parametrize(
        "arguments, count",
        [
            ({**WIDTHS["5m"], **CLASSIFIER}, 5_392_764),
            ({**WIDTHS["11m"], **CLASSIFIER}, 10_996_972),
            ({**WIDTHS["21m"], **CLASSIFIER}, 21_198_568),
            ({**WIDTHS["21m"], **CLASSIFIER, **WINDOWS_384}, 21_230_488),
            ({**WIDTHS["21m"], **CLASSIFIER, **WINDOWS_512}, 21_268_120),
            (WIDTHS["5m"], 6_065_532),
            ({**WIDTHS["5m"], "head": False}, 5_743_892),
            (WIDTHS["11m"], 11_702_508),
            (WIDTHS["21m"], 21_936_872),
        ],
    )
    def test_parameter_counts(self, arguments, count):
        assert sum(p.numel() for p in on_meta(**arguments).parameters()) == count

    def test_hooks_on_every_layer_see_tokens(self, make_tiny_vit, image):
        model = make_tiny_vit(layer_lr_decay=0.8)
        seen = {}
        for i, layer in enumerate(model.layers[:3]):
            layer.register_forward_hook(lambda _, a, out, i=i: seen.update({i: out.shape}))
        model(image(2, 64, 48))
        assert seen == {0: (2, 8 * 6, 12), 1: (2, 4 * 3, 16), 2: (2, 4 * 3, 24)}

    def test_hooks_on_the_last_layer_see_tokens(self, make_tiny_vit, image):
        model = make_tiny_vit()
        seen = []
        model.layers[3].register_forward_hook(lambda _, a, out: seen.append(out.shape))
        model(image(2, 64, 48))
        assert seen == [(2, 4 * 3, 24)]


class TestAnySize:
    @settings(max_examples=20)
    @given(height=st.integers(1, 700), width=st.integers(1, 700))
    def test_sam_form(self, make_tiny_vit, height, width):
        model = make_tiny_vit(depths=(1, 1, 1, 1))
        with torch.no_grad():
            y = model(torch.zeros(1, 3, height, width))
        assert y.shape == (1, 16, ceil(height, 16), ceil(width, 16))
        assert y.isfinite().all()

    @given(
        height=st.integers(1, 130),
        width=st.integers(1, 130),
        batch=st.integers(0, 3),
        in_chans=st.integers(1, 4),
    )
    def test_classifier_form(self, make_tiny_vit, height, width, batch, in_chans):
        model = make_tiny_vit(in_chans=in_chans, **CLASSIFIER)
        x = torch.randn(batch, in_chans, height, width)
        with torch.no_grad():
            assert model(x).shape == (batch, 5)
            map_ = model.forward_features(x)
        assert map_.shape == (batch, 24, ceil(height, 32), ceil(width, 32))

    def test_pointwise_form(self, make_tiny_vit, image):
        model = make_tiny_vit(stem="pointwise", head=False)
        assert model(image(2, 33, 21)).shape == (2, 16, 9, 6)

    @pytest.mark.parametrize("size", [(64, 64), (50, 77)])
    def test_an_image_alone_is_the_same_as_in_a_batch(self, make_tiny_vit, image, size):
        model = make_tiny_vit()
        x = image(3, *size)
        together = model(x)
        for i in range(3):
            # matrix products of another height may add in another order: float32 rounding
            torch.testing.assert_close(model(x[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)

    def test_nothing_is_kept_between_calls(self, make_tiny_vit, image):
        model = make_tiny_vit()
        x = image(2, 50, 70)
        before = model(x)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        for size in ((64, 64), (70, 50), (1, 1), (16, 200)):
            model(image(1, *size))
            model.set_imgsz(size)
        assert torch.equal(model(x), before)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_the_declared_size_changes_nothing(self, make_tiny_vit, image):
        x = image(1, 40, 60)
        outputs = [make_tiny_vit(img_size=size)(x) for size in (64, (40, 60), 1024)]
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])

    def test_memory_format_of_the_input_changes_nothing(self, make_tiny_vit, image):
        model = make_tiny_vit()
        x = image(2, 50, 70)
        assert torch.equal(model(x), model(x.contiguous(memory_format=torch.channels_last)))
        assert torch.equal(model(x), model(x.transpose(2, 3).contiguous().transpose(2, 3)))

    @pytest.mark.parametrize(
        "dtype, tolerance",
        [
            (torch.float32, 1e-4),  # two dozen layers of 6e-8 each
            (torch.bfloat16, 0.25),  # 8 bits: 4e-3 at each of two dozen layers
        ],
    )
    def test_close_to_the_float64_result(self, make_tiny_vit, image, dtype, tolerance):
        exact = make_tiny_vit().double()
        x = image(2, 50, 70, dtype=torch.float64)
        wanted = exact(x)
        got = make_tiny_vit().to(dtype)(x.to(dtype))
        assert (got.dtype, wanted.dtype) == (dtype, torch.float64)
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("x", [None, "a.png", [[0.0]]])
    def test_what_is_no_tensor(self, make_tiny_vit, x):
        with pytest.raises(TypeError, match=f"came {type(x).__name__}; tinyvit.Engine takes"):
            make_tiny_vit()(x)

    @pytest.mark.parametrize(
        "shape", [(3, 32, 32), (1, 1, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (1, 3, 32, 0), (9,)]
    )
    def test_what_is_no_batch_of_images(self, make_tiny_vit, shape):
        with pytest.raises(ValueError) as caught:
            make_tiny_vit()(torch.zeros(shape))
        assert str(caught.value) == (
            f"TinyViT wants images [batch, 3, height, width] of at least 1x1, got {list(shape)}"
        )

    def test_whole_numbers(self, make_tiny_vit):
        with pytest.raises(TypeError, match=r"floating-point images, got torch.uint8; tinyvit\."):
            make_tiny_vit()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@settings(max_examples=15)
@given(
    stages=st.integers(1, 4),
    data=st.data(),
    neck_dim=st.sampled_from([None, 6]),
    head=st.booleans(),
    stem=st.sampled_from(["conv", "pointwise"]),
)
def test_random_configurations(stages, data, neck_dim, head, stem):
    def each(values, count=stages):
        return data.draw(st.lists(values, min_size=count, max_size=count))

    dims, strides = each(st.sampled_from([8, 16, 32])), each(st.sampled_from([1, 2]), stages - 1)
    model = TinyViT(
        img_size=16,
        num_classes=4,
        embed_dims=dims,
        depths=each(st.integers(1, 2)),
        num_heads=each(st.sampled_from([1, 2, 4])),
        window_sizes=each(st.integers(1, 8)),
        strides=strides,
        stem=stem,
        neck_dim=neck_dim,
        head=head,
    ).eval()
    x = torch.randn(2, 3, *data.draw(st.tuples(st.integers(1, 30), st.integers(1, 30))))
    sides = [ceil(side, 4) if stem == "conv" else side for side in x.shape[2:]]
    for stride in strides:
        sides = [ceil(side, stride) for side in sides]
    map_shape = (2, neck_dim or dims[-1], *sides)
    with torch.no_grad():
        y = model(x)
        assert model.forward_features(x).shape == map_shape
    assert y.isfinite().all()
    assert y.shape == ((2, 4) if head and neck_dim is None else map_shape)


class TestHead:
    def test_forward_with_and_without_a_neck(self, make_tiny_vit, image):
        x = image(2, 40, 56)
        encoder = make_tiny_vit()
        backbone = encoder.forward_backbone(x)
        assert backbone.shape == (2, 24, 3, 4)
        assert torch.equal(encoder(x), encoder.neck(backbone))
        assert torch.equal(encoder(x), encoder.forward_features(x))
        classifier = make_tiny_vit(neck_dim=None)
        classifier.load_state_dict(encoder.state_dict(), strict=False)
        assert torch.equal(classifier.forward_features(x), backbone)
        assert torch.equal(classifier(x), encoder.classify(x))
        bare = make_tiny_vit(neck_dim=None, head=False)
        assert bare(x).shape == (2, 24, 3, 4)

    def test_logits_are_mean_norm_linear(self, make_tiny_vit, image):
        model = make_tiny_vit(neck_dim=None).double()
        x = image(2, 40, 56, dtype=torch.float64)
        pooled = model.forward_backbone(x).flatten(2).mean(2)
        features = model.norm_head(pooled)
        logits = features @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model.classify(x), logits)
        torch.testing.assert_close(
            model.forward_head(model.forward_backbone(x), pre_logits=True), features
        )

    def test_reset_classifier(self, make_tiny_vit, image):
        model = make_tiny_vit(neck_dim=None).double()
        x = image(2, 16, 16, dtype=torch.float64)
        norm = model.norm_head
        model.reset_classifier(9)
        assert (model.num_classes, model.classify(x).shape) == (9, (2, 9))
        assert model.head.weight.dtype == torch.float64
        assert model.norm_head is norm
        assert torch.equal(model.head.bias, torch.zeros(9, dtype=torch.float64))
        assert not model.head.training
        model.reset_classifier(0)
        assert isinstance(model.head, nn.Identity)
        assert torch.equal(model(x), model.forward_head(model.forward_backbone(x), pre_logits=True))
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)

    def test_zero_classes_from_the_start(self, make_tiny_vit, image):
        model = make_tiny_vit(neck_dim=None, num_classes=0)
        assert model(image(1, 16, 16)).shape == (1, 24)

    def test_without_a_head(self, make_tiny_vit, image):
        model = make_tiny_vit(head=False)
        assert not any("head" in key for key in model.state_dict())
        with pytest.raises(ValueError, match=r"without a classification head; .*reset_classifier"):
            model.classify(image(1, 16, 16))
        model.reset_classifier(4)
        assert model.classify(image(1, 16, 16)).shape == (1, 4)

    def test_a_new_head_takes_over_the_mode(self, make_tiny_vit):
        model = make_tiny_vit(head=False)
        model.reset_classifier(4)
        assert not any(module.training for module in model.modules())

    def test_negative(self, make_tiny_vit):
        with pytest.raises(ValueError, match="num_classes must not be negative, got -1"):
            make_tiny_vit().reset_classifier(-1)
        with pytest.raises(ValueError, match="num_classes must not be negative, got -2"):
            make_tiny_vit(num_classes=-2)

    def test_forward_hq(self, make_tiny_vit, image):
        model = make_tiny_vit()
        x = image(2, 70, 50)
        seen = []
        model.layers[1].register_forward_hook(lambda _, a, out: seen.append(out))
        y, early = model.forward_hq(x)
        assert torch.equal(y, model(x))
        assert early.shape == (2, 5, 4, 16)
        assert torch.equal(early.flatten(1, 2), seen[0])
        backbone, _ = make_tiny_vit(neck_dim=None).forward_hq(x)
        assert backbone.shape == (2, 24, 5, 4)

    def test_forward_hq_wants_three_stages(self, image):
        model = TinyViT(embed_dims=(4, 4), depths=(1, 1), num_heads=(1, 1), window_sizes=(2, 2))
        with pytest.raises(ValueError, match="forward_hq wants at least 3 stages, got 2"):
            model.forward_hq(image(1, 16, 16))


class TestSettings:
    @pytest.mark.parametrize(
        "given, kept, sizes",
        [
            (96, 96, [(24, 24), (12, 12), (6, 6), (6, 6)]),
            ([96, 96], 96, [(24, 24), (12, 12), (6, 6), (6, 6)]),
            ((64, 100), (64, 100), [(16, 25), (8, 13), (4, 7), (4, 7)]),
            ([33], 33, [(9, 9), (5, 5), (3, 3), (3, 3)]),
        ],
    )
    def test_set_imgsz(self, make_tiny_vit, given, kept, sizes):
        model = make_tiny_vit()
        model.set_imgsz(given)
        assert model.img_size == kept
        assert model.patches_resolution == model.patch_embed.patches_resolution == sizes[0]
        assert model.patch_embed.num_patches == sizes[0][0] * sizes[0][1]
        assert [layer.input_resolution for layer in model.layers] == sizes
        for layer, size in zip(model.layers, sizes, strict=True):
            inside = [m for m in layer.modules() if hasattr(m, "input_resolution")]
            assert {module.input_resolution for module in inside} == {size}
        assert make_tiny_vit(img_size=given).img_size == kept

    def test_set_imgsz_default(self, make_tiny_vit):
        model = make_tiny_vit()
        model.set_imgsz()
        assert model.img_size == 1024

    @pytest.mark.parametrize(
        "given, error",
        [
            (0, ValueError),
            ([0, 0], ValueError),
            ([-64, 64], ValueError),
            ((64, 64, 3), ValueError),
            (64.0, TypeError),
            ("64", TypeError),
            (None, TypeError),
        ],
    )
    def test_set_imgsz_refuses_and_changes_nothing(self, make_tiny_vit, given, error):
        model = make_tiny_vit()
        with pytest.raises(error, match="imgsz must be") as caught:
            model.set_imgsz(given)
        assert str(caught.value).endswith(f"got {given!r}")
        assert (model.img_size, model.layers[0].input_resolution) == (64, (16, 16))
        with pytest.raises(error, match="img_size must be"):
            make_tiny_vit(img_size=given)

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"depths": ()}, "depths must name at least one stage"),
            ({"strides": (2, 2)}, r"strides wants 3 numbers .* got \(2, 2\)"),
            ({"num_heads": (1, 5, 2, 3)}, "num_heads must divide dim, got dim=12, num_heads=5"),
            ({"window_sizes": (4, 0, 5, 2)}, r"window_sizes must be positive, got \(4, 0, 5, 2\)"),
            ({"num_heads": (0, 2, 2, 3)}, r"num_heads must be positive, got \(0, 2, 2, 3\)"),
            ({"mbconv_expand_ratio": 0.1}, "at least 1 hidden channel, got 0.1 for in_chans=8"),
            ({"mlp_ratio": 0.0}, "hidden_features must be at least 1, got 0"),
            ({"local_conv_size": 4}, "local_conv_size must be odd.*got 4"),
            ({"stem": "patch"}, "stem must be 'conv' or 'pointwise', got 'patch'"),
            ({"drop_path_rate": 1.5}, "drop_path must be a probability between 0 and 1"),
        ],
    )
    def test_contradictions(self, make_tiny_vit, change, words):
        with pytest.raises(ValueError, match=words):
            make_tiny_vit(**change)

    def test_train_eval_train(self, make_tiny_vit, image):
        model = make_tiny_vit()
        x = image(2, 32, 32)
        wanted = model(x)
        assert model.train() is model and model.training
        model(x)
        assert model.eval() is model
        assert not torch.equal(model(x), wanted)  # the batch has moved the statistics
        model.train()
        model.train()
        assert model(x).shape == wanted.shape

    def test_drop_path_acts_in_training(self, make_tiny_vit, image):
        model = make_tiny_vit(drop_path_rate=0.5).freeze_batch_stats().train()
        x = image(8, 32, 32)
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))

    def test_attention_biases_get_gradients_in_eval_mode(self, make_tiny_vit, image):
        model = make_tiny_vit()
        model(image(2, 40, 40)).square().sum().backward()
        tables = [p for n, p in model.named_parameters() if n.endswith("attention_biases")]
        assert len(tables) == 4
        assert all(table.grad.abs().max() > 0 for table in tables)

    def test_freeze_batch_stats(self, make_tiny_vit, image):
        model = make_tiny_vit(drop_path_rate=0.0)
        x = image(2, 32, 32)
        wanted = model(x)
        assert model.freeze_batch_stats() is model
        frozen = copy.deepcopy(model).train()
        assert torch.equal(frozen(x), wanted)
        assert torch.equal(frozen.eval()(x), wanted)
        assert not torch.equal(frozen.freeze_batch_stats(False).train()(x), wanted)

    def test_set_grad_checkpointing(self, make_tiny_vit, image):
        model = make_tiny_vit().train()
        saving = copy.deepcopy(model)
        saving.set_grad_checkpointing()
        assert saving.arguments()["use_checkpoint"] and not model.arguments()["use_checkpoint"]
        x = image(2, 40, 40)
        for one in (model, saving):
            one(x).square().sum().backward()
        # the same operations on the same numbers
        for (name, p), q in zip(model.named_parameters(), saving.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == ("head" in name)
            assert p.grad is None or torch.equal(p.grad, q.grad)
        assert all(map(torch.equal, model.buffers(), saving.buffers()))
        saving.set_grad_checkpointing(False)
        assert not saving.arguments()["use_checkpoint"]


class TestCopies:
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"img_size": (48, 80), "in_chans": 4, "num_classes": 0, "use_checkpoint": True},
            {**CLASSIFIER, "mlp_ratio": 2.0, "mbconv_expand_ratio": 3.0, "local_conv_size": 5},
            {"stem": "pointwise", "head": False, "drop_rate": 0.1, "drop_path_rate": 0.2},
            {"layer_lr_decay": 0.8},
        ],
    )
    def test_arguments_round_trip(self, make_tiny_vit, image, change):
        model = make_tiny_vit(**change)
        arguments = model.arguments()
        assert json.loads(json.dumps(arguments)) == arguments
        again = TinyViT(**arguments).eval()
        assert again.arguments() == arguments
        again.load_state_dict(model.state_dict())
        x = image(1, 20, 30, channels=model.in_chans)
        assert torch.equal(again(x), model(x))
        assert repr(again) == repr(model)

    def test_arguments_name_every_argument(self, make_tiny_vit, describe_arguments):
        listed = ", ".join(describe_arguments(TinyViT))
        for name in make_tiny_vit().arguments():
            assert f"{name}=" in listed
        assert len(make_tiny_vit().arguments()) == 19

    def test_arguments_after_another_head(self, make_tiny_vit):
        model = make_tiny_vit(head=False)
        model.reset_classifier(3)
        again = TinyViT(**model.arguments())
        assert list(again.state_dict()) == list(model.state_dict()) or (
            set(again.state_dict()) == set(model.state_dict())
        )

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_compute_the_same_on_their_own(self, make_tiny_vit, image, copied):
        model = make_tiny_vit()
        x = image(1, 30, 50)
        wanted = model(x)
        other = copied(model)
        assert torch.equal(other(x), wanted)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(other(x), wanted)

    def test_a_pickle_holds_little_more_than_the_weights(self):
        model = TinyViT(embed_dims=(64, 128, 160, 320), num_heads=(2, 4, 5, 10)).eval()
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        sizes = []
        for thing in (model, model.state_dict()):
            file = io.BytesIO()
            torch.save(thing, file)
            sizes.append(file.tell())
        assert sizes[0] <= 1.02 * sizes[1]

    def test_meta_device(self, make_tiny_vit, image):
        model = make_tiny_vit()
        with torch.device("meta"):
            empty = TinyViT(**model.arguments())
        assert all(tensor.is_meta for tensor in empty.state_dict().values())
        assert empty(image(2, 40, 40).to("meta")).shape == (2, 16, 3, 3)
        filled = empty.to_empty(device="cpu").eval()
        filled.load_state_dict(model.state_dict())
        x = image(1, 40, 40)
        assert torch.equal(filled(x), model(x))

    def test_default_dtype(self, image):
        torch.set_default_dtype(torch.float64)
        try:
            model = TinyViT(img_size=16, embed_dims=(4, 8, 8, 8), num_heads=(1, 2, 2, 2)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert model(image(1, 16, 16, dtype=torch.float64)).dtype == torch.float64

    def test_a_model_built_by_hand_has_no_image_spec(self, make_tiny_vit):
        assert make_tiny_vit().image_spec is None


def test_gradients_are_right(make_tiny_vit, image):
    model = make_tiny_vit(
        embed_dims=(4, 4, 8, 8), depths=(1, 1, 1, 1), window_sizes=(2, 2, 2, 2),
        num_heads=(1, 1, 2, 2), neck_dim=4, num_classes=2,
    ).double()  # fmt: skip
    names = [name for name, _ in model.named_parameters()]

    def run(x, *parameters):
        by_name = dict(zip(names, parameters, strict=True))
        y = torch.func.functional_call(model, by_name, x)
        # a sum of squares keeps layer norm's output from being constant in some directions
        return y.sin().sum((2, 3))

    x = image(1, 40, 24, dtype=torch.float64).requires_grad_()
    inputs = (x, *(parameter.detach().requires_grad_() for parameter in model.parameters()))
    # fast_mode: one random projection of the whole Jacobian, over every parameter and pixel
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    small = image(1, 8, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x).sin(), (small,))


def test_a_student_of_sam_3_gives_a_map_of_one_size() -> None:
    sizes = {"embed_dims": (16, 32, 64, 96), "num_heads": (1, 1, 2, 3), "strides": (2, 2, 2)}
    model = TinyViT(**sizes, neck_dim=24, neck_size=9, head=False).eval()
    assert isinstance(model.neck, SAM3Neck)
    for side in (64, 33):
        assert model(torch.zeros(2, 3, side, side)).shape == (2, 24, 9, 9)
    assert model.arguments()["neck_size"] == 9
    names = [key for key in model.state_dict() if key.startswith("neck.")]
    assert {key.rpartition(".")[0] for key in names} == {"neck.0", "neck.1", "neck.3"}
    assert "neck.0.bias" not in names and "neck.3.bias" in names


def test_a_side_without_a_neck_is_refused() -> None:
    with pytest.raises(ValueError, match="neck_size=72 wants a neck, but neck_dim=None"):
        TinyViT(neck_dim=None, neck_size=72)
    with pytest.raises(ValueError, match="positive"):
        TinyViT(neck_size=0)
