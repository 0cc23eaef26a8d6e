import csv

import numpy as np
import pytest
from PIL import Image

import objects
from fetch import Package
from manifest import Row, is_done, read_rows, split_of

from .packages_made import deb, disc, encoded, tgz

PHOTO = "file,label,category,group,split,package,source,license\n"
EMOJI = "source,label,category,group\n"
DRAWINGS = "usr/share/openclipart/png/"


def drawn(colour, height=120, width=100):
    return encoded(disc(height, width, colour))


def two_pieces():
    pixels = np.zeros((120, 240, 4), np.uint8)
    pixels[:, :100, 3] = pixels[:, 140:, 3] = 255
    return encoded(pixels)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A work folder with tiny packages, and lists that choose from them."""
    packages, chosen = tmp_path / "packages", tmp_path / "selection"
    chosen.mkdir()
    deb(
        packages / "stamps.deb",
        {"usr/frog.png": encoded(disc()), "usr/big.png": drawn((1, 2, 3), 800, 400), "x": b""},
    )
    tgz(
        packages / "fluent-emoji-3d.deb.tgz",
        {"package/assets/1f34e.webp": encoded(disc(60, 60), "WEBP")},
    )
    deb(
        packages / "openclipart-png.deb",
        {
            f"{DRAWINGS}food/apple_01.png": drawn((200, 0, 0)),
            f"{DRAWINGS}food/apple_02.png": drawn((0, 200, 0)),
            f"{DRAWINGS}food/copy.png": drawn((0, 200, 0)),
            f"{DRAWINGS}food/ugly.png": drawn((0, 0, 99)),
            f"{DRAWINGS}food/small.png": drawn((0, 0, 98), 95, 60),
            f"{DRAWINGS}food/full.png": encoded(np.full((120, 120, 4), 255, np.uint8)),
            f"{DRAWINGS}food/no_alpha.png": encoded(np.full((120, 120, 3), 9, np.uint8)),
            f"{DRAWINGS}food/two.png": two_pieces(),
            f"{DRAWINGS}food/broken.png": drawn((9, 9, 9))[:90],
            f"{DRAWINGS}food/nothing.png": encoded(np.zeros((120, 120, 4), np.uint8)),
            f"{DRAWINGS}food/about.txt": b"text",
            f"{DRAWINGS}shapes/round.png": drawn((7, 7, 7)),
            f"{DRAWINGS}special/patterns/dots.png": drawn((8, 8, 8)),
            f"{DRAWINGS}transportation/roadsigns/stop-1.png": drawn((250, 0, 0)),
        },
    )
    (chosen / "photo.csv").write_text(
        PHOTO
        + "tp_1.png,A frog.,animals,tp:frog,test,stamps,usr/frog.png,GPL-2\n"
        + "tp_0.png,A big one.,animals,tp:big,train,stamps,usr/big.png,GPL-2\n"
    )
    (chosen / "emoji.csv").write_text(EMOJI + "package/assets/1f34e.webp,red apple,food,apple\n")
    (chosen / "clipart_left_out.txt").write_text("# by eye\n\nfood/ugly.png\n")
    monkeypatch.setattr(objects, "SELECTION", chosen)

    def path(work, name):
        (found,) = packages.glob(f"{name}.deb*")
        return Package(name, "1.0", found.name, "", 1, ()), found

    monkeypatch.setattr(objects, "package_path", path)
    return tmp_path / "work"


def test_photographs_are_as_their_list_says(work):
    assert objects.build(work, ["photo"]) == {"photo": 2}
    big, frog = read_rows(work / "objects" / "photo.csv", Row)
    assert frog == Row(
        "photo/tp_1.png", "photo", "A frog.", "animals", 30, 40, frog.fill, "tp:frog", "test",
        "stamps 1.0", "usr/frog.png", "GPL-2",
    )  # fmt: skip
    assert frog.fill == pytest.approx(np.pi / 4, abs=0.05)  # an ellipse of few pixels
    with Image.open(work / "objects" / big.file) as cutout:
        assert cutout.mode == "RGBA"
        assert cutout.size == (big.width, big.height) == (192, 384)


def test_emoji_get_their_split_from_their_group(work):
    assert objects.build(work, ["emoji"]) == {"emoji": 1}
    (apple,) = read_rows(work / "objects" / "emoji.csv", Row)
    assert (apple.file, apple.label, apple.group) == ("emoji/1f34e.png", "red apple", "em:apple")
    assert apple.split == split_of("em:apple")
    assert (apple.package, apple.license) == ("fluent-emoji-3d 1.0", "MIT")


def test_drawings_pass_the_rule_once_each(work):
    assert objects.build(work, ["clipart"]) == {"clipart": 3}
    rows = read_rows(work / "objects" / "clipart.csv", Row)
    assert [(row.file, row.label, row.group) for row in rows] == [
        ("clipart/food_apple_01.png", "apple", "oc:food/apple"),
        ("clipart/food_apple_02.png", "apple", "oc:food/apple"),
        ("clipart/transportation_roadsigns_stop_1.png", "stop", "oc:road sign"),
    ]
    assert {row.license for row in rows} == {"public-domain"}
    assert len({row.split for row in rows[:2]}) == 1


def test_what_is_done_is_kept_and_what_is_missing_is_made_again(work):
    assert objects.build(work) == {"photo": 2, "emoji": 1, "clipart": 3}
    table = work / "objects" / "photo.csv"
    text = table.read_text()
    assert objects.build(work) == {}
    (work / "objects" / "photo" / "tp_1.png").unlink()
    assert objects.build(work) == {"photo": 2}
    assert table.read_text() == text
    assert is_done(table, Row)


def test_no_table_is_left_when_an_image_fails(work):
    (objects.SELECTION / "photo.csv").write_text(
        PHOTO + "a.png,A.,animals,tp:a,train,stamps,usr/gone.png,GPL-2\n"
    )
    with pytest.raises(ValueError, match=r"lacks 1 of 1 files wanted: usr/gone.png"):
        objects.build(work, ["photo"])
    (objects.SELECTION / "photo.csv").write_text(
        PHOTO + "a.png,A.,animals,tp:a,train,stamps,x,GPL-2\n"
    )
    with pytest.raises(ValueError, match=r"x cannot be read: cannot identify"):
        objects.build(work, ["photo"])
    assert not (work / "objects" / "photo.csv").exists()


def test_an_unknown_kind_is_named(work, capsys):
    with pytest.raises(ValueError, match="no kind drawings; there are photo, emoji, clipart"):
        objects.build(work, ["drawings"])
    assert objects.main([str(work), "drawings"]) == 1
    assert capsys.readouterr().err.startswith("error: there is no kind drawings")
    assert objects.main([str(work), "emoji"]) == 0
    assert capsys.readouterr().out == "1 of emoji\n"


@pytest.mark.parametrize("kind", ["photo", "emoji"])
def test_the_recipes_lists_are_whole_and_name_nothing_twice(kind):
    table = objects.Path(objects.__file__).parent / "selection" / f"{kind}.csv"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 400
    assert all(all(row.values()) for row in rows)
    assert len({row["source"] for row in rows}) == len(rows)
    splits = {}
    for row in rows:
        splits.setdefault(row["group"], set()).add(row.get("split"))
    assert all(len(found) == 1 for found in splits.values())
