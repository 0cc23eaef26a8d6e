"""stage.py: ConvLayer and BasicLayer; gradient checkpointing."""

import copy

import pytest
import torch
from torch import nn

from tinyvit.modules import BasicLayer, ConvLayer, PatchMerging, freeze_batch_stats, stage


def conv_layer(**changes):
    arguments = {"dim": 6, "input_resolution": (5, 4), "depth": 2, "activation": nn.GELU}
    return ConvLayer(**{**arguments, **changes})


def basic_layer(**changes):
    arguments = {"dim": 6, "input_resolution": (5, 4), "depth": 2, "num_heads": 2, "window_size": 3}
    return BasicLayer(**{**arguments, **changes})


MAP = (2, 6, 5, 4)
TOKENS = (2, 20, 6)
BOTH = pytest.mark.parametrize(
    "make, shape", [(conv_layer, MAP), (basic_layer, TOKENS)], ids=["conv", "basic"]
)


def test_arguments(describe_arguments):
    assert describe_arguments(ConvLayer) == (
        "dim, input_resolution, depth, activation, drop_path=0.0, downsample=None, "
        "use_checkpoint=False, out_dim=None, conv_expand_ratio=4.0",
        "",
    )
    assert describe_arguments(BasicLayer) == (
        "dim, input_resolution, depth, num_heads, window_size, mlp_ratio=4.0, drop=0.0, "
        "drop_path=0.0, downsample=None, use_checkpoint=False, local_conv_size=3, "
        "activation=GELU, out_dim=None",
        "",
    )


@BOTH
def test_children_and_repr(make, shape):
    layer = make(downsample=PatchMerging)
    assert {name for name, _ in layer.named_children()} == {"blocks", "downsample"}
    assert layer.extra_repr() == "dim=6, input_resolution=(5, 4), depth=2"
    assert make().downsample is None
    assert not any("downsample" in key for key in make().state_dict())


@BOTH
def test_is_its_blocks_in_turn_then_the_downsample(randomise, make, shape):
    layer = randomise(make(downsample=PatchMerging, out_dim=8)).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    y = x
    for block in layer.blocks:
        y = block(y)
    torch.testing.assert_close(layer(x), layer.downsample(y))
    assert layer(x).shape == (2, 6, 8)  # 5x4 -> 3x2
    layer.downsample = None
    torch.testing.assert_close(layer(x), y)


@BOTH
def test_out_dim_left_out_is_dim(make, shape):
    layer = make(downsample=PatchMerging).eval()
    assert layer.downsample.out_dim == 6
    assert layer(torch.zeros(shape)).shape == (2, 6, 6)


def test_downsample_is_called_with_the_published_arguments():
    calls = []

    def downsample(*args, **kwargs):
        calls.append((args, kwargs))
        return nn.Identity()

    basic_layer(downsample=downsample, out_dim=9, activation=nn.ReLU)
    assert calls == [(((5, 4),), {"dim": 6, "out_dim": 9, "activation": nn.ReLU})]


def test_arguments_reach_the_blocks():
    layer = basic_layer(
        mlp_ratio=2.0, drop=0.1, drop_path=0.2, local_conv_size=5, activation=nn.ReLU
    )
    for block in layer.blocks:
        assert block.window_size == 3
        assert block.mlp.fc1.out_features == 12
        assert block.mlp.drop.p == 0.1
        assert block.drop_path.drop_prob == 0.2
        assert block.local_conv.c.kernel_size == (5, 5)
        assert isinstance(block.mlp.act, nn.ReLU)
    assert conv_layer(conv_expand_ratio=1.5).blocks[0].hidden_chans == 9


@BOTH
def test_drop_path_list(make, shape):
    layer = make(drop_path=[0.1, 0.3])
    assert [block.drop_path.drop_prob for block in layer.blocks] == [0.1, 0.3]
    for bad in ([0.1], [0.1, 0.2, 0.3]):
        with pytest.raises(ValueError, match=f"each of the 2 blocks, got {len(bad)}"):
            make(drop_path=bad)
    with pytest.raises(ValueError, match=r"between 0 and 1, got -0\.5"):
        make(drop_path=-0.5)


def test_sizes_of_the_call_and_declared_ones(randomise):
    layer = randomise(basic_layer(downsample=PatchMerging, out_dim=8)).eval()
    x = torch.randn(2, 21, 6)
    with pytest.raises(ValueError, match="21 tokens do not make a map of 5x4 = 20"):
        layer(x)
    y = layer(x, (3, 7))
    assert y.shape == (2, 8, 8)
    assert layer.input_resolution == (5, 4)
    assert layer.declare((3, 7)) == (2, 4)
    assert {module.input_resolution for module in (*layer.blocks, layer.downsample)} == {(3, 7)}
    assert torch.equal(layer(x), y)
    assert basic_layer().declare((3, 7)) == (3, 7)


def test_even_local_conv_size_is_refused_at_once():
    with pytest.raises(ValueError, match=r"local_conv_size must be odd.*got 4"):
        basic_layer(local_conv_size=4)


class TestCheckpointing:
    """The same numbers with and without, and each batch counted once."""

    def twins(self, randomise, make, **changes):
        plain = randomise(make(downsample=PatchMerging, **changes)).double()
        saving = copy.deepcopy(plain)
        saving.use_checkpoint = True
        return plain, saving

    def step(self, layer, x, seed=3):
        torch.manual_seed(seed)
        x = x.clone().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        return y.detach(), x.grad, gradients, dict(layer.named_buffers())

    @BOTH
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("drop_path", [0.0, 0.5])
    def test_same_output_gradients_and_statistics(
        self, randomise, make, shape, training, drop_path
    ):
        plain, saving = self.twins(randomise, make, drop_path=drop_path)
        x = torch.randn(4, *shape[1:], dtype=torch.float64)
        wanted = self.step(plain.train(training), x)
        got = self.step(saving.train(training), x)
        # the same operations on the same numbers
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)

    @BOTH
    def test_each_batch_counts_once(self, randomise, make, shape):
        _, saving = self.twins(randomise, make)
        for n in (1, 2):
            self.step(saving.train(), torch.randn(shape, dtype=torch.float64))
            counters = [v for k, v in saving.named_buffers() if k.endswith("num_batches_tracked")]
            assert counters and all(counter == n for counter in counters)

    @BOTH
    def test_frozen_statistics_stay(self, randomise, make, shape):
        _, saving = self.twins(randomise, make)
        freeze_batch_stats(saving).train()
        before = {name: buffer.clone() for name, buffer in saving.named_buffers()}
        *_, after = self.step(saving, torch.randn(shape, dtype=torch.float64))
        assert all(torch.equal(after[name], before[name]) for name in before)

    @BOTH
    def test_really_recomputes_and_only_with_gradients(self, randomise, make, shape):
        _, saving = self.twins(randomise, make)
        runs = []
        # not a forward hook: recomputing stops as soon as it has what backward wants
        saving.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            saving(x)
        assert len(runs) == 1
        y = saving(x)
        assert len(runs) == 2
        y.sum().backward()
        assert len(runs) == 3

    def test_leaves_out_the_pause_where_a_compiler_rules(self, randomise, monkeypatch):
        plain, saving = self.twins(randomise, conv_layer)
        x = torch.randn(MAP, dtype=torch.float64)
        wanted = self.step(plain.eval(), x)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.testing.assert_close(self.step(saving.eval(), x), wanted)

    def test_leaves_off_while_tracing(self, monkeypatch):
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        monkeypatch.setattr(stage, "checkpoint", None)  # would fail if called
        conv_layer(use_checkpoint=True)(torch.zeros(MAP))
