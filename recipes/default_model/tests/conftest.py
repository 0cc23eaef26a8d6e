"""What the tests of the recipe share: its files may be imported, and a tiny SAM on the disk.

All of them are ``slow`` (the recipe runs once a release) but the one that runs the whole recipe.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import make_tiny_sam

from . import recipe_files  # noqa: F401  (puts the recipe's folder on the path)

ALWAYS_RUN = "test_from_cut_outs_to_a_card"


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and item.name != ALWAYS_RUN:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_sam_file(tmp_path_factory):
    """A whole SAM for images of 64 pixels, as training leaves it: float32, with a header."""
    from tinyvit.train.tasks.segment import save_sam

    sam = make_tiny_sam(loadable=True)  # with a head, as classifiers have it
    return save_sam(sam, tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def make_supply():
    """``make_supply(work)``: a few cut-outs, backgrounds and things for each split, with tables."""
    from manifest import SPLITS, Background, Row, write_rows

    def make(work):
        rng = np.random.default_rng(0)
        rows, grounds, things = [], [], []
        for number, split in enumerate(SPLITS * 2):
            rgba = rng.integers(0, 256, (40, 30, 4)).astype(np.uint8)
            y, x = np.mgrid[-1:1:40j, -1:1:30j]
            rgba[..., 3] = (np.hypot(x, y) < 1) * 255
            row = Row(
                f"photo/{number}.png", "photo", f"thing {number}", "thing", 30, 40,
                0.78, f"thing_{number}", split, "things 1.0", f"{number}.png", "CC0-1.0",
            )  # fmt: skip
            (work / "objects" / "photo").mkdir(parents=True, exist_ok=True)
            Image.fromarray(rgba).save(work / "objects" / row.file)
            rows.append(row)
            ground = Background(
                f"{number}.jpg", 96, 80, "grounds 2.0", f"{number}.jpg", "CC-BY-4.0", split
            )
            (work / "backgrounds").mkdir(exist_ok=True)
            noise = Image.fromarray(rng.integers(60, 200, (5, 6, 3)).astype(np.uint8))
            noise.resize((96, 80)).save(work / "backgrounds" / ground.file)
            grounds.append(ground)
            (work / "labels").mkdir(exist_ok=True)
            Image.fromarray(rgba[..., :3]).resize((96, 80)).save(
                work / "labels" / f"{number}_0.jpg"
            )
            soft = np.clip(1.5 - np.hypot(*np.mgrid[-1:1:80j, -1:1:96j]) * 1.5, 0, 1) * 255
            Image.fromarray(soft.astype(np.uint8)).save(work / "labels" / f"{number}_0.png")
            things.append(replace(ground, file=f"{number}_0.jpg"))
        write_rows(work / "labels" / "manifest.csv", things, Background)
        write_rows(work / "objects" / "photo.csv", rows, Row)
        write_rows(work / "backgrounds" / "manifest.csv", grounds, Background)
        return work

    return make


@pytest.fixture
def make_photographs():
    """``make_photographs(folder, method="drawn")``: two images, three masks, a manifest."""

    def make(folder, method="drawn"):
        lines = ["image,mask,label,method"]
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
        for number, count in enumerate((1, 2)):
            pixels = np.full((48, 64, 3), 40 * number + 20, np.uint8)
            for place in range(count):
                mask = np.zeros((48, 64), np.uint8)
                mask[10:30, 5 + 30 * place : 25 + 30 * place] = 255
                pixels[mask > 0] = (200, 90 * place, 30)
                Image.fromarray(mask).save(folder / "masks" / f"{number}_{place}.png")
                lines.append(f"{number}.png,{number}_{place}.png,box,{method}")
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
        return folder

    return make
