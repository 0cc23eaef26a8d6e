"""Make a network ready to learn: device and memory, what moves, stochastic depth, batch statistics.

Reads no files and computes no loss. Stochastic depth: Huang et al., ECCV 2016.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tinyvit.modules import TinyViT

from .distributed import Processes
from .moving import choose_moving
from .settings import BatchStats, TrainSettings

__all__ = ["choose_batch_stats", "prepare", "set_drop_path"]


def prepare(
    model: nn.Module, settings: TrainSettings, processes: Processes, batch_stats: BatchStats
) -> None:
    """Make a network ready to learn.

    Args:
        model: Changed in place.
        settings: What to do.
        processes: On which device, and with how many others.
        batch_stats: What ``choose_batch_stats`` gave.

    Raises:
        ValueError: A setting asks for what the network does not have.
    """
    choose_moving(model, settings.moving, settings.lora_rank)
    model.to(processes.device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    encoders = [module for module in model.modules() if isinstance(module, TinyViT)]
    for encoder in encoders:
        if settings.drop_path is not None:
            set_drop_path(encoder, settings.drop_path)
        encoder.set_grad_checkpointing(settings.grad_checkpointing)
    if settings.grad_checkpointing and not encoders:
        raise ValueError(
            f"grad_checkpointing wants a model with a TinyViT in it, got {type(model).__name__}; "
            "turn it off"
        )
    if batch_stats == "synchronised" and processes.count > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def set_drop_path(encoder: TinyViT, rate: float) -> None:
    """Stochastic depth that rises in a straight line from 0 in the first block to ``rate``."""
    blocks = [block for stage in encoder.stages() for block in stage.blocks]
    for i, block in enumerate(blocks):
        block.drop_path.drop_prob = rate * i / max(len(blocks) - 1, 1)  # type: ignore[union-attr]
    encoder.drop_path_rate = rate


def choose_batch_stats(model: nn.Module, wanted: BatchStats, processes: Processes) -> BatchStats:
    """What to do with batch statistics: what was asked for, or what fits.

    "auto" keeps statistics that were learnt before, as fine-tuning should: a few batches of other
    pictures would spoil them. Untouched ones (mean 0 and variance 1) must move; together with the
    other processes on GPUs, else each on its own, and then those of the first process count.

    Args:
        model: With the weights it starts from.
        wanted: The setting.
        processes: On which device, and how many.

    Returns:
        "frozen", "own" or "synchronised".

    Raises:
        ValueError: "synchronised" was asked for in several processes without GPUs, where torch
            cannot do it.
    """
    on_gpu = processes.device.type == "cuda"
    if wanted == "synchronised" and processes.count > 1 and not on_gpu:
        raise ValueError(
            f"batch_stats='synchronised' works on GPUs only, and the {processes.count} processes "
            f"run on {processes.device.type}; take 'frozen', or 'own'"
        )
    if wanted != "auto":
        return wanted
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if any(not _is_untouched(norm) for norm in norms):
        return "frozen"
    return "synchronised" if on_gpu and processes.count > 1 else "own"


def _is_untouched(norm: _BatchNorm) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        return True
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())
