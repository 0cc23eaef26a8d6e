import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.train.data.images import split
from tinyvit.train.data.lists import number_classes, read_csv, read_folder

from .tiny_images import write_folder


def test_a_folder_is_listed_by_class_and_name(tmp_path):
    root = write_folder(tmp_path / "data", ("bee", "ant"), count=2)
    (root / "ant" / ".hidden.png").write_bytes(b"x")
    (root / "ant" / "notes.txt").write_bytes(b"x")
    (root / ".git").mkdir()
    inner = root / "bee" / "more"
    inner.mkdir()
    (root / "bee" / "1.png").rename(inner / "9.PNG")
    listed = read_folder(root)
    assert listed.classes == ("ant", "bee")
    assert listed.names == ("ant/0.png", "ant/1.png", "bee/0.png", "bee/more/9.PNG")
    assert listed.labels.tolist() == [0, 0, 1, 1]
    assert listed.source(3) == root / "bee/more/9.PNG"
    assert listed.name(0) == "ant/0.png"
    assert len(listed) == 4


def test_an_empty_class_is_an_error_that_names_it(tmp_path):
    root = write_folder(tmp_path, count=1)
    (root / "dog").mkdir()
    with pytest.raises(ValueError, match=r"1 class \('dog'\) .* without an image"):
        read_folder(root)


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_classes(tmp_path, make):
    folder = tmp_path / "none"
    if make:
        folder.mkdir()
    with pytest.raises(ValueError, match="no subfolders with images" if make else "no folder"):
        read_folder(folder)


def test_the_other_part_is_numbered_alike(tmp_path):
    root = write_folder(tmp_path / "val", ("bee", "cat"), count=1)
    with pytest.warns(UserWarning, match=r"1 class \('ant'\) without an image in"):
        listed = read_folder(root, ("ant", "bee", "cat"))
    assert listed.labels.tolist() == [1, 2]
    with pytest.raises(ValueError, match="1 classes that the other part does not have: 'cat'"):
        read_folder(root, ("ant", "bee"))


@pytest.mark.parametrize(
    "text",
    [
        "label,path,more\nbee,a/0.png,x\nant,a/1.png,y\n",
        "a/0.png,bee\na/1.png,ant\n",
        "file;class\n\na/0.png;bee\na/1.png; ant \n",
    ],
)
def test_csv_with_and_without_a_header(tmp_path, text):
    write_folder(tmp_path, ("a",), count=2)
    (tmp_path / "list.csv").write_text(text, encoding="utf-8-sig")
    listed = read_csv(tmp_path / "list.csv")
    assert listed.classes == ("ant", "bee")
    assert (listed.names, listed.labels.tolist()) == (("a/0.png", "a/1.png"), [1, 0])
    assert listed.source(0).is_file()
    assert listed.parts is None


def test_csv_with_a_split(tmp_path):
    write_folder(tmp_path, ("a",), count=2)
    (tmp_path / "l.csv").write_text("path,label,split\na/0.png,10,train\na/1.png,9,val\n")
    listed = read_csv(tmp_path / "l.csv")
    assert listed.classes == ("9", "10")  # numbers are sorted as numbers
    assert listed.parts == ("train", "val")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is empty"),
        ("path,label\n", "a header and no rows"),
        ("a/0.png,x\na/1.png\n", "line 2 of .* is 'a/1.png'; wanted a path and a label"),
        ("a/0.png,x\nb/7.png,y\n", "1 of 2 images .* are not there: 'b/7.png'; paths are rel"),
    ],
)
def test_a_csv_that_is_wrong(tmp_path, text, words):
    write_folder(tmp_path, ("a",), count=2)
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_csv(tmp_path / "l.csv")


def test_a_csv_that_is_no_text(tmp_path):
    (tmp_path / "l.csv").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match="cannot be read as CSV text"):
        read_csv(tmp_path / "l.csv")


def test_texts_that_are_not_all_numbers_are_sorted_as_texts():
    assert number_classes(["10", "9", "x"], None, "here")[1] == ("10", "9", "x")


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
def test_a_split_parts_every_class(numbers, part, seed):
    labels = np.array(numbers)
    counts = np.bincount(labels)
    if counts.max() < 2:
        with pytest.raises(ValueError, match="nothing can be held out"):
            split(labels, part, seed)
        return
    train, val = split(labels, part, seed)
    assert sorted([*train, *val]) == list(range(len(labels)))
    for number, count in enumerate(counts):
        held = int((labels[val] == number).sum())
        assert held == (0 if count < 2 else min(max(round(part * count), 1), count - 1))
    assert (split(labels, part, seed)[1] == val).all()


def test_another_seed_holds_out_others():
    labels = np.zeros(50, np.int64)
    assert split(labels, 0.5, 0)[1].tolist() != split(labels, 0.5, 1)[1].tolist()


def test_one_image_is_too_few_and_a_part_has_a_range():
    with pytest.raises(ValueError, match="1 images and no class with more than one; an image"):
        split(np.array([0]), 0.5, 0)
    with pytest.raises(ValueError, match=r"above 0 and below 1, got 1\.0"):
        split(np.array([0, 0]), 1.0, 0)
