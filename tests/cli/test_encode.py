from __future__ import annotations

import json
import os
from importlib.metadata import version

import pytest
import torch
from safetensors import safe_open

from tinyvit.factory import create_model
from tinyvit.image_spec import ImageSpec
from tinyvit.images import draw
from tinyvit.images.decode import decode
from tinyvit.inference import Engine


def read(path):
    """The features of a file, and its header as values."""
    with safe_open(path, framework="pt") as file:
        header = {k: json.loads(text) for k, text in file.metadata().items() if k != "format"}
        return file.get_tensor("features"), header


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


@pytest.fixture
def tiny(checkpoints):
    """Options for a tiny model on tiny images."""
    return ("--checkpoint", checkpoints / "encoder.safetensors", "--size", 32)


def test_an_image_becomes_features_that_say_how_they_came_about(run, tmp_path, photo):
    image = photo(tmp_path / "böse Katze [1].jpg", 30, 60)
    result = run("encode", image, "-o", tmp_path / "out", "--backend", "torch")
    assert (result.code, result.out) == (0, "")
    assert names(tmp_path / "out") == ["böse Katze [1].png", "böse Katze [1].safetensors"]
    features, header = read(tmp_path / "out" / "böse Katze [1].safetensors")
    engine = Engine(create_model(checkpoint="tinyvit_sam_2m"), backend="torch")
    torch.testing.assert_close(features, engine.embed(image)[0], atol=1e-5, rtol=1e-5)
    stat = image.stat()
    assert header == {
        "picture": "böse Katze [1].jpg",
        "picture_bytes": stat.st_size,
        "picture_mtime_ns": stat.st_mtime_ns,
        "original_size": [30, 60],
        "resized_size": [128, 256],
        "crop_offset": [0, 0],
        "model_size": [256, 256],
        "image_spec": ImageSpec.sam(256).to_dict(),
        "weights_sha256": engine.weights_sha256(),
        "checkpoint": "tinyvit_sam_2m",
        "variant": "tiny_vit_2m_sam",
        "strides": [2, 2, 1],
        "precision": "fp32",
        "device": "cpu",
        "tinyvit_version": version("tinyvit"),
        "drawing": "böse Katze [1].png",
    }
    assert decode(tmp_path / "out" / "böse Katze [1].png").shape[1] > 3 * 320
    lines = result.err.splitlines()
    assert lines[0].startswith("tinyvit_sam_2m: torch, cpu, fp32")
    assert lines[1].startswith("encoded 1 image in ")
    assert f"features [256, 16, 16] in {tmp_path}/out/böse Katze [1].safetensors" in lines[1]
    assert lines[1].endswith(f"seen in {tmp_path}/out/böse Katze [1].png")


def test_a_folder_keeps_its_shape(run, tmp_path, photo, tiny):
    for name in ("a.jpg", "a.png", "deep/er/b.webp", "deep/c.tif"):
        photo(tmp_path / "in" / name)
    result = run("encode", tmp_path / "in", "-o", tmp_path / "out", "--no-pictures", *tiny)
    assert result.code == 0
    assert names(tmp_path / "out") == [
        "a.jpg.safetensors",
        "a.png.safetensors",
        "deep/c.safetensors",
        "deep/er/b.safetensors",
    ]
    assert read(tmp_path / "out" / "deep/er/b.safetensors")[1]["picture"] == "deep/er/b.webp"
    assert "encoded 4 images" in result.err
    assert "/out/NAME.safetensors" in result.err


def test_quiet_says_nothing(run, tmp_path, photo, tiny):
    result = run("encode", photo(tmp_path / "a.png"), "-o", tmp_path / "out", "-q", *tiny)
    assert (result.code, result.out, result.err) == (0, "", "")


def test_broken_images_are_named_counted_and_listed(run, tmp_path, photo, tiny):
    photo(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (tmp_path / "in" / "empty.png").touch()
    words = ("encode", tmp_path / "in", "-o", tmp_path / "out", "--json", *tiny)
    result = run(*words, "-q")
    assert result.code == 1
    lines = result.err.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["failed", "failed"]
    assert "broken.jpg" in lines[0]
    assert "empty.png' is empty" in lines[1]
    assert lines[2:] == ["failed 2 of 3, named above"]
    failed = result.json["failed"]
    assert [row["picture"] for row in failed] == ["broken.jpg", "empty.png"]
    assert all(row["error"] and row["path"].startswith(str(tmp_path)) for row in failed)
    assert [row["picture"] for row in result.json["written"]] == ["good.png"]


def test_json_has_everything(run, tmp_path, photo, tiny):
    photo(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    content = run("encode", tmp_path / "in", "-o", out, "--json", *tiny).json
    assert set(content) == {
        *("checkpoint", "variant", "strides", "weights_sha256", "image_spec", "precision"),
        *("device", "tinyvit_version", "written", "skipped", "failed", "output", "seconds"),
    }
    assert content["written"] == [
        {
            "picture": "a.png",
            "path": str(tmp_path / "in" / "a.png"),
            "features": str(out / "a.safetensors"),
            "drawing": str(out / "a.png"),
            "shape": [16, 2, 2],
            "instead_of": None,
        }
    ]
    again = run("encode", tmp_path / "in", "-o", out, "--json", *tiny).json
    assert (again["written"], again["failed"]) == ([], [])
    assert again["skipped"] == [
        {
            "picture": "a.png",
            "path": str(tmp_path / "in" / "a.png"),
            "features": str(out / "a.safetensors"),
            "drawing": str(out / "a.png"),
        }
    ]


# --- what is there already ------------------------------------------------------------------------


def test_what_is_there_is_kept_and_what_is_outdated_is_replaced(run, tmp_path, photo, tiny):
    images, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "b.png"):
        photo(images / name)
    words = ["encode", images, "-o", out, *tiny]
    run(*words, "--no-pictures")
    assert names(out) == ["a.safetensors", "b.safetensors"]
    drawn = run(*words)
    assert "replaced 2 that were without an image of the features" in drawn.err
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(*words)
    kept = "encoded nothing new\nkept 2 made before (--overwrite writes them again)\n"
    assert kept in again.err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    os.utime(images / "a.png", ns=(1, 1))
    changed = run(*words)
    assert "replaced 1 that were made of an image that has changed since\n" in changed.err
    assert "kept 1 made before" in changed.err
    coarse = run(*words, "--precision", "bf16")
    assert "replaced 2 that were made in another precision\n" in coarse.err
    forced = run(*words, "--precision", "bf16", "--overwrite")
    assert "encoded 2 images" in forced.err
    assert "replaced" not in forced.err


def test_files_of_the_user_s_own_are_not_replaced_unasked(run, tmp_path, photo, tiny):
    image = photo(tmp_path / "a.jpg")
    (tmp_path / "a.png").write_text("mine")
    result = run("encode", image, "-o", tmp_path, *tiny)
    assert result.code == 1
    assert "a.png is there already and was not made by this command; choose" in result.err
    assert (tmp_path / "a.png").read_text() == "mine"
    assert names(tmp_path) == ["a.jpg", "a.png"]
    assert run("encode", image, "-o", tmp_path, "--overwrite", *tiny).code == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_an_image_is_never_replaced_by_the_image_of_its_features(run, tmp_path, photo, tiny):
    image = photo(tmp_path / "a.png")
    before = image.read_bytes()
    for more in ((), ("--overwrite",)):
        result = run("encode", image, "-o", tmp_path, *more, *tiny)
        assert result.code == 1
        assert "would replace" in result.err
    assert image.read_bytes() == before
    assert run("encode", image, "-o", tmp_path, "--no-pictures", *tiny).code == 0


# --- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["none.jpg", "-o", "out"], "there is no file or folder"),
        (["empty", "-o", "out"], "there are no images in 'empty'"),
        (["in", "-o", "in"], "is read and written to"),
        (["in", "-o", "/proc/nope/x"], "the folder '/proc/nope/x' cannot be written: "),
        (["in", "-o", "file"], "'file' is a file; give a folder to write to"),
        (["in", "-o", "out", "--checkpoint", "nothing"], "unknown checkpoint 'nothing'"),
        (["in", "-o", "out", "--checkpoint", "none.pt"], "no such file"),
        (["in", "-o", "out", "--checkpoint", ""], "the name of the checkpoint is empty"),
        (["in", "-o", "out", "--checkpoint", "in/a.png"], "PNG image"),
        (["in", "-o", "out", "--checkpoint", "mobile_sam"], "TINYVIT_OFFLINE"),
        (["in", "-o", "out", "--model", "tiny_vit_5m_sam"], "needs a --checkpoint"),
        (["in", "-o", "out", "--model", "tiny_vit"], "unknown model 'tiny_vit'"),
        (["in", "-o", "out", "--device", "toaster"], "device must be"),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(
    run, tmp_path, photo, monkeypatch, words, expected
):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "in" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    result = run("-q", "encode", *words)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert expected in result.err
    assert names(tmp_path) == ["in/a.png"]


def test_a_checkpoint_that_does_not_fit_is_told_in_few_words(run, tmp_path, photo, tiny):
    words = ("encode", photo(tmp_path / "a.jpg"), "-o", tmp_path / "out", *tiny)
    result = run(*words, "--model", "tiny_vit_2m_sam", "-q")
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert len(result.err) < 800
    assert "does not fit" in result.err
    assert result.err.endswith("... (--debug shows all of it)\n")
    assert len(run(*words, "--model", "tiny_vit_2m_sam", "--debug").err) > 5000


def test_a_read_only_folder_is_one_line(run, tmp_path, photo, tiny, monkeypatch):
    out = tmp_path / "out"
    out.mkdir(mode=0o500)
    if os.access(out, os.W_OK):  # the superuser may write anywhere

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tinyvit.folders.encode.write_bytes", refuse)
    result = run("encode", photo(tmp_path / "a.jpg"), "-o", out, "-q", *tiny)
    assert result.code == 1
    assert "error: " in result.err
    assert "Permission denied" in result.err
    assert result.err.count("\n") == 1
    assert list(out.iterdir()) == []


def test_a_stop_in_the_middle_says_how_far_it_came(run, tmp_path, photo, tiny, monkeypatch):
    real = draw.save_png

    def save(path, pixels):
        if path.name == "2.png":
            raise KeyboardInterrupt
        real(path, pixels)

    for number in range(4):
        photo(tmp_path / "in" / f"{number}.png")
    monkeypatch.setattr(draw, "save_png", save)
    result = run("encode", tmp_path / "in", "-o", tmp_path / "out", "--json", *tiny)
    assert (result.code, result.out) == (130, "")
    stems = [path.stem for path in (tmp_path / "out").iterdir()]
    count = sum(stems.count(stem) == 2 for stem in set(stems))  # features and drawing
    assert result.err.splitlines()[1:] == [
        f"stopped after {count} of 4 images; the same command goes on from there",
        "interrupted",
    ]


def test_threads_workers_backend_and_a_limit_of_pixels(run, tmp_path, photo, tiny, monkeypatch):
    photo(tmp_path / "in" / "small.png", 20, 30)
    photo(tmp_path / "in" / "large.png", 20, 40)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    words = ("encode", tmp_path / "in", "-o", tmp_path / "out", "--workers", 0, "--threads", 2)
    result = run(*words, "--backend", "torch", "--max-pixels", 600, *tiny)
    assert (result.code, threads) == (1, [2])
    assert "large.png" in result.err
    assert "raise the limit with --max-pixels 800" in result.err
    assert names(tmp_path / "out") == ["small.png", "small.safetensors"]


def test_no_pad(run, tmp_path, photo, tiny):
    photo(tmp_path / "in" / "a.png", 20, 40)
    out = tmp_path / "out"
    assert run("encode", tmp_path / "in", "-o", out, *tiny).code == 0
    padded = run("encode", tmp_path / "in", "-o", out, "--json", *tiny).json
    assert padded["image_spec"]["pad"] is True
    result = run("encode", tmp_path / "in", "-o", out, "--no-pad", "--json", "--debug", *tiny)
    assert ", not padded" in result.err
    assert "made with another preparation of images" in result.err
    assert result.json["image_spec"] == {**padded["image_spec"], "pad": False}
    height, width = padded["image_spec"]["size"]
    assert result.json["written"][0]["shape"][1:] == [-(-height // 2 // 16), -(-width // 16)]
