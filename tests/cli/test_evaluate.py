from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from PIL import Image

from tiny import write_mask_folder, write_tiny_sam
from tinyvit.cli.evaluate import drawn

FAST = ("--clicks", "1,2", "--most-clicks", 2, "--no-floors", "--size", 64)


@pytest.fixture
def images(tmp_path, photo):
    """Five classes of four images."""
    for name in ("a", "b", "c", "d", "e"):
        for number in range(4):
            photo(tmp_path / "pictures" / name / f"{number}.png", 16, 16, number)
    return tmp_path / "pictures"


@pytest.fixture
def cells(tmp_path):
    return write_mask_folder(tmp_path / "cells")


@pytest.fixture(scope="module")
def sams(make_tiny_vit, randomise, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sams")
    paths = [folder / "first.safetensors", folder / "second.safetensors"]
    return [write_tiny_sam(path, 5 * i) for i, path in enumerate(paths)]


@pytest.fixture
def classifier(checkpoints):
    return ("--checkpoint", checkpoints / "five.safetensors")


def width_of(path):
    with Image.open(path) as image:
        return image.width


def test_classify_as_a_table(run, images, classifier, tmp_path):
    sheet = tmp_path / "wrong.png"
    result = run("evaluate", "classify", images, *classifier, "--sheet", sheet)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["images", "20", "in", "5", "classes"]
    assert any(line.startswith("top-1 ") for line in lines)
    assert any(line.startswith("class  images  found  taken for") for line in lines)
    assert result.err.splitlines()[-1] == f"gallery: {sheet}"
    assert width_of(sheet) > 200


def test_classify_as_json_by_a_part(run, images, classifier):
    words = ("evaluate", "classify", images, *classifier, "--json")
    whole = run(*words).json
    assert (whole["pictures"], whole["classes"]) == (20, 5)
    assert run(*words, "--held-out", "--val-part", 0.25).json["pictures"] == 5
    some = [run(*words, "--limit", 7, "--seed", seed).json for seed in (1, 1, 2)]
    assert [one["pictures"] for one in some] == [7, 7, 7]
    assert some[0]["wrong"] == some[1]["wrong"] != some[2]["wrong"]


def test_a_broken_image_is_named(run, images, classifier):
    (images / "a" / "0.png").write_bytes(b"no image")
    result = run("evaluate", "classify", images, *classifier)
    assert result.code == 1
    assert result.out.splitlines()[0].split()[1] == "19"
    assert result.err.splitlines()[-1].startswith("skipped: a/0.png: ")


def test_the_model_must_know_the_classes(run, images, checkpoints):
    head = ("--checkpoint", checkpoints / "thousand.safetensors")
    result = run("evaluate", "classify", images, *head)
    assert result.code == 1
    assert "1000 classes" in result.err.splitlines()[-1]
    none = run("evaluate", "classify", images, "--checkpoint", checkpoints / "encoder.safetensors")
    assert none.code == 1
    assert "has no classification head" in none.err


def test_held_out_wants_the_classes_of_the_checkpoint(run, images, classifier, monkeypatch):
    from tinyvit.train.tasks import classify as classifiers

    load = classifiers.load_classifier
    names = tuple("vwxyz")
    monkeypatch.setattr(classifiers, "load_classifier", lambda path: (load(path)[0], names))
    result = run("evaluate", "classify", images, *classifier, "--held-out")
    assert result.code == 1
    assert "has the classes a, b, c, d, e, ..., and the checkpoint v, w, x, y, z" in result.err


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_a_sheet_that_cannot_be_written_is_said_first(run, images, cells, classifier, task):
    """Once an hour of evaluation was lost: the gallery was written before the numbers."""
    data, weights = (images, classifier) if task == "classify" else (cells, ())
    result = run("evaluate", task, data, *weights, "--sheet", "nodir/x/sheet.png")
    assert result.code == 1
    assert result.out == ""
    assert "there is no folder nodir/x to write --sheet in; make it" in result.err


def test_no_sheet_where_nothing_is_wrong(run, images, classifier, tmp_path, monkeypatch):
    from tinyvit.evaluate import classify

    none = partial(classify.evaluate_classifier, most_wrong=0)
    monkeypatch.setattr(classify, "evaluate_classifier", none)
    sheet = tmp_path / "wrong.png"
    result = run("evaluate", "classify", images, *classifier, "--sheet", sheet)
    assert result.code == 0
    assert f"{sheet} was not written: no image was taken for another class" in result.err
    assert not sheet.exists()


def test_segment(run, cells, sams, tmp_path):
    sheet = tmp_path / "sheet.png"
    words = ("evaluate", "segment", cells, "--checkpoint", sams[0], *FAST)
    result = run(*words, "--sheet", sheet)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == f"{sams[0]} on {cells}: 3 images, 3 masks"
    assert lines[1].split()[0] == "metric"
    assert any(line.startswith("mean IoU, 2 clicks ") for line in lines)
    assert result.err.splitlines()[-1] == f"gallery: {sheet}"
    assert width_of(sheet) > 400
    found = run(*words, "--json", "--limit", 2).json
    assert (found["pictures"], found["masks"], found["floors"]["box"]) == (2, 2, {})
    assert run(*words, "--json", "--held-out").json["pictures"] == 1


def test_what_is_wrong_with_masks_is_named(run, cells, sams):
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(cells / "masks" / "1.png")
    words = ("evaluate", "segment", cells, "--checkpoint", sams[0], *FAST)
    result = run(*words)
    assert result.code == 1
    assert "2 images, 2 masks" in result.out
    assert sum(line.startswith("skipped: ") for line in result.err.splitlines()) == 1
    (cells / "images" / "2.png").unlink()
    (cells / "masks" / "2.png").unlink()
    alone = run(*words, "--held-out")
    assert alone.code == 1
    assert "only one image, of which none is held out" in alone.err


def test_agreement(run, cells, sams):
    words = ("evaluate", "agreement", sams[0], sams[0], cells / "images", "--size", 64)
    result = run(*words, "--grid", 2, "--limit", 2)
    assert result.code == 0, result.err
    assert result.out.splitlines()[1].split() == ["cosine", "1.000000", "1.000000"]
    assert result.out.splitlines()[2].split() == ["mask", "IoU", "1.0000", "1.0000"]
    assert "(auto, fp32)" in result.out
    assert result.err.endswith("comparing on 2 images\n")
    other = ("evaluate", "agreement", *sams, cells / "images", "--size", 64, "--grid", 1)
    found = run(*other, "--json", "--backend-a", "torch").json
    assert found["names"] == [str(path) for path in sams]
    assert found["mean_cosine"] < 0.99
    assert len(found["pictures"]) == 3


def test_agreement_names_broken_images(run, cells, sams):
    (cells / "images" / "0.png").write_bytes(b"no image")
    words = ("evaluate", "agreement", *sams, cells / "images", "--size", 64, "--grid", 1)
    result = run(*words)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("skipped: ")
    assert "0.png" in result.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("classify", "none"), 2, "Missing option '--checkpoint'"),
        (("classify", "none", "--checkpoint", "none.pt"), 1, "none.pt"),
        (("segment", "none"), 1, "there is no file or folder 'none' for DATA"),
        (("segment", ".", "--clicks", "a"), 2, "is not whole numbers between commas"),
        (("segment", ".", "--clicks", "0"), 1, "clicks must be numbers of at least 1"),
        (("segment", "none", "--limit", "0"), 2, "--limit"),
        (("agreement", "a", "b"), 2, "Missing argument"),
        (("agreement", "a", "b", "none"), 1, "there is no file or folder 'none'"),
        (("agreement", "a", "b", "c", "--backend-a", "tpu"), 2, "'tpu' is not one of"),
    ],
)
def test_wrong_words(run, words, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("evaluate", *words)
    assert result.code == code
    assert said in " ".join(result.err.split())
    assert "Traceback" not in result.err


def test_an_empty_folder(run, tmp_path, sams, classifier):
    for words, said in (
        (("classify", tmp_path, *classifier), "no subfolders with images"),
        (("segment", tmp_path, "--checkpoint", sams[0]), "no data set that is known"),
        (("agreement", *sams, tmp_path), "there are no images in"),
    ):
        result = run("evaluate", *words)
        assert result.code == 1
        assert said in result.err


def test_a_limit_draws_by_its_seed():
    assert drawn(5, None, 0) == drawn(5, 9, 0) == [0, 1, 2, 3, 4]
    some = drawn(100, 10, 1)
    assert some == sorted(set(some)) == drawn(100, 10, 1) != drawn(100, 10, 2)
    assert len(some) == 10
