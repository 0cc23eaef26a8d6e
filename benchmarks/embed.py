"""Measure an embedding store: speed, memory, masks from int8, what search finds, actors of Ray.

Each part can be run alone, with its size, and replaces its own lines of ``embed.json``;
``embed.md`` is written from that. Weights of the parts that measure time are random, for which time
is the same; those of ``masks`` and ``likeness`` are the embedded ones, trained, on real images.
Where no part is named, ``actors`` and ``ray`` are left out unless the package ray is installed, and
``likeness`` unless its images are named.

    python benchmarks/embed.py                          # every part, at its size
    python benchmarks/embed.py rate --images 200 --rounds 5
    python benchmarks/embed.py masks --photos FOLDER
    python benchmarks/embed.py actors ray
    python benchmarks/embed.py likeness --objects FOLDER --backgrounds FOLDER
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import likeness
import numpy as np
from folder import IMAGES, pure_rate, write_images
from local_ray import of_fixed_cost, ray_of

import tinyvit
from tinyvit.bench import machine_facts
from tinyvit.embed import EmbeddingStore, RayWorkers, embed_images
from tinyvit.embed.commits import FragmentWriter, commit, keep_up
from tinyvit.embed.rows import StoreRow
from tinyvit.embed.verify import POINTS
from tinyvit.image_spec import ImageSpec

HERE = Path(__file__).parent
PACKAGES = ("pylance", "torch", "ray")
Facts = dict[str, Any]


def make_engine(size: int, **changes: Any) -> tinyvit.Engine:
    """MobileSAM's encoder with random weights."""
    model = tinyvit.create_model("tiny_vit_5m_sam", img_size=size, **changes)
    return tinyvit.Engine(model)


def small_engine(size: int = 64, batch_size: int = 8) -> tinyvit.Engine:
    """An encoder that takes milliseconds and gives SAM's 256 channels."""
    from tinyvit.modules import TinyViT

    model = TinyViT(
        img_size=size, embed_dims=(8, 12, 16, 24), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 3),
        window_sizes=(4, 4, 4, 4), strides=(2, 2, 1), neck_dim=256, head=False,
    ).eval()  # fmt: skip
    model.image_spec = ImageSpec.sam(size)
    return tinyvit.Engine(model, backend="torch", batch_size=batch_size)


@contextmanager
def folder() -> Iterator[Path]:
    """A folder on the disk of this checkout, which may be another than /tmp's."""
    with tempfile.TemporaryDirectory(dir=HERE) as path:
        yield Path(path)


def quantiles(seconds: list[float]) -> Facts:
    """Median and 90 % in milliseconds."""
    milliseconds = np.asarray(seconds) * 1e3
    return {
        "median_ms": float(np.median(milliseconds)),
        "p90_ms": float(np.quantile(milliseconds, 0.9)),
    }


# -- parts -----------------------------------------------------------------------------------------


def rate(options: argparse.Namespace) -> Facts:
    """Images a second of ``embed_images`` beside the encoder alone, taking turns."""
    engine = make_engine(options.size)
    with folder() as place:
        (place / "photos").mkdir()
        paths = write_images(place / "photos", options.images)
        ratios, rates, pure, streams = [], [], [], []
        for number in range(options.rounds + 1):
            before = pure_rate(engine, options.pure_seconds)
            start = time.perf_counter()
            report = embed_images(place / "photos", place / f"{number}.lance", engine)
            seconds = time.perf_counter() - start
            after = pure_rate(engine, options.pure_seconds)
            start = time.perf_counter()
            for _ in engine.stream(paths):
                pass
            streamed = len(paths) / (time.perf_counter() - start)
            shutil.rmtree(place / f"{number}.lance")
            if report.stored != len(paths):
                raise RuntimeError(f"stored {report.stored} of {len(paths)}")
            if number:  # the first round warms up
                alone = statistics.mean((before, after))
                rates.append(len(paths) / seconds)
                pure.append(alone)
                streams.append(streamed)
                ratios.append(len(paths) / seconds / alone)
    return {
        **{"images": options.images, "size": options.size, "rounds": options.rounds},
        **{"images_per_s": statistics.median(rates), "encoder_per_s": statistics.median(pure)},
        **{"ratio": statistics.median(ratios), "ratios": ratios, "engine": engine.summary()},
        "stream_per_s": statistics.median(streams),
    }


def synthetic(store: EmbeddingStore, count: int, grid: int, start: int = 0) -> Iterator[StoreRow]:
    """Rows of random maps, as a store has them."""
    recipe, random = store.recipe, np.random.default_rng(start)
    placement, now = recipe.image_spec.place(480, 640), datetime.now(timezone.utc)
    bytes_ = random.integers(0, 120, 256 * grid * grid + count, np.uint8)
    kind = {"fp16": np.float16, "int8": np.int8}[recipe.dtype]
    for number in range(start, start + count):
        part = bytes_[number - start :][: 256 * grid * grid].astype(kind).reshape(256, grid, grid)
        yield StoreRow(
            *(f"folder-{number // 1000:04}/image {number}.jpg", "ok", f"{number:064x}", 1, 1, ""),
            *(now, placement, None if recipe.keep == "pooled" else part),
            scales=np.ones(256, np.float32) if recipe.dtype == "int8" else None,
            pooled=random.standard_normal(recipe.pooled_dim).astype(np.float32),
        )


def fill(store: EmbeddingStore, count: int, grid: int, commits: int) -> float:
    """Write rows in so many commits; seconds for each row."""
    seconds = 0.0
    for number in range(commits):
        each = count // commits
        start = time.perf_counter()
        writer, paths = FragmentWriter(store), []
        for row in synthetic(store, each, grid, number * each):
            writer.add(row)
            paths.append(row.path)
        commit(store, writer.finish(), paths)
        seconds += time.perf_counter() - start
    return seconds / count


def lookup(options: argparse.Namespace) -> Facts:
    """One image by its path, from rows of 1 MB (int8) and 2 MB (fp16)."""
    engine, found = small_engine(1024), {}
    for dtype in ("int8", "fp16"):
        with folder() as place:
            store = EmbeddingStore.create(place / "x.lance", engine, dtype=dtype)
            written = fill(store, options.rows, 64, 8)
            start = time.perf_counter()
            keep_up(store)
            upkeep = time.perf_counter() - start
            store = EmbeddingStore.open(place / "x.lance")
            paths = list(store)
            random = np.random.default_rng(0)
            times = []
            for number in random.permutation(len(paths))[: options.reads]:
                start = time.perf_counter()
                store[paths[number]]
                times.append(time.perf_counter() - start)
            start = time.perf_counter()
            size = sum(embedding.features.nbytes for _, embedding in store.iterate())
            scan = time.perf_counter() - start
            start = time.perf_counter()
            for _ in store.iterate(raw=True):
                pass
            raw = time.perf_counter() - start
            disk = sum(
                one.stat().st_size for one in (place / "x.lance").rglob("*") if one.is_file()
            )
        found[dtype] = {
            **{"rows": len(paths), "row_mb": 256 * 64 * 64 * (1 + (dtype == "fp16")) / 1e6},
            **{
                "write_ms": written * 1e3,
                "upkeep_s": upkeep,
                **quantiles(times[len(times) // 25 :]),
            },
            **{"scan_rows_per_s": len(paths) / scan, "scan_mb_per_s": size / scan / 1e6},
            **{"raw_rows_per_s": len(paths) / raw, "disk_mb": disk / 1e6},
        }
    return found


def opening(options: argparse.Namespace) -> Facts:
    """Opening a store of many rows of vectors, a row by its path, and an exact search."""
    with folder() as place:
        store = EmbeddingStore.create(place / "x.lance", small_engine(), keep="pooled")
        written = fill(store, options.many_rows, 1, max(1, options.many_rows // 20_000))
        keep_up(store)
        times = []
        for _ in range(9):
            start = time.perf_counter()
            store = EmbeddingStore.open(place / "x.lance")
            times.append(time.perf_counter() - start)
        rows = len(store)
        path = f"folder-{rows // 2000:04}/image {rows // 2}.jpg"
        reads, searches = [], []
        for _ in range(50):
            start = time.perf_counter()
            if path not in store:
                raise RuntimeError(f"no {path}")
            reads.append(time.perf_counter() - start)
        for _ in range(9):
            start = time.perf_counter()
            store.similar(np.ones(256), 20)
            searches.append(time.perf_counter() - start)
    return {
        **{"rows": rows, "write_ms": written * 1e3, "open": quantiles(times)},
        **{"by_path": quantiles(reads), "search": quantiles(searches)},
    }


def memory(options: argparse.Namespace) -> Facts:
    """Memory of a process that embeds many images, at a tenth of them and at the end."""
    with folder() as place:
        write_small(place / "photos", options.memory_images)
        code = "import embed, sys; embed.embed_and_tell(sys.argv[1], sys.argv[2])"
        done = subprocess.run(
            [sys.executable, "-c", code, str(place / "photos"), str(place / "x.lance")],
            cwd=HERE, capture_output=True, text=True, check=True,
        )  # fmt: skip
    return {"images": options.memory_images, **json.loads(done.stdout)}


def write_small(place: Path, count: int) -> None:
    """Small photographs that differ in two pixels."""
    from PIL import Image

    place.mkdir()
    with Image.open(IMAGES[0]) as image:
        pixels = np.array(image.convert("RGB").resize((128, 96)))
    for number in range(count):
        pixels[0, :2] = np.frombuffer(number.to_bytes(6, "little"), np.uint8).reshape(2, 3)
        Image.fromarray(pixels).save(place / f"{number:06}.png", compress_level=1)


def embed_and_tell(photos: str, url: str) -> None:
    """Embed a folder; print this process's memory on the way as JSON."""
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int, failed: int) -> None:
        if done % max(1, total // 50) == 0 or done == total:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((done, pages * os.sysconf("SC_PAGE_SIZE")))

    start = time.perf_counter()
    report = embed_images(photos, url, small_engine(256), progress=progress)
    total = seen[-1][0]
    early = [size for done, size in seen if total // 10 <= done <= total // 5]
    late = [size for done, size in seen if done >= total - total // 10]
    print(
        json.dumps(
            {
                "stored": report.stored,
                "row_mb": report.nbytes / max(1, report.stored) / 1e6,
                "seconds": time.perf_counter() - start,
                "early_mb": statistics.median(early) / 1e6,
                "late_mb": statistics.median(late) / 1e6,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            }
        )
    )


def masks(options: argparse.Namespace) -> Facts:
    """Masks of stored embeddings against those of float32 ones: nine clicks on each image."""
    segmenter = tinyvit.Segmenter(options.checkpoint)
    photos = sorted(path for path in options.photos.iterdir() if path.suffix in (".png", ".jpg"))
    found: Facts = {"images": len(photos), "checkpoint": options.checkpoint or "tinyvit_sam_2m"}
    with folder() as place:
        for dtype in ("fp32", "fp16", "int8"):
            url = place / f"{dtype}.lance"
            embed_images(photos, url, segmenter.encoder.engine, dtype=dtype)
        exact, ious = EmbeddingStore.open(place / "fp32.lance"), {}
        for dtype in ("fp16", "int8"):
            store, all_ = EmbeddingStore.open(place / f"{dtype}.lance"), []
            for path, embedding in exact.iterate():
                height, width = embedding.original_size
                prompts = [{"points": [[x * width, y * height]]} for x, y in POINTS]
                both = segmenter.segment([embedding, store[path]], [prompts, prompts])
                (first, second) = both
                for number, best in enumerate(first.best().tolist()):
                    one, other = (side.mask(number, best) for side in (first, second))
                    union = np.count_nonzero(one | other)
                    all_.append(np.count_nonzero(one & other) / union if union else 1.0)
            ious[dtype] = {
                **{"masks": len(all_), "mean_iou": float(np.mean(all_)), "worst_iou": min(all_)},
                "p01_iou": float(np.quantile(all_, 0.01)),
            }
    return {**found, **ious}


def likeness_part(options: argparse.Namespace) -> Facts:
    """What search finds alike."""
    with folder() as place:
        return likeness.measure(options.objects, options.backgrounds, options.encoders, place)


class Clock:
    """Takes the progress of a run: images done, and when."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def __call__(self, done: int, total: int, failed: int) -> None:
        """As ``embed_images`` calls it."""
        self.seen.append((time.monotonic(), done))

    def rate(self) -> float:
        """Images a second after the first outcome."""
        (first, before), (last, done) = self.seen[0], self.seen[-1]
        return (done - before) / (last - first)


def actors_of_fixed_cost(options: argparse.Namespace, count: int) -> Facts:
    """So many actors and as many times the images: how fast once all of them work."""
    images = options.images_per_actor * count
    with folder() as place:
        (place / "notes").mkdir()
        write_small(place / "photos", images)
        with ray_of(max(options.actors), of_fixed_cost(options.cost, str(place / "notes"))):
            clock, start = Clock(), time.monotonic()
            report = embed_images(
                place / "photos", place / "x.lance", small_engine(batch_size=1),
                ray=RayWorkers(count=count), progress=clock,
            )  # fmt: skip
            seconds = time.monotonic() - start
        began = [
            sorted(map(float, file.read_text().split())) for file in (place / "notes").iterdir()
        ]
    if report.stored != images or len(began) != count:
        raise RuntimeError(f"stored {report.stored} of {images} by {len(began)} actors")
    ready = max(times[0] for times in began)
    left = sum(sum(one >= ready for one in times) for times in began)
    return {
        **{"rate": left / (clock.seen[-1][0] - ready), "after_first": clock.rate()},
        **{"whole": images / seconds, "ready_s": ready - start},
    }


def actors_part(options: argparse.Namespace) -> Facts:
    """N actors of a fixed cost an image against N times one."""
    actors: Facts = {}
    for number in range(options.rounds):
        for count in sorted({1, *options.actors}):
            found = actors_of_fixed_cost(options, count)
            print(json.dumps({"round": number, "actors": count, **found}), flush=True)
            for name, value in found.items():
                actors.setdefault(str(count), {}).setdefault(name, []).append(value)
    return {
        **{"cost_s": options.cost, "images_per_actor": options.images_per_actor},
        **{"rounds": options.rounds, "actors": actors},
    }


def ray_part(options: argparse.Namespace) -> Facts:
    """One actor that computes, beside the plain loop, taking turns."""
    cores, engine = len(os.sched_getaffinity(0)), make_engine(options.size)
    plain, rays = [], []
    with folder() as place, ray_of(cores):
        (place / "photos").mkdir()
        paths = write_images(place / "photos", options.images)
        for number in range(options.rounds):
            for ray, rates in ((None, plain), (RayWorkers(count=1, cpus=cores), rays)):
                clock, url = Clock(), place / f"{number}.lance"
                report = embed_images(place / "photos", url, engine, ray=ray, progress=clock)
                if report.stored != len(paths):
                    raise RuntimeError(f"stored {report.stored} of {len(paths)}")
                rates.append(clock.rate())
                shutil.rmtree(url)
    return {
        **{"images": options.images, "size": options.size, "engine": engine.summary()},
        **{"rounds": options.rounds, "plain": plain, "ray": rays},
    }


PARTS: dict[str, Callable[[argparse.Namespace], Facts]] = {
    "rate": rate,
    "lookup": lookup,
    "opening": opening,
    "memory": memory,
    "masks": masks,
    "likeness": likeness_part,
    "actors": actors_part,
    "ray": ray_part,
}


# -- the page --------------------------------------------------------------------------------------


def page(found: Facts) -> str:
    """``embed.md``."""
    lines = ["# An embedding store, measured", "", "Written by `python benchmarks/embed.py`.", ""]
    for name, facts in found.items():
        machine = facts["machine"]
        lines += ["", f"## {name.capitalize()}", "", *LINES[name](facts), ""]
        versions = (f"{name} {machine[name]}" for name in PACKAGES if machine.get(name))
        lines += [f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}, "
                  f"{', '.join(versions)}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def rate_lines(f: Facts) -> list[str]:
    """P9."""
    return [
        f"{f['images']} JPEGs of 480 to 4000 pixels at {f['size']}, {f['engine']}, {f['rounds']} "
        "rounds, each between two measurements of the encoder alone; `Engine.stream` decodes the "
        "same files and keeps nothing.",
        "",
        "| `embed_images`, images/s | the encoder alone | ratio | `Engine.stream`, images/s |",
        "|---:|---:|---:|---:|",
        f"| {f['images_per_s']:.2f} | {f['encoder_per_s']:.2f} | {f['ratio']:.1%} "
        f"({min(f['ratios']):.1%} to {max(f['ratios']):.1%}) | {f['stream_per_s']:.2f} |",
    ]


def lookup_lines(f: Facts) -> list[str]:
    """P7 and the scan rate."""
    rows = [
        f"| {kind} | {one['rows']} | {one['row_mb']:.2f} | {one['write_ms']:.1f} | "
        f"{one['median_ms']:.1f} ({one['p90_ms']:.1f}) | {one['scan_rows_per_s']:.0f} | "
        f"{one['raw_rows_per_s']:.0f} | {one['upkeep_s']:.1f} |"
        for kind, one in f.items()
        if isinstance(one, dict) and "rows" in one
    ]
    return [
        "One image by its path as an `ImageEmbedding` (median, 90 %), checksum compared; `iterate` "
        "over all of them, and with `raw=True`.",
        "",
        "| | rows | MB a row | write, ms a row | by path, ms | scan, rows/s | raw, rows/s "
        "| upkeep, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
    ]


def opening_lines(f: Facts) -> list[str]:
    """P7 of a large store."""
    return [
        f"{f['rows']:,} rows with vectors of 256 numbers.",
        "",
        "| open, ms | is a path there, ms | exact search of 20, ms |",
        "|---:|---:|---:|",
        "| " + " | ".join(
            f"{f[name]['median_ms']:.1f} ({f[name]['p90_ms']:.1f})"
            for name in ("open", "by_path", "search")
        ) + " |",
    ]  # fmt: skip


def memory_lines(f: Facts) -> list[str]:
    """Memory over many images."""
    return [
        f"{f['stored']:,} images, rows of {f['row_mb']:.2f} MB, in {f['seconds']:.0f} s.",
        "",
        "| at a tenth to a fifth, MB | in the last tenth, MB | peak, MB |",
        "|---:|---:|---:|",
        f"| {f['early_mb']:.0f} | {f['late_mb']:.0f} | {f['peak_mb']:.0f} |",
    ]


def masks_lines(f: Facts) -> list[str]:
    """Masks of fp16 and int8 against those of fp32."""
    return [
        f"{f['checkpoint']} on {f['images']} photographs, nine clicks on each; the best mask of "
        "the float32 embedding against the same one of the stored embedding.",
        "",
        "| | masks | mean IoU | 1 % | worst |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {kind} | {one['masks']} | {one['mean_iou']:.4f} | {one['p01_iou']:.4f} | "
            f"{one['worst_iou']:.4f} |"
            for kind, one in ((kind, f[kind]) for kind in ("fp16", "int8"))
        ),
    ]


def actors_lines(f: Facts) -> list[str]:
    """P9 under Ray: scale."""
    actors = {int(count): one for count, one in f["actors"].items()}
    single = statistics.median(actors[1]["rate"])
    return [
        f"Actors that sleep {f['cost_s']} s for each image, {f['images_per_actor']} images for "
        f"each actor, medians of {f['rounds']} rounds: the rate from when all actors work to the "
        "last outcome, against so many times that of one; the whole run, with the actors' start.",
        "",
        "| actors | images/s | of N times one | lowest | of what sleeping allows "
        "| after the first outcome, images/s | whole run, images/s | all work after, s |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {count} | {statistics.median(one['rate']):.2f} "
            f"| {statistics.median(one['rate']) / count / single:.1%} "
            f"| {min(one['rate']) / count / single:.1%} "
            f"| {statistics.median(one['rate']) / count * f['cost_s']:.1%} "
            f"| {statistics.median(one['after_first']):.2f} "
            f"| {statistics.median(one['whole']):.2f} | {statistics.median(one['ready_s']):.0f} |"
            for count, one in sorted(actors.items())
        ),
    ]


def ray_lines(f: Facts) -> list[str]:
    """P9 under Ray: what it costs."""
    ratios = [ray / plain for ray, plain in zip(f["ray"], f["plain"], strict=True)]
    return [
        f"One actor that computes, with all cores, beside the plain loop: {f['images']} JPEGs at "
        f"{f['size']}, {f['engine']}, {f['rounds']} rounds, taking turns, after the first outcome.",
        "",
        "| one actor, images/s | plain loop, images/s | ratio |",
        "|---:|---:|---:|",
        f"| {statistics.median(f['ray']):.3f} | {statistics.median(f['plain']):.3f} "
        f"| {statistics.median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%}) |",
    ]


LINES: dict[str, Callable[[Facts], list[str]]] = {
    "rate": rate_lines,
    "lookup": lookup_lines,
    "opening": opening_lines,
    "memory": memory_lines,
    "masks": masks_lines,
    "likeness": likeness.lines,
    "actors": actors_lines,
    "ray": ray_lines,
}


def main() -> None:
    """Measure the parts that are named, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("parts", nargs="*", choices=[[], *PARTS], default=[], help="default: all")
    add("--images", type=int, default=100, help="rate, ray: photographs")
    add("--rounds", type=int, default=3, help="rate, actors, ray")
    add("--size", type=int, default=1024, help="rate, ray: of the input")
    add("--pure-seconds", type=float, default=20.0, help="rate: the encoder alone, each time")
    add("--rows", type=int, default=2048, help="lookup: rows of 1 and of 2 MB")
    add("--reads", type=int, default=500, help="lookup")
    add("--many-rows", type=int, default=1_000_000, help="opening")
    add("--memory-images", type=int, default=10_000, help="memory")
    add("--photos", type=Path, default=IMAGES[0].parent, help="masks: a folder")
    add("--checkpoint", help="masks: a whole SAM; default: the embedded weights")
    add("--actors", type=int, nargs="+", default=[2, 4, 8], help="actors, beside 1")
    add("--cost", type=float, default=0.25, help="actors: seconds for an image")
    add("--images-per-actor", type=int, default=240, help="actors")
    add("--objects", type=Path, help="likeness: cut-outs with alpha, as recipes/ makes them")
    add("--backgrounds", type=Path, help="likeness: photographs, likewise")
    add("--encoders", nargs="+", default=["tinyvit_sam_2m"], help="likeness: checkpoints")
    add("--output", type=Path, default=HERE)
    options = parser.parse_args()
    file = options.output / "embed.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    has_images = options.objects is not None and options.backgrounds is not None
    if "likeness" in options.parts and not has_images:
        parser.error("likeness wants --objects FOLDER and --backgrounds FOLDER")
    has_ray = find_spec("ray") is not None
    there = {"actors": has_ray, "ray": has_ray, "likeness": has_images}
    for name in options.parts or [name for name in PARTS if there.get(name, True)]:
        found[name] = {**PARTS[name](options), "machine": machine_facts("pylance", "ray")}
        print(json.dumps({name: found[name]}))
        found = {part: found[part] for part in PARTS if part in found}
        file.write_text(json.dumps(found, indent=1) + "\n")
        (options.output / "embed.md").write_text(page(found))


if __name__ == "__main__":
    main()
