import logging
import pickle

import numpy as np
import pytest

from tinyvit.errors import ImageError
from tinyvit.images.decode import decode
from tinyvit.train.data.lists import INDEX, find_shards, read_shards

from .tiny_images import pixels_of, png, write_shards, write_tar


@pytest.mark.parametrize("label", [".cls", ".json"])
def test_every_image_is_read_at_its_place(tmp_path, label):
    folder = write_shards(tmp_path, classes=2, count=3, label=label)
    listed = pickle.loads(pickle.dumps(read_shards(find_shards(folder))))
    assert len(listed) == 12
    assert listed.classes == ("0", "1")
    for index in (11, 0, 5):
        _, i, number = listed.name(index).removesuffix(".png").split("/")[1]
        read = decode(listed.source(index))[:, :, 0]
        np.testing.assert_array_equal(read, pixels_of(int(number), int(i)))  # PNG: exact
        assert listed.labels[index] == int(number)


def test_the_ways_to_name_tar_files(tmp_path):
    folder = write_shards(tmp_path / "a")
    both = (folder / "train-0.tar", folder / "train-1.tar")
    assert find_shards(folder) == both
    assert find_shards(folder / "train-*.tar") == both
    assert find_shards(folder / "train-1.tar") == both[1:]
    assert find_shards(tmp_path) == ()
    assert find_shards(tmp_path / "nothing.tar") == ()


def test_the_index_is_kept_and_made_anew_when_a_file_changes(tmp_path, monkeypatch):
    folder = write_shards(tmp_path)
    first = read_shards(find_shards(folder))
    assert (folder / INDEX).is_file()
    with monkeypatch.context() as patch:
        patch.setattr("tinyvit.train.data.lists._index", None)  # not called
        second = read_shards(find_shards(folder))
    assert second.names == first.names
    np.testing.assert_array_equal(second.places, first.places)
    write_tar(folder / "train-1.tar", [("x.png", png(pixels_of(1, 0))), ("x.cls", b"5")])
    third = read_shards(find_shards(folder))
    assert third.names[-1] == "train-1.tar/x.png"
    assert third.classes == ("0", "1", "5")


def test_a_damaged_index_is_made_anew(tmp_path, caplog):
    folder = write_shards(tmp_path)
    (folder / INDEX).write_bytes(b"PK nonsense")
    with caplog.at_level(logging.WARNING, "tinyvit"):
        assert len(read_shards(find_shards(folder))) == 12
    assert "is damaged" in caplog.text


def test_a_place_that_cannot_be_written_leaves_the_index_in_memory(tmp_path, monkeypatch):
    folder = write_shards(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinyvit.checkpoints.files.os.replace", full)
    assert len(read_shards(find_shards(folder))) == 12
    assert sorted(p.name for p in folder.iterdir()) == ["train-0.tar", "train-1.tar"]


@pytest.mark.parametrize("part", [0.3, 0.5, 0.62, 1.0])
@pytest.mark.parametrize("more", [0, 100])  # between two blocks, and within one
def test_a_tar_file_that_is_cut_short(tmp_path, part, more):
    path = write_shards(tmp_path) / "train-0.tar"
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    path.write_bytes(whole[: int(end * part) // 512 * 512 + more])
    with pytest.raises(
        ValueError, match=r"train-0.tar' is cut short, damaged or compressed .* cop"
    ):
        read_shards(find_shards(path))


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + b"x" * 2000)
    with pytest.raises(ValueError, match=r"unpack \.gz first"):
        read_shards(find_shards(tmp_path))


@pytest.mark.parametrize(
    "members, words",
    [
        ([("a.png", b"x"), ("b.cls", b"1")], "1 images of .* have no label, the first is 'a'"),
        ([("a.txt", b"x")], "no images in 1 tar files"),
        ([("a.png", b"x"), ("a.cls", b"")], "label 'a.tar/a.cls' is ''; wanted a number or a name"),
        ([("a.png", b"x"), ("a.json", b"{")], "is no json"),
        ([("a.png", b"x"), ("a.json", b'{"caption": "x"}')], "in .json under one of label, cls"),
    ],
)
def test_labels_that_are_wrong(tmp_path, members, words):
    with pytest.raises(ValueError, match=words):
        read_shards([write_tar(tmp_path / "a.tar", members)])
    with pytest.raises(ValueError, match="at least one tar file"):
        read_shards([])


def test_names_of_classes_beside_the_files(tmp_path):
    folder = write_shards(tmp_path, classes=2)
    (folder / "classes.txt").write_text("no\nyes\n")
    listed = read_shards(find_shards(folder))
    assert listed.classes == ("no", "yes")
    assert listed.labels.tolist()[:2] == [0, 1]
    (folder / "classes.txt").write_text("no\n")
    with pytest.raises(ValueError, match=r"label 1, but there are 1 classes \(0 to 0\)"):
        read_shards(find_shards(folder))


def test_a_file_that_became_shorter_is_said_when_read(tmp_path):
    folder = write_shards(tmp_path)
    listed = read_shards(find_shards(folder))
    (folder / "train-1.tar").write_bytes(b"")
    with pytest.raises(ImageError, match="ends beyond its tar file, which has become shorter"):
        listed.source(11)
    (folder / "train-1.tar").unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        listed.source(11)
