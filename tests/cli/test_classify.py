from __future__ import annotations

import pytest

from tinyvit.checkpoints.files import header_for, read_state_dict, write_state_dict
from tinyvit.factory import create_model
from tinyvit.inference import Engine
from tinyvit.labels import imagenet_labels


@pytest.fixture
def thousand(checkpoints):
    return ("--checkpoint", checkpoints / "thousand.safetensors", "--size", 32)


@pytest.fixture
def five(checkpoints):
    return ("--checkpoint", checkpoints / "five.safetensors", "--size", 32)


def test_the_likeliest_classes_come_first_with_their_names(run, tmp_path, photo, thousand):
    path = photo(tmp_path / "a b.png")
    result = run("classify", path, *thousand)
    assert result.code == 0
    engine = Engine(create_model(checkpoint=thousand[1], img_size=32))
    best = engine.classify(path)[0].softmax(0).topk(5)
    lines = result.out.splitlines()
    assert (lines[0], len(lines)) == (str(path), 6)
    for line, probability, number in zip(lines[1:], *map(list, best), strict=True):
        label = imagenet_labels()[int(number)]
        assert line == f"  {float(probability):6.1%}  {int(number):>5}  {label}"


def test_json_is_complete(run, tmp_path, photo, thousand):
    photo(tmp_path / "in" / "a.png")
    photo(tmp_path / "in" / "b.png", seed=1)
    (tmp_path / "in" / "c.png").touch()
    result = run("-q", "classify", tmp_path / "in", "--json", "--top-k", 1000, *thousand)
    assert result.code == 1
    content = result.json
    assert content["classes"] == 1000
    assert content["variant"] is None
    assert content["checkpoint"] == str(thousand[1])
    assert [row["picture"] for row in content["pictures"]] == [
        str(tmp_path / "in" / "a.png"),
        str(tmp_path / "in" / "b.png"),
    ]
    top = content["pictures"][0]["top"]
    assert sorted(row["class"] for row in top) == list(range(1000))
    assert all(row["label"] == imagenet_labels()[row["class"]] for row in top)
    assert content["failed"][0]["picture"] == str(tmp_path / "in" / "c.png")
    lines = result.err.splitlines()
    assert lines[0].startswith("failed: ") and "c.png' is empty" in lines[0]
    assert lines[1:] == ["failed 1 of 3, named above"]


def test_other_heads_show_numbers_or_the_names_of_a_file(run, tmp_path, photo, five):
    path = photo(tmp_path / "a.png")
    bare = run("classify", path, *five)
    assert len(bare.out.splitlines()) == 6
    assert all(len(line.split()) == 2 for line in bare.out.splitlines()[1:])
    assert run("classify", path, "--json", *five).json["pictures"][0]["top"][0]["label"] is None
    labels = tmp_path / "names.txt"
    labels.write_text("zero\none\ntwo\nthree\nfour\n")
    named = run("classify", path, "--labels", labels, "--top-k", 2, *five)
    assert len(named.out.splitlines()) == 3
    row = named.out.splitlines()[1].split()
    assert ["zero", "one", "two", "three", "four"][int(row[1])] == row[2]


def test_a_file_may_name_its_classes(run, tmp_path, photo, five):
    file = read_state_dict(five[1])
    names = [f"kind {number}" for number in "abcde"]
    header = {**file.metadata, **header_for("tinyvit", (2, 2, 2), None, names)}
    header.pop("format", None)
    named = write_state_dict(tmp_path / "named.safetensors", file.tensors, metadata=header)
    image = photo(tmp_path / "a.png")
    result = run("classify", image, "--checkpoint", named, *five[2:])
    assert result.code == 0
    assert sorted(line.split(maxsplit=2)[2] for line in result.out.splitlines()[1:]) == names
    labels = tmp_path / "labels.txt"
    labels.write_text("v\nw\nx\ny\nz\n")
    result = run("classify", image, "--checkpoint", named, *five[2:], "--labels", labels)
    assert sorted(line.split()[2] for line in result.out.splitlines()[1:]) == list("vwxyz")


def test_the_number_of_labels_must_fit(run, tmp_path, photo, five):
    labels = tmp_path / "names.txt"
    labels.write_text("zero\none\n")
    result = run("-q", "classify", photo(tmp_path / "a.png"), "--labels", labels, *five)
    assert (result.code, result.out) == (1, "")
    assert "has 2 names, but the head has 5 classes" in result.err
    assert run("classify", tmp_path / "a.png", "--labels", tmp_path / "no", *five).code == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "the embedded tinyvit_sam_2m has no classification head"),
        (["--checkpoint", "tinyvit_sam_2m"], "has no trained classification head"),
        (["--checkpoint", "mobile_sam"], "has no trained classification head"),
        (["--checkpoint", "tiny_vit_5m_224.in1k"], "TINYVIT_OFFLINE"),
        (["--model", "tiny_vit_11m_224"], "for example tiny_vit_11m_224.in1k"),
        (["--checkpoint", "none.pth"], "no such file"),
    ],
)
def test_without_a_trained_head_it_says_what_to_name(run, tmp_path, photo, words, expected):
    result = run("-q", "classify", photo(tmp_path / "a.png"), *words)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert expected in result.err
    if not words:
        assert "--checkpoint, for example tiny_vit_5m_224.dist_in22k_ft_in1k" in result.err


def test_a_head_that_was_hardly_trained_is_a_warning(run, tmp_path, photo, checkpoints):
    words = ("--checkpoint", checkpoints / "both.safetensors", "--size", 32)
    result = run("-q", "classify", photo(tmp_path / "a.png"), *words)
    assert result.code == 0
    assert result.err.startswith("warning: ")
    assert result.err.count("\n") == 1
