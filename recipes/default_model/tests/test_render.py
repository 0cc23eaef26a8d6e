import csv
import dataclasses
import io
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import raytrace
import render
from manifest import SPLITS, Row, is_done, read_rows
from raytrace import View

from .ray_cast import PlainScene

CUBE = (
    "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0 0 1\nv 1 0 1\nv 1 1 1\nv 0 1 1\n"
    "f 1 2 3 4\nf 5 6 7 8\nf 1 2 6 5\nf 2 3 7 6\nf 3 4 8 7\nf 4 1 5 8\n"
)
MODELS = {"cup": CUBE, "hat": CUBE, "jar": CUBE}


def deb(libraries):
    """A Debian package of furniture libraries: name -> model -> OBJ file."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for library, models in libraries.items():
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                catalogue = ""
                for number, (name, text) in enumerate(models.items()):
                    archive.writestr(f"things/{name}/{name}.obj", text)
                    catalogue += f"model#{number}=/things/{name}/{name}.obj\n"
                    catalogue += "".join(f"{s}#{number}=9\n" for s in ("width", "depth", "height"))
                archive.writestr("PluginFurnitureCatalog.properties", catalogue)
            member = tarfile.TarInfo(f"./usr/share/sweethome3d/furniture/{library}.sh3f")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    data = packed.getvalue()
    header = f"{'data.tar.gz':16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(data):<10}`\n"
    return b"!<arch>\n" + header.encode() + data


@pytest.fixture
def supply(tmp_path):
    """``supply(libraries)``: a folder with the package, and a table of its models."""

    def make(libraries=None, folder="work"):
        libraries = libraries or {"Scopia": MODELS}
        work = tmp_path / folder
        (work / "packages").mkdir(parents=True)
        (work / "packages" / render.PACKAGE_FILE).write_bytes(deb(libraries))
        table = tmp_path / "models.csv"
        lines = [f"{lib},{model},{SPLITS[i % 3]}" for lib in libraries
                 for i, model in enumerate(libraries[lib])]  # fmt: skip
        table.write_text("\n".join(["library,model,split", *lines]) + "\n")
        return work, table

    return make


@pytest.fixture
def views(monkeypatch):
    """The views asked for so far; images of them are noise that hangs on the view."""
    asked = []

    def take(mesh, view):
        asked.append(view)
        image = np.random.default_rng(int(view.azimuth * 1e6)).integers(0, 256, (50, 40, 4))
        return image.astype(np.uint8)

    monkeypatch.setattr(render, "render", take)
    return asked


def build(supplied, views=2, said=None):
    work, table = supplied
    return render.build(work, views, table=table, say=(said if said is not None else []).append)


def images(work):
    return {file.name: file.read_bytes() for file in (work / "objects" / "render").glob("*.png")}


def test_the_table_says_what_each_image_is(supply, views):
    said = []
    path = build(supply(), 2, said)
    rows = read_rows(path, Row)
    assert is_done(path, Row)
    assert path.name == "render.csv"
    assert [row.label for row in rows] == ["cup", "cup", "hat", "hat", "jar", "jar"]
    assert [row.split for row in rows] == ["train", "train", "val", "val", "test", "test"]
    first = rows[0]
    assert (first.kind, first.category, first.group) == ("cg", "Scopia", "sh:Scopia/cup")
    assert (first.package, first.source) == (render.PACKAGE, "Scopia.sh3f/cup")
    assert (first.license, first.width, first.height) == ("CC-BY-3.0", 40, 50)
    image = np.asarray(Image.open(path.parent / first.file))
    assert image.shape == (50, 40, 4)
    assert first.fill == pytest.approx(
        (image[..., 3] > 127).mean(), abs=6e-4
    )  # three digits are kept
    assert said == [f"6 views of 3 models: {path}"]


def test_what_is_done_is_not_made_again(supply, views):
    supplied = supply()
    build(supplied)
    before = images(supplied[0])
    del views[:]
    build(supplied)
    assert views == []
    build(supplied, 3)
    assert len(views) == 3  # one more of each
    after = images(supplied[0])
    assert before.items() < after.items()
    assert len(read_rows(supplied[0] / "objects" / "render.csv", Row)) == 9
    build(supplied, 1)  # fewer: nothing is thrown away
    assert len(read_rows(supplied[0] / "objects" / "render.csv", Row)) == 9


def test_an_interrupted_run_goes_on_to_the_same_end(supply, views, monkeypatch):
    whole = supply()
    build(whole)
    parted = supply(folder="parted")
    take = render.render

    def stop(mesh, view):
        if len(views) == 6 + 3:
            raise KeyboardInterrupt
        return take(mesh, view)

    monkeypatch.setattr(render, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        build(parted)
    monkeypatch.setattr(render, "render", take)
    build(parted)
    assert images(parted[0]) == images(whole[0])
    tables = [(work / "objects" / "render.csv").read_text() for work in (parted[0], whole[0])]
    assert tables[0] == tables[1]
    assert not list((parted[0] / "objects").rglob("*.part"))


def test_the_table_never_forgets_views_while_others_are_added(supply, views, monkeypatch):
    supplied = supply({"Scopia": {f"cup {number}": CUBE for number in range(26)}})
    build(supplied, 1)
    take = render.render

    def stop(mesh, view):
        if len(views) == 26 + 25:
            raise KeyboardInterrupt
        return take(mesh, view)

    monkeypatch.setattr(render, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        build(supplied, 2)
    # The table was last written after 25 models.
    assert len(read_rows(supplied[0] / "objects" / "render.csv", Row)) == 26 + 25


def test_a_lost_image_and_an_older_edition_are_made_again(supply, views, monkeypatch):
    supplied = supply()
    path = build(supplied)
    before = images(supplied[0])
    (path.parent / "render" / "Scopia__hat_1.png").unlink()
    del views[:]
    build(supplied)
    assert len(views) == 2
    assert images(supplied[0]) == before
    monkeypatch.setattr(render, "EDITION", render.EDITION + 1)
    build(supplied)
    assert len(views) == 2 + 6


def test_the_split_comes_from_the_table_at_all_times(supply, views):
    work, table = supply()
    build((work, table))
    table.write_text(table.read_text().replace("hat,val", "hat,train"))
    rows = read_rows(build((work, table)), Row)
    assert {row.split for row in rows if row.label == "hat"} == {"train"}


def test_views_that_show_too_little_are_tried_again_and_then_left_out(supply, monkeypatch):
    asked, said = [], []
    thin, narrow = np.zeros((50, 40, 4), np.uint8), np.full((200, 20, 4), 255, np.uint8)
    thin[:5, :, 3] = 255  # a tenth

    def take(mesh, view):
        asked.append(view)
        return thin if len(asked) <= render.ATTEMPTS else narrow

    monkeypatch.setattr(render, "render", take)
    path = build(supply({"Scopia": {"cup": CUBE}}), 2, said)
    assert read_rows(path, Row) == []
    assert len({view.azimuth for view in asked}) == 2 * render.ATTEMPTS
    assert said[0] == "left out: Scopia/cup, view 0: fill 0.100, shorter side 40"
    assert said[1] == "left out: Scopia/cup, view 1: fill 1.000, shorter side 20"


def test_a_view_of_nothing_leaves_the_other_views(supply, views, monkeypatch):
    take, said = render.render, []

    def fail_one(mesh, view):
        if view.azimuth in {render.draw_view("Scopia/cup", 0, k).azimuth for k in range(9)}:
            raise ValueError("nothing can be seen in this view")
        return take(mesh, view)

    monkeypatch.setattr(render, "render", fail_one)
    path = build(supply({"Scopia": {"cup": CUBE}}), 2, said)
    assert [row.file for row in read_rows(path, Row)] == ["render/Scopia__cup_1.png"]
    assert said[0] == "left out: Scopia/cup, view 0: nothing can be seen in this view"


def test_a_broken_model_is_named_and_the_others_are_made(supply, views):
    said = []
    supplied = supply({"Scopia": {"bad": "f 1 2 3\n", "cup": CUBE}})
    path = build(supplied, 1, said)
    assert [row.label for row in read_rows(path, Row)] == ["cup"]
    assert said[0].startswith("left out: Scopia/bad: a face has the corner '1'")
    assert len(views) == 1
    build(supplied, 1)
    assert len(views) == 1


def test_only_models_of_the_table_are_made_and_all_of_them(supply, views):
    work, table = supply({"Scopia": MODELS, "Reallusion": {"man": CUBE}})
    kept = [line for line in table.read_text().splitlines() if "hat" not in line]
    table.write_text("\n".join(kept) + "\n")
    rows = read_rows(build((work, table), 1), Row)
    assert [(row.category, row.label, row.license) for row in rows] == [
        ("Reallusion", "man", "CC-BY-3.0-US"),
        ("Scopia", "cup", "CC-BY-3.0"),
        ("Scopia", "jar", "CC-BY-3.0"),
    ]
    table.write_text(table.read_text() + "Scopia,ghost,train\n")
    with pytest.raises(ValueError, match=r"lacks 1 models .* first .*ghost"):
        build((work, table), 1)


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run fetch\.py on the same folder first"):
        render.build(tmp_path)


def test_a_real_image_of_a_cube(supply, monkeypatch):
    draw = render.draw_view
    monkeypatch.setattr(raytrace, "_scene", PlainScene)
    monkeypatch.setattr(
        render, "draw_view", lambda *which: dataclasses.replace(draw(*which), longest_side=36)
    )
    path = build(supply({"Scopia": {"cup": CUBE}}), 1)
    (row,) = read_rows(path, Row)
    image = np.asarray(Image.open(path.parent / row.file))
    assert max(row.width, row.height) in (35, 36)
    # A cube covers at least half of its box; its inside has no hole.
    assert row.fill > 0.5
    assert image[row.height // 2, row.width // 2, 3] == 255
    for line in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert line[..., 3].any()


@given(name=st.text(max_size=8), number=st.integers(0, 20), attempt=st.integers(0, 5))
def test_a_view_hangs_on_its_name_alone(name, number, attempt):
    view = render.draw_view(name, number, attempt)
    assert view == render.draw_view(name, number, attempt)
    assert view != render.draw_view(name, number, attempt + 1)
    assert view != render.draw_view(name + "x", number, attempt)
    assert isinstance(view, View)
    assert 0 <= view.azimuth < 360
    assert 5 <= view.elevation <= 45
    assert 0 < view.lamp_share < 1


@given(name=st.text(max_size=8))
def test_six_views_look_from_all_around(name):
    azimuths = sorted(render.draw_view(name, number).azimuth for number in range(6))
    gaps = np.diff([*azimuths, azimuths[0] + 360])
    assert gaps.max() < 130  # at most 85 without the chance, which moves each by at most 20


def test_the_table_of_models_is_sound():
    with render.MODELS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [(row["library"], row["model"]) for row in rows]
    assert len(set(names)) == len(names) == 551
    assert {row["library"] for row in rows} == set(render.LICENSES)
    assert {row["split"] for row in rows} == set(SPLITS)
    assert all(row["author"] for row in rows)  # CC-BY wants them named
