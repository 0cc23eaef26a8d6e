"""Files as other tools write them: JSON and CSV in several dialects, and names of files.

A byte order mark, semicolons and tabs are usual, and so are names with Windows' separators, of
another machine or of another folder. All readers of data sets take them through these functions.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Hashable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

SHOWN = 5  # names in a message


def load_json(path: Path) -> Any:
    """The content of a JSON file, in UTF-8, 16 or 32, with a byte order mark or without."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(f"{path} cannot be read as JSON: {err}") from err


def read_table(path: Path) -> list[tuple[int, list[str]]]:
    """(number of the line, stripped cells) of each line that is not empty, of at least one.

    Comma, semicolon or tab separate: what the first line has most of, Excel's ``sep=;`` too.
    """
    try:
        data = path.read_bytes()
        is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
        first = text.partition("\n")[0]
        mark = max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
        lines = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
        rows = [(number, cells) for number, cells in lines if any(cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise ValueError(f"the list {str(path)!r} cannot be read as CSV text: {err}") from err
    rows = rows[1:] if first.lower().startswith("sep=") else rows
    if not rows:
        raise ValueError(f"the list {str(path)!r} is empty; wanted names of files in each line")
    return rows


def find_column(header: Sequence[str], names: Sequence[str]) -> int | None:
    """The place of the first of these names in a header, in any case."""
    found = [cell.lower() for cell in header]
    return next((found.index(name) for name in names if name in found), None)


def find_file(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of this name in one of the folders, or that of the longest end of the name there."""
    straight = name.replace("\\", "/").rpartition("?d=")[2]  # Label Studio: local-files/?d=...
    names = [name, straight, unquote(straight)]
    parts = PurePosixPath(straight).parts
    names += ["/".join(parts[n:]) for n in range(1, len(parts)) if parts[n] != ".."]
    places = (folder / one for one in names for folder in folders)
    return next((place for place in places if os.path.isfile(place)), None)


def identity(path: Path) -> Hashable:
    """What tells a file from all others, whatever name or link leads to it."""
    try:
        found = path.stat()
    except OSError:
        return str(path)
    return (found.st_dev, found.st_ino) if found.st_ino else str(path.resolve())


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
