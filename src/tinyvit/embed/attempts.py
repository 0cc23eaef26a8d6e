"""Which images a process was at when it died, so that one that kills it is passed over.

Beside the rows of a store on a disk lies ``_attempts/``: each writer has a file in it, which it
holds locked and which says what it has begun and ended. A file that nobody holds is of a process
that died: what it was at is tried first the next time, one image alone. An image that ends the
process twice while it is alone is not tried again.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

FOLDER = "_attempts"
DEADLY = 2  # deaths alone with an image until it is passed over
REASON = (
    f"it ended the process {DEADLY} times, as a crash of the decoder or a lack of memory does; "
    "--retry-failed (retry_failed=True) tries it again"
)


class Attempts:
    """What one writer is at; a context that is left in any way but by death leaves nothing.

    Args:
        folder: Of the store; None (object storage) keeps nothing.

    Attributes:
        suspects: Paths that a process which died was at, and how often it died alone with each.
    """

    def __init__(self, folder: Path | None) -> None:
        self.suspects: Counter[str] = Counter()
        self._file: IO[str] | None = None
        self._path: Path | None = None
        if folder is not None:
            (folder / FOLDER).mkdir(exist_ok=True)
            self._path = folder / FOLDER / f"{uuid.uuid4().hex}.jsonl"

    def __enter__(self) -> Self:
        if self._path is None:
            return self
        others = sorted(self._path.parent.glob("*.jsonl"))
        self._file = self._path.open("a", encoding="utf-8")
        _lock(self._file)
        for other in others:
            self._take_over(other)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None and self._path is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()

    @property
    def deadly(self) -> list[str]:
        """Paths to be passed over."""
        return [path for path, deaths in self.suspects.items() if deaths >= DEADLY]

    def begin(self, path: str, alone: bool = False) -> None:
        """Note that an image is worked on; ``alone``: and no other."""
        self._write("alone" if alone else "begin", path)

    def end(self, path: str) -> None:
        """Note that it is done."""
        self._write("end", path)
        self.suspects.pop(path, None)

    def commit(self) -> None:
        """Forget what is done; what is begun and not ended stays."""
        if self._file is None or self._path is None:
            return
        begun, alone, deaths = _read(self._path)
        self._file.seek(0)
        self._file.truncate()
        for path in begun:
            self._write("alone" if path in alone else "begin", path)
        for path, count in deaths.items():
            self._write("suspect", path, count)

    def _write(self, what: str, path: str, deaths: int = 0) -> None:
        if self._file is not None:
            self._file.write(json.dumps([what, path, deaths]) + "\n")
            self._file.flush()  # the system has it then, whatever becomes of the process

    def _take_over(self, other: Path) -> None:
        """The suspects of a process that died."""
        try:
            with other.open("r+", encoding="utf-8") as file:
                if not _lock(file):
                    return
                begun, alone, deaths = _read(other)
                for path in {*begun, *deaths}:
                    count = deaths[path] + (path in alone)
                    self.suspects[path] = max(self.suspects[path], count)
                    self._write("suspect", path, self.suspects[path])
                other.unlink(missing_ok=True)
        except FileNotFoundError:  # another writer took it
            return


def _read(path: Path) -> tuple[list[str], set[str], Counter[str]]:
    """(begun and not ended, those of them that were alone, suspects) of a file."""
    begun: dict[str, None] = {}
    alone: set[str] = set()
    deaths: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            what, name, count = json.loads(line)
        except ValueError:  # the last one may have been cut off
            continue
        if what == "suspect":
            deaths[name] = count
        elif what == "end":
            begun.pop(name, None)
            alone.discard(name)
            deaths.pop(name, None)
        else:
            begun[name] = None
            if what == "alone":
                alone.add(name)
    return list(begun), alone, deaths


def _lock(file: IO[str]) -> bool:
    """Lock a file for this process; False: another one holds it."""
    if os.name != "posix":  # no locks there: each file counts as held, and nothing is passed over
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
