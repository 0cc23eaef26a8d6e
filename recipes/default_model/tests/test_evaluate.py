import hashlib
import json

import pytest

from .recipe_files import load

evaluate = load("evaluate")


@pytest.fixture
def no_opencv(monkeypatch):
    """As on a machine without OpenCV, whatever this one has."""
    from tinyvit.evaluate import metrics as floors

    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    monkeypatch.setattr(floors, "find_spec", lambda name: None)


def test_two_models_stand_in_one_table_and_share_the_floors(
    tmp_path, tiny_sam_file, make_photographs, make_supply, no_opencv
):
    choices = evaluate.Choices(
        make_photographs(tmp_path / "photos"), make_supply(tmp_path / "work"), composites=2, size=64
    )
    said = []
    weights = {"new": str(tiny_sam_file), "old": str(tiny_sam_file)}
    written = evaluate.build(weights, choices, tmp_path / "out", said.append)
    results = json.loads(written.read_text())
    assert [line.split(" on ")[1] for line in said] == ["photographs"] * 2 + ["composites"] * 2
    photographs = results["sets"]["photographs"]
    assert (photographs["pictures"], photographs["masks"]) == (2, 3)
    assert photographs["models"]["new"]["ious"] == photographs["models"]["old"]["ious"]
    assert set(photographs["floors"]["1 click"]) == {"disc"}
    assert set(photographs["floors"]["box"]) == {"ellipse"}
    # Each mask is a 20 x 20 square: the ellipse in its box is a disc of radius 10, 316 pixels.
    assert photographs["floors"]["box"]["ellipse"]["value"] == pytest.approx(0.79)
    assert results["weights"]["new"] == {
        "file": "tiny.safetensors",
        "bytes": tiny_sam_file.stat().st_size,
        "sha256": hashlib.sha256(tiny_sam_file.read_bytes()).hexdigest(),
    }
    assert "cases" not in written.read_text()
    cases = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert len(cases["photographs"]["new"]) == 3
    sheets = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert sheets == {
        f"{kind}_{name}.png" for kind in ("photographs", "composites") for name in ("new", "old")
    }


def test_the_table_says_what_it_does_not_show(tmp_path, tiny_sam_file, make_photographs, no_opencv):
    folder = make_photographs(tmp_path / "photos", "GrabCut and strokes")
    (folder / "masks" / "1_1.png").unlink()
    evaluate.build(
        {"new": str(tiny_sam_file)}, evaluate.Choices(folder), tmp_path / "out", lambda words: None
    )
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "### Photographs: 2 images, 2 masks" in text
    assert "| baseline: disc around the click, ellipse in the box |" in text
    assert "| baseline: GrabCut" not in text
    assert "GrabCut was not run: OpenCV is not installed." in text
    assert "GrabCut helped to make these masks, so it is no fair baseline here." in text
    assert "Left out: " in text and "1_1.png" in text


def test_grabcut_has_a_row_where_it_ran():
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    found = {"1 click": {"disc": figure, "grabcut": figure}, "box": {"ellipse": figure}}
    found["box"]["grabcut"] = {"value": 0.7, "low": 0.6, "high": 0.8}
    rows = evaluate._baseline_rows(found)
    assert rows[1].startswith(
        "| baseline: GrabCut from the click, in the box | 0.500 [0.400, 0.600]"
    )
    assert "0.700 [0.600, 0.800]" in rows[1]


def test_masks_drawn_by_hand_have_no_note(tmp_path, make_photographs):
    (sets,) = evaluate.open_sets(evaluate.Choices(make_photographs(tmp_path / "photos")))
    assert (sets.name, sets.note, len(sets.images)) == ("photographs", "", 2)


def test_composites_are_those_of_the_test_objects(tmp_path, make_supply):
    work = make_supply(tmp_path)
    (sets,) = evaluate.open_sets(evaluate.Choices(None, work, 3, 64))
    assert len(sets.images) == 3
    labels = {label for image in sets.images for label in image.labels}
    assert labels <= {"thing 2", "thing 5"}  # every third one is a test object


def test_regions_are_a_set_where_they_were_found(tmp_path, make_supply):
    pytest.importorskip("skimage")
    from regions import build

    work = make_supply(tmp_path)
    build(work)
    _, found = evaluate.open_sets(evaluate.Choices(None, work, 5, 64, split="val"))
    assert found.name == "regions" and len(found.images) == 2
    assert {label for image in found.images for label in image.labels} == {"region"}


def test_nothing_to_measure_on_is_an_error():
    with pytest.raises(ValueError, match="give --photographs DIR or --work WORK"):
        evaluate.open_sets(evaluate.Choices())


def test_names_are_stems_or_given():
    assert evaluate.named(["a/new.safetensors", "old=b/new.safetensors", "tinyvit_sam_2m"]) == {
        "new": "a/new.safetensors",
        "old": "b/new.safetensors",
        "tinyvit_sam_2m": "tinyvit_sam_2m",
    }
    with pytest.raises(ValueError, match="two weights are called 'new'; write NAME=PATH"):
        evaluate.named(["a/new.safetensors", "b/new.safetensors"])


def test_the_command_prints_the_table(tmp_path, tiny_sam_file, make_photographs, capsys):
    folder = make_photographs(tmp_path / "photos")
    arguments = [str(tiny_sam_file), "--photographs", str(folder), "--out", str(tmp_path / "out")]
    evaluate.main([*arguments, "--most-masks", "1"])
    assert "### Photographs: 1 images, 1 masks" in capsys.readouterr().out
