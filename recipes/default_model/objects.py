"""Objects with alpha out of packages: photographs, pictures of 3D models, emoji, drawings.

Leaves ``WORK/objects/KIND/*.png`` and, last of all, ``WORK/objects/KIND.csv``: a table is there if
all its images are. Photographs, 3D models and emoji are lists chosen by eye (``selection/*.csv``);
drawings are chosen by a rule, less a list of those left out by eye. The picture of a 3D model is
the one that its library shows in its catalogue. Packages must have been fetched.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

import manifest
from archives import read_members, read_named
from fetch import package_path
from manifest import Row, is_done, read_selection, split_of, write_rows, write_whole

LONGEST = 384
_FAINT = 16  # alpha up to which a border is cut away: what is left of shadows and resampling
_OPAQUE = 240
_EVERY_NEIGHBOUR = np.ones((3, 3), bool)


def cut_out(image: Image.Image) -> Image.Image | None:
    """Crop an image to what can be seen of it and make it small enough."""
    rgba = image.convert("RGBA")
    seen = _alpha(rgba) > _FAINT
    if not seen.any():
        return None
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    cropped = rgba.crop(box)
    scale = LONGEST / max(cropped.size)
    if scale >= 1:
        return cropped
    size = max(1, round(cropped.width * scale)), max(1, round(cropped.height * scale))
    # Premultiplied, or the colour of what is invisible would come through at the edge.
    return cropped.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def fill_of(cutout: Image.Image) -> float:
    """Share of a cut-out's pixels that belong to the object."""
    return round(float((_alpha(cutout) > 127).mean()), 3)


def is_one_object(cutout: Image.Image, share: float = 0.9) -> bool:
    """Whether nearly all of what can be seen hangs together."""
    alpha = _alpha(cutout)
    pieces, count = ndimage.label(alpha > _FAINT, structure=_EVERY_NEIGHBOUR)
    if count == 0:
        return False
    sums = np.asarray(ndimage.sum_labels(alpha, pieces, np.arange(1, count + 1)))
    return bool(sums.max() >= share * sums.sum())


def has_hard_edge(cutout: Image.Image, share: float = 0.12) -> bool:
    """Whether little of a cut-out is half transparent: no glow, no soft shadow, no glass."""
    alpha = _alpha(cutout)
    seen = alpha > _FAINT
    solid = ndimage.binary_dilation(alpha >= _OPAQUE, structure=_EVERY_NEIGHBOUR)
    return bool(seen.any() and (seen & ~solid).sum() <= share * seen.sum())


def _alpha(image: Image.Image) -> NDArray[np.uint8]:
    """The alpha channel [H, W]."""
    return np.asarray(image.getchannel("A"))


CLIPART_FOLDER = "usr/share/openclipart/png/"
# Icons, plain shapes, flags, lettering: no objects that somebody would click on.
CLIPART_PASSED_OVER = frozenset(
    ("buttons", "computer", "decorations", "logos", "shapes", "signs_and_symbols")
)
CLIPART_ONE_GROUP = {  # what differs in little but its sign or its colour
    "transportation/roadsigns/": "road sign",
    "people/smilies/": "smiley",
    "geography/astronomy/": "planet",
}
CLIPART_LEAST_SIDE = 96
CLIPART_FILL = (0.15, 0.95)


def build(work: Path, kinds: Sequence[str] = ()) -> dict[str, int]:
    """Cut out the objects of each kind that is not done."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"there is no kind {', '.join(unknown)}; there are {', '.join(KINDS)}")
    made = {}
    for kind in kinds or KINDS:
        table = work / "objects" / f"{kind}.csv"
        if is_done(table, Row):
            continue
        rows = sorted(KINDS[kind](work), key=lambda row: row.file)
        if not rows:
            raise ValueError(f"no object of kind {kind!r} came out of its packages")
        write_rows(table, rows, Row)
        made[kind] = len(rows)
    return made


def _photo(work: Path) -> Iterator[Row]:
    """Photographed objects; their list says all but the size."""
    chosen = read_selection("photo")
    for name in dict.fromkeys(row["package"] for row in chosen):
        package, path = package_path(work, name)
        sources = {row["source"]: row for row in chosen if row["package"] == name}
        for source, data in read_named(path, sources):
            row = sources[source]
            cutout = _cut(data, source)
            yield _keep(
                work, f"photo/{row['file']}", cutout, label=row["label"], kind="photo",
                category=row["category"], group=row["group"], split=row["split"],
                package=package.title, source=source, license=row["license"],
            )  # fmt: skip


RENDER_LICENSES = {
    "BlendSwap-CC-0": "CC0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US",
    "Scopia": "CC-BY-3.0",
}


def _render(work: Path) -> Iterator[Row]:
    """The catalogue's pictures of 3D models; what is not in its list is passed over."""
    package, path = package_path(work, "sweethome3d-furniture")
    splits = {(row["library"], row["model"]): row["split"] for row in read_selection("render")}
    for member, data in read_members(path, lambda name: name.endswith(".sh3f")):
        library = Path(member).stem
        for model, icon in _catalogue_icons(library, data).items():
            if (split := splits.pop((library, model), None)) is None:
                continue
            group = f"sh:{library}/{model}"
            yield _keep(
                work, f"render/{library}__{model}.png", _cut(icon, group), label=model,
                kind="render", category=library, group=group, split=split, package=package.title,
                source=f"{library}.sh3f/{model}", license=RENDER_LICENSES[library],
            )  # fmt: skip
    if splits:
        raise ValueError(f"{path} lacks {len(splits)} models, first {min(splits)}")


def _catalogue_icons(library: str, data: bytes) -> dict[str, bytes]:
    """The picture of each model, by the name of its folder, of a furniture library (a zip)."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
    except (zipfile.BadZipFile, KeyError) as err:
        raise ValueError(
            f"{library} is no furniture library: {err}; fetch its package again"
        ) from err
    entries: dict[str, dict[str, str]] = defaultdict(dict)
    for key, number, value in re.findall(r"^(icon|model)#(\d+)=(.*?)\s*$", text, re.MULTILINE):
        entries[number][key] = value
    return {
        Path(entry["model"]).parent.name: archive.read(entry["icon"].lstrip("/"))
        for entry in entries.values()
    }


def _emoji(work: Path) -> Iterator[Row]:
    """Emoji that show a thing, an animal, a plant or a person."""
    package, path = package_path(work, "fluent-emoji-3d")
    sources = {row["source"]: row for row in read_selection("emoji")}
    for source, data in read_named(path, sources):
        row = sources[source]
        cutout = _cut(data, source)
        group = f"em:{row['group']}"
        yield _keep(
            work, f"emoji/{Path(source).stem}.png", cutout, label=row["label"], kind="emoji",
            category=row["category"], group=group, split=split_of(group), package=package.title,
            source=source, license="MIT",
        )  # fmt: skip


def _clipart(work: Path) -> Iterator[Row]:
    """Drawings of one object with a clean edge, each only once."""
    package, path = package_path(work, "openclipart-png")
    left_out = _lines(manifest.SELECTION / "clipart_left_out.txt")
    seen: set[str] = set()
    for source, data in read_members(path, _may_be_clipart):
        inner = source.removeprefix(CLIPART_FOLDER)
        if inner in left_out or (cutout := _one_drawing(data)) is None:
            continue
        digest = hashlib.sha256(repr(cutout.size).encode() + cutout.tobytes()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        stem = re.sub(r"[^a-z0-9]+", "_", inner.removesuffix(".png").lower()).strip("_")
        group = _clipart_group(inner)
        yield _keep(
            work, f"clipart/{stem}.png", cutout, label=_words(Path(inner).stem), kind="clipart",
            category=inner.split("/")[0], group=group, split=split_of(group),
            package=package.title, source=source, license="public-domain",
        )  # fmt: skip


def _may_be_clipart(name: str) -> bool:
    """Whether a member of the package is a drawing in a folder of objects."""
    inner = name.removeprefix(CLIPART_FOLDER)
    return (
        inner != name
        and inner.endswith(".png")
        and inner.split("/")[0] not in CLIPART_PASSED_OVER
        and not inner.startswith("special/patterns/")
    )


def _one_drawing(data: bytes) -> Image.Image | None:
    """The cut-out of a drawing, or None if it is not one object with alpha."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if image.mode not in ("RGBA", "LA") and "transparency" not in image.info:
                return None
            cutout = cut_out(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # one bad drawing in thousands that nobody chose
    if cutout is None or max(cutout.size) < CLIPART_LEAST_SIDE:
        return None
    if not CLIPART_FILL[0] <= fill_of(cutout) <= CLIPART_FILL[1]:
        return None
    return cutout if is_one_object(cutout) and has_hard_edge(cutout) else None


def _clipart_group(inner: str) -> str:
    """What a drawing shares with others: its folder, and its name without digits."""
    for folder, name in CLIPART_ONE_GROUP.items():
        if inner.startswith(folder):
            return f"oc:{name}"
    stem = re.sub(r"[\d_\W]+", " ", Path(inner).stem.lower()).strip()
    return f"oc:{inner.split('/')[0]}/{stem}"


def _words(stem: str) -> str:
    """A file's name as words."""
    return re.sub(r"[\d_\W]+", " ", stem).strip() or stem


def _cut(data: bytes, source: str) -> Image.Image:
    """The cut-out of an image that was chosen."""
    try:
        cutout = cut_out(Image.open(io.BytesIO(data)))
    except (OSError, SyntaxError, ValueError) as err:
        raise ValueError(f"{source} cannot be read: {err}; fetch its package again") from err
    if cutout is None:
        raise ValueError(f"{source} shows nothing, although it was chosen")
    return cutout


def _keep(
    work: Path, file: str, cutout: Image.Image, *, kind: str, label: str, category: str,
    group: str, split: str, package: str, source: str, license: str,
) -> Row:  # fmt: skip
    """Write a cut-out and give its row."""
    write_whole(cutout, work / "objects" / file)
    width, height = cutout.size
    fill = fill_of(cutout)
    return Row(
        file, kind, label, category, width, height, fill, group, split, package, source, license
    )


def _lines(path: Path) -> frozenset[str]:
    """The lines of a file that say something."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return frozenset(line.strip() for line in lines if line.strip() and line[0] != "#")


KINDS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "photo": _photo,
    "render": _render,
    "emoji": _emoji,
    "clipart": _clipart,
}
