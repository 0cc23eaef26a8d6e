from dataclasses import replace

import numpy as np
import pytest

import tinyvit
from tinyvit.evaluate.classify import (
    CELL,
    MARGIN,
    TITLE,
    WrongImage,
    draw_wrong,
    evaluate_classifier,
)
from tinyvit.image_spec import ImageSpec
from tinyvit.images.draw import save_png

from .test_classify import Listed


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
    sheet = draw_wrong(report, images)
    columns = min(4, len(report.wrong))
    assert sheet.shape[1] == 2 * MARGIN + columns * (CELL + 20) - 20
    for place, row in enumerate(report.wrong[:columns]):
        middle = sheet[MARGIN + TITLE + CELL // 2, MARGIN + place * (CELL + 20) + CELL // 2]
        assert middle.tolist() == [200, 10 * row.index, 30]  # enlarged pixel by pixel


def test_long_names_stay_in_their_cell(measured):
    report, images = measured
    long = WrongImage(0, "a", "x" * 300, "y" * 300, 0.5)
    sheet = draw_wrong(replace(report, wrong=(long,)), images, "x")
    assert sheet.shape[1] == 2 * MARGIN + CELL
    assert (sheet[:, -MARGIN + 2 :] == 255).all()
    wide = draw_wrong(replace(report, wrong=(long,)), images, "a title wider than one cell of it")
    assert wide.shape[1] > sheet.shape[1]


def test_nothing_wrong_is_nothing_to_show(measured):
    report, images = measured
    with pytest.raises(ValueError, match="no image was taken for another class"):
        draw_wrong(replace(report, wrong=()), images)
