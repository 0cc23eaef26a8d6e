"""What may move: which parameters learn, and which parts stay as they are to the last bit.

A frozen part does not require gradients *and* is in eval mode, so that neither batch statistics
nor dropout act in it, whatever ``train()`` says: ``learning_mode`` takes the place of ``train()``.

The names of the parts are those of ``Sam`` (``image_encoder``, ``mask_decoder``) and ``TinyViT``
(``neck``, ``norm_head``, ``head``). Low-rank additions are made by ``lora.py``.
"""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .settings import Moving

__all__ = ["choose_moving", "learning_mode", "merged"]

_PARTS = {
    "decoder": ("mask_decoder",),
    "neck": ("neck",),
    "head": ("norm_head", "head"),
}


def choose_moving(model: nn.Module, moving: Moving, lora_rank: int = 8) -> None:
    """Set ``requires_grad`` of every parameter: True for what learns, False for all else.

    Args:
        model: A Sam or a TinyViT; "full" and "lora" take others too.
        moving: What learns.
        lora_rank: Rank of the additions that "lora" makes.

    Raises:
        ValueError: The model has no such part.
    """
    model.requires_grad_(moving == "full")
    if moving == "full":
        return
    if moving == "lora":
        from .lora import add_lora

        add_lora(model, lora_rank)
        return
    parts = _find(model, moving)
    if not any(True for part in parts for _ in part.parameters()):
        held = [name for name in _PARTS if any(True for _ in _find(model, name))]
        raise ValueError(
            f"moving={moving!r} wants a model with a {moving}, but this {type(model).__name__} has "
            f"none; it has {', '.join(held) or 'none of the parts'}, and 'full' and 'lora' always "
            "work"
        )
    for part in parts:
        part.requires_grad_(True)


def _find(model: nn.Module, moving: str) -> list[nn.Module]:
    """The modules of a part; the neck and the head are the encoder's."""
    encoder = getattr(model, "image_encoder", model)
    found = [getattr(owner, name, None) for owner in {model, encoder} for name in _PARTS[moving]]
    return [part for part in found if isinstance(part, nn.Module)]


def learning_mode(model: nn.Module, freeze_batch_stats: bool) -> None:
    """Put what learns into train mode and all else into eval mode.

    Args:
        model: The network.
        freeze_batch_stats: Keep every batch norm on its running statistics, learning or not.
    """
    model.train()
    for module in model.modules():
        is_norm = freeze_batch_stats and isinstance(module, _BatchNorm)
        if is_norm or _is_frozen(module):
            module.eval()


def _is_frozen(module: nn.Module) -> bool:
    """Whether it has parameters and none of them learns."""
    learns = [parameter.requires_grad for parameter in module.parameters()]
    return bool(learns) and not any(learns)


def merged(model: nn.Module, moving: Moving) -> nn.Module:
    """The network as other commands know it: low-rank additions added to their weights.

    Args:
        model: Stays as it is.
        moving: What was moved; "lora" gives a copy, all else the model itself.
    """
    if moving != "lora":
        return model
    from .lora import merge_lora

    plain = copy.deepcopy(model)
    merge_lora(plain)
    return plain
