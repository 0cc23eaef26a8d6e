from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from pycocotools.coco import COCO

from tinyvit.cli import arguments, segment
from tinyvit.cli.segment import parse_box, parse_point
from tinyvit.folders.images import Item
from tinyvit.folders.runner import Job
from tinyvit.images.decode import decode

OPEN = arguments.open_sam


@pytest.fixture(autouse=True)
def tiny(monkeypatch, make_tiny_sam):
    """A tiny model in the place of every checkpoint."""
    sam = make_tiny_sam()
    monkeypatch.setattr("tinyvit.cli.arguments.open_sam", lambda *arguments: sam)
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


def test_a_click(run, image, tmp_path):
    out = tmp_path / "out"
    result = run("segment", image, "--point", "20,10", "-o", out, "--backend", "torch")
    assert (result.code, result.out) == (0, "")
    assert names(out) == [f"böse Katze.{end}" for end in ("json", "mask-1.png", "overlay.png")]
    (found,) = annotations(out / "böse Katze.json")
    assert found["prompt"] == {"points": [[20, 10]], "labels": [1]}
    facts = info(out / "böse Katze.json")
    assert set(facts["seconds"]) == {"read", "encode", "decode", "write"}
    assert len(facts["model_sha256"]) == 64
    lines = result.err.splitlines()
    assert lines[0].startswith("tinyvit_sam_2m: torch, cpu, fp32")
    assert lines[1].startswith("segmented 1 image in ")
    assert "1 mask (predicted IoU " in lines[1]
    assert lines[1].endswith(f"seen in {out}/böse Katze.overlay.png")
    assert lines[2].startswith("seconds an image: read 0.")
    assert (
        "weak" not in result.err or "below 0.5 is low: the embedded weights are weak" in result.err
    )
    quiet = run("segment", image, "--point", "9,9", "-o", out, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


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


def test_a_low_estimate_is_told_with_the_embedded_weights_only():
    def said(score, is_starter):
        facts = {"count": 1, "masks": [{"score": score}], "seconds": {"read": 0}, "overlay": "o"}
        job = Job(Item(Path("a"), "a", "a"), told=facts)
        words = segment._summary(is_starter, [job], 1.0)
        return "predicted IoU below 0.5 is low: the embedded weights" in words

    assert said(0.49, True)
    assert not said(0.5, True)
    assert not said(0.1, False)


# --- everything -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_everything_is_a_file_that_cocos_own_tools_read(run, image, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--points-per-side", "4")
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
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.0,
    }
    assert "generate" in result.json["written"][0]["seconds"]


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
    assert "kept 1 made before (--overwrite writes them again)" in again.err


def test_csv_and_the_same_prompts_for_all(run, folder, tmp_path):
    path = tmp_path / "clicks.csv"
    path.write_text("picture,x,y\nb.jpg,9,9\nin/c.webp,3,3\n")
    assert run("segment", folder, "--prompts", path, "-o", tmp_path / "csv").code == 0
    assert [n for n in names(tmp_path / "csv") if n.endswith("json")] == ["b.json", "in/c.json"]
    result = run("segment", folder, "--point", "9,9", "-o", tmp_path / "all")
    assert result.code == 0
    assert "segmented 3 images" in result.err
    assert result.err.splitlines()[1].endswith(f"3 masks in {tmp_path / 'all'}")


def test_what_is_there_is_kept_and_what_is_outdated_is_replaced(run, image, tmp_path):
    words = ("segment", image, "--point", "9,9", "-o", tmp_path / "out")
    run(*words)
    assert "kept 1 made before" in run(*words).err
    assert "replaced" not in run(*words, "--overwrite").err
    bf16 = run(*words, "--precision", "bf16")
    assert "replaced 1 that were made in another precision" in bf16.err
    no_pad = run(*words, "--no-pad", "--precision", "bf16")
    assert "made with another preparation of images" in no_pad.err
    (tmp_path / "out" / "böse Katze.json").write_text("{}")
    foreign = run(*words)
    assert foreign.code == 1
    assert "is there already and was not made by this command; choose another" in foreign.err
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
    documents = (tmp_path / "out").rglob("*.json")
    count = sum(info(path)["is_complete"] for path in documents)
    assert result.err.splitlines()[1:] == [
        f"stopped after {count} of 3 images; the same command goes on from there",
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
        (["--prompts", "none.json"], "there is no file 'none.json'; check the path of --prompts"),
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


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("3,4", (3, 4, 1)),
        ("3,4,1", (3, 4, 1)),
        (" 3.5, -4 ,0", (3.5, -4, 0)),
    ],
)
def test_points(text, point):
    assert parse_point(text) == point


@pytest.mark.parametrize("text", ["", "3", "3,4,1,1", "a,b", "3;4", "3,,4"])
def test_what_is_no_point(text):
    with pytest.raises(typer.BadParameter, match="is not X,Y or X,Y,LABEL; for example 320,240"):
        parse_point(text)


@pytest.mark.parametrize("text", ["3,4,2", "3,4,-1", "3,4,0.5", "3,4,nan"])
def test_a_label_is_0_or_1(text):
    with pytest.raises(typer.BadParameter, match=r"must be 1 .the object. or 0 .not the object."):
        parse_point(text)


def test_boxes():
    assert parse_box("1,2,3.5,4") == (1, 2, 3.5, 4)
    for text in ("", "1,2,3", "1,2,3,4,5", "1,2,3,x"):
        with pytest.raises(typer.BadParameter, match="is not X0,Y0,X1,Y1"):
            parse_box(text)


# --- which model ----------------------------------------------------------------------------------


@pytest.fixture
def real(monkeypatch, tiny):
    """The checkpoint's own model after all."""
    monkeypatch.setattr("tinyvit.cli.arguments.open_sam", OPEN)


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ("nothing", "unknown checkpoint 'nothing'"),
        ("none.pt", "no such file"),
        ("saved", "is a folder without a whole SAM; give a file"),
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
    assert result.json["checkpoint"] == "tinyvit_sam_2m"
    assert result.json["image_spec"]["size"] == [64, 64]
