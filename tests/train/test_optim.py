import copy
import math

import pytest
import torch
from torch import nn

from tinyvit.modules import Conv2d_BN, TinyViT
from tinyvit.train import TrainSettings, train
from tinyvit.train.optim import (
    Ema,
    Processes,
    choose_batch_stats,
    clip_gradients,
    make_optimiser,
    merged,
    parameter_groups,
    prepare,
    schedule,
    set_drop_path,
    set_learning_rates,
    set_trainable,
    train_mode,
)

from .toy_task import ToyTask, make_model


def falling(rate, steps, **changes):
    return schedule(TrainSettings("x", learning_rate=rate, **{"final_rate": 0.0, **changes}), steps)


def test_rates_by_hand():
    rate = falling(1.0, steps=6, warmup_steps=2, final_rate=0.1)
    half_cosine = [0.5 * (1 + math.cos(math.pi * part)) for part in (0.25, 0.5, 0.75, 1.0)]
    wanted = [0.5, 1.0, *(0.1 + 0.9 * value for value in half_cosine)]
    assert [rate(step) for step in range(6)] == pytest.approx(wanted)
    assert rate(5) == pytest.approx(0.1)
    assert rate(3) == pytest.approx(0.55)  # the middle of the fall


def test_without_a_rise_and_with_nothing_else():
    assert falling(2.0, 4)(0) == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert falling(2.0, 4)(3) == pytest.approx(0)
    assert [falling(2.0, 2, warmup_steps=2)(step) for step in range(2)] == [1.0, 2.0]
    with pytest.raises(ValueError, match="warmup_steps must be at most the 4 steps"):
        falling(1.0, 4, warmup_steps=5)


def test_groups_are_complete_and_disjoint(make_tiny_vit):
    model = make_tiny_vit()
    model.tokens = nn.Embedding(2, 4)
    model.neck.requires_grad_(False)
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    names = [name for group in groups for name in group["names"]]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(names) == sorted(trainable)
    listed = [id(p) for group in groups for p in group["params"]]
    assert listed == [id(trainable[name]) for name in names]
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
    set_learning_rates(optimiser, 0.01)
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
        set_learning_rates(optimiser, 0.01)
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


def trainable_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_full_moves_all(make_tiny_vit):
    model = make_tiny_vit().requires_grad_(False)
    set_trainable(model, "full")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "trainable, prefixes", [("neck", ("neck.",)), ("head", ("norm_head.", "head."))]
)
def test_parts_of_an_encoder(make_tiny_vit, trainable, prefixes):
    model = make_tiny_vit()
    set_trainable(model, trainable)
    wanted = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert trainable_names(model) == wanted != set()


def test_a_part_that_is_not_there(make_tiny_vit):
    with pytest.raises(
        ValueError,
        match=r"one of full, lora, neck, head for this TinyViT, got 'decoder'",
    ):
        set_trainable(make_tiny_vit(), "decoder")
    with pytest.raises(ValueError, match="must be one of full, lora for this Linear"):
        set_trainable(nn.Linear(2, 2), "neck")


def test_what_is_frozen_stays_in_eval_mode():
    model = make_model(drop_path=0.5, drop=0.5)
    set_trainable(model, "head")
    train_mode(model, freeze_batch_stats=False)
    learning = {name for name, module in model.named_modules() if module.training}
    assert learning == {"", "norm_head", "head"}
    set_trainable(model, "full")
    train_mode(model, freeze_batch_stats=False)
    assert all(module.training for module in model.modules())
    train_mode(model, freeze_batch_stats=True)
    norms = [m.bn for m in model.modules() if isinstance(m, Conv2d_BN)]
    assert norms and not any(norm.training for norm in norms)
    assert all(m.training for m in model.modules() if m not in norms)


class HalfTask(ToyTask):
    """A network of an encoder and a decoder; the encoder has batch norms, dropout and buffers."""

    def __init__(self):
        model = nn.Module()
        model.image_encoder = make_model(drop_path=0.5, drop=0.5)
        model.mask_decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        model.register_buffer("pixel_mean", torch.ones(3))
        model.forward = lambda images: model.mask_decoder(model.image_encoder(images))
        super().__init__(model, samples=4)

    def validate(self, model):
        return {"accuracy": 0.0}


def test_a_hundred_steps_change_the_decoder_alone(tmp_path):
    task = HalfTask()
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    settings = TrainSettings(
        folder=str(tmp_path),
        steps=100,
        batch_size=4,
        trainable="decoder",
        batch_stats="own",
        validate_every=100,
        device="cpu",
    )
    train(task, settings)
    changed = {k for k, v in task.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {key for key in before if key.startswith("mask_decoder.")}
    assert float(before["pixel_mean"].sum()) == 3


def test_the_parts_of_a_sam():
    from tinyvit.sam import build_sam

    sam = build_sam("tinyvit_sam_2m")
    set_trainable(sam, "decoder")
    assert {name.partition(".")[0] for name in trainable_names(sam)} == {"mask_decoder"}
    set_trainable(sam, "neck")
    assert {name.rpartition(".neck.")[0] for name in trainable_names(sam)} == {"image_encoder"}


def test_lora_moves_what_it_adds_and_leaves_a_plain_network(image):
    model = make_model().eval()
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    set_trainable(model, "lora", 2)
    trainable = trainable_names(model)
    assert trainable and not trainable & set(frozen)
    train_mode(model, freeze_batch_stats=True)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.eval()
    plain = merged(model, "lora")
    assert set(plain.state_dict()) == set(make_model().state_dict())
    x = image(2, 16, 16)
    # the sum of two products against the product of a sum, in float32
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    assert merged(plain, "full") is plain


TWO_ON_CPU = Processes(0, 2, torch.device("cpu"))
TWO_ON_GPU = Processes(0, 2, torch.device("cuda"))


def test_drop_path_rises_as_in_a_model_built_with_it(make_tiny_vit):
    built = make_tiny_vit(drop_path_rate=0.4)
    model = make_tiny_vit()
    set_drop_path(model, 0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages() for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert rates == [b.drop_path.drop_prob for stage in built.stages() for b in stage.blocks]
    assert model.arguments() == built.arguments()


@pytest.mark.parametrize(
    "is_learnt, processes, wanted",
    [
        (True, Processes(), "frozen"),
        (True, TWO_ON_CPU, "frozen"),
        (False, Processes(), "own"),
        (False, TWO_ON_CPU, "own"),
        (False, TWO_ON_GPU, "synchronised"),
    ],
)
def test_learnt_statistics_are_kept_and_untouched_ones_move(is_learnt, processes, wanted):
    model = (
        make_model()
        if is_learnt
        else TinyViT(
            embed_dims=(8, 8), depths=(1, 1), num_heads=(1, 1), window_sizes=(2, 2), neck_dim=None
        )
    )
    assert choose_batch_stats(model, "auto", processes) == wanted
    assert choose_batch_stats(model, "own", processes) == "own"
    assert choose_batch_stats(model, "frozen", processes) == "frozen"


def test_synchronised_statistics_want_gpus():
    with pytest.raises(ValueError, match="must be frozen or own for 2 processes on cpu"):
        choose_batch_stats(make_model(), "synchronised", TWO_ON_CPU)
    assert choose_batch_stats(make_model(), "synchronised", Processes()) == "synchronised"
    assert choose_batch_stats(make_model(), "synchronised", TWO_ON_GPU) == "synchronised"


def test_synchronised_norms_keep_keys_and_values():
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = TrainSettings(folder="x")
    prepare(model, settings, TWO_ON_CPU, "synchronised")
    assert isinstance(model.layers[0].blocks[0].conv1.bn, nn.SyncBatchNorm)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_memory_layout_checkpointing_and_drop_path_are_set():
    model = make_model()
    prepare(
        model,
        TrainSettings(folder="x", grad_checkpointing=True, drop_path=0.3),
        Processes(),
        "frozen",
    )
    kernel = model.patch_embed.seq[2].c.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert all(stage.use_checkpoint for stage in model.stages())
    assert model.drop_path_rate == 0.3
    prepare(model, TrainSettings(folder="x"), Processes(), "frozen")
    assert not any(stage.use_checkpoint for stage in model.stages())
    assert model.drop_path_rate == 0.3  # None leaves what is there


def test_checkpointing_wants_a_tiny_vit():
    settings = TrainSettings(folder="x", grad_checkpointing=True)
    with pytest.raises(ValueError, match="must be false for a model without a TinyViT"):
        prepare(nn.Linear(2, 2), settings, Processes(), "own")


def test_values_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    ema = Ema(layer, 0.5)
    nn.init.constant_(layer.weight, 2.0)
    ema.update(layer, 0)  # memory (1 + 0) / (10 + 0)
    assert float(ema.model.weight) == pytest.approx(0.1 * 1 + 0.9 * 2)
    nn.init.constant_(layer.weight, 0.0)
    ema.update(layer, 100)  # memory 0.5
    assert float(ema.model.weight) == pytest.approx(0.5 * 1.9)


def test_nothing_in_it_is_older_than_the_step(image):
    model = make_model()
    model.head.weight.requires_grad_(False)
    ema = Ema(model, 0.999)
    ema.model(image(1, 16, 16))  # whatever might be kept from a first call
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    ema.update(model, 10_000)
    for mine, theirs in zip(ema.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(ema.model.head.weight, model.head.weight)
    biases = "layers.1.blocks.0.attn.attention_biases"
    mine, theirs = ema.model.get_parameter(biases), model.get_parameter(biases)
    # a thousandth of the way from theirs - 1 to theirs; float32 rounds at 1e-7 of values near 1
    torch.testing.assert_close(mine, theirs - 0.999, rtol=0, atol=1e-6)
    fresh = make_model(seed=1).eval()
    fresh.load_state_dict(ema.model.state_dict())
    assert torch.equal(ema.model(image(2, 16, 16)), fresh(image(2, 16, 16)))


def test_it_is_a_network_of_its_own():
    model = make_model().train()
    before = copy.deepcopy(model.state_dict())
    ema = Ema(model, 0.9)
    assert not ema.model.training and model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    with torch.no_grad():
        for p in ema.model.parameters():
            p.zero_()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
