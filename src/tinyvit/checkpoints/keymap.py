"""Rename the keys of a state dict, from a family's spelling to the canonical one and back.

Pure functions, dict in, dict out; the values are passed on untouched (they may be tensors or
anything else). The renaming is one to one, so there and back gives the same dict. What a family
looks like stands in ``families``; which tensors a file must hold is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from tinyvit.checkpoints.families import get_layout, part_of
from tinyvit.errors import CheckpointError

__all__ = ["from_canonical", "key_from_canonical", "key_to_canonical", "to_canonical"]

T = TypeVar("T")

# timm's spelling, canonical spelling; both start a key.
_TIMM_PREFIXES = (
    ("patch_embed.conv1.", "patch_embed.seq.0."),
    ("patch_embed.conv2.", "patch_embed.seq.2."),
    ("head.norm.", "norm_head."),
    ("head.fc.", "head."),
)
_STAGE = re.compile(r"^(stages|layers)\.(\d+)\.(downsample\.)?(.*)$")


def to_canonical(state: Mapping[str, T], family: str) -> dict[str, T]:
    """Rename a family's keys to the canonical ones.

    ``*.attention_bias_idxs``, index tables that Cream's files may hold and no loader reads, are
    left out. Keys of no TinyViT part keep their name.

    Args:
        state: Key -> value, in the family's spelling.
        family: The family's name.

    Returns:
        A new dict in the same order.

    Raises:
        CheckpointError: If the family is unknown, or two keys would get the same name.

    Example:
        >>> to_canonical({"stages.1.downsample.conv1.conv.weight": 0}, "timm")
        {'layers.0.downsample.conv1.c.weight': 0}
    """
    get_layout(family)
    renamed: dict[str, T] = {}
    for key, value in state.items():
        new = key_to_canonical(key, family)
        if part_of(new) == "bias_indices":
            continue
        if new in renamed:
            raise CheckpointError(
                f"two tensors of this {family} file would both be called {new!r}; "
                "the file mixes two spellings, convert it from its original"
            )
        renamed[new] = value
    return renamed


def from_canonical(state: Mapping[str, T], family: str) -> dict[str, T]:
    """Rename canonical keys to a family's own; the inverse of ``to_canonical``.

    Args:
        state: Key -> value, in canonical spelling.
        family: The family's name.

    Returns:
        A new dict in the same order.

    Raises:
        CheckpointError: If the family is unknown, or has no place for some of the keys (all of
            them are named).

    Example:
        >>> from_canonical({"norm_head.bias": 0}, "mobile_sam")
        {'image_encoder.norm_head.bias': 0}
    """
    layout = get_layout(family)
    homeless = [key for key in state if part_of(key) not in (*layout.required, *layout.optional)]
    if homeless:
        raise CheckpointError(
            f"a {family} file has no place for {len(homeless)} of these tensors: "
            f"{', '.join(homeless)}; leave them out first"
        )
    return {key_from_canonical(key, family): value for key, value in state.items()}


def key_to_canonical(key: str, family: str) -> str:
    """Return the canonical name of one key of a family's file.

    Args:
        key: The key as it stands in the file.
        family: The family's name.

    Returns:
        The canonical key.

    Raises:
        CheckpointError: If the family is unknown.
    """
    layout = get_layout(family)
    if layout.naming == "timm":
        return _from_timm(key)
    return key.removeprefix(layout.prefix)


def key_from_canonical(key: str, family: str) -> str:
    """Return the name a canonical key has in a family's file.

    Args:
        key: The canonical key.
        family: The family's name.

    Returns:
        The family's key.

    Raises:
        CheckpointError: If the family is unknown.
    """
    layout = get_layout(family)
    if layout.naming == "timm":
        return _to_timm(key)
    is_encoder = part_of(key) in ("trunk", "head", "neck", "bias_indices")
    return layout.prefix + key if is_encoder else key


def _from_timm(key: str) -> str:
    """Canonical key of timm's key: a stage's downsample moves to the end of the stage before."""
    for theirs, ours in _TIMM_PREFIXES:
        if key.startswith(theirs):
            return _with_short_conv(ours + key.removeprefix(theirs))
    match = _STAGE.match(key)
    if match is None or match[1] != "stages":
        return key
    stage = int(match[2]) - (1 if match[3] else 0)
    return _with_short_conv(f"layers.{stage}.{match[3] or ''}{match[4]}")


def _to_timm(key: str) -> str:
    """Name of a canonical key in timm's files."""
    for theirs, ours in _TIMM_PREFIXES:
        if key.startswith(ours):
            return (theirs + key.removeprefix(ours)).replace(".c.", ".conv.")
    match = _STAGE.match(key)
    if match is None or match[1] != "layers":
        return key
    stage = int(match[2]) + (1 if match[3] else 0)
    return f"stages.{stage}.{match[3] or ''}{match[4]}".replace(".c.", ".conv.")


def _with_short_conv(key: str) -> str:
    """``….conv.weight`` -> ``….c.weight``: the convolution of a Conv2d_BN."""
    return key.replace(".conv.", ".c.")
