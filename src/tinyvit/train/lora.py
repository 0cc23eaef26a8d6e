"""Low-rank additions to frozen linear layers (LoRA; Hu et al., 2021): add, merge, keep in a file.

A layer's weight W becomes W + scale * up @ down, with down [rank, in] and up [out, rank]; only
these two are trained. ``up`` starts at zero, so a fresh addition changes nothing. The layer stays
a ``nn.Linear``: the base's state-dict keys do not change, and ``lora_down`` and ``lora_up`` stand
beside them. Layers are told apart by the attention or MLP that they sit in and their name there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.checkpoints.files import read_state_dict, weights_sha256, write_state_dict
from tinyvit.errors import CheckpointError
from tinyvit.modules import Attention, Mlp
from tinyvit.modules.sam.mask_decoder import Attention as DecoderAttention

ENCODER_TARGETS = ("qkv", "proj", "fc1", "fc2")
"""Linear layers of a TinyViT block."""

DECODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Linear layers of the attentions in a SAM mask decoder."""

_LAYERS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (Attention, ("qkv", "proj")),
    (Mlp, ("fc1", "fc2")),
    (DecoderAttention, DECODER_TARGETS),
)
_OWN = ("lora_down", "lora_up")
_HEADER = "tinyvit.lora"


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank addition; it has the parameters of the layer it replaces."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        if rank < 1:
            raise ValueError(f"the rank of a low-rank addition must be at least 1, got {rank}")
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha}; None makes it equal to the rank")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a probability from 0 to below 1, got {dropout}")
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout = rank, float(alpha), float(dropout)
        down = base.weight.new_empty(rank, base.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.lora_down = nn.Parameter(down)
        self.lora_up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        for parameter in (self.lora_down, self.lora_up):  # layer-wise rates hold for these too
            parameter.lr_scale = getattr(base.weight, "lr_scale", 1.0)  # type: ignore[attr-defined]
        self.train(base.training)

    @property
    def scale(self) -> float:
        """What the addition is multiplied by."""
        return self.alpha / self.rank

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        narrow = F.dropout(input, self.dropout, self.training) if self.dropout else input
        added = F.linear(F.linear(narrow, self.lora_down), self.lora_up)
        return super().forward(input) + self.scale * added

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same as this one in eval mode."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        with torch.no_grad():  # added in double precision, since large and small numbers meet
            addition = self.scale * (self.lora_up.double() @ self.lora_down.double())
            plain.weight.copy_(self.weight.double() + addition)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, and those of the addition."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ENCODER_TARGETS,
    dropout: float = 0.0,
) -> list[str]:
    """Give layers low-rank additions, in place; afterwards only these require gradients.

    ``targets`` are out of ``ENCODER_TARGETS`` and ``DECODER_TARGETS``; ``alpha`` is the additions'
    factor times the rank, None for a factor of 1; ``dropout`` zeroes their inputs in training.
    Called again with the same choices it changes nothing but ``requires_grad``; with others it
    raises ValueError, as for unknown or missing layers. Gives the names of the layers.

    Examples:
        >>> import tinyvit
        >>> from tinyvit.train.lora import add_lora, merge_lora
        >>> model = tinyvit.create_model("tinyvit_sam_2m")
        >>> len(add_lora(model, rank=4)), len(merge_lora(model))
        (40, 40)
    """
    known = (*ENCODER_TARGETS, *DECODER_TARGETS)
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        raise ValueError(
            f"targets must be names out of {', '.join(known)}; got {', '.join(unknown) or 'none'}"
        )
    alpha = float(rank if alpha is None else alpha)
    found = list(_find(model, targets))
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no layer called {', '.join(targets)} in an attention "
            "or MLP of tinyvit; choose other targets"
        )
    there, wanted = lora_layers(model), [name for _, _, name in found]
    if there:
        first = next(iter(there.values()))
        before, choices = (first.rank, first.alpha, first.dropout), (rank, alpha, float(dropout))
        if set(there) != set(wanted) or before != choices:
            raise ValueError(
                f"this model has low-rank additions on {len(there)} layers with (rank, alpha, "
                f"dropout) {before}; wanted {len(wanted)} layers with {choices}. Call merge_lora "
                "first"
            )
    model.requires_grad_(False)
    for parent, attribute, name in found:
        if name not in there:
            layer = LoraLinear(getattr(parent, attribute), rank, alpha, dropout)
            setattr(parent, attribute, layer)
    for layer in lora_layers(model).values():
        layer.lora_down.requires_grad_(True)
        layer.lora_up.requires_grad_(True)
    return wanted


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with low-rank additions, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def merge_lora(model: nn.Module) -> list[str]:
    """Add the additions to the weights, in place: plain keys again; gives the layers' names."""
    names = list(lora_layers(model))
    for name in names:
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, attribute, getattr(owner, attribute).merged())
    return names


def base_sha256(model: nn.Module) -> str:
    """Hash of everything in a model but its additions: names, types, shapes and bytes."""
    state = model.state_dict()
    own = {k: v for k, v in state.items() if k.rpartition(".")[2] not in _OWN}
    return weights_sha256(own, older=True)  # as in the files of the first versions


def save_lora(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the additions alone to a ``.safetensors`` file, with the hash of their base.

    ValueError where there are none; the file is written whole or not at all.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("this model has no low-rank additions to save; make them by add_lora")
    tensors = {
        f"{name}.{own}": getattr(layer, own) for name, layer in layers.items() for own in _OWN
    }
    first = next(iter(layers.values()))
    facts = {
        **{name: getattr(first, name) for name in ("rank", "alpha", "dropout")},
        "targets": sorted({name.rpartition(".")[2] for name in layers}),
        "base_sha256": base_sha256(model),
    }
    return write_state_dict(path, tensors, metadata={_HEADER: json.dumps(facts)})


def load_lora(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Put additions from a file onto the base that they were trained on; gives the layers' names.

    ValueError where the model has additions already; CheckpointError where the file cannot be read
    or holds none, or the model is another base.
    """
    if lora_layers(model):
        raise ValueError("this model has low-rank additions already; call merge_lora first")
    file = read_state_dict(path)
    try:
        facts = json.loads(file.metadata[_HEADER])
        rank, alpha = int(facts["rank"]), float(facts["alpha"])
        targets, dropout = [str(t) for t in facts["targets"]], float(facts["dropout"])
        wanted = str(facts["base_sha256"])
    except (KeyError, TypeError, ValueError) as err:
        raise CheckpointError(
            f"{path} holds no low-rank additions, or its header is damaged ({err!s}); wanted a "
            "file of save_lora"
        ) from err
    came = base_sha256(model)
    if came != wanted:
        raise CheckpointError(
            f"{path} was trained on a base with sha256 {wanted[:16]}…, but this model's is "
            f"{came[:16]}…; load the checkpoint it was trained from first"
        )
    wanted_shapes: dict[str, list[int]] = {}
    for _, _, name in _find(model, targets):
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        wanted_shapes |= {f"{name}.lora_down": [rank, inputs], f"{name}.lora_up": [outputs, rank]}
    shapes = {key: list(tensor.shape) for key, tensor in file.tensors.items()}
    problems = [
        f"{key}: wanted {wanted_shapes.get(key, 'nothing')}, came {shapes.get(key, 'nothing')}"
        for key in sorted({*shapes, *wanted_shapes})
        if shapes.get(key) != wanted_shapes.get(key)
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit this model: {'; '.join(problems)}")
    names = add_lora(model, rank, alpha, targets, dropout)
    model.load_state_dict(file.tensors, strict=False)
    return names


def _find(model: nn.Module, targets: Sequence[str]) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, attribute, full name) of each layer that ``targets`` name."""
    for name, module in model.named_modules():
        known = (one for kind, names in _LAYERS if isinstance(module, kind) for one in names)
        for attribute in known:
            if attribute in targets:
                yield module, attribute, f"{name}.{attribute}" if name else attribute
