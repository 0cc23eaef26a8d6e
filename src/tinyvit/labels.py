"""Names of classes: the 1000 of ImageNet-1k, or those of a file.

Knows no model: which numbers a head gives is told to ``labels_for``.

The list in ``data/imagenet_1k.txt`` has one class a line, in the order of the numbers 0 to 999
that all published ImageNet-1k heads use: the classes of the ILSVRC 2012 challenge sorted by their
WordNet number, each with the words of its WordNet 3.0 synset. It was put together from timm's
tables ``imagenet_synsets.txt`` and ``imagenet_synset_to_lemma.txt`` (Apache-2.0).
"""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path

_IMAGENET_CLASSES = 1000


def imagenet_labels() -> tuple[str, ...]:
    """The names of ImageNet-1k's classes, in the order of their numbers.

    Examples:
        >>> imagenet_labels()[285]
        'Egyptian cat'
    """
    text = (files("tinyvit") / "data" / "imagenet_1k.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names in a file, in the order of the classes' numbers.

    It is a text file with one name a line (empty lines at the end do not count); or JSON: a list of
    names, an object from number to name (or to [WordNet number, name]), or an object from name to
    number. A ValueError says that it cannot be read, holds no names, or leaves out a number.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise ValueError(f"the labels {str(path)!r} cannot be read as text: {err}") from err
    if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
        try:
            content = json.loads(text)
        except ValueError as err:
            raise ValueError(f"the labels {str(path)!r} are no JSON: {err}") from err
        names = _from_json(content, path)
    else:
        names = [line.strip() for line in text.rstrip().splitlines()]
    if not any(names):
        raise ValueError(f"the labels {str(path)!r} hold no names; wanted one a line, or JSON")
    return tuple(names)


def labels_for(
    num_classes: int, path: str | os.PathLike[str] | None = None
) -> tuple[str, ...] | None:
    """The names for a head: those of a file, or ImageNet's where the head has 1000 classes.

    None where nothing names them. A ValueError says that the file, which is as for ``read_labels``,
    cannot be read, or has another number of names than the head has classes.

    Examples:
        >>> labels_for(21841) is None
        True
    """
    if path is None:
        return imagenet_labels() if num_classes == _IMAGENET_CLASSES else None
    names = read_labels(path)
    if len(names) != num_classes:
        raise ValueError(
            f"{os.fspath(path)!r} has {len(names)} names, but the head has {num_classes} classes; "
            "give a file with one name for each class"
        )
    return names


def _from_json(content: object, path: Path) -> list[str]:
    """Names in the order of their numbers, from any of the forms in use."""
    if isinstance(content, list):
        pairs = dict(enumerate(content))
    elif isinstance(content, dict) and all(type(value) is int for value in content.values()):
        pairs = {number: name for name, number in content.items()}
    elif isinstance(content, dict) and all(key.isdecimal() for key in content):
        pairs = {int(key): value for key, value in content.items()}
    else:
        pairs = {-1: None}
    names = [pairs.get(number) for number in range(len(pairs))]
    names = [name[-1] if isinstance(name, list) and name else name for name in names]
    texts = [name for name in names if isinstance(name, str)]
    if len(texts) != len(names) or (isinstance(content, dict) and len(pairs) != len(content)):
        raise ValueError(
            f"the labels {str(path)!r} must be a list of names, or an object from the numbers 0, "
            "1, 2, ... to names or back, with no number left out"
        )
    return texts
