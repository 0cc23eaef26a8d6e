"""Little labelled images for the tests: folders, tar files, and a classifier of a few weights."""

import io
import tarfile

import numpy as np
from PIL import Image

from tiny import make_tiny_classifier


def pixels_of(label, number, size=8):
    """A noisy image whose brightness tells the class."""
    rng = np.random.default_rng([label, number])
    return np.clip(60 * label + 30 + rng.normal(0, 8, (size, size)), 0, 255).astype(np.uint8)


def png(array):
    held = io.BytesIO()
    Image.fromarray(array).save(held, format="PNG")
    return held.getvalue()


def write_folder(root, classes=("ant", "bee", "cat"), count=4, size=8):
    """``root/ant/0.png`` ...; gives the root."""
    for label, name in enumerate(classes):
        place = root / name
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (place / f"{number}.png").write_bytes(png(pixels_of(label, number, size)))
    return root


def write_tar(path, members):
    """Members are (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, classes=2, count=3, label=".cls"):
    """Two tar files; labels are numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        members = []
        for i in range(count):
            for number in range(classes):
                key = f"{shard}{i}{number}"
                text = str(number) if label == ".cls" else f'{{"label": {number}}}'
                members.append((f"{key}.png", png(pixels_of(number, i))))
                members.append((f"{key}{label}", text.encode()))
        write_tar(folder / f"train-{shard}.tar", members)
    return folder


def tiny_classifier(make_tiny_vit, classes=3, seed=0, size=16, **changes):
    return make_tiny_classifier(classes, seed, size, **changes)
