"""How a network is trained: which parameters, by which optimiser and schedule, in which processes.

A frozen part does not require gradients *and* is in eval mode, so that neither batch statistics nor
dropout act in it, whatever ``train()`` says: ``train_mode`` takes the place of ``train()``. Of the
processes that ``torchrun`` starts only the first writes files, and each reads the state of a run
that is resumed, so all must see the run's folder. Parameters are not sharded (FSDP): the largest
model here takes 0.35 GB with gradients and AdamW's state.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from tinyvit.inference.backend import choose_device
from tinyvit.modules import TinyViT
from tinyvit.modules.tiny_vit import NO_DECAY

from .lora import add_lora, merge_lora
from .settings import BatchStats, SettingError, Trainable, TrainSettings

# names of the parts in ``Sam`` and ``TinyViT``
_PARTS = {"decoder": ("mask_decoder",), "neck": ("neck",), "head": ("norm_head", "head")}


def set_trainable(model: nn.Module, trainable: Trainable, lora_rank: int = 8) -> None:
    """Set ``requires_grad`` of every parameter; SettingError where there is no such part."""
    model.requires_grad_(trainable == "full")
    if trainable == "lora":
        add_lora(model, lora_rank)
    elif trainable != "full":
        parameters = _parameters_of(model, trainable)
        if not parameters:
            held = [name for name in _PARTS if _parameters_of(model, name)]
            names = ", ".join(["full", "lora", *held])
            wanted = f"one of {names} for this {type(model).__name__}"
            raise SettingError("trainable", wanted, trainable)
        for parameter in parameters:
            parameter.requires_grad_(True)


def _parameters_of(model: nn.Module, part: str) -> list[nn.Parameter]:
    """The parameters of a part; the neck and the head are the encoder's."""
    encoder = getattr(model, "image_encoder", model)
    found = [getattr(owner, name, None) for owner in {model, encoder} for name in _PARTS[part]]
    return [p for module in found if isinstance(module, nn.Module) for p in module.parameters()]


def train_mode(model: nn.Module, freeze_batch_stats: bool) -> None:
    """Put what is trained into train mode; all else, and batch norms if asked, into eval mode."""
    model.train()
    for module in model.modules():
        trained = [parameter.requires_grad for parameter in module.parameters()]
        is_frozen = bool(trained) and not any(trained)
        if is_frozen or (freeze_batch_stats and isinstance(module, _BatchNorm)):
            module.eval()


def merged(model: nn.Module, trainable: Trainable) -> nn.Module:
    """The network as other commands know it: with "lora" a copy, additions added to weights."""
    if trainable != "lora":
        return model
    plain = copy.deepcopy(model)
    merge_lora(plain)
    return plain


def prepare(
    model: nn.Module, settings: TrainSettings, processes: Processes, batch_stats: BatchStats
) -> None:
    """Get a network ready for training, in place; SettingError for what it does not have."""
    set_trainable(model, settings.trainable, settings.lora_rank)
    model.to(processes.device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    encoders = [module for module in model.modules() if isinstance(module, TinyViT)]
    for encoder in encoders:
        if settings.drop_path is not None:
            set_drop_path(encoder, settings.drop_path)
        encoder.set_grad_checkpointing(settings.grad_checkpointing)
    if settings.grad_checkpointing and not encoders:
        wanted = f"false for a model without a TinyViT ({type(model).__name__})"
        raise SettingError("grad_checkpointing", wanted, True)
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

    "auto" keeps statistics that were trained before, as fine-tuning should: a few batches of other
    images would spoil them. Untouched ones (mean 0 and variance 1) must be updated; together with
    the other processes on GPUs, else each on its own, and then those of the first process count.
    Without GPUs torch cannot synchronise them: SettingError.
    """
    on_gpu = processes.device.type == "cuda"
    if wanted == "synchronised" and processes.count > 1 and not on_gpu:
        where = f"{processes.count} processes on {processes.device.type}"
        raise SettingError("batch_stats", f"frozen or own for {where}, not on GPUs", wanted)
    if wanted != "auto":
        return wanted
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            is_touched = norm.running_mean.any() or (cast(Tensor, norm.running_var) != 1).any()
            if is_touched:
                return "frozen"
    return "synchronised" if on_gpu and processes.count > 1 else "own"


class Ema:
    """An exponential moving average of a network, in a copy; early on the decay is smaller."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights after a step, counted from 0, into the average."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for mean, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            if parameter.requires_grad:
                mean.lerp_(parameter, weight)
            else:
                mean.copy_(parameter)
        for mine, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(buffer)


def schedule(settings: TrainSettings, steps: int) -> Callable[[int], float]:
    """The learning rate of each step from 0: a straight rise, then half a cosine to the last."""
    highest, warmup, final = settings.learning_rate, settings.warmup_steps, settings.final_rate
    if warmup > steps:
        raise SettingError("warmup_steps", f"at most the {steps} steps of the run", warmup)

    def learning_rate(step: int) -> float:
        if step < warmup:
            return highest * (step + 1) / warmup
        part = (step + 1 - warmup) / max(1, steps - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, part)))
        return highest * (final + (1 - final) * cosine)

    return learning_rate


Group: TypeAlias = dict[str, Any]  # for ``torch.optim``, with the ``names`` of its parameters


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, apart: Collection[int] = ()
) -> list[Group]:
    """Every parameter that requires gradients, once, by its learning rate and decay.

    Only matrices and kernels decay: not what has one dimension (norms, biases), attention biases
    and embeddings. ``layer_decay`` is the factor on the learning rate from each block to the one
    before it; those whose ids are ``apart`` have own groups. ``set_learning_rates`` sets ``lr``.
    """
    embeddings: set[int] = set()
    for module in model.modules():
        if isinstance(module, TinyViT):
            module.set_layer_lr_decay(layer_decay)
        elif isinstance(module, nn.Embedding):
            embeddings.add(id(module.weight))
    groups: dict[tuple[float, float, bool], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bare = parameter.ndim <= 1 or name.endswith(NO_DECAY) or id(parameter) in embeddings
        scale, decay = float(getattr(parameter, "lr_scale", 1.0)), 0.0 if is_bare else weight_decay
        empty = {"params": [], "names": [], "lr": 0.0, "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((scale, decay, id(parameter) in apart), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("no parameter of the model requires gradients; nothing can be trained")
    return list(groups.values())


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of linear layers, AdamW for everything else, as one optimiser."""

    def __init__(
        self, matrices: list[Group], others: list[Group], betas: tuple[float, float]
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            wanted = f"adamw with torch {torch.__version__} (Muon is in 2.9 and later)"
            raise SettingError("optimiser", wanted, "muon")
        muon = torch.optim.Muon(matrices, lr=0.0, adjust_lr_fn="match_rms_adamw")
        self._parts: list[torch.optim.Optimizer] = [muon]
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=0.0, betas=betas))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self._parts:
            part.step()


def make_optimiser(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The chosen optimiser over what is trainable; ValueError where it has nothing to train."""
    is_muon = settings.optimiser == "muon"
    linear = {id(one.weight) for one in model.modules() if is_muon and isinstance(one, nn.Linear)}
    groups = parameter_groups(model, settings.weight_decay, settings.layer_decay, linear)
    betas = settings.beta1, settings.beta2
    if not is_muon:
        return torch.optim.AdamW(groups, lr=0.0, betas=betas)
    matrices = [group for group in groups if id(group["params"][0]) in linear]
    others = [group for group in groups if id(group["params"][0]) not in linear]
    if not matrices:
        raise SettingError("optimiser", "adamw where no linear layer is trained", "muon")
    return MuonAndAdamW(matrices, others, betas)


def set_learning_rates(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give each group its part of a step's learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def clip_gradients(optimiser: torch.optim.Optimizer, most: float) -> Tensor:
    """Scale the whole gradient down to a norm, if it is not 0; gives the norm before that."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, most if most > 0 else math.inf)


# -- the processes that train together -----------------------------------------------------------

_PATIENCE = timedelta(hours=12)  # the others wait while the first process validates


@dataclass(frozen=True)
class Processes:
    """This process, ``rank``, among the ``count`` that train together."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, module: nn.Module) -> nn.Module:
        """Let a module, whose ``forward`` gives the loss, start as the first process's.

        Its gradients are added up with the others'. Buffers are the first process's: batch
        statistics that are updated and not synchronised are those of its samples.
        """
        if self.count == 1:
            return module
        # a prompt that is not there leaves its weights out
        return DistributedDataParallel(module, find_unused_parameters=True)

    def gradient_sync(self, module: nn.Module, is_last: bool) -> AbstractContextManager[None]:
        """Add up gradients over the processes in the last of a step's parts only."""
        if isinstance(module, DistributedDataParallel) and not is_last:
            return cast("AbstractContextManager[None]", module.no_sync())
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, the same in each; changes ``values``."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started with this one, and leave them at the end.

    "auto" and "cuda" give each process a GPU of its own; ValueError where there are too few.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device=torch.device(choose_device(device)))
        return
    rank, place = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    own = _own_device(choose_device(device), place)
    is_ours = not dist.is_initialized()
    if is_ours:
        backend = "nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        with warnings.catch_warnings():
            # torch says so where all parameters happen to be used; that is no fault
            warnings.filterwarnings("ignore", message=".*find_unused_parameters=True.*")
            yield Processes(rank, count, own)
    finally:
        if is_ours:
            dist.destroy_process_group()


def _own_device(device: str, place: int) -> torch.device:
    """The device of the process at a place of this machine."""
    if device != "cuda":
        return torch.device(device)
    if place >= torch.cuda.device_count():
        raise ValueError(
            f"process {place} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "start that many processes, or take device='cpu'"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)
