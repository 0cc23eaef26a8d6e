from __future__ import annotations

import os

import pytest
from PIL import Image

from tinyvit.folders.images import IMAGE_SUFFIXES, list_images
from tinyvit.images.decode import FORMATS


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names_of(*args, **kwargs):
    return {image.name: image.stem for image in list_images(*args, **kwargs)}


def test_the_suffixes_are_of_formats_that_are_read():
    by_plugins = {".heic": "HEIF", ".heif": "HEIF", ".avif": "AVIF"}  # perhaps not installed
    known = {**Image.registered_extensions(), **by_plugins}
    assert {known.get(suffix, "PPM") for suffix in IMAGE_SUFFIXES} == set(FORMATS)


def test_folders_are_read_in_a_fixed_order_with_what_is_in_them(tmp_path):
    touch(tmp_path, "b.jpg", "a.PNG", "z/c.webp", "m n/ü.jpeg", "notes.txt", ".hidden.jpg")
    touch(tmp_path, ".git/x.png", "a/ä b.tif", "no_suffix")
    assert list(names_of([tmp_path]).items()) == [
        ("a.PNG", "a"),
        ("b.jpg", "b"),
        ("a/ä b.tif", "a/ä b"),
        ("m n/ü.jpeg", "m n/ü"),
        ("z/c.webp", "z/c"),
    ]


def test_a_file_counts_whatever_its_suffix_and_each_once(tmp_path):
    touch(tmp_path, "a", "b.jpg", "sub/c.png")
    paths = [tmp_path / "b.jpg", tmp_path / "a", tmp_path / "b.jpg", tmp_path / "sub"]
    assert list(names_of(paths)) == ["b.jpg", "a", "c.png"]
    assert list(names_of([tmp_path / "b.jpg", tmp_path])) == ["b.jpg", "sub/c.png"]


def test_images_of_one_stem_keep_their_suffixes(tmp_path):
    touch(tmp_path, "a.jpg", "a.png", "b.jpg", "a.jpg.png", "C.jpg", "c.png", "sub/a.jpg")
    assert names_of([tmp_path]) == {
        "a.jpg": "a.jpg",
        "a.png": "a.png",
        "a.jpg.png": "a.jpg.png",
        "b.jpg": "b",
        "C.jpg": "C.jpg",  # one name where the disk folds case
        "c.png": "c.png",
        "sub/a.jpg": "sub/a",
    }


def test_several_folders_keep_their_names_apart(tmp_path):
    touch(tmp_path, "one/x.jpg", "two/x.jpg", "y.png")
    paths = [tmp_path / "one", tmp_path / "two", tmp_path / "y.png"]
    assert list(names_of(paths)) == ["one/x.jpg", "two/x.jpg", "y.png"]


def test_images_that_would_meet_are_refused(tmp_path):
    touch(tmp_path, "one/x.jpg", "two/x.jpg")
    with pytest.raises(ValueError, match=r"one/x\.jpg' and '.*two/x\.jpg' would have the same"):
        list_images([tmp_path / "one/x.jpg", tmp_path / "two/x.jpg"])


def test_nothing_is_listed_from_the_output(tmp_path):
    touch(tmp_path, "a.jpg", "out/a.png", "out2/b.png")
    assert list(names_of([tmp_path], output=tmp_path / "out")) == ["a.jpg", "out2/b.png"]
    with pytest.raises(ValueError, match=r"is read and written to; .*features'"):
        list_images([tmp_path], output=tmp_path / "out" / "..")


@pytest.mark.parametrize("name", ["", "empty", "texts"])
def test_a_folder_without_images_is_an_error_with_its_name(tmp_path, name):
    touch(tmp_path, "texts/a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"there are no images in '{tmp_path / name}'; .*\.jpg"):
        list_images([tmp_path / name])


def test_a_path_that_is_not_there_is_an_error_before_anything_else(tmp_path):
    touch(tmp_path, "a.jpg")
    with pytest.raises(ValueError, match=r"there is no file or folder '.*typo'; check the path"):
        list_images([tmp_path / "a.jpg", tmp_path / "typo"])


def test_a_folder_that_cannot_be_read_does_not_vanish(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        list_images([tmp_path])
