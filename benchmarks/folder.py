"""Compare a folder of images of mixed sizes with the speed of the encoder alone.

Writes JPEGs made from the example images to a temporary folder, runs ``Engine.stream`` over it, and
before and after that the backend alone on prepared tensors of the model's size. Prints one line of
JSON: the ratio is the speed that remains after decoding, resizing and batching.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import tinyvit
from tinyvit.bench import machine_facts

FOLDER = Path(__file__).parents[1] / "examples" / "pictures"
IMAGES = [FOLDER / name for name in ("chelsea.png", "coffee.png", "rocket.jpg")]


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEGs of 480 to 4000 pixels, upright and lying."""
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        with Image.open(IMAGES[number % len(IMAGES)]) as original:
            longer = int(np.exp(random.uniform(np.log(480), np.log(4000))))
            scale = longer / max(original.size)
            image = original.convert("RGB").resize(
                [max(round(s * scale), 1) for s in original.size]
            )
        if random.uniform() < 0.5:
            image = image.transpose(Image.Transpose.ROTATE_90)
        paths.append(folder / f"{number:04}.jpg")
        image.save(paths[-1], quality=90)
    return paths


def pure_rate(engine: tinyvit.Engine, seconds: float) -> float:
    """Images a second of the backend alone, on a prepared tensor, as a folder's are counted."""
    height, width = engine.image_spec.size
    batch = torch.randn(1, 3, height, width)
    engine.backend(batch)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        engine.backend(batch)
        times.append(time.perf_counter() - start)
    return len(times) / sum(times)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_vit_5m_sam")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    engine = tinyvit.Engine(tinyvit.create_model(options.model), precision=options.precision)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), options.count)
        before = pure_rate(engine, 10)
        start, peaks, done = time.perf_counter(), [], 0
        for done, _ in enumerate(engine.stream(paths), 1):
            if done % (options.count // 4 or 1) == 0:
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        rate = done / (time.perf_counter() - start)
        after = pure_rate(engine, 10)
    result = {
        "model": options.model,
        "precision": options.precision,
        "pictures": done,
        "pictures_per_second": round(rate, 3),
        "encoder_alone_before_and_after": [round(before, 3), round(after, 3)],
        "ratio": round(rate / statistics.mean((before, after)), 3),
        "peak_mb_at_each_quarter": peaks,
        **machine_facts(),
    }
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
