from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tinyvit.cli import segment
from tinyvit.images.decode import decode
from tinyvit.sam import SamPredictor
from tinyvit.sam import mask_ops as rle

LOAD = segment._load


@pytest.fixture(autouse=True)
def tiny(monkeypatch, make_tiny_sam):
    """A tiny model in the place of every checkpoint."""
    sam = make_tiny_sam()
    monkeypatch.setattr("tinyvit.cli.segment._load", lambda own, checkpoint, size: sam)
    return sam


@pytest.fixture
def image(tmp_path, photo):
    return photo(tmp_path / "böse Katze.png", 24, 40)


@pytest.fixture
def folder(tmp_path, photo):
    for name in ("a.png", "b.jpg", "in/c.webp"):
        photo(tmp_path / "photos" / name)
    return tmp_path / "photos"


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def info(path):
    return json.loads(path.read_text())["info"]


def annotations(path):
    return json.loads(path.read_text())["annotations"]


# --- one image ----------------------------------------------------------------------------------


def test_a_click(run, image, tmp_path, tiny):
    out = tmp_path / "out"
    result = run("segment", image, "--point", "20,10", "-o", out)
    assert (result.code, result.out) == (0, "")
    assert names(out) == [f"böse Katze.{end}" for end in ("json", "mask-1.png", "overlay.png")]
    predictor = SamPredictor(tiny)
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(np.array([[20, 10]]), np.array([1]))
    wanted = masks[scores.argmax()]
    np.testing.assert_array_equal(np.asarray(Image.open(out / "böse Katze.mask-1.png")) > 0, wanted)
    (found,) = annotations(out / "böse Katze.json")
    np.testing.assert_array_equal(rle.decode(found["segmentation"]), wanted)
    assert found["score"] == pytest.approx(float(scores.max()), abs=1e-5)
    assert found["prompt"] == {"points": [[20, 10]], "labels": [1]}
    facts = info(out / "böse Katze.json")
    assert set(facts["seconds"]) == {"read", "encode", "decode"}
    assert len(facts["model_sha256"]) == 64
    lines = result.err.splitlines()
    assert lines[0].startswith("tinyvit_starter: torch ")
    assert lines[1].startswith("segmented 1 image in ")
    assert "1 mask (predicted IoU " in lines[1]
    assert lines[1].endswith(f"seen in {out}/böse Katze.overlay.png")
    assert lines[2].startswith("seconds an image: read 0.")
    assert "encode" in lines[2] and "decode" in lines[2]


def test_points_with_a_box_are_one_object_and_boxes_are_many(run, image, tmp_path):
    out = tmp_path / "out"
    run("segment", image, "--point", "9,9", "--point", "2,2,0", "--box", "1,1,20,20", "-o", out)
    (found,) = annotations(out / "böse Katze.json")
    wanted = {"points": [[9, 9], [2, 2]], "labels": [1, 0], "box": [1, 1, 20, 20]}
    assert found["prompt"] == wanted
    words = ("segment", image, "--box", "1,1,20,20", "--box", "20,1,39,20", "-o", out)
    assert "replaced 1 that were made with other prompts or options" in run(*words).err
    assert [one["object"] for one in annotations(out / "böse Katze.json")] == [1, 2]
    assert "böse Katze.mask-2.png" in names(out)
    words = ("segment", image, "--point", "9,9", "--point", "30,9", "--each", "-o", out)
    assert run(*words).code == 0
    assert [one["prompt"]["points"] for one in annotations(out / "böse Katze.json")] == [
        [[9, 9]],
        [[30, 9]],
    ]


def test_multimask_and_logits_to_refine(run, image, tmp_path):
    out = tmp_path / "out"
    run("segment", image, "--point", "9,9", "--multimask", "--logits", "-o", out)
    assert names(out) == [
        f"böse Katze.{end}"
        for end in (
            *("json", "logits-1.npy", "mask-1-1.png", "mask-1-2.png", "mask-1-3.png"),
            "overlay.png",
        )
    ]
    for mask in (out / "böse Katze.logits-1.npy", out / "böse Katze.mask-1-2.png"):
        again = tmp_path / mask.suffix
        result = run("segment", image, "--point", "9,9", "--mask", mask, "-o", again)
        assert result.code == 0
        assert annotations(again / "böse Katze.json")[0]["prompt"]["mask"] is True


def test_a_turned_photograph_is_upright_first(run, tmp_path, photo):
    image = photo(tmp_path / "t.jpg", 24, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: 40 high, 24 wide
    Image.open(image).save(tmp_path / "turned.jpg", exif=exif)
    words = ("segment", tmp_path / "turned.jpg", "-o", tmp_path / "out")
    assert run(*words, "--point", "10,35").code == 0
    assert decode(tmp_path / "out" / "turned.overlay.png").shape == (40, 24, 3)
    assert "lies outside the image of width 24 and height 40" in run(*words, "--point", "35,9").err


def test_quiet_says_nothing(run, image, tmp_path):
    result = run("segment", image, "--point", "9,9", "-o", tmp_path / "out", "-q")
    assert (result.code, result.out, result.err) == (0, "", "")


# --- everything -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_everything_is_a_file_that_cocos_own_tools_read(run, image, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("--pred-iou-thresh", "-9", "--stability-score-thresh", "-1", "--points-per-side", "4")
    result = run("segment", image, "--everything", *words, "-o", out, "--json")
    assert result.code == 0
    assert names(out) == ["böse Katze.json", "böse Katze.overlay.png"]
    coco = COCO(str(out / "böse Katze.json"))
    capsys.readouterr()  # it talks
    assert len(coco.anns) == result.json["written"][0]["count"] > 0
    for annotation in coco.anns.values():
        assert coco.annToMask(annotation).sum() == annotation["area"]
    assert (decode(out / "böse Katze.overlay.png") != decode(image)).any()
    assert info(out / "böse Katze.json")["task"] == {
        "mode": "everything",
        "points_per_side": 4,
        "pred_iou_thresh": -9.0,
        "stability_score_thresh": -1.0,
    }
    assert "generate" in result.json["written"][0]["seconds"]


def test_everything_may_be_nothing(run, image, tmp_path):
    words = ("--points-per-side", "2", "--pred-iou-thresh", "99", "--min-mask-region-area", "4")
    result = run("segment", image, "--everything", *words, "-o", tmp_path / "out")
    assert result.code == 0
    assert "0 masks" in result.err
    np.testing.assert_array_equal(
        decode(tmp_path / "out" / "böse Katze.overlay.png"), decode(image)
    )


# --- many images --------------------------------------------------------------------------------


def test_a_folder_with_prompts_in_one_run(run, folder, tmp_path):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    prompts = {
        "a.png": [{"points": [[9, 9]], "name": "x"}, {"box": [1, 1, 9, 9]}],
        "in/c.webp": [{"points": [[9, 99]]}],
        "broken.jpg": [{"points": [[9, 9]]}],
        "gone.jpg": [{"points": [[9, 9]]}],
    }
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(prompts))
    out = tmp_path / "out"
    result = run("segment", folder, "--prompts", path, "-o", out, "--json")
    assert result.code == 1
    assert names(out) == [f"a.{end}" for end in ("json", "mask-1.png", "mask-2.png", "overlay.png")]
    lines = result.err.splitlines()
    failed = sorted(line for line in lines if line.startswith("failed: "))
    assert len(failed) == 3
    assert "'gone.jpg', which is not among the images" in "".join(failed)
    assert f"{folder / 'in/c.webp'}: point 0 at (x, y) = (9, 99) lies outside" in "".join(failed)
    assert "left out 1 image without prompts: b.jpg" in lines
    assert lines[-1] == "failed 3 of 4, named above"
    content = result.json
    assert [row["picture"] for row in content["written"]] == ["a.png"]
    masks = content["written"][0]["masks"]
    assert [mask["object"] for mask in masks] == [1, 2]
    assert set(masks[0]) == {"bbox", "area", "score", "object", "mask"}
    assert {row["picture"] for row in content["failed"]} == {"gone.jpg", "in/c.webp", "broken.jpg"}
    assert content["without_prompts"] == ["b.jpg"]
    again = run("segment", folder, "--prompts", path, "-o", out)
    assert "segmented nothing new" in again.err
    assert "kept 1 made before (--overwrite makes them anew)" in again.err


def test_csv_and_the_same_prompts_for_all(run, folder, tmp_path):
    path = tmp_path / "clicks.csv"
    path.write_text("picture,x,y\nb.jpg,9,9\nin/c.webp,3,3\n")
    assert run("segment", folder, "--prompts", path, "-o", tmp_path / "csv").code == 0
    assert [n for n in names(tmp_path / "csv") if n.endswith("json")] == ["b.json", "in/c.json"]
    result = run("segment", folder, "--point", "9,9", "-o", tmp_path / "all")
    assert result.code == 0
    assert "segmented 3 images" in result.err
    assert result.err.splitlines()[1].endswith(f"3 masks in {tmp_path / 'all'}")


def test_what_is_there_is_kept_and_what_is_outdated_is_made_anew(run, image, tmp_path):
    words = ("segment", image, "--point", "9,9", "-o", tmp_path / "out")
    run(*words)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "kept 1 made before" in run(*words).err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert "replaced" not in run(*words, "--overwrite").err
    bf16 = run(*words, "--precision", "bf16")
    assert "replaced 1 that were made in another precision" in bf16.err
    no_pad = run(*words, "--no-pad", "--precision", "bf16")
    assert "made with another preparation of images" in no_pad.err
    os.utime(image, ns=(1, 1))
    changed = run(*words, "--no-pad", "--precision", "bf16")
    assert "made of an image that has changed since" in changed.err


def test_files_of_the_user_s_own_are_not_replaced_unasked(run, image, tmp_path):
    mine = tmp_path / "böse Katze.json"
    mine.write_text("{}")
    words = ("segment", image, "--point", "9,9", "-o", tmp_path)
    result = run(*words)
    assert result.code == 1
    assert "is there already and was not made by this command; choose another" in result.err
    assert mine.read_text() == "{}"
    assert run(*words, "--overwrite").code == 0


def test_a_stop_in_the_middle_says_how_far_it_came(run, folder, tmp_path, monkeypatch):
    from tinyvit.images import draw

    real = draw.save_png

    def save(path, pixels):
        if path.name.startswith("c."):
            raise KeyboardInterrupt
        real(path, pixels)

    monkeypatch.setattr(draw, "save_png", save)
    result = run("segment", folder, "--point", "9,9", "-o", tmp_path / "out", "--json")
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[1:] == [
        "stopped after 2 of 3 images; the same command goes on from there",
        "interrupted",
    ]


# --- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "nothing is prompted; give --point"),
        (["--box", "9,9,1,1"], "box must be (x0, y0, x1, y1)"),
        (["--point", "1,1", "--box", "1,1,2,2", "--box", "1,1,3,3"], "with --each, or say it"),
        (["--point", "1,1,0"], "label 0 alone"),
        (["--point", "1,1", "--everything"], "--everything does not go together with --point"),
        (["--point", "1,1", "--prompts", "p.json"], "--prompts does not go together with --point"),
        (["--prompts", "p.json", "--everything"], "does not go together with --prompts"),
        (["--everything", "--multimask"], "does not go together with --multimask"),
        (["--point", "1,1", "--points-per-side", "3"], "--points-per-side is for --everything"),
        (["--prompts", "none.json"], "none.json: No such file or directory"),
        (["--prompts", "p.json"], "p.json is no JSON"),
        (["--mask", "none.png"], "there is no file 'none.png'"),
        (["--point", "1,1", "--device", "toaster"], "device must be"),
        (["--everything", "--device", "toaster"], "device must be"),
        (["--point", "1,1", "-o", "p.json"], "'p.json' is a file; give a folder"),
        (["--point", "1,1", "-o", "photos"], "is read and written to"),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(
    run, folder, tmp_path, monkeypatch, words, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").touch()
    before = names(tmp_path)
    result = run("-q", "segment", "photos", "-o", "out", *words)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert expected in result.err
    assert names(tmp_path) == before


def test_a_point_outside_is_told_in_the_library_s_words(run, image, tmp_path):
    result = run("-q", "segment", image, "--point", "10,30", "-o", tmp_path / "out")
    assert result.code == 1
    assert result.err == (
        f"failed: {image}: point 0 at (x, y) = (10, 30) lies outside the image of width 40 and "
        "height 24; wanted pixels of the original image, 0 <= x <= 40 and 0 <= y <= 24; are x "
        "and y swapped?\nfailed 1 of 1, named above\n"
    )


# --- which model ----------------------------------------------------------------------------------


@pytest.fixture
def real(monkeypatch, tiny):
    """The checkpoint's own model after all."""
    monkeypatch.setattr("tinyvit.cli.segment._load", LOAD)


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ("nothing", "unknown checkpoint 'nothing'"),
        ("none.pt", "no such file"),
        ("saved", "is a folder, and folders of save_pretrained hold an encoder alone"),
    ],
)
def test_wrong_checkpoints(run, image, tmp_path, monkeypatch, real, checkpoint, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    words = ("-q", "segment", image, "--point", "9,9", "-o", "out", "--checkpoint", checkpoint)
    result = run(*words)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert expected in result.err


def test_an_encoder_alone_is_refused(run, image, tmp_path, checkpoints, real):
    words = ("--checkpoint", checkpoints / "encoder.safetensors", "-o", tmp_path / "out")
    result = run("-q", "segment", image, "--point", "9,9", *words)
    assert result.code == 1
    assert "holds no prompt_encoder and no mask_decoder" in result.err


def test_the_embedded_weights(run, image, tmp_path, real):
    words = ("--point", "9,9", "--size", "64", "-o", tmp_path / "out", "--json")
    result = run("segment", image, *words)
    assert result.code == 0
    assert result.json["checkpoint"] == "tinyvit_starter"
    assert result.json["image_spec"]["size"] == [64, 64]
