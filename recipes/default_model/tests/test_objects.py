import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

import manifest
import objects
from fetch import Package
from manifest import Row, is_done, read_rows, split_of
from objects import LONGEST, cut_out, fill_of, has_hard_edge, is_one_object, write_whole

from .packages_made import deb, disc, encoded, tgz, wheel


def test_a_cut_out_ends_where_the_object_ends():
    cutout = cut_out(Image.fromarray(disc(40, 30, border=9)))
    assert cutout.mode == "RGBA"
    assert cutout.size == (30, 40)


def test_faint_pixels_do_not_widen_it():
    pixels = disc(40, 30, border=9)
    pixels[0, 0, 3] = 16
    assert cut_out(Image.fromarray(pixels)).size == (30, 40)
    pixels[0, 0, 3] = 17
    assert cut_out(Image.fromarray(pixels)).size == (39, 49)


def test_an_image_that_shows_nothing_has_no_cut_out():
    assert cut_out(Image.new("RGBA", (20, 20), (255, 0, 0, 16))) is None


@hypothesis.given(st.integers(1, 60), st.integers(385, 900), st.booleans())
def test_large_ones_are_made_small_and_keep_their_shape(short, long, is_tall):
    size = (short, long) if is_tall else (long, short)
    cutout = cut_out(Image.new("RGBA", size, (9, 9, 9, 255)))
    assert max(cutout.size) == LONGEST
    assert min(cutout.size) == max(1, round(short * LONGEST / long))


def test_what_is_invisible_gives_no_colour_to_the_edge():
    pixels = disc(800, 800, (0, 0, 250), border=0)
    pixels[pixels[..., 3] == 0] = (255, 255, 255, 0)
    small = np.asarray(cut_out(Image.fromarray(pixels)))
    seen = small[..., 3] > 16
    # Premultiplied colour of alpha 17 is known to one part in 17 only, a tenth of 255 at most.
    assert small[seen][:, 0].max() <= 26


def test_modes_without_a_channel_of_alpha_get_one():
    palette = Image.new("P", (20, 10), 0)
    palette.putpalette([0, 0, 0, 250, 0, 0])
    palette.paste(1, (5, 2, 11, 9))
    palette.info["transparency"] = 0
    cutout = cut_out(palette)
    assert cutout.size == (6, 7)
    assert fill_of(cutout) == 1


def test_fill_is_the_share_above_half():
    cutout = Image.fromarray(disc(100, 100, border=0))
    assert fill_of(cutout) == pytest.approx(np.pi / 4, abs=0.02)  # a disc in its square


def two(share):
    """Two squares apart; the smaller has this share of the alpha."""
    pixels = np.zeros((20, 120, 4), np.uint8)
    pixels[:, :100] = (9, 9, 9, 255)
    pixels[:, 100:102, 3] = 0
    pixels[:, 102:, :] = (9, 9, 9, round(255 * share / (1 - share) * 100 / 18))
    return Image.fromarray(pixels)


def test_one_object_is_one_large_piece():
    assert is_one_object(two(0.09))
    assert not is_one_object(two(0.11))
    assert is_one_object(two(0.11), share=0.8)
    assert not is_one_object(Image.new("RGBA", (9, 9)))


def test_pieces_that_touch_at_a_corner_are_one():
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[:10, :10, 3] = pixels[10:, 10:, 3] = 255
    assert is_one_object(Image.fromarray(pixels))


def test_glows_have_no_hard_edge_and_smooth_borders_have():
    y, x = np.mgrid[-1:1:80j, -1:1:80j]
    pixels = disc(80, 80, border=0)
    far = np.hypot(x, y)
    pixels[..., 3] = 255 * np.clip((0.9 - far) * 40, 0, 1)
    assert has_hard_edge(Image.fromarray(pixels))
    pixels[..., 3] = 255 * np.clip((0.9 - far) * 2, 0, 1)
    assert not has_hard_edge(Image.fromarray(pixels))
    assert not has_hard_edge(Image.new("RGBA", (9, 9)))


def test_writing_leaves_nothing_half_done(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.png"
    write_whole(Image.fromarray(disc()), path, optimize=True)
    before = path.read_bytes()

    def broken(self, file, *rest, **options):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="no space"):
        write_whole(Image.fromarray(disc()), path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_whole(Image.fromarray(disc(9, 9)), path)  # what was left behind is not in the way
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


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
    catalogue = "".join(
        f"id#{n}=x\nmodel#{n}=/s/{name}/m.obj\nicon#{n}=/s/{name}.png\n"
        for n, name in enumerate(("lamp", "chair"), 1)
    )
    wheel(
        packages / "library.zip",
        {
            "PluginFurnitureCatalog.properties": catalogue,
            "s/lamp.png": encoded(disc()),
            "s/chair.png": encoded(disc(20, 20)),
        },
    )
    library = (packages / "library.zip").read_bytes()
    deb(packages / "sweethome3d-furniture.deb", {"usr/Scopia.sh3f": library})
    (chosen / "render.csv").write_text("library,model,split,author\nScopia,lamp,val,Somebody\n")
    (chosen / "photo.csv").write_text(
        PHOTO
        + "tp_1.png,A frog.,animals,tp:frog,test,stamps,usr/frog.png,GPL-2\n"
        + "tp_0.png,A big one.,animals,tp:big,train,stamps,usr/big.png,GPL-2\n"
    )
    (chosen / "emoji.csv").write_text(EMOJI + "package/assets/1f34e.webp,red apple,food,apple\n")
    (chosen / "clipart_left_out.txt").write_text("# by eye\n\nfood/ugly.png\n")
    monkeypatch.setattr(manifest, "SELECTION", chosen)

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


def test_models_are_shown_as_in_their_catalogue(work):
    assert objects.build(work, ["render"]) == {"render": 1}
    (lamp,) = read_rows(work / "objects" / "render.csv", Row)
    assert lamp == Row(
        "render/Scopia__lamp.png", "render", "lamp", "Scopia", 30, 40, lamp.fill, "sh:Scopia/lamp",
        "val", "sweethome3d-furniture 1.0", "Scopia.sh3f/lamp", "CC-BY-3.0",
    )  # fmt: skip
    (manifest.SELECTION / "render.csv").write_text(
        "library,model,split,author\nScopia,lamp,val,A\nScopia,sofa,val,B\n"
    )
    (work / "objects" / "render.csv").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 models, first \('Scopia', 'sofa'\)"):
        objects.build(work, ["render"])
    with pytest.raises(ValueError, match="Scopia is no furniture library"):
        objects._catalogue_icons("Scopia", b"no zip")


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
    assert objects.build(work) == {"photo": 2, "render": 1, "emoji": 1, "clipart": 3}
    table = work / "objects" / "photo.csv"
    text = table.read_text()
    assert objects.build(work) == {}
    (work / "objects" / "photo" / "tp_1.png").unlink()
    assert objects.build(work) == {"photo": 2}
    assert table.read_text() == text
    assert is_done(table, Row)


def test_no_table_is_left_when_an_image_fails(work):
    (manifest.SELECTION / "photo.csv").write_text(
        PHOTO + "a.png,A.,animals,tp:a,train,stamps,usr/gone.png,GPL-2\n"
    )
    with pytest.raises(ValueError, match=r"lacks 1 of 1 files wanted: usr/gone.png"):
        objects.build(work, ["photo"])
    (manifest.SELECTION / "photo.csv").write_text(
        PHOTO + "a.png,A.,animals,tp:a,train,stamps,x,GPL-2\n"
    )
    with pytest.raises(ValueError, match=r"x cannot be read: cannot identify"):
        objects.build(work, ["photo"])
    assert not (work / "objects" / "photo.csv").exists()


def test_an_unknown_kind_is_named(work):
    with pytest.raises(ValueError, match="no kind drawings; there are photo, render, emoji"):
        objects.build(work, ["drawings"])
    assert objects.build(work, ["emoji"]) == {"emoji": 1}


@pytest.mark.parametrize("kind", ["photo", "emoji"])
def test_the_recipes_lists_are_whole_and_name_nothing_twice(kind):
    rows = manifest.read_selection(kind)
    assert len(rows) > 400
    assert all(all(row.values()) for row in rows)
    assert len({row["source"] for row in rows}) == len(rows)
    splits = {}
    for row in rows:
        splits.setdefault(row["group"], set()).add(row.get("split"))
    assert all(len(found) == 1 for found in splits.values())
