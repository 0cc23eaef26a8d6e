import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyvit.images import draw as drawing
from tinyvit.images.draw import (
    bands,
    colour,
    distance_to_box,
    draw_boxes,
    draw_masks,
    draw_points,
    paint,
    save_mask,
    window,
    within,
)

PHOTO = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
GREY = np.full((60, 80, 3), 100, np.uint8)
PHOTO.flags.writeable = GREY.flags.writeable = False  # any change of the input is an error
RED, BLUE = (250, 0, 0), (0, 0, 250)


def block(top, left, bottom, right, size=(60, 80)):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


LARGE, SMALL = block(10, 10, 50, 70), block(20, 20, 30, 40)


def mixed(pixels, tint, alpha):
    return np.rint(pixels * (1 - alpha) + np.array(tint) * alpha)


class TestColour:
    def test_it_is_always_the_same(self):
        assert colour(0) == (54, 152, 255)
        assert [colour(i) for i in range(50)] == [colour(i) for i in range(50)]

    def test_colours_differ(self):
        colours = np.array([colour(i) for i in range(21)])
        apart = np.abs(colours[:, None] - colours[None]).max(axis=2)
        np.fill_diagonal(apart, 255)
        assert apart.min() >= 20
        assert apart[:7, :7][~np.eye(7, dtype=bool)].min() >= 50  # the first ones are far apart
        assert colours.min() >= 0
        assert colours.max() <= 255
        assert (np.ptp(colours, axis=1) > 80).all()  # none is grey

    def test_wrong_index(self):
        with pytest.raises(ValueError, match="index must be 0 or more, but is -1"):
            colour(-1)


class TestMasks:
    def test_fill_is_exact(self):
        got = draw_masks(PHOTO, [SMALL], [RED], alpha=0.25, outlines=False)
        np.testing.assert_array_equal(got[SMALL], mixed(PHOTO[SMALL], RED, 0.25))
        np.testing.assert_array_equal(got[~SMALL], PHOTO[~SMALL])
        assert got.dtype == np.uint8

    @pytest.mark.parametrize("kind", [list, tuple, np.stack])
    def test_a_small_mask_stays_visible_whatever_the_order(self, kind):
        for masks, tints in (([SMALL, LARGE], [RED, BLUE]), ([LARGE, SMALL], [BLUE, RED])):
            got = draw_masks(PHOTO, kind(masks), tints, outlines=False)
            np.testing.assert_array_equal(got[SMALL], mixed(PHOTO[SMALL], RED, 0.5))
            only = LARGE & ~SMALL
            np.testing.assert_array_equal(got[only], mixed(PHOTO[only], BLUE, 0.5))

    def test_a_generator_is_drawn_as_it_comes(self):
        got = draw_masks(PHOTO, (mask for mask in (SMALL, LARGE)), [RED, BLUE], outlines=False)
        np.testing.assert_array_equal(got[LARGE], mixed(PHOTO[LARGE], BLUE, 0.5))
        best = draw_masks(PHOTO, iter([LARGE, SMALL]))
        np.testing.assert_array_equal(best, draw_masks(PHOTO, [LARGE, SMALL]))

    def test_a_generator_is_taken_one_at_a_time(self, monkeypatch):
        events = []
        real = drawing._draw_outline
        monkeypatch.setattr(
            drawing, "_draw_outline", lambda *given: (events.append("drawn"), real(*given))
        )

        def masks():
            for mask in (LARGE, SMALL):
                events.append("given")
                yield mask

        draw_masks(PHOTO, masks())
        assert events == ["given", "drawn", "given", "drawn"]

    def test_colours_follow_the_order_given(self):
        got = draw_masks(GREY, [SMALL, LARGE], alpha=1, outlines=False)
        assert tuple(got[25, 30]) == colour(0)
        assert tuple(got[12, 12]) == colour(1)

    def test_the_outline_lies_on_the_edge_alone(self):
        got = draw_masks(GREY, [LARGE], [RED], alpha=0.0)
        is_drawn = (got != GREY).any(axis=2)
        deep, far = block(14, 14, 46, 66), ~block(6, 6, 54, 74)
        assert not is_drawn[deep].any()
        assert not is_drawn[far].any()
        assert is_drawn[9:11, 14:66].all()  # both sides of the edge
        assert (got[10, 14:66, 0] > 150).all()
        # symmetric, as the mask is
        np.testing.assert_array_equal(got, got[::-1])
        np.testing.assert_array_equal(got, got[:, ::-1])

    def test_the_outline_grows_with_the_image(self):
        def width_of_line(scale):
            size = 300 * scale, 400 * scale
            mask = block(0, 0, size[0], size[1] // 2, size)
            got = draw_masks(np.zeros((*size, 3), np.uint8), [mask], [RED], alpha=0)
            return got[size[0] // 2, :, 0].sum() / RED[0] / drawing.OUTLINE_STRENGTH

        # the blur is rounded to 8 bits, and a line of a pixel is sampled coarsely
        for scale, tolerance in ((1, 0.25), (2, 0.1), (4, 0.1)):
            unit = scale * np.sqrt(300 * 400) / drawing.UNIT
            assert width_of_line(scale) == pytest.approx(drawing.OUTLINE * unit, rel=tolerance)

    def test_the_edge_of_the_image_is_none_of_the_mask(self):
        got = draw_masks(GREY, [np.ones((60, 80), bool)], [RED], alpha=0.5)
        assert (got == mixed(GREY, RED, 0.5)).all()

    def test_nothing_to_draw(self):
        for masks in ([], iter(()), [np.zeros((60, 80), bool)], np.zeros((0, 60, 80), bool)):
            got = draw_masks(PHOTO, masks)
            np.testing.assert_array_equal(got, PHOTO)
            assert got is not PHOTO
        assert draw_masks(PHOTO, []).flags.writeable

    def test_an_empty_mask_keeps_its_colour(self):
        got = draw_masks(GREY, [np.zeros((60, 80), bool), SMALL], alpha=1, outlines=False)
        assert tuple(got[25, 30]) == colour(1)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"image": PHOTO[0]}, r"image must be an image \[H, W, 3\] uint8"),
            ({"masks": [SMALL, SMALL[1:]]}, r"\[60, 80\]; mask 1 is \[59, 80\] of bool"),
            ({"masks": [SMALL[None]]}, r"mask 0 \[H, W\] bool; came \[1, 60, 80\] bool"),
            ({"masks": iter([SMALL * 1.0])}, r"mask 0 .*came \[60, 80\] float64"),
            ({"masks": SMALL}, r"mask 0 .*came \[80\] bool"),
            ({"masks": [[1]]}, "mask 0 .*came list"),
            ({"alpha": 1.5}, "alpha must be from 0 to 1, but is 1.5"),
            ({"alpha": float("nan")}, "alpha must be from 0 to 1, but is nan"),
            ({"colours": [RED]}, "a colour for each of the masks; came only 1"),
            ({"colours": [RED, (0, 300, 0)]}, r"of 0 to 255; came \(0, 300, 0\)"),
            ({"colours": [RED, (0, 3)]}, r"of 0 to 255; came \(0, 3\)"),
        ],
    )
    def test_wrong_input(self, change, words):
        good = {"image": PHOTO, "masks": [LARGE, SMALL]}
        with pytest.raises(ValueError, match=words):
            draw_masks(**{**good, **change})


class TestPoints:
    def test_green_is_the_object_and_red_is_not(self):
        got = draw_points(GREY, [[20, 30], [60.5, 10.5]], [1, 0])
        assert tuple(got[30, 20]) == drawing.GREEN
        assert tuple(got[10, 60]) == drawing.RED
        assert (got[:, 32:48] == GREY[:, 32:48]).all()
        large = draw_points(np.full((500, 500, 3), 100, np.uint8), [[250, 250]], [0])
        ring = 250 + int(drawing.RADIUS + drawing.RING / 2)
        for row, column in ((250, ring), (ring, 250), (499 - ring, 249), (249, 499 - ring)):
            assert tuple(large[row, column]) == drawing.WHITE

    def test_size_follows_the_image(self):
        def area(scale):
            photo = np.zeros((300 * scale, 400 * scale, 3), np.uint8)
            got = draw_points(photo, [[200 * scale, 150 * scale]], [1])
            return (got > 127).any(axis=2).sum()

        assert area(4) == pytest.approx(16 * area(1), rel=0.1)  # edges count as whole pixels

    def test_a_point_between_pixels_is_smooth_and_symmetric(self):
        got = draw_points(GREY, [[40, 30]], [1])
        np.testing.assert_array_equal(got, got[::-1])
        np.testing.assert_array_equal(got, got[:, ::-1])
        assert len(np.unique(got.reshape(-1, 3), axis=0)) > 6
        assert (got != draw_points(GREY, [[40.3, 30]], [1])).any()

    def test_none_or_outside(self):
        for points, labels in (([], []), (np.zeros((0, 2)), np.zeros(0)), ([[900, -800]], [1])):
            np.testing.assert_array_equal(draw_points(PHOTO, points, labels), PHOTO)
        cut = draw_points(GREY, [[0, 0]], [True])
        assert tuple(cut[0, 0]) == drawing.GREEN

    @pytest.mark.parametrize(
        ("points", "labels", "words"),
        [
            ([1, 2], [1], r"points must be \[N, 2\]; came \[2\]"),
            ([[1, 2, 3]], [1], r"points must be \[N, 2\]; came \[1, 3\]"),
            ([[1, 2]], [1, 0], r"wanted 1 labels, one a point; came \[2\]"),
            ([], [1], r"wanted 0 labels, one a point; came \[1\]"),
            ([[1, 2]], [[1]], r"came \[1, 1\]"),
            ([[1, 2]], [-1], r"1 \(object\) or 0 \(not the object\); came \[-1"),
            ([[1, float("nan")]], [1], "points must be finite"),
        ],
    )
    def test_wrong_input(self, points, labels, words):
        with pytest.raises(ValueError, match=words):
            draw_points(PHOTO, points, labels)

    def test_wrong_image(self):
        with pytest.raises(ValueError, match="image must be an image"):
            draw_points(PHOTO / 2, [[1, 2]], [1])


class TestBoxes:
    def test_only_the_line_is_drawn(self):
        photo = np.full((600, 800, 3), 100, np.uint8)
        got = draw_boxes(photo, [[100, 120, 700, 480]], [RED])
        for row, column in ((120, 400), (479, 400), (300, 100), (300, 699)):
            assert tuple(got[row, column]) == RED
        is_drawn = (got != photo).any(axis=2)
        assert not is_drawn[130:470, 110:690].any()
        assert is_drawn[110:490, 90:710].sum() == is_drawn.sum()
        np.testing.assert_array_equal(got, got[::-1])  # the box lies in the middle
        np.testing.assert_array_equal(got, got[:, ::-1])

    def test_each_has_its_colour_and_later_ones_lie_over(self):
        got = draw_boxes(GREY, [[10, 10, 50, 50], [10, 10, 50, 50], [60, 5, 75, 55]])
        np.testing.assert_allclose(got[30, 74], colour(2), atol=60)  # a line thinner than a pixel
        one, two = (draw_boxes(GREY, [[10, 10, 50, 50]], [tint]) for tint in (RED, BLUE))
        both = draw_boxes(GREY, [[10, 10, 50, 50]] * 2, [RED, BLUE])
        away_from_blue = np.abs(both[10, 30].astype(int) - two[10, 30]).sum()
        assert away_from_blue < np.abs(both[10, 30].astype(int) - one[10, 30]).sum()

    @settings(deadline=None)
    @given(
        st.integers(1, 40),
        st.integers(1, 40),
        st.lists(st.integers(-50, 90), min_size=4, max_size=4),
    )
    def test_every_box_can_be_drawn(self, height, width, ends):
        x0, x1, y0, y1 = sorted(ends[:2]) + sorted(ends[2:])
        photo = np.full((height, width, 3), 9, np.uint8)
        got = draw_boxes(photo, np.array([[x0, y0, x1, y1]]))
        assert got.shape == photo.shape
        is_apart = x0 > width + 5 or y0 > height + 5 or x1 < -5 or y1 < -5
        if is_apart:
            assert (got == 9).all()
        if 0 < x0 < width and y0 < 0 and y1 > height:  # its left line crosses the image
            assert (got != 9).any(axis=(1, 2)).all()

    def test_none_and_wrong_input(self):
        np.testing.assert_array_equal(draw_boxes(PHOTO, []), PHOTO)
        with pytest.raises(ValueError, match=r"boxes must be \[N, 4\]; came \[4\]"):
            draw_boxes(PHOTO, [1, 2, 3, 4])
        with pytest.raises(ValueError, match=r"x0 <= x1, y0 <= y1; came \[\[5.0, 1.0, 2.0"):
            draw_boxes(PHOTO, [[5, 1, 2, 3]])
        with pytest.raises(ValueError, match="boxes must be finite"):
            draw_boxes(PHOTO, [[5, 1, np.inf, 3]])
        with pytest.raises(ValueError, match="a colour for each of the boxes; came only 0"):
            draw_boxes(PHOTO, [[1, 1, 2, 3]], [])
        with pytest.raises(ValueError, match="image must be an image"):
            draw_boxes(PHOTO[0], [])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_every_size_can_be_drawn_and_twice_alike(height, width, seed):
    random = np.random.default_rng(seed)
    photo = random.integers(0, 256, (height, width, 3), np.uint8)
    before = photo.copy()
    masks = random.random((3, height, width)) < random.random((3, 1, 1))
    points = random.random((4, 2)) * (width, height)

    def draw():
        got = draw_points(draw_masks(photo, masks), points, [0, 1, 1, 0])
        return draw_boxes(got, [[0, 0, width, height]])

    got = draw()
    assert got.shape == photo.shape
    np.testing.assert_array_equal(draw(), got)
    np.testing.assert_array_equal(photo, before)


class TestSaveMask:
    def test_it_comes_back(self, tmp_path):
        path = tmp_path / "mask.png"
        for mask in (LARGE, SMALL, SMALL.T, np.zeros((1, 1), bool)):
            save_mask(path, mask)
            with Image.open(path) as opened:
                assert (opened.format, opened.mode) == ("PNG", "L")
                np.testing.assert_array_equal(np.asarray(opened), np.where(mask, 255, 0))
        assert os.listdir(tmp_path) == ["mask.png"]

    def test_wrong_input(self, tmp_path):
        path = tmp_path / "mask.png"
        with pytest.raises(ValueError, match=r"mask \[H, W\] bool; came \[1, 60, 80\] bool"):
            save_mask(path, LARGE[None])
        with pytest.raises(ValueError, match=r"came \[60, 80\] uint8"):
            save_mask(path, LARGE.astype(np.uint8))
        with pytest.raises(ValueError, match=r"came \[0, 80\]"):
            save_mask(path, LARGE[:0])
        with pytest.raises(ValueError, match="came list"):
            save_mask(path, [[True]])
        with pytest.raises(FileNotFoundError):
            save_mask(tmp_path / "none" / "mask.png", LARGE)
        assert not list(tmp_path.iterdir())


# --- smooth lines ---------------------------------------------------------------------------------

positions = st.floats(-60, 60)


def blank(height=20, width=30):
    return np.zeros((height, width, 3), np.uint8)


def test_a_window_stays_within_the_image():
    assert window(blank(), 2.4, 3.6, 8.1, 9.0) == (slice(3, 9), slice(2, 9))
    assert window(blank(), -5, -5, 500, 500) == (slice(0, 20), slice(0, 30))
    for away in ((40, 0, 50, 9), (-9, 0, -3, 9), (0, 1e300, 9, 1e301)):
        assert blank()[window(blank(), *away)].size == 0


@given(positions, positions, st.floats(0, 40), st.floats(0, 40), st.floats(1, 9))
def test_bands_hold_the_whole_line_and_no_pixel_twice(x0, y0, width, height, reach):
    box = [x0, y0, x0 + width, y0 + height]
    times = np.zeros((20, 30), int)
    for where in bands(blank(), box, reach):
        times[where] += 1
    assert times.max() <= 1
    everywhere = slice(0, 20), slice(0, 30)
    near = np.abs(distance_to_box(everywhere, box, 0.0)) < reach - 1
    assert times[near].all()


def test_distances_to_a_box():
    distance = distance_to_box((slice(0, 20), slice(0, 30)), [5, 5, 25, 15], 0.0)
    assert distance.dtype == np.float32
    # halves are exact
    assert distance[10, 4] == 0.5
    assert distance[10, 5] == -0.5
    assert distance[9, 14] == -4.5
    np.testing.assert_allclose(distance[0, 0], np.hypot(4.5, 4.5), rtol=1e-6)  # float32
    rounded = distance_to_box((slice(0, 20), slice(0, 30)), [5, 5, 25, 15], 4.0)
    assert rounded[5, 5] > 0 > distance[5, 5]  # the corner is cut
    assert rounded[10, 4] == 0.5


def test_cover_changes_over_one_pixel():
    distance = np.array([0.0, 1.5, 2.0, 2.25, 2.5, 9.0], np.float32)
    np.testing.assert_array_equal(within(distance, 2.0), [1, 1, 0.5, 0.25, 0, 0])


def test_paint_mixes_in_place(monkeypatch):
    monkeypatch.setattr("tinyvit.images.draw.BLOCK", 4)  # several blocks
    out = np.full((5, 3, 3), 100, np.uint8)
    cover = np.zeros((5, 3), np.float32)
    cover[1, 1], cover[4, 2] = 1.0, 0.5
    paint(out, (200, 0, 101), cover)
    wanted = np.full((5, 3, 3), 100, np.uint8)
    wanted[1, 1] = 200, 0, 101
    wanted[4, 2] = 150, 50, 100  # 100.5 to the even number
    np.testing.assert_array_equal(out, wanted)
    paint(out[:0], (1, 2, 3), cover[:0])
    np.testing.assert_array_equal(out, wanted)
