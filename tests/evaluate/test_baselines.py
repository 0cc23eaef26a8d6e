import math
from importlib.util import find_spec

import numpy as np
import pytest

from tinyvit.evaluate.metrics import baselines, disc, ellipse, grabcut


def test_the_disc_has_a_fifth_of_the_longer_side_as_radius():
    mask = disc((300, 500), (250, 150))
    assert mask.sum() == pytest.approx(math.pi * 100**2, rel=0.005)  # pixels at its rim
    assert mask[150, 250 + 99]
    assert not mask[150, 250 + 101]


def test_the_ellipse_fills_its_box_by_a_quarter_of_pi():
    mask = ellipse((200, 200), (20, 40, 120, 180))
    assert mask.sum() == pytest.approx(math.pi / 4 * 100 * 140, rel=0.005)
    assert not mask[:, :20].any()
    assert mask[110, 20]


def test_a_box_without_area_has_no_ellipse():
    assert not ellipse((10, 10), (3, 3, 3, 8)).any()


def test_floors_by_name():
    image = np.zeros((20, 30, 3), np.uint8)
    assert baselines(image, point=(10, 10))["disc"].shape == (20, 30)
    assert baselines(image, box=(2, 2, 20, 18))["ellipse"].shape == (20, 30)


def test_grabcut_is_there_exactly_where_opencv_is(monkeypatch):
    image = np.zeros((20, 30, 3), np.uint8)
    there = find_spec("cv2") is not None
    assert ("grabcut" in baselines(image, point=(10, 10))) == there
    monkeypatch.setattr("tinyvit.evaluate.metrics.find_spec", lambda name: None)
    assert list(baselines(image, point=(10, 10))) == ["disc"]
    assert list(baselines(image, box=(2, 2, 20, 18))) == ["ellipse"]


def test_grabcut_wants_one_prompt():
    with pytest.raises(ValueError, match="either a point or a box"):
        grabcut(np.zeros((8, 8, 3), np.uint8))


def test_grabcut_finds_a_plain_object():
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 40, (80, 80, 3), dtype=np.uint8)
    image[20:60, 20:60, 0] += 180
    for mask in (grabcut(image, point=(40, 40)), grabcut(image, box=(15, 15, 65, 65))):
        assert mask[30:50, 30:50].all()
        assert mask.sum() == pytest.approx(1600, rel=0.1)
