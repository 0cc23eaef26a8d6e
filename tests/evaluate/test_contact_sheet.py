import numpy as np
import pytest
from PIL import Image

from tinyvit.evaluate.segment import (
    CELL_HEIGHT,
    CELL_WIDTH,
    ContactSheet,
    MeasureSettings,
    evaluate_segment,
)

from .segmenting import Discs, Growing


def collect(sheet, images):
    settings = MeasureSettings((1,), most_clicks=1, with_floors=False)
    evaluate_segment(Growing(radius=9), [Discs() for _ in range(images)], settings, watch=sheet)
    return sheet


def test_a_sheet_shows_images_found_masks_and_truth(tmp_path):
    sheet = collect(ContactSheet(4), 4)
    sheet.save(tmp_path / "sheet.png", "Discs")
    drawn = np.array(Image.open(tmp_path / "sheet.png"))
    np.testing.assert_array_equal(drawn, sheet.draw("Discs"))
    assert drawn.shape[1] > 4 * CELL_WIDTH
    assert drawn.shape[0] > 2 * CELL_HEIGHT
    found = np.rint(0.5 * np.array([40, 60, 230]) + 0.5 * np.array([38, 110, 255]))
    assert (np.abs(drawn.astype(int) - found).max(-1) <= 1).sum() > 1000  # filled over an object
    assert (drawn == (46, 190, 84)).all(-1).sum() > 20  # clicks


def test_best_and_worst_are_kept_in_order_and_shown_once():
    sheet = collect(ContactSheet(2), 3)
    assert [cell.words for cell in sheet._best] == ["right", "right"]
    assert [cell.words for cell in sheet._worst] == ["left", "left"]
    one = collect(ContactSheet(8), 1)
    assert one.draw().shape[0] > one.draw().shape[1] / 2


def test_nothing_to_show():
    with pytest.raises(ValueError, match="nothing to show"):
        ContactSheet().draw()
    with pytest.raises(ValueError, match="count must be at least 1"):
        ContactSheet(0)
