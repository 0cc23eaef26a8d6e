from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tinyvit.checkpoints import write_state_dict
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.folders.images import Item
from tinyvit.folders.prompt_files import prompts_of, read_mask, read_prompts, share_out
from tinyvit.sam import Prompt

A, B, NOT = (3.0, 4.0, 1), (5.0, 6.0, 1), (7.0, 8.0, 0)
FIRST, SECOND = (0.0, 1.0, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0)


def mask_file(path, height=4, width=6):
    pixels = np.zeros((height, width), np.uint8)
    pixels[1:3, 2:5] = 255
    Image.fromarray(pixels).save(path)
    return path


def described(prompts):
    return [prompt.describe() for prompt in prompts]


# --- the options of one call ----------------------------------------------------------------------


def test_all_points_are_about_one_object_and_so_is_a_box_with_them():
    points = {"points": [[3, 4], [7, 8]], "labels": [1, 0]}
    assert described(prompts_of([A, NOT], [], None, False)) == [points]
    both = {**points, "box": [0, 1, 2, 3]}
    assert described(prompts_of([A, NOT], [FIRST], None, False)) == [both]


def test_several_boxes_are_several_objects():
    found = prompts_of([], [FIRST, SECOND], None, False)
    assert described(found) == [{"box": [0, 1, 2, 3]}, {"box": [4, 5, 6, 7]}]


def test_each_makes_every_point_and_box_an_object():
    found = described(prompts_of([A, B], [FIRST], None, True))
    point = {"labels": [1]}
    assert found == [
        {"points": [[3, 4]], **point},
        {"points": [[5, 6]], **point},
        {"box": [0, 1, 2, 3]},
    ]
    assert described(prompts_of([A], [], None, True)) == [{"points": [[3, 4]], **point}]


def test_a_mask_goes_with_one_object(tmp_path):
    path = mask_file(tmp_path / "m.png")
    (alone,) = prompts_of([], [], path, False)
    assert alone.kind == (0, False, True)
    (with_all,) = prompts_of([A, NOT], [FIRST], path, False)
    assert with_all.kind == (2, True, True)
    (refined,) = prompts_of([NOT], [], path, False)  # with a mask it says what to take away
    assert refined.kind == (1, False, True)


@pytest.mark.parametrize(
    ("points", "boxes", "has_mask", "each", "words"),
    [
        ([], [], False, False, "nothing is prompted; give --point"),
        ([], [], False, True, "nothing is prompted"),
        ([A], [FIRST, SECOND], False, False, "not clear which of them the points are about"),
        ([], [FIRST, SECOND], True, False, "--mask is about one object"),
        ([A, B], [], True, True, "--mask is about one object"),
        ([NOT], [], False, False, "label 0 alone say only what the object is not"),
        ([A, NOT], [], False, True, "label 0 alone"),
        ([], [(5, 1, 2, 3)], False, False, "x1 < x0"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path, points, boxes, has_mask, each, words):
    mask = mask_file(tmp_path / "m.png") if has_mask else None
    with pytest.raises(ValueError, match=words):
        prompts_of(points, boxes, mask, each)


# --- masks ----------------------------------------------------------------------------------------


def test_an_image_of_a_mask(tmp_path):
    mask = read_mask(mask_file(tmp_path / "m.png"))
    assert mask.dtype == bool
    assert mask.shape == (4, 6)
    assert mask.sum() == 6 and mask[1:3, 2:5].all()


def test_logits_of_both_kinds_of_files(tmp_path):
    logits = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "a.npy", logits)
    np.save(tmp_path / "b.npy", logits[None].astype(np.float64))
    write_state_dict(tmp_path / "c.safetensors", {"logits": torch.from_numpy(logits)[None]})
    for name in ("a.npy", "b.npy", "c.safetensors"):
        found = read_mask(tmp_path / name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, logits)


def test_what_is_no_mask(tmp_path):
    black = Image.fromarray(np.full((4, 4), 3, np.uint8))
    black.save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="its brightest pixel is 3 of 255"):
        read_mask(tmp_path / "black.png")
    with pytest.raises(ImageError, match="there is no file"):
        read_mask(tmp_path / "none.png")
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no array of numpy"):
        read_mask(tmp_path / "bad.npy")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="is no array of numpy"):  # pickles are never read
        read_mask(tmp_path / "object.npy")
    np.save(tmp_path / "three.npy", np.zeros((3, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"logits of one mask, .* came \[3, 4, 4\] of float32"):
        read_mask(tmp_path / "three.npy")
    np.save(tmp_path / "whole.npy", np.zeros((4, 4), np.int64))
    with pytest.raises(ValueError, match=r"of floats; came .* of int64"):
        read_mask(tmp_path / "whole.npy")
    with pytest.raises(CheckpointError, match="no such file"):
        read_mask(tmp_path / "none.safetensors")


# --- files of prompts -----------------------------------------------------------------------------


def test_json(tmp_path):
    mask_file(tmp_path / "m.png")
    content = {
        "a.jpg": [{"points": [[1, 2]], "labels": [1], "name": "cat"}, {"box": [0, 0, 5, 5]}],
        "b/c.jpg": [{"mask": "m.png", "points": [[1, 2]], "labels": [0]}],
        "d.jpg": [],
    }
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    found = read_prompts(path)
    assert described(found["a.jpg"]) == content["a.jpg"]
    assert found["b/c.jpg"][0].kind == (1, False, True)
    assert found["d.jpg"] == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1", "is no JSON"),
        ("[1]", "must be an object of images"),
        ('{"a.jpg": {"points": [[1, 2]]}}', "must be an object of images with a list"),
        ('{"a.jpg": [], "a.jpg": []}', "'a.jpg' stands there twice"),
        ('{"a.jpg": [{"box": [0, 0, 1, 1]}, {"point": [1, 2]}]}', r"'a.jpg', object 2: a prompt"),
        ('{"a.jpg": [{"box": [9, 0, 1, 1]}]}', r"'a.jpg', object 1: box must be"),
        ('{"a.jpg": [{}]}', "object 1: nothing is prompted"),
        ('{"a.jpg": [[1, 2]]}', "object 1: wanted an object like"),
        ('{"a.jpg": [{"mask": [[1]]}]}', "mask must be the name of a file"),
        ('{"a.jpg": [{"points": [[1, 2]], "labels": [0]}]}', "label 0 alone"),
    ],
)
def test_wrong_json_says_where(tmp_path, text, words):
    path = tmp_path / "prompts.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def csv_file(tmp_path, *lines):
    path = tmp_path / "prompts.csv"
    path.write_text("\n".join(lines), encoding="utf-8-sig")  # as spreadsheets write it
    return path


def test_csv(tmp_path):
    path = csv_file(
        tmp_path,
        "picture,x,y,label,x0,y0,x1,y1,object",
        "a.jpg,1,2,,,,,,cat",
        "b.jpg,,,,0,0,5,5,",
        "a.jpg,3,4,0,0,0,9,9,cat",
        "",
        'a.jpg,5,6,1,,,,,"dog, small"',
        "b.jpg,7,8,,,,,,",
    )
    found = read_prompts(path)
    assert described(found["a.jpg"]) == [
        {"points": [[1, 2], [3, 4]], "labels": [1, 0], "box": [0, 0, 9, 9], "name": "cat"},
        {"points": [[5, 6]], "labels": [1], "name": "dog, small"},
    ]
    assert described(found["b.jpg"]) == [
        {"box": [0, 0, 5, 5]},
        {"points": [[7, 8]], "labels": [1]},
    ]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_of_excel(tmp_path, mark):
    path = tmp_path / "p.csv"
    text = "image,x,y,label\na.png,5,6,1\n".replace(",", mark)
    path.write_text(text, encoding="utf-8-sig")
    ((name, prompts),) = read_prompts(path).items()
    assert (name, len(prompts)) == ("a.png", 1)


def test_names_written_on_windows():
    images = [Item(Path("d/sub/a.png"), "sub/a.png", "sub/a")]
    items, missing = share_out(images, {"sub\\a.png": (Prompt(points=[[1, 2]]),)}, Path("p.csv"))
    assert (len(items), missing) == (1, [])


def test_csv_of_clicks_alone(tmp_path):
    found = read_prompts(csv_file(tmp_path, "image, x, y", "a.jpg, 1, 2", "a.jpg, 3, 4"))
    assert [prompt.points.tolist() for prompt in found["a.jpg"]] == [[[1, 2]], [[3, 4]]]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["x,y", "1,2"], "there is no column 'picture'"),
        ([""], "there is no column 'picture'"),
        (["picture,x,y,colour", "a,1,2,red"], "came 'colour'"),
        (["picture,x,y", "a.jpg,1"], "line 2 must have 3 values"),
        (["picture,x,y", "a.jpg,1,2,3"], "line 2 must have 3 values"),
        (["picture,x,y", "a.jpg,1,"], "a point has x and y"),
        (["picture,x,y", "a.jpg,1,z"], "line 2: could not convert"),
        (["picture,x,y", ",1,2"], "names no image"),
        (["picture,x,y", "a.jpg,,"], "neither a point nor a box"),
        (["picture,x,y,label,x0,y0,x1,y1", "a,,,1,1,2,3,4"], "a label and no point"),
        (["picture,x0,y0", "a,1,2"], "a box x0, y0, x1 and y1"),
        (["picture,x,y,label", "a,1,2,5"], "object 1: labels of points must be 1"),
        (["picture,x,y,label", "a,1,2,0"], "label 0 alone"),
        (
            ["picture,x0,y0,x1,y1,object", "a,1,2,3,4,cat", "a,1,2,3,4,cat"],
            "line 3: object 'cat' has a box already",
        ),
    ],
)
def test_wrong_csv_says_where(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words):
        read_prompts(csv_file(tmp_path, *lines))


# --- which image gets what ----------------------------------------------------------------------

IMAGES = [
    Item(Path("photos/a.jpg"), "a.jpg", "a"),
    Item(Path("photos/in/b.jpg"), "in/b.jpg", "in/b"),
    Item(Path("photos/c.jpg"), "c.jpg", "c"),
]
ONE = (Prompt(points=[[1, 2]]),)


def test_names_are_relative_to_the_folder_or_as_given():
    found = share_out(IMAGES, {"photos/in/b.jpg": ONE, "./a.jpg": ONE}, Path("p.json"))
    assert found == ([replace(image, prompts=ONE) for image in IMAGES[:2]], [])


def test_what_is_not_there_is_told_with_the_nearest_name():
    images = [*IMAGES, Item(Path("coffee.png"), "coffee.png", "coffee")]
    prompts = {"a.jpg": ONE, "cofee.jpg": ONE, "nope.png": ONE}  # the last: .png alone is alike
    _, missing = share_out(images, prompts, Path("p.json"))
    assert missing == [
        (name, f"p.json has prompts for {name!r}, which is not among the images{hint}")
        for name, hint in (("cofee.jpg", "; did you mean 'coffee.png'?"), ("nope.png", ""))
    ]


def test_a_photograph_is_no_mask(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    with pytest.warns(UserWarning, match=r"photo\.png' looks like a photograph and not"):
        read_mask(tmp_path / "photo.png")
    soft = np.zeros((40, 40), np.uint8)
    soft[10:30, 10:30] = 255
    Image.fromarray(soft).filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "soft.jpg")
    read_mask(tmp_path / "soft.jpg")  # a warning would be an error


def test_an_empty_list_is_no_prompts():
    items, _ = share_out(IMAGES, {"a.jpg": ONE, "c.jpg": ()}, Path("p.json"))
    assert [item.name for item in items] == ["a.jpg"]


def test_nothing_to_do_is_an_error():
    with pytest.raises(ValueError, match=r"none of the images \('a.jpg', .* has prompts in p"):
        share_out(IMAGES, {}, Path("p.json"))
    with pytest.raises(ValueError, match=r"'q\.jpg', which is not among the images"):
        share_out(IMAGES, {"q.jpg": ONE}, Path("p.json"))


def test_one_image_under_two_names():
    with pytest.raises(ValueError, match=r"names 'a.jpg' in two ways"):
        share_out(IMAGES, {"a.jpg": ONE, "photos/a.jpg": ONE}, Path("p.json"))
