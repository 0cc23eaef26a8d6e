import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.errors import ImageError
from tinyvit.images.decode import decode
from tinyvit.train.data.images import fingerprint, hold_out, open_data_set, open_part, read_good

from .tiny_images import write_folder, write_shards


def read_one(images, index, rng, on_broken="skip"):
    def load(place):
        return decode(images.source(place))

    return read_good(load, index, images.name, len(images), rng, on_broken)


def names(images):
    return [images.name(i) for i in range(len(images))]


def test_a_folder_of_classes_is_split(tmp_path):
    found = open_data_set(write_folder(tmp_path, count=4), val_part=0.25)
    assert (len(found.train), len(found.val)) == (9, 3)
    assert found.classes == found.val.classes == ("ant", "bee", "cat")
    assert not set(names(found.train)) & set(names(found.val))
    assert found.val.labels.tolist() == [0, 1, 2]
    assert "25% of each class held out with seed 0" in found.origin
    assert found.val.source(0) == tmp_path / found.val.name(0)


def test_train_and_val_in_a_folder(tmp_path):
    write_folder(tmp_path / "train", count=2)
    write_folder(tmp_path / "val", count=1)
    found = open_data_set(tmp_path)
    assert (len(found.train), len(found.val)) == (6, 3)
    other = open_data_set(tmp_path, tmp_path / "val")
    assert names(other.train) == names(found.train)


def test_val_must_not_have_classes_of_its_own(tmp_path):
    write_folder(tmp_path / "train", ("ant", "bee"))
    write_folder(tmp_path / "test", ("ant", "dog"))
    with pytest.raises(ValueError, match="does not have: 'dog'"):
        open_data_set(tmp_path)


def test_csv_by_its_column_or_by_chance(tmp_path):
    write_folder(tmp_path, count=2)
    rows = [f"{c}/{i}.png,{c},{'train' if i else 'test'}" for c in ("ant", "bee") for i in (0, 1)]
    path = tmp_path / "l.csv"
    path.write_text("path,label,split\n" + "\n".join(rows))
    found = open_data_set(path)
    assert names(found.train) == ["ant/1.png", "bee/1.png"]
    assert names(found.val) == ["ant/0.png", "bee/0.png"]
    path.write_text("\n".join(row.rpartition(",")[0] for row in rows))
    assert len(open_data_set(path, val_part=0.5).val) == 2


@pytest.mark.parametrize(
    "parts, words",
    [
        (("train", "train", "train"), "has 3 and 0 images; wanted 'train' and 'val'"),
        (("train", "some", "val"), r"has the values \['some'\]"),
        (("train", "val", "val"), "no image in 'train': 'cat'"),
    ],
)
def test_a_column_split_that_is_wrong(tmp_path, parts, words):
    write_folder(tmp_path, ("ant", "cat"), count=2)
    files = ("ant/0.png,ant", "ant/1.png,ant", "cat/0.png,cat")
    text = "\n".join(f"{file},{part}" for file, part in zip(files, parts, strict=True))
    (tmp_path / "l.csv").write_text(f"path,label,split\n{text}")
    with pytest.raises(ValueError, match=words):
        open_data_set(tmp_path / "l.csv")


def test_tar_files(tmp_path):
    found = open_data_set(write_shards(tmp_path, classes=2, count=2), val_part=0.5)
    assert (len(found.train), len(found.val)) == (4, 4)
    assert isinstance(found.train.source(0), bytes)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder .* wanted a folder of classes, a CSV"):
        open_data_set(tmp_path / "nothing")


def test_a_broken_image_is_replaced_and_named(tmp_path):
    images = open_part(write_folder(tmp_path, count=4))
    (tmp_path / "ant" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    first = read_one(images, 0, np.random.default_rng(3))
    again = read_one(images, 0, np.random.default_rng(3))
    assert first[0] == again[0] != 0  # chance is in the generator alone
    np.testing.assert_array_equal(first[1], again[1])
    assert list(first[2]) == ["ant/0.png"]
    rng = np.random.default_rng(3)
    assert read_one(images, 1, rng)[2] == {}
    assert rng.random() == np.random.default_rng(3).random()  # nothing was drawn
    with pytest.raises(ImageError, match=r"ant/0.png: .*ant/0.png"):
        read_one(images, 0, rng, "error")


def test_images_that_are_all_broken(tmp_path):
    images = open_part(write_folder(tmp_path, ("ant",), count=2))
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"20 images drawn in a row are unreadable.*0 bytes"):
        read_one(images, 0, np.random.default_rng(0))


def test_a_fingerprint_tells_lists_apart(tmp_path):
    whole = open_part(write_folder(tmp_path, count=2))
    prints = {fingerprint(whole), fingerprint(open_data_set(tmp_path, val_part=0.5).train)}
    (tmp_path / "ant" / "1.png").unlink()
    prints.add(fingerprint(open_part(tmp_path)))
    assert len(prints) == 3
    assert fingerprint(whole) == fingerprint(whole)


NAMES = st.lists(st.text("abcd/.", min_size=1), min_size=2, max_size=30, unique=True)


@given(names=NAMES, part=st.floats(0.001, 0.999), seed=st.integers(0, 9))
def test_every_name_is_on_one_side_and_both_have_some(names, part, seed):
    learnt, held = hold_out(names, part, seed)
    assert learnt and held
    assert sorted(learnt + held) == sorted(names)
    assert not set(learnt) & set(held)


def test_a_name_keeps_its_side_when_others_come():
    names = [f"{n}.jpg" for n in range(300)]
    learnt, held = hold_out(names[:100], 0.3)
    more, more_held = hold_out(names, 0.3)
    assert set(learnt) <= set(more) and set(held) <= set(more_held)
    assert 60 < len(more_held) < 120  # 90 are expected, with a deviation of 8
    assert hold_out(names, 0.3, seed=1)[1] != more_held


def test_a_folder_can_be_held_out():
    names = ["a.jpg", "val/b.jpg", "value/c.jpg"]
    assert (
        hold_out(names, "val")
        == hold_out(names, "val/")
        == (["a.jpg", "value/c.jpg"], ["val/b.jpg"])
    )
    with pytest.raises(ValueError, match="'test' leaves 3 images to train on and 0"):
        hold_out(names, "test")


def test_what_cannot_be_split_is_said():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        hold_out(["a"], 0.5)
    for part in (0.0, 1.0):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            hold_out(["a", "b"], part)
