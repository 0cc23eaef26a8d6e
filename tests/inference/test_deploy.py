"""The deploy form against the plain model: every size, batch, cut into pieces and precision."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyvit.inference import fast_encoder as deploy
from tinyvit.inference.fast_encoder import DeployedTinyViT, PlainKernels, choose_kernels
from tinyvit.modules import FeatureMaps

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
        torch.testing.assert_close(deployed.features(x), model.forward_features(x), **CLOSE)
        for got, wanted in zip(deployed.stages(x), FeatureMaps(model)(x), strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)
        if model.head is not None:
            torch.testing.assert_close(deployed.logits(x), model.classify(x), **CLOSE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 2), st.integers(1, 130), st.integers(1, 130), st.sampled_from([1, 2000, 1e5]))
def test_any_size_in_any_pieces(make_tiny_vit, b, h, w, piece):
    model = make_tiny_vit()
    x = torch.randn(b, 3, h, w)
    kept, deploy.PIECE = deploy.PIECE, int(piece)
    try:
        with torch.inference_mode():
            got = DeployedTinyViT(model, KERNELS[-1]).features(x)
            torch.testing.assert_close(got, model(x), **CLOSE)
    finally:
        deploy.PIECE = kept


@torch.inference_mode()
def test_bf16_is_near(make_tiny_vit):
    model = make_tiny_vit()
    x = torch.randn(2, 3, 75, 52)
    wanted = model(x)
    got = DeployedTinyViT(model, choose_kernels(torch.bfloat16)).features(x)
    assert got.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(got.float().flatten(), wanted.flatten(), dim=0)
    assert cosine > 0.999  # 8 bits of mantissa through some thirty layers


@torch.inference_mode()
def test_it_keeps_nothing_of_the_model_and_leaves_it_alone(make_tiny_vit):
    model = make_tiny_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    deployed = DeployedTinyViT(model, KERNELS[0])
    x = torch.randn(1, 3, 40, 40)
    wanted = deployed.features(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(deployed.features(x), wanted)


def test_head_of_zero_classes_gives_features(make_tiny_vit):
    model = make_tiny_vit(num_classes=0, neck_dim=None)
    x = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        got = DeployedTinyViT(model, KERNELS[0]).logits(x)
        torch.testing.assert_close(got, model.classify(x), **CLOSE)


def test_logits_without_a_head_are_an_error(make_tiny_vit):
    deployed = DeployedTinyViT(make_tiny_vit(head=False), KERNELS[0])
    with pytest.raises(ValueError, match="without a classification head"):
        deployed.logits(torch.randn(1, 3, 32, 32))


@given(st.integers(0, 5), st.integers(1, 60), st.integers(1, 10**6), st.integers(1, 9))
def test_pieces_cover_every_row_once_in_order(batch, rows, bytes_per_row, multiple):
    seen = []
    for images, top, bottom in deploy._pieces(batch, rows, bytes_per_row, multiple):
        assert top % multiple == 0 or top == 0
        assert bottom % multiple == 0 or bottom == rows
        for i in range(*images.indices(batch)):
            seen += [(i, row) for row in range(top, bottom)]
    assert sorted(seen) == [(i, row) for i in range(batch) for row in range(rows)]
