from __future__ import annotations

import pytest


@pytest.fixture
def images(tmp_path, photo):
    for name in ("a", "b", "c", "d", "e"):
        for number in range(2):
            photo(tmp_path / "pictures" / name / f"{number}.png", 16, 16, number)
    return tmp_path / "pictures"


def test_a_broken_image_is_named_and_the_rest_is_kept(run, images, checkpoints, tmp_path):
    (images / "a" / "0.png").write_bytes(b"no image")
    encoder = checkpoints / "encoder.safetensors"
    words = ("train", "store-features", images, "--teacher", encoder, "-o", tmp_path / "out")
    result = run(*words, "--json")
    assert result.code == 1
    assert result.json["pictures"] == 9
    assert list(result.json["broken"]) == ["a/0.png"]
    assert result.err.splitlines()[-1].startswith("failed: ")
    assert "0.png" in result.err.splitlines()[-1]


def test_the_same_call_goes_on_and_another_teacher_is_refused(run, images, checkpoints, tmp_path):
    words = ("train", "store-features", images, "-o", tmp_path / "out")
    assert run(*words, "--teacher", checkpoints / "encoder.safetensors").code == 0
    shards = sorted((tmp_path / "out").iterdir())
    again = run(*words, "--teacher", checkpoints / "encoder.safetensors")
    assert (again.code, sorted((tmp_path / "out").iterdir())) == (0, shards)
    assert again.err.splitlines()[-1] == f"10 images are in {tmp_path / 'out'}"
    other = run(*words, "--teacher", checkpoints / "other.safetensors")
    assert other.code == 1
    assert "choose another folder" in other.err


def test_answers_go_on_and_broken_images_have_none(run, images, checkpoints, tmp_path):
    (images / "e" / "2.png").write_bytes(b"no image")
    words = ("train", "write-logits", images, "-o", tmp_path / "out", "--views", 1)
    five = ("--teacher", checkpoints / "five.safetensors")
    for _ in range(2):
        result = run(*words, *five, "--val-part", 0.1, "--split-seed", 3, "--json")
        assert result.code in (0, 1)
        assert result.json["pictures"] == 6
        assert result.code == bool(result.json["broken"])
    refused = run(*words, *five, "--no-flip")
    assert refused.code == 1
    assert refused.err.splitlines()[-1].startswith("error: ")


def test_stopping_says_how_to_go_on(run, images, checkpoints, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tinyvit.train.tasks.teachers.store_features", stop)
    encoder = checkpoints / "encoder.safetensors"
    result = run("train", "store-features", images, "--teacher", encoder, "-o", tmp_path / "out")
    assert result.code == 130
    assert result.err.splitlines()[-2:] == [
        "stopped; the same command goes on from there",
        "interrupted",
    ]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("write-logits", "none", "--teacher", "x", "-o", "y"), 1, "there is no file or folder"),
        (("write-logits", "a", "-o", "y"), 2, "Missing option '--teacher'"),
        (("write-logits", "a", "--teacher", "x", "-o", "y", "--augment", "a"), 2, "'a' is not one"),
        (("store-features", "a", "--teacher", "x"), 2, "Missing option '--output'"),
    ],
)
def test_wrong_words(run, words, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", *words)
    assert result.code == code
    assert said in result.err
    assert list(tmp_path.iterdir()) == []
