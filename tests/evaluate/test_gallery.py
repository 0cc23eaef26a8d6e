from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import tinyvit
from tinyvit.evaluate.classify import WrongImage, draw_error_gallery, evaluate_classifier
from tinyvit.evaluate.segment import EvaluateSettings, Gallery, evaluate_segment
from tinyvit.image_spec import ImageSpec
from tinyvit.images.draw import GAP, PANEL, TITLE, save_png

from .segmenting import Discs, Growing
from .test_classify import Listed


def collect(sheet, images):
    settings = EvaluateSettings((1,), most_clicks=1, with_baselines=False)
    evaluate_segment(Growing(radius=9), [Discs() for _ in range(images)], settings, watch=sheet)
    return sheet


def test_a_sheet_shows_images_found_masks_and_truth(tmp_path):
    sheet = collect(Gallery(4), 4)
    sheet.save(tmp_path / "sheet.png", "Discs")
    drawn = np.array(Image.open(tmp_path / "sheet.png"))
    np.testing.assert_array_equal(drawn, sheet.draw("Discs"))
    assert drawn.shape[1] > 4 * PANEL
    assert drawn.shape[0] > PANEL
    found = np.rint(0.5 * np.array([40, 60, 230]) + 0.5 * np.array([38, 110, 255]))
    assert (np.abs(drawn.astype(int) - found).max(-1) <= 1).sum() > 1000  # filled over an object
    assert (drawn == (46, 190, 84)).all(-1).sum() > 20  # clicks


def test_best_and_worst_are_kept_in_order_and_shown_once():
    sheet = collect(Gallery(2), 3)
    assert [caption.split("\n")[1] for *_, caption in sheet._kept] == [
        *("right", "right", "left", "left")
    ]
    one = collect(Gallery(8), 1)
    assert one.draw().shape[0] > one.draw().shape[1] / 2


def test_nothing_to_show():
    with pytest.raises(ValueError, match="nothing to show"):
        Gallery().draw()
    with pytest.raises(ValueError, match="count must be at least 1"):
        Gallery(0)


@pytest.fixture
def measured(tmp_path, make_tiny_vit):
    model = make_tiny_vit(num_classes=3, img_size=16, neck_dim=None, strides=(2, 2, 2))
    model.image_spec = ImageSpec.timm(16)
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"{i}.png")
        save_png(paths[-1], np.full((8, 8 + 4 * i, 3), (200, 10 * i, 30), np.uint8))
    images = Listed(paths, np.arange(6) % 3, ("ant", "bee", "a rather long name of a class"))
    return evaluate_classifier(tinyvit.Engine(model), images), images


def test_the_wrong_images_are_shown_in_order(measured):
    report, images = measured
    assert report.wrong  # untrained, so not all of three classes are right
    sheet = draw_error_gallery(report, images)
    columns = min(4, len(report.wrong))
    assert sheet.shape[1] >= GAP + columns * (PANEL + GAP)
    height = max(round(PANEL * 8 / (8 + 4 * row.index)) for row in report.wrong)
    for place, row in enumerate(report.wrong[:columns]):
        across = GAP + place * (PANEL + GAP) + PANEL // 2
        middle = sheet[2 * TITLE + GAP + height // 2, across]
        assert middle.tolist() == [200, 10 * row.index, 30]


def test_long_names_stay_in_their_cell(measured):
    report, images = measured
    long = WrongImage(0, "a", "x" * 300, "y" * 300, 0.5)
    sheet = draw_error_gallery(replace(report, wrong=(long,)), images, "x")
    assert sheet.shape[1] == GAP + PANEL + GAP
    assert (sheet[:, -GAP + 2 :] == 255).all()
    title = "a title wider than one cell of it, and then some words"
    wide = draw_error_gallery(replace(report, wrong=(long,)), images, title)
    assert wide.shape[1] > sheet.shape[1]


def test_nothing_wrong_is_nothing_to_show(measured):
    report, images = measured
    with pytest.raises(ValueError, match="no image was taken for another class"):
        draw_error_gallery(replace(report, wrong=()), images)
