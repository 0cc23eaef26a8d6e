"""Background photos for composites, out of packages.

    python recipes/default_model/backgrounds.py WORK

Leaves ``WORK/backgrounds/*.jpg`` and, last of all, ``WORK/backgrounds/manifest.csv``: the table is
there if all its images are. Which photos, with licence and author, says
``selection/backgrounds.csv``, chosen by eye. A source ``a.rcc:b`` is the file ``b`` in the Qt
resource file ``a.rcc``. ``selection/held_out.csv`` lists the photos of the evaluation set;
none of them may be chosen. Packages must have been fetched.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from archives import read_named, read_resources
from fetch import package_path
from manifest import Background, is_done, read_selection, write_rows, write_whole

LONGEST = 900
_QUALITY = 92


def build(work: Path) -> int:
    """Make the background photographs if they are not done."""
    table = work / "backgrounds" / "manifest.csv"
    if is_done(table, Background):
        return 0
    chosen = read_selection("backgrounds")
    _refuse_held_out(chosen)
    rows: list[Background] = []
    for name in dict.fromkeys(row["package"] for row in chosen):
        package, path = package_path(work, name)
        sources = {row["source"]: row for row in chosen if row["package"] == name}
        for source, data in _members(path, list(sources)):
            row = sources[source]
            photograph = _photograph(data, source)
            write_whole(photograph, table.parent / row["file"], quality=_QUALITY, optimize=True)
            width, height = photograph.size
            rows.append(
                Background(
                    row["file"], width, height, package.title, source, row["license"], row["split"]
                )
            )
    write_rows(table, sorted(rows, key=lambda row: row.file), Background)
    return len(rows)


def _refuse_held_out(chosen: Sequence[dict[str, str]]) -> None:
    """Raise if a chosen photo belongs to the evaluation set."""
    held_out = [(row["package"], row["source"]) for row in read_selection("held_out")]
    for row in chosen:
        for package, source in held_out:
            if row["package"] == package and row["source"].endswith(source):
                raise ValueError(
                    f"{row['file']} is made of {source}, which models are evaluated on; remove it "
                    "from selection/backgrounds.csv"
                )


def _members(path: Path, sources: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Read photographs of a package, also those inside its resource files."""
    inside: dict[str, set[str]] = {}
    for source in sources:
        outer, _, inner = source.partition(":")
        inside.setdefault(outer, set()).add(inner)
    for outer, data in read_named(path, inside):
        wanted = inside[outer]
        if "" in wanted:
            wanted.discard("")
            yield outer, data
        if not wanted:
            continue
        for inner, content in read_resources(data):
            if inner in wanted:
                wanted.discard(inner)
                yield f"{outer}:{inner}", content
        if wanted:
            raise ValueError(f"{outer} in {path} lacks {', '.join(sorted(wanted)[:3])}")


def _photograph(data: bytes, source: str) -> Image.Image:
    """A photograph, upright, RGB, longest side at most 900 pixels."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except (OSError, SyntaxError, ValueError) as err:
        raise ValueError(f"{source} cannot be read: {err}; fetch its package again") from err
    scale = LONGEST / max(image.size)
    if scale >= 1:
        return image
    # Halves go up, which round() does not do: 2560 x 1600 becomes 900 x 563.
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
