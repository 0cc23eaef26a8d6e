"""The fast form against the plain model, packed kernels against public ones, windows and back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyvit.inference import fast_encoder
from tinyvit.inference import fast_encoder as deploy
from tinyvit.inference.fast_encoder import (
    DeployedTinyViT,
    PackedKernels,
    PlainKernels,
    choose_kernels,
    copy_from_windows,
    copy_to_windows,
)
from tinyvit.inference.fold import Weights
from tinyvit.modules import FeatureMaps
from tinyvit.modules.functional import partition, unpartition

# float32 on both sides; folding rounds the weights once more (errors of 3e-6 were measured)
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
KERNELS = [PlainKernels(torch.float32), choose_kernels(torch.float32)]
FORMS = {
    "SAM encoder": {},
    "classifier": {"strides": (2, 2, 2), "neck_dim": None},
    "trunk": {"neck_dim": None, "head": False},
    "pointwise stem": {"stem": "pointwise", "head": False},
    "wide local convolution": {"local_conv_size": 5, "mlp_ratio": 2.0},
    "four channels": {"in_chans": 4},
}


@pytest.fixture(params=KERNELS, ids=lambda kernels: kernels.name)
def kernels(request):
    return request.param


@pytest.fixture(params=[1, 4 << 10, 4 << 20], ids=["tiny pieces", "small pieces", "pieces"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(deploy, "PIECE", request.param)


@torch.inference_mode()
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_it_gives_what_the_model_gives(make_tiny_vit, form, kernels, pieces):
    model = make_tiny_vit(**form)
    deployed = DeployedTinyViT(model, kernels)
    for shape in ((1, 64, 64), (3, 33, 47), (0, 32, 32), (2, 1, 1)):
        x = torch.randn(shape[0], model.in_chans, *shape[1:])
        torch.testing.assert_close(deployed(x)[0], model.forward_features(x), **CLOSE)
        for got, wanted in zip(deployed(x, None, True), FeatureMaps(model)(x), strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)
        if model.head is not None:
            torch.testing.assert_close(deployed(x, "logits")[0], model.classify(x), **CLOSE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 2), st.integers(1, 130), st.integers(1, 130), st.sampled_from([1, 2000, 1e5]))
def test_any_size_in_any_pieces(make_tiny_vit, b, h, w, piece):
    model = make_tiny_vit()
    x = torch.randn(b, 3, h, w)
    kept, deploy.PIECE = deploy.PIECE, int(piece)
    try:
        with torch.inference_mode():
            got = DeployedTinyViT(model, KERNELS[-1])(x)[0]
            torch.testing.assert_close(got, model(x), **CLOSE)
    finally:
        deploy.PIECE = kept


@torch.inference_mode()
def test_bf16_is_near(make_tiny_vit):
    model = make_tiny_vit()
    x = torch.randn(2, 3, 75, 52)
    wanted = model(x)
    got = DeployedTinyViT(model, choose_kernels(torch.bfloat16))(x)[0]
    assert got.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(got.float().flatten(), wanted.flatten(), dim=0)
    assert cosine > 0.999  # 8 bits of mantissa through some thirty layers


@torch.inference_mode()
def test_it_keeps_nothing_of_the_model_and_leaves_it_alone(make_tiny_vit):
    model = make_tiny_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    deployed = DeployedTinyViT(model, KERNELS[0])
    x = torch.randn(1, 3, 40, 40)
    wanted = deployed(x)[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(deployed(x)[0], wanted)


def test_head_of_zero_classes_gives_features(make_tiny_vit):
    model = make_tiny_vit(num_classes=0, neck_dim=None)
    x = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        got = DeployedTinyViT(model, KERNELS[0])(x, "logits")[0]
        torch.testing.assert_close(got, model.classify(x), **CLOSE)


def test_logits_without_a_head_are_an_error(make_tiny_vit):
    deployed = DeployedTinyViT(make_tiny_vit(head=False), KERNELS[0])
    with pytest.raises(ValueError, match="without a classification head"):
        deployed(torch.randn(1, 3, 32, 32), "logits")


@given(st.integers(0, 5), st.integers(1, 60), st.integers(1, 10**6), st.integers(1, 9))
def test_pieces_cover_every_row_once_in_order(batch, rows, bytes_per_row, multiple):
    seen = []
    for images, top, bottom in deploy._pieces(batch, rows, bytes_per_row, multiple):
        assert top % multiple == 0 or top == 0
        assert bottom % multiple == 0 or bottom == rows
        for i in range(*images.indices(batch)):
            seen += [(i, row) for row in range(top, bottom)]
    assert sorted(seen) == [(i, row) for i in range(batch) for row in range(rows)]


# both accumulate in float32; bf16 results may then round to neighbouring values of 8 bits
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2e-2},
}


def random_weights(*shape, **settings):
    noise = np.random.default_rng(0)
    weight, bias = noise.standard_normal(shape), noise.standard_normal(shape[0])
    return Weights(weight.astype(np.float32), bias.astype(np.float32), **settings)


def tensors(weights):
    return torch.from_numpy(weights.weight), torch.from_numpy(weights.bias)


@pytest.fixture(autouse=True)
def forget_choices():
    choose_kernels.cache_clear()
    yield
    choose_kernels.cache_clear()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_and_public_kernels_agree(dtype):
    try:
        packed = fast_encoder._trial(PackedKernels(dtype))
    except (RuntimeError, AttributeError) as err:
        pytest.skip(f"this torch has no packed operators: {err}")
    for ours, theirs in zip(packed, fast_encoder._trial(PlainKernels(dtype)), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


def test_public_kernels_are_the_textbook():
    kernels = PlainKernels(torch.float32)
    weights = random_weights(6, 4)
    x, add = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    wanted = F.linear(x, *tensors(weights))
    torch.testing.assert_close(kernels.linear(weights)(x), wanted)
    torch.testing.assert_close(kernels.linear(weights, "gelu")(x), F.gelu(wanted))
    torch.testing.assert_close(kernels.linear(weights)(x, add), wanted + add)
    conv = random_weights(4, 1, 3, 3, stride=2, pad=1, groups=4)
    image = torch.randn(1, 4, 7, 6)
    wanted = F.conv2d(image, *tensors(conv), 2, 1, groups=4)
    torch.testing.assert_close(kernels.conv(conv, "gelu")(image), F.gelu(wanted))
    wanted = F.conv2d(image, *tensors(conv), 2, (0, 1), groups=4)
    torch.testing.assert_close(kernels.conv(conv)(image, pad_rows=0), wanted)


def test_the_residual_is_not_written_to():
    for kernels in (PlainKernels(torch.float32), choose_kernels(torch.float32)):
        weights = random_weights(4, 4)
        x, add = torch.randn(5, 4), torch.randn(5, 4)
        before = add.clone()
        kernels.linear(weights)(x, add)
        assert torch.equal(add, before)


def test_missing_operators_mean_public_ones(monkeypatch):
    def missing(self, weights, after="none"):
        raise AttributeError("no such operator")

    monkeypatch.setattr(PackedKernels, "linear", missing)
    assert choose_kernels(torch.float32).name == "public operators"


def test_operators_that_give_something_else_are_not_used(monkeypatch):
    def wrong(self, weights, after="none"):
        return PlainKernels(self.dtype).linear(weights)  # leaves the GELU out

    monkeypatch.setattr(PackedKernels, "linear", wrong)
    assert choose_kernels(torch.float32).name == "public operators"


def test_the_choice_is_made_once(monkeypatch):
    first = choose_kernels(torch.bfloat16)
    monkeypatch.setattr(fast_encoder, "_trial", None)  # would fail if it were asked again
    assert choose_kernels(torch.bfloat16) is first


sizes = st.integers(1, 17)


@given(st.integers(0, 3), sizes, sizes, st.integers(1, 8))
def test_zero_padding_gives_the_plain_windows_and_the_way_back_gives_the_map(b, h, w, side):
    x = torch.randn(b, h, w, 3)
    windows = copy_to_windows(x, side, torch.zeros(3))
    assert torch.equal(windows, partition(x, side))
    assert torch.equal(copy_from_windows(windows, side, x), x)
    assert torch.equal(unpartition(windows, side, b, (h, w)), x)


def test_padding_stands_wherever_a_window_leaves_the_map():
    padding = torch.tensor([7.0, -1.0])
    x = torch.randn(1, 4, 5, 2)
    windows = copy_to_windows(x, 3, padding).view(2, 2, 3, 3, 2)
    as_map = windows.transpose(1, 2).reshape(6, 6, 2)
    assert torch.equal(as_map[:4, :5], x[0])
    assert (as_map[4:] == padding).all()
    assert (as_map[:, 5:] == padding).all()
