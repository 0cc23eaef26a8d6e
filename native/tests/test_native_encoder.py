"""The whole network against the plain modules: configurations, sizes, batches, outputs, edges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_door import here
from native_models import Student, config_of, native, randomise, tensors_of
from tinyvit_native import Config, Net

from tinyvit.modules import TinyViT

SMALL = {
    "embed_dims": (16, 24, 40, 64),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 5, 2),
    "window_sizes": (7, 3, 4, 7),
    "num_classes": 11,
}


def small(**changes: object) -> TinyViT:
    return randomise(TinyViT(**{**SMALL, **changes}))


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(model: TinyViT, x: torch.Tensor) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        out = {"embedding": features, "early": model.forward_hq(x)[1]}
        if model.head is not None:
            out["logits"] = model.classify(x)
    return {k: v.numpy() for k, v in out.items()} | {
        f"stage{i}": m.numpy() for i, m in enumerate(maps)
    }


def everything(net: Net, x: np.ndarray, **how: object) -> dict[str, np.ndarray]:
    wanted = {"embedding": True, "early": True, "logits": net.config.head}
    return net.run(x, stages=range(len(net.config.depths)), **wanted, **how)


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], share: float) -> None:
    assert set(ours) == set(theirs)
    for name, exact in theirs.items():
        assert ours[name].shape == exact.shape, name
        assert np.abs(ours[name] - exact).max(initial=0) <= share * np.abs(exact).max(initial=1), (
            name
        )


@pytest.mark.parametrize(("isa", "is_bf16"), [p.values[0] for p in here()])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (33, 70), (64, 64), (100, 75)])
def test_every_isa_agrees_with_the_modules(isa, is_bf16, size):
    model = small()
    x = image(2, 3, *size)
    net = native(model, isa=isa, precision="bf16" if is_bf16 else "fp32", threads=2)
    assert net.describe()["isa"] == isa
    compare(everything(net, x.numpy()), plain(model, x), 5e-2 if is_bf16 else 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"stem": "pointwise", "head": False},
        {"strides": (2, 2, 2), "neck_dim": None},
        {"strides": (1, 1, 1)},
        {"in_chans": 1, "neck_dim": 40},
        {"in_chans": 5, "local_conv_size": 5, "mlp_ratio": 2.0, "mbconv_expand_ratio": 3.0},
        {"local_conv_size": 1, "num_classes": 0},
        {"embed_dims": (20, 30, 70, 96), "num_heads": (1, 3, 7, 2)},
        {"window_sizes": (7, 1, 16, 9)},
        {"depths": (0, 2, 0, 1)},
        {
            "embed_dims": (32, 64, 128, 192),
            "num_heads": (1, 1, 2, 12),
            "window_sizes": (7, 8, 12, 5),
        },
    ],
)
def test_configurations(changes):
    model = small(**changes)
    x = image(1, model.in_chans, 47, 80)
    compare(everything(native(model), x.numpy()), plain(model, x), 1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 4), st.integers(1, 4))
def test_sizes_and_batches(height, width, batch, threads):
    model = small(depths=(1, 1, 1, 1))
    x = image(batch, 3, height, width)
    compare(everything(native(model, threads=threads), x.numpy()), plain(model, x), 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_bits_for_any_threads_and_batch(precision):
    model = small()
    x = image(5, 3, 90, 61).numpy()
    first = everything(native(model, precision=precision, threads=1), x)
    for threads in (2, 3, 8):
        net = native(model, precision=precision, threads=threads)
        for _ in range(3):
            again = everything(net, x)
            assert all(np.array_equal(first[k], again[k]) for k in first)
        for i in range(5):
            alone = everything(net, x[i : i + 1])
            assert all(np.array_equal(first[k][i : i + 1], alone[k]) for k in first)


def test_bf16_is_as_near_as_torch():
    model = randomise(
        TinyViT(**{**SMALL, "embed_dims": (64, 128, 160, 320), "num_heads": (2, 4, 5, 10)})
    )
    x = image(1, 3, 128, 128)
    exact = plain(model, x)["embedding"]
    ours = native(model, precision="bf16").encode(x.numpy())
    with torch.inference_mode():
        theirs = model.bfloat16()(x.bfloat16()).float().numpy()
    assert np.abs(ours - exact).mean() <= 1.1 * np.abs(theirs - exact).mean()


def test_bytes_and_padding():
    model = small()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 50, 37, 3), dtype=np.uint8)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    normal = (torch.from_numpy(pixels).float() - torch.tensor(mean)) / torch.tensor(std)
    padded = torch.zeros(2, 3, 64, 48)
    padded[:, :, :50, :37] = normal.permute(0, 3, 1, 2)
    net = native(model)
    ours = net.encode(pixels, mean=mean, std=std, padded=(64, 48))
    assert np.array_equal(ours, net.encode(padded.numpy()))
    assert np.array_equal(ours, net.encode(padded[:, :, :50, :37].numpy(), padded=(64, 48)))
    with pytest.raises(ValueError, match="want mean and std of 3 channels"):
        net.encode(pixels)
    with pytest.raises(ValueError, match="padded_height and padded_width must be 0 or at least"):
        net.encode(pixels, mean=mean, std=std, padded=(10, 48))


def test_channels_last_is_a_view_of_planes():
    net = native(small())
    x = image(2, 3, 40, 56).numpy()
    a, b = everything(net, x), everything(net, x, channels_last=True)
    for name in ("embedding", "stage0", "stage3"):
        assert np.array_equal(a[name].transpose(0, 2, 3, 1), b[name])


def test_tensors_whose_norms_are_folded_are_taken():
    model = small()
    x = image(1, 3, 64, 64).numpy()
    folded = {}
    for name, value in tensors_of(model).items():
        if name.endswith(".c.weight"):
            norm = {k: model.state_dict()[f"{name[:-9]}.bn.{k}"].double() for k in
                    ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
            scale = norm["weight"] / (norm["running_var"] + 1e-5).sqrt()
            folded[f"{name[:-9]}.weight"] = value * scale.numpy()[:, None, None, None]
            folded[f"{name[:-9]}.bias"] = (norm["bias"] - norm["running_mean"] * scale).numpy()
        elif ".bn." not in name:
            folded[name] = value
    ours, theirs = (Net(config_of(model), t).encode(x) for t in (folded, tensors_of(model)))
    assert np.abs(ours - theirs).max() < 2e-5


def test_efficientsam3():
    student = randomise(Student("tiny_vit_5m_224", 20))
    x = image(1, 3, 100, 160)
    with torch.inference_mode():
        exact = student(x).numpy()
    ours = student.native().encode(x.numpy())
    assert ours.shape == (1, 1024, 20, 20)
    assert np.abs(ours - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_spreads_as_in_torch(value):
    model = small()
    x = image(1, 3, 128, 128)
    x[0, 1, 100, 20] = value
    ours, theirs = everything(native(model), x.numpy()), plain(model, x)
    for name, exact in theirs.items():
        assert np.array_equal(np.isfinite(ours[name]), np.isfinite(exact)), name
    assert np.isfinite(ours["stage1"]).any() and not np.isfinite(ours["stage1"]).all()


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e4])
def test_denormal_and_large_images(scale):
    model = small()
    x = image(1, 3, 64, 64) * scale
    compare(everything(native(model), x.numpy()), plain(model, x), 1e-5)


def test_only_what_is_asked_for_is_computed():
    net = native(small())
    x = image(1, 3, 64, 64).numpy()
    whole = everything(net, x)
    assert np.array_equal(net.run(x, stages=[1])["stage1"], whole["stage1"])
    assert np.array_equal(net.run(x, early=True)["early"], whole["early"])
    assert np.array_equal(net.logits(x), whole["logits"])
    assert [m.shape for m in net.stages(x)] == [whole[f"stage{i}"].shape for i in range(4)]


def test_errors_say_what_was_wanted():
    model = small()
    tensors = tensors_of(model)
    with pytest.raises(ValueError, match=r"tensor 'layers.1.blocks.0.attn.qkv.weight' is missing"):
        Net(config_of(model), {k: v for k, v in tensors.items() if "blocks.0.attn.qkv" not in k})
    with pytest.raises(ValueError, match=r"attention_biases' must be \[2, 9\], got \[2, 4\]"):
        Net(config_of(model), {k: v[:, :4] if "1.blocks.0.attn.attention_b" in k else v
                               for k, v in tensors.items()})  # fmt: skip
    with pytest.raises(ValueError, match="num_heads must divide embed_dims, got 7"):
        Net(dataclasses.replace(config_of(model), num_heads=(1, 7, 5, 2)), tensors)
    with pytest.raises(ValueError, match="strides wants 3 numbers for 4 stages"):
        Net(Config(strides=(2, 2)), tensors)
    with pytest.raises(ValueError, match="unknown instruction set 'sse'"):
        native(model, isa="sse")
    net = native(small(head=False))
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, height, width\]"):
        net.encode(np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(ValueError, match="made without a head"):
        net.logits(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match="height and width must be 1 to 65536"):
        net.encode(np.zeros((1, 3, 0, 8), np.float32))
    with pytest.raises(ValueError, match="no output is wanted"):
        net.run(np.zeros((1, 3, 8, 8), np.float32))


def test_environment_lowers_the_instruction_set(monkeypatch):
    monkeypatch.setenv("TINYVIT_ISA", "generic")
    assert native(small()).describe()["isa"] == "generic"
