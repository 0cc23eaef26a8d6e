"""Which images an embedding store finds alike: those with the same thing, or the same surroundings.

Two questions to the vectors that search uses. *Halves*: of the left and the right half of each
photograph, how often is the other half the nearest of all? *Things*: two objects are pasted on two
photographs, which gives four images; how often is an image nearer to the same object on the other
photograph than to the other object on the same one? A histogram of colours answers beside the
encoders. ``embed.py likeness`` calls this and writes the page.
"""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tinyvit.embed import EmbeddingStore, embed_images
from tinyvit.inference import Engine

SUFFIXES = (".png", ".jpg", ".jpeg")
QUALITY = 95
SHARES = (0.3, 0.5, 0.8)  # the object's longer side of the photograph's shorter one
Vectors = dict[str, NDArray[np.float32]]


def files_in(folder: Path) -> list[Path]:
    """Its images; where FOLDER.csv has a column ``group``, one of each group."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    manifest = folder.with_suffix(".csv")
    if not manifest.is_file():
        return files
    with manifest.open(encoding="utf-8", newline="") as file:
        groups = {Path(row["file"]).name: row.get("group") for row in csv.DictReader(file)}
    first: dict[str, Path] = {}
    for path in files:
        first.setdefault(groups.get(path.name) or path.name, path)
    return list(first.values())


def write_halves(photographs: Iterable[Path], folder: Path) -> None:
    """The left and the right half of each."""
    for number, path in enumerate(photographs):
        with Image.open(path) as image:
            whole = image.convert("RGB")
        middle = whole.width // 2
        for side, box in (
            ("left", (0, 0, middle, whole.height)),
            ("right", (whole.width - middle, 0, whole.width, whole.height)),
        ):
            whole.crop(box).save(folder / f"{number:04}-{side}.jpg", quality=QUALITY)


def write_quads(objects: list[Path], photographs: list[Path], share: float, folder: Path) -> int:
    """Two objects on two photographs each, at random places; how many such four images."""
    random = np.random.default_rng(0)
    objects = [objects[i] for i in random.permutation(len(objects))]
    photographs = [photographs[i] for i in random.permutation(len(photographs))]
    count = min(len(objects), len(photographs)) // 2
    for number in range(count):
        for o, cutout in enumerate(objects[2 * number :][:2]):
            for p, photograph in enumerate(photographs[2 * number :][:2]):
                with Image.open(cutout) as image, Image.open(photograph) as below:
                    pasted(image, below, share, random).save(
                        folder / f"{number:04}-object{o}-place{p}.jpg", quality=QUALITY
                    )
    return count


def pasted(
    cutout: Image.Image, photograph: Image.Image, share: float, random: np.random.Generator
) -> Image.Image:
    """An object with alpha on a photograph."""
    below, above = photograph.convert("RGB"), cutout.convert("RGBA")
    scale = share * min(below.size) / max(above.size)
    width, height = (max(round(side * scale), 1) for side in above.size)
    above = above.resize((width, height), Image.Resampling.LANCZOS)
    x, y = (int(random.integers(0, s - o + 1)) for s, o in zip(below.size, above.size, strict=True))
    below.paste(above, (x, y), above)
    return below


def colours_of(folder: Path) -> Vectors:
    """A histogram of 8 x 8 x 8 colours of each image, whose cosine is that of the counts' roots."""
    found = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), np.int64) // 32
        bins = np.bincount((pixels @ [64, 8, 1]).ravel(), minlength=512)
        found[path.name] = np.sqrt(bins).astype(np.float32)
    return found


def cosines(vectors: Vectors) -> tuple[list[str], NDArray[np.float32]]:
    """(names, the cosine of each with each, below all others with itself)."""
    names = sorted(vectors)
    matrix = np.stack([vectors[name] for name in names])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    found = matrix @ matrix.T
    np.fill_diagonal(found, -2)
    return names, found


def halves_found(vectors: Vectors) -> float:
    """In which share of the halves the other half is the nearest of all."""
    names, found = cosines(vectors)
    nearest = found.argmax(1)
    return float(np.mean([names[i][:4] == names[n][:4] for i, n in enumerate(nearest)]))


def things_found(vectors: Vectors) -> dict[str, float]:
    """Shares of the images: the same object is nearer; what the nearest of all has in common."""
    names, found = cosines(vectors)
    index = {name: i for i, name in enumerate(names)}
    nearer, objects, places = [], [], []
    for name, row in zip(names, found, strict=True):
        thing = index[_other(name, "place")]
        place = index[_other(name, "object")]
        nearer.append(row[thing] > row[place])
        objects.append(row.argmax() == thing)
        places.append(row.argmax() == place)
    return {
        "nearer": float(np.mean(nearer)),
        "nearest_object": float(np.mean(objects)),
        "nearest_place": float(np.mean(places)),
    }


def _other(name: str, word: str) -> str:
    return name.replace(f"{word}0", f"{word}2").replace(f"{word}1", f"{word}0").replace(
        f"{word}2", f"{word}1"
    )  # fmt: skip


def measure(
    objects: Path, photographs: Path, checkpoints: list[str], place: Path
) -> dict[str, Any]:
    """All of it: the number of images, and the shares for each encoder and for colours."""
    things, scenes = files_in(objects), files_in(photographs)
    folders = {"halves": place / "halves", **{str(s): place / f"things-{s}" for s in SHARES}}
    for folder in folders.values():
        folder.mkdir()
    write_halves(scenes, folders["halves"])
    quads = [write_quads(things, scenes, share, folders[str(share)]) for share in SHARES]
    rows = {}
    for name, vectors in _answers(folders, checkpoints, place):
        rows[name] = {
            "halves": halves_found(vectors["halves"]),
            "things": {str(share): things_found(vectors[str(share)]) for share in SHARES},
        }
    return {"photographs": len(scenes), "quads": quads[0], "rows": rows}


def _answers(
    folders: dict[str, Path], checkpoints: list[str], place: Path
) -> Iterator[tuple[str, dict[str, Vectors]]]:
    """What is asked, and its vectors of the images of each folder."""
    for number, checkpoint in enumerate(checkpoints):
        found = {}
        with Engine(checkpoint) as engine:
            for name, folder in folders.items():
                url = place / f"{number}-{name}.lance"
                report = embed_images(folder, url, engine, keep="pooled")
                if report.failed:
                    raise RuntimeError(f"{len(report.failed)} images failed: {report.failed[0]}")
                paths, matrix = EmbeddingStore.open(url).vectors()
                found[name] = dict(zip(paths, matrix, strict=True))
        yield checkpoint, found
    yield "colours alone", {name: colours_of(folder) for name, folder in folders.items()}


def lines(f: dict[str, Any]) -> list[str]:
    """For the page."""
    images, halves = 4 * f["quads"], 2 * f["photographs"]
    return [
        "The vectors that search uses, by their cosine; a histogram of colours beside them.",
        "",
        f"Halves: the left and the right half of {f['photographs']} photographs, {halves} images.",
        "",
        f"| | the other half is the nearest of all (by chance {1 / (halves - 1):.1%}) |",
        "|---|---:|",
        *(f"| {name} | {row['halves']:.1%} |" for name, row in f["rows"].items()),
        "",
        f"Things: {f['quads']} pairs of objects, each on a pair of photographs, {images} images; "
        "the object's longer side as a share of the photograph's shorter one. The same object on "
        "the other photograph against the other object on the same photograph; and which of the "
        f"two is the nearest of all (by chance {1 / (images - 1):.1%}).",
        "",
        "| | size | same object is nearer (by chance 50 %) | nearest: same object "
        "| nearest: same photograph |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {share} | {found['nearer']:.1%} | {found['nearest_object']:.1%} "
            f"| {found['nearest_place']:.1%} |"
            for name, row in f["rows"].items()
            for share, found in row["things"].items()
        ),
    ]
