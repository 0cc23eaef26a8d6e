from __future__ import annotations

import json

import pytest

from tinyvit.labels import imagenet_labels, labels_for, read_labels


def test_imagenet_has_its_thousand_names_in_the_published_order():
    names = imagenet_labels()
    assert len(names) == 1000
    known = {
        0: "tench, Tinca tinca",
        1: "goldfish, Carassius auratus",
        207: "golden retriever",
        285: "Egyptian cat",
        388: "giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca",
        504: "coffee mug",
        657: "missile",
        812: "space shuttle",
        999: "toilet tissue, toilet paper, bathroom tissue",
    }
    assert {number: names[number] for number in known} == known
    assert all(name == name.strip() and name for name in names)
    assert names[134] == names[517] == "crane"  # the bird and the machine
    assert len(set(names)) == 999


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "cat\ndog\nbird"),
        ("a.txt", "cat\r\n dog \r\nbird\r\n\r\n"),
        ("a.txt", "\ufeffcat\ndog\nbird\n"),
        ("a.json", '["cat", "dog", "bird"]'),
        ("a.txt", '\n["cat", "dog", "bird"]\n'),
        ("a.json", '{"0": "cat", "2": "bird", "1": "dog"}'),
        ("a.json", '{"cat": 0, "bird": 2, "dog": 1}'),
        ("a.json", '{"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "bird"]}'),
    ],
)
def test_reads_every_form_in_use(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert read_labels(path) == ("cat", "dog", "bird")
    assert labels_for(3, path) == ("cat", "dog", "bird")


def test_an_empty_line_between_names_keeps_its_number(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("cat\n\nbird\n")
    assert read_labels(path) == ("cat", "", "bird")


@pytest.mark.parametrize(
    "content",
    [
        {"0": "cat", "2": "bird"},
        {"cat": 0, "dog": 0},
        {"0": "cat", "x": "dog"},
        {"1": "cat", "2": "dog"},
        {"0": "cat", "00": "dog"},
        ["cat", 3],
        [[]],
        "cat",
        3,
    ],
)
def test_refuses_json_that_leaves_numbers_out(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must be a list of names, or an object"):
        read_labels(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "hold no names"),
        (b"\n \n", "hold no names"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"[1,", "are no JSON"),
        (b"[]", "hold no names"),
        (b"{}", "hold no names"),
    ],
)
def test_refuses_what_names_nothing(tmp_path, data, words):
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_labels(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"labels '.*none\.txt' cannot be read"):
        read_labels(tmp_path / "none.txt")


def test_only_a_head_of_1000_has_names_of_its_own():
    assert labels_for(1000) == imagenet_labels()
    assert labels_for(21841) is None
    assert labels_for(999) is None


def test_the_number_of_names_must_be_that_of_the_classes(tmp_path):
    path = tmp_path / "two.txt"
    path.write_text("cat\ndog")
    with pytest.raises(ValueError, match=r"two\.txt' has 2 names, but the head has 1000 classes"):
        labels_for(1000, path)
