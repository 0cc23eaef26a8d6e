import pytest
import torch
from torch import nn

from tinyvit.modules import TinyViT
from tinyvit.train import TrainSettings
from tinyvit.train.distributed import Processes
from tinyvit.train.optim import choose_batch_stats, prepare, set_drop_path

from .toy_task import make_model

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
