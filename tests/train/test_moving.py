import pytest
import torch
from torch import nn

from tinyvit.modules import Conv2d_BN
from tinyvit.train import TrainSettings, train
from tinyvit.train.optim import choose_moving, learning_mode, merged

from .toy_task import ToyTask, make_model


def moving_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_full_moves_all(make_tiny_vit):
    model = make_tiny_vit().requires_grad_(False)
    choose_moving(model, "full")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "moving, prefixes", [("neck", ("neck.",)), ("head", ("norm_head.", "head."))]
)
def test_parts_of_an_encoder(make_tiny_vit, moving, prefixes):
    model = make_tiny_vit()
    choose_moving(model, moving)
    wanted = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert moving_names(model) == wanted != set()


def test_a_part_that_is_not_there(make_tiny_vit):
    with pytest.raises(
        ValueError,
        match=r"one of full, lora, neck, head for this TinyViT, got 'decoder'",
    ):
        choose_moving(make_tiny_vit(), "decoder")
    with pytest.raises(ValueError, match="must be one of full, lora for this Linear"):
        choose_moving(nn.Linear(2, 2), "neck")


def test_what_is_frozen_stays_in_eval_mode():
    model = make_model(drop_path=0.5, drop=0.5)
    choose_moving(model, "head")
    learning_mode(model, freeze_batch_stats=False)
    learning = {name for name, module in model.named_modules() if module.training}
    assert learning == {"", "norm_head", "head"}
    choose_moving(model, "full")
    learning_mode(model, freeze_batch_stats=False)
    assert all(module.training for module in model.modules())
    learning_mode(model, freeze_batch_stats=True)
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
        moving="decoder",
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

    sam = build_sam("tinyvit_starter")
    choose_moving(sam, "decoder")
    assert {name.partition(".")[0] for name in moving_names(sam)} == {"mask_decoder"}
    choose_moving(sam, "neck")
    assert {name.rpartition(".neck.")[0] for name in moving_names(sam)} == {"image_encoder"}


def test_lora_moves_what_it_adds_and_leaves_a_plain_network(image):
    pytest.importorskip("tinyvit.train.lora")
    model = make_model().eval()
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    choose_moving(model, "lora", 2)
    moving = moving_names(model)
    assert moving and not moving & set(frozen)
    learning_mode(model, freeze_batch_stats=True)
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
