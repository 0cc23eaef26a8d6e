"""The optimiser and its parameter groups, the rate of each step, and the limit on the gradient.

A parameter's rate is the step's rate times its ``lr_scale``, which ``modules/learning_rates.py``
sets block by block. What is trained on what is not known here.

AdamW: Loshchilov and Hutter, ICLR 2019; the cosine: the same, ICLR 2017. Muon: Jordan et al., 2024;
the length of its steps: Liu et al., "Muon is Scalable for LLM Training", 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from tinyvit.modules import TinyViT
from tinyvit.modules.learning_rates import NO_DECAY

from .settings import TrainSettings

__all__ = [
    "MuonAndAdamW",
    "NamedGroup",
    "Schedule",
    "clip_gradients",
    "make_optimiser",
    "parameter_groups",
    "set_rates",
]


class NamedGroup(TypedDict):
    """A group for a ``torch.optim`` optimiser, with the names of its parameters."""

    params: list[nn.Parameter]
    names: list[str]
    lr: float
    lr_scale: float
    weight_decay: float


@dataclass(frozen=True)
class Schedule:
    """A straight rise, then half a cosine down to the last step.

    Attributes:
        rate: The highest rate.
        steps: Steps in all.
        warmup_steps: Steps of the rise; the last of them has the highest rate.
        final_rate: The last step's rate as a part of the highest.
    """

    rate: float
    steps: int
    warmup_steps: int = 0
    final_rate: float = 0.0

    def __post_init__(self) -> None:
        """Check that the rise fits.

        Raises:
            ValueError: The rise takes more steps than there are.
        """
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than the {self.steps} steps of the run; "
                "take fewer, or train longer"
            )

    def __call__(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.rate * (step + 1) / self.warmup_steps
        part = (step + 1 - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, part)))
        return self.rate * (self.final_rate + (1 - self.final_rate) * cosine)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[NamedGroup]:
    """Every parameter that requires gradients, once, by its rate and decay.

    Args:
        model: A network; the layer-wise rates of each TinyViT in it are set.
        weight_decay: For matrices and kernels. What has one dimension (norms, biases), attention
            biases and embeddings have none.
        layer_decay: Factor on the rate from each block to the one before it.

    Returns:
        Groups with ``lr`` 0; ``set_rates`` sets it.

    Raises:
        ValueError: Nothing requires gradients.
    """
    embeddings: set[int] = set()
    for module in model.modules():
        if isinstance(module, TinyViT):
            module.set_layer_lr_decay(layer_decay)
        elif isinstance(module, nn.Embedding):
            embeddings.add(id(module.weight))
    groups: dict[tuple[float, float], NamedGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bare = parameter.ndim <= 1 or name.endswith(NO_DECAY) or id(parameter) in embeddings
        scale, decay = float(getattr(parameter, "lr_scale", 1.0)), 0.0 if is_bare else weight_decay
        empty: NamedGroup = {
            "params": [],
            "names": [],
            "lr": 0.0,
            "lr_scale": scale,
            "weight_decay": decay,
        }
        group = groups.setdefault((scale, decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("no parameter of the model requires gradients; nothing can be learnt")
    return list(groups.values())


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of linear layers, AdamW for everything else, as one optimiser.

    Args:
        matrices: Groups of parameters of two dimensions.
        others: All other groups; may be empty.
        betas: AdamW's.

    Raises:
        ValueError: This torch has no Muon.
    """

    def __init__(
        self, matrices: list[NamedGroup], others: list[NamedGroup], betas: tuple[float, float]
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"Muon is in torch 2.9 and later, and this is {torch.__version__}; install a newer "
                "one, or take optimiser='adamw'"
            )
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                [dict(group) for group in matrices], lr=0.0, adjust_lr_fn="match_rms_adamw"
            )
        ]
        if others:
            self._parts.append(
                torch.optim.AdamW([dict(group) for group in others], lr=0.0, betas=betas)
            )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self._parts:
            part.step()


def make_optimiser(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The chosen optimiser over what may move.

    Raises:
        ValueError: Nothing may move; or Muon was chosen, and nothing that moves is the matrix of a
            linear layer, or this torch has none.
    """
    groups = parameter_groups(model, settings.weight_decay, settings.layer_decay)
    betas = settings.beta1, settings.beta2
    if settings.optimiser == "adamw":
        return torch.optim.AdamW([dict(group) for group in groups], lr=0.0, betas=betas)
    linear = {id(one.weight) for one in model.modules() if isinstance(one, nn.Linear)}
    matrices = _those(groups, lambda parameter: id(parameter) in linear)
    if not matrices:
        raise ValueError(
            "optimiser='muon' is for the matrices of linear layers, and none of them moves; take "
            "'adamw'"
        )
    return MuonAndAdamW(matrices, _those(groups, lambda parameter: id(parameter) not in linear),
                        betas)  # fmt: skip


def _those(groups: list[NamedGroup], is_one: Callable[[nn.Parameter], bool]) -> list[NamedGroup]:
    """The groups with those parameters alone; without the groups that become empty."""
    found: list[NamedGroup] = []
    for group in groups:
        pairs = [pair for pair in zip(group["params"], group["names"], strict=True)
                 if is_one(pair[0])]  # fmt: skip
        if pairs:
            found.append({**group, "params": [p for p, _ in pairs], "names": [n for _, n in pairs]})
    return found


def set_rates(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its part of a step's rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_scale"]


def clip_gradients(optimiser: torch.optim.Optimizer, most: float) -> Tensor:
    """Scale the whole gradient down to a norm; 0 leaves it as it is.

    Returns:
        The norm before that, a float scalar; not finite where some gradient is not.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, most if most > 0 else math.inf)
