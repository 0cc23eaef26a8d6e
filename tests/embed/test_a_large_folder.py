"""Two thousand files, real and broken, embedded, changed, brought up to date and searched."""

import io
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinyvit
from tinyvit import EmbeddingStore, embed_images
from tinyvit.embed.verify import verify_store

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
FORMATS = ("jpg", "png", "webp", "bmp", "tiff")
WHOLE, BROKEN = 1900, 100


def write_files(folder):
    """Parts of three photographs in five formats, and files that are no images."""
    photographs = []
    for name in ("chelsea.png", "coffee.png", "rocket.jpg"):
        with Image.open(PICTURES / name) as image:
            photographs.append(image.convert("RGB"))
    chance = random.Random(0)
    for number in range(WHOLE):
        image = photographs[number % 3]
        side = chance.randint(60, 200)
        left, top = (chance.randint(0, most - side) for most in image.size)
        part = image.crop((left, top, left + side, top + chance.randint(30, side)))
        if number % 7 == 0:
            part = part.transpose(Image.Transpose.ROTATE_90)
        suffix = FORMATS[number % 5]
        place = folder / f"{number % 3}{chance.choice('ab')}" / f"{number:04}.{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        part.save(place)
    data = io.BytesIO()
    photographs[0].save(data, "JPEG")
    for number in range(BROKEN):
        kinds = data.getvalue()[: 5000 + number], b"", b"text", b"\xff\xd8\xff", os.urandom(999)
        (folder / f"broken-{number:03}.jpg").write_bytes(kinds[number % 5])
    return folder


@pytest.mark.slow  # 65 s
def test_two_thousand_files(tmp_path):
    photos, url = write_files(tmp_path / "photos"), tmp_path / "photos.lance"
    shown = []
    engine = tinyvit.Engine("tinyvit_sam_2m", image_spec=tinyvit.ImageSpec.sam(64))
    report = embed_images(photos, url, engine, progress=lambda *now: shown.append(now))
    assert (report.stored + report.copied, len(report.failed)) == (WHOLE, BROKEN)
    assert shown[-1] == (WHOLE + BROKEN, WHOLE + BROKEN, BROKEN)
    assert all(path.startswith("broken-") for path, _ in report.failed)

    files = sorted(path for path in photos.rglob("*.*") if not path.name.startswith("broken-"))
    chance = random.Random(1)
    chosen = chance.sample(files, 250)
    for path in chosen[:50]:
        Image.fromarray(np.random.default_rng(len(path.name)).integers(
            0, 255, (50 + files.index(path) % 50, 70, 3), np.uint8)).save(path)  # fmt: skip
    for path in chosen[50:100]:
        path.rename(path.with_name(f"renamed {path.name}"))
    for path in chosen[100:150]:
        os.utime(path, ns=(1, 1))
    for path in chosen[150:200]:
        path.unlink()
    for path in chosen[200:250]:
        shutil.copyfile(path, path.with_name(f"copy {path.name}"))
    again = embed_images(photos, url, prune=True)
    assert again.stored + again.copied == 50 + 50 + 50 + 50
    assert again.stored <= 50 and again.gone == 100
    assert again.kept == WHOLE - 200 and len(again.failed) == BROKEN
    assert embed_images(photos, url).kept == WHOLE

    store = EmbeddingStore.open(url)
    there = {p.relative_to(photos).as_posix() for p in photos.rglob("*.*")}
    assert set(store) == {name for name in there if not name.startswith("broken-")}
    proof = verify_store(store)
    assert (proof.rows, proof.failed, proof.damaged, proof.twice) == (2000, BROKEN, [], [])
    for path in chance.sample(sorted(store), 20):
        (wanted,) = engine.stream(photos / path)
        np.testing.assert_allclose(store[path].features, wanted.features, atol=5e-3)
    right = 0
    for path in chance.sample(sorted(store), 60):
        if path[0] in "012" and "/" in path:  # the folder's digit is the photograph
            matches = store.similar(path, 5)
            right += sum(match.path[0] == path[0] for match in matches) >= 3
    assert right > 25  # parts of one photograph are like each other; by chance it were 13
