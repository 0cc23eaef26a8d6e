"""Which pictures are measured on and never learnt from; names in, names out.

Each name is put on a side by a hash of itself, so that it stays there when others come or go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

__all__ = ["hold_out"]


def hold_out(names: Sequence[str], part: float | str, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split names into those to learn from and those to measure on.

    Args:
        names: What is there; at least two.
        part: About this part is held out, above 0 and below 1, at least one name on each side; or
            the folder whose names are.
        seed: Which names.

    Returns:
        (to learn from, held out), each in the order of ``names``.

    Raises:
        ValueError: Fewer than two names, ``part`` is out of its range, or the folder leaves nothing
            on one side.

    Example:
        >>> learnt, held = hold_out([f"{n}.jpg" for n in range(100)], 0.2)
        >>> len(learnt), len(held)
        (80, 20)
    """
    if isinstance(part, str):
        return _by_folder(names, part)
    if not 0 < part < 1:
        raise ValueError(f"held_out must be a part above 0 and below 1, got {part}")
    if len(names) < 2:
        raise ValueError(
            f"learning and measuring want at least 2 pictures, got {len(names)}; measuring on a "
            "picture that was learnt from says nothing"
        )
    drawn = {name: _number(name, seed) for name in names}
    held = {name for name, number in drawn.items() if number < part}
    if not held:
        held = {min(drawn, key=lambda name: drawn[name])}
    if len(held) == len(drawn):
        held.discard(max(drawn, key=lambda name: drawn[name]))
    return [n for n in names if n not in held], [n for n in names if n in held]


def _by_folder(names: Sequence[str], folder: str) -> tuple[list[str], list[str]]:
    prefix = folder.strip("/") + "/"
    learnt = [name for name in names if not name.startswith(prefix)]
    held = [name for name in names if name.startswith(prefix)]
    if not learnt or not held:
        raise ValueError(
            f"held_out={folder!r} leaves {len(learnt)} pictures to learn from and {len(held)} to "
            "measure on; wanted a folder below the pictures' with some of them"
        )
    return learnt, held


def _number(name: str, seed: int) -> float:
    """An even number from 0 to below 1."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
