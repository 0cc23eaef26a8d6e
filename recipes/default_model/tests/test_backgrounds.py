import numpy as np
import pytest
from PIL import Image

import backgrounds
import manifest
from fetch import Package
from manifest import SPLITS, Background, read_rows, read_selection

from .packages_made import deb, encoded, rcc, wheel

HEAD = "file,package,source,license,split\n"


def photograph(height, width, format="JPEG"):
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([255 * y / height, 255 * x / width, 0 * x + 90], -1)
    return encoded(smooth.astype(np.uint8), format)


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """``choose(*lines)``: a work folder with tiny packages, of which these lines are chosen."""
    packages, chosen = tmp_path / "packages", tmp_path / "selection"
    chosen.mkdir()
    resources = rcc("img", {"dam.webp": photograph(60, 80, "WEBP"), "apple.webp": b"not asked"})
    deb(
        packages / "walls.deb",
        {
            "usr/lake.jpg": photograph(1000, 1800),
            "usr/wide.jpg": photograph(800, 1280),
            "usr/a.rcc": resources,
            "usr/text.jpg": b"text",
        },
    )
    wheel(packages / "images.whl", {"data/brick.png": photograph(30, 20, "PNG")})
    (chosen / "held_out.csv").write_text("package,source\nwalls,img/apple.webp\n")
    monkeypatch.setattr(manifest, "SELECTION", chosen)

    def path(work, name):
        (found,) = packages.glob(f"{name}.*")
        return Package(name, "1.0", found.name, "", 1, ()), found

    monkeypatch.setattr(backgrounds, "package_path", path)

    def make(*lines):
        (chosen / "backgrounds.csv").write_text(HEAD + "\n".join(lines) + "\n")
        return tmp_path / "work"

    return make


LINES = (
    "c.jpg,walls,usr/lake.jpg,CC0,train",
    "b.jpg,walls,usr/a.rcc:img/dam.webp,CC-BY-2.0,val",
    "a.jpg,images,data/brick.png,BSD-3,test",
)


def test_photographs_come_out_of_every_package(choose):
    work = choose(*LINES)
    assert backgrounds.build(work) == 3
    rows = read_rows(work / "backgrounds" / "manifest.csv", Background)
    assert rows == [
        Background("a.jpg", 20, 30, "images 1.0", "data/brick.png", "BSD-3", "test"),
        Background("b.jpg", 80, 60, "walls 1.0", "usr/a.rcc:img/dam.webp", "CC-BY-2.0", "val"),
        Background("c.jpg", 900, 500, "walls 1.0", "usr/lake.jpg", "CC0", "train"),
    ]
    for row in rows:
        with Image.open(work / "backgrounds" / row.file) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert image.size == (row.width, row.height)
            # a smooth ramp: what JPEG and shrinking change is below one step in twenty
            first = image.getpixel((0, 0))
            last = image.getpixel((row.width - 1, row.height - 1))
            assert max(first[:2]) < 20
            assert min(last[:2]) > 235


def test_halves_of_pixels_go_up(choose):
    work = choose("a.jpg,walls,usr/wide.jpg,CC0,train")
    backgrounds.build(work)
    with Image.open(work / "backgrounds" / "a.jpg") as image:
        assert image.size == (900, 563)  # 1280 x 800: 562.5


def test_what_is_done_is_kept(choose):
    work = choose(*LINES)
    assert backgrounds.build(work) == 3
    assert backgrounds.build(work) == 0
    (work / "backgrounds" / "b.jpg").unlink()
    assert backgrounds.build(work) == 3


def test_photos_of_the_evaluation_set_are_refused(choose):
    work = choose(*LINES, "d.jpg,walls,usr/a.rcc:img/apple.webp,CC0,train")
    with pytest.raises(ValueError, match=r"d.jpg is made of img/apple.webp, which models are eval"):
        backgrounds.build(work)
    assert not work.exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("usr/sea.jpg", r"lacks 1 of 1 files wanted: usr/sea.jpg"),
        ("usr/a.rcc:img/sea.webp", r"usr/a.rcc in .*walls.deb lacks img/sea.webp"),
        ("usr/text.jpg", r"usr/text.jpg cannot be read: cannot identify"),
    ],
)
def test_what_is_missing_or_broken_is_named_and_no_table_is_left(choose, source, words):
    work = choose(f"a.jpg,walls,{source},CC0,train")
    with pytest.raises(ValueError, match=words):
        backgrounds.build(work)
    assert not (work / "backgrounds" / "manifest.csv").exists()


def test_the_recipes_list_holds_nothing_of_the_evaluation_set():
    held_out = [(row["package"], row["source"]) for row in read_selection("held_out")]
    rows = read_selection("backgrounds")
    assert len(held_out) > 90
    assert len(rows) > 200
    assert {row["split"] for row in rows} == set(SPLITS)
    assert all(all(row.values()) for row in rows)
    assert len({row["source"] for row in rows}) == len({row["file"] for row in rows}) == len(rows)
    for row in rows:
        assert not any(
            row["package"] == package and row["source"].endswith(source)
            for package, source in held_out
        )
