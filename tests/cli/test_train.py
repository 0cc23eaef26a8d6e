from __future__ import annotations

import pytest

from tiny import write_mask_folder, write_tiny_sam

QUICK = ("--epochs", 1, "--batch-size", 4)


@pytest.fixture(autouse=True)
def allocator(monkeypatch):
    monkeypatch.setattr("tinyvit.allocator.tune_allocator", lambda: None)


@pytest.fixture
def cells(tmp_path):
    return write_mask_folder(tmp_path / "cells")


@pytest.fixture
def sam(make_tiny_vit, randomise, tmp_path):
    return write_tiny_sam(tmp_path / "sam.safetensors")


@pytest.fixture
def images(tmp_path, photo):
    for name in ("ant", "bee"):
        for number in range(3):
            photo(tmp_path / "pictures" / name / f"{number}.png", 16, 16, number)
    return tmp_path / "pictures"


def test_segment(run, cells, sam, tmp_path):
    folder = tmp_path / "run"
    words = ("--checkpoint", sam, "--size", 64, "--move", "decoder", "--objects", 1)
    result = run("train", "segment", cells, "-o", folder, *QUICK, *words, "--json")
    assert result.code == 0, result.err
    assert result.json["goal"] == ["mean_iou", "max"]
    assert "iou_1_click" in result.json["figures"]
    assert "objects = 1\n" in (folder / "task.toml").read_text()
    found = run(
        *("evaluate", "segment", cells, "--checkpoint", folder / "best.safetensors"),
        *("--size", 64, "--clicks", "1", "--most-clicks", 1, "--no-floors"),
    )
    assert found.code == 0, found.err


def test_segment_from_chance(run, cells, tmp_path, monkeypatch):
    """``--model`` alone names no checkpoint, here seen where the library is called."""
    seen = []

    def stop(settings):
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("tinyvit.train.tasks.segment.make_task", stop)
    for words in (("--model", "tiny_vit_2m_sam"), ()):
        assert run("train", "segment", cells, "-o", tmp_path / "run", *words, "--seed", 3).code == 1
    assert [(one.checkpoint, one.model) for one in seen] == [
        (None, "tiny_vit_2m_sam"),
        ("tinyvit_starter", None),
    ]
    assert seen[0].seed == 3


def test_distil_logits(run, images, checkpoints, tmp_path):
    split = ("--val-part", 0.3)
    teacher = tmp_path / "teacher" / "best.safetensors"
    start = ("--checkpoint", checkpoints / "five.safetensors", "--img-size", 32, *split, *QUICK)
    first = run("train", "classify", images, "-o", teacher.parent, *start)
    assert first.code == 0, first.err
    answers = tmp_path / "answers"
    written = run(
        *("train", "write-logits", images, "--teacher", teacher, "-o", answers, *split),
        *("--views", 2, "--top-k", 2, "--json"),
    )
    assert written.code == 0, written.err
    assert written.json == {"output": str(answers), "pictures": 4, "views": 2, "broken": {}}
    words = ("train", "distill-logits", images, *start)
    result = run(*words, "--logits", answers, "-o", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert result.json["task"] == "distill-logits"
    assert run("train", "distill-logits", "-o", tmp_path / "run", "--resume").code == 0
    missing = run(*words, "-o", tmp_path / "other")
    assert missing.code == 1
    assert missing.err == "error: name the folder of the teacher's answers with --logits FOLDER\n"
    other = run(*words, "--logits", answers, "--augment", "none", "-o", tmp_path / "other")
    assert other.code == 1
    assert other.err.startswith("error: ")


def test_distil_features(run, cells, checkpoints, sam, tmp_path):
    features, images = tmp_path / "features", cells / "images"
    kept = run("train", "store-features", images, "--teacher", sam, "-o", features, "--json")
    assert kept.code == 0, kept.err
    assert kept.json["pictures"] == 3
    assert kept.json["shape"][0] == 16
    student = checkpoints / "encoder.safetensors"
    side = 16 * kept.json["shape"][1]
    words = ("train", "distill-features", images, "--checkpoint", student, "--size", side, *QUICK)
    missing = run(*words, "-o", tmp_path / "run")
    assert (
        missing.err == "error: name the folder of the teacher's features with --features FOLDER\n"
    )
    result = run(
        *words, "--features", features, "-o", tmp_path / "run", "--loss", "huber", "--json"
    )
    assert result.code == 0, result.err
    assert {"cosine", "cosine_floor", "mse"} <= set(result.json["figures"])
    wanted = run(*words, "--features", features, "-o", tmp_path / "two", "--mask-weight", 1)
    assert wanted.code == 1
    assert "--mask-weight 1.0 wants the heads of a SAM" in wanted.err


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        ("empty", "has no subfolders with images"),
        ("missing", "there is no file or folder"),
        ("one class", "only one class, 'ant'"),
        ("one image", "nothing can be held out"),
    ],
)
def test_wrong_images_for_a_classifier(run, tmp_path, photo, prepare, said):
    data = tmp_path / "data"
    if prepare != "missing":
        data.mkdir()
    if prepare == "one image":
        photo(data / "ant" / "0.png")
    if prepare == "one class":
        for number in range(3):
            photo(data / "ant" / f"{number}.png", seed=number)
    result = run("train", "classify", data, "-o", tmp_path / "run")
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert said in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_wrong_masks(run, cells, tmp_path, photo, sam):
    for path in (cells / "masks").iterdir():
        path.unlink()
    result = run("train", "segment", cells, "-o", tmp_path / "run")
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert "no image with a good mask" in result.err or "holds no images" in result.err
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = run("train", "segment", empty, "-o", tmp_path / "run")
    assert nothing.code == 1
    assert "is no data set that is known" in nothing.err


def test_one_image_with_a_mask_is_warned_of(run, cells, tmp_path, sam):
    for number in (1, 2):
        (cells / "images" / f"{number}.png").unlink()
        (cells / "masks" / f"{number}.png").unlink()
    words = ("--checkpoint", sam, "--size", 64, "--move", "decoder")
    result = run("train", "segment", cells, "-o", tmp_path / "run", *QUICK, *words)
    assert result.code == 0, result.err
    assert f"warning: {cells} has only one image" in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("classify", "a", "-o", "x", "--augment", "much"), "'much' is not one of 'none', 'light'"),
        (("classify", "a", "-o", "x", "--move", "all"), "'all' is not one of 'full', 'decoder'"),
        (("classify", "a"), "name the folder of the run with -o"),
        (("classify", "a", "b", "-o", "x"), "2 places of data were named"),
        (("segment", "-o", "x"), "name the data to learn from"),
        (("segment", "a", "-o", "x", "--mixup", "1"), "No such option"),
        (("everything", "a"), "No such command 'everything'"),
    ],
)
def test_wrong_usage_is_exit_code_2(run, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", *words)
    assert result.code == 2
    assert said in " ".join(result.err.split())
