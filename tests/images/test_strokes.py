import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.images.draw import bands, centres, distance_to_box, paint, window, within

positions = st.floats(-60, 60)


def blank(height=20, width=30):
    return np.zeros((height, width, 3), np.uint8)


def test_a_window_stays_within_the_image():
    assert window(blank(), 2.4, 3.6, 8.1, 9.0) == (slice(3, 9), slice(2, 9))
    assert window(blank(), -5, -5, 500, 500) == (slice(0, 20), slice(0, 30))
    for away in ((40, 0, 50, 9), (-9, 0, -3, 9), (0, 1e300, 9, 1e301)):
        assert blank()[window(blank(), *away)].size == 0


def test_centres_are_those_of_pixels():
    across, down = centres((slice(1, 3), slice(4, 7)))
    np.testing.assert_array_equal(across, [[4.5, 5.5, 6.5]])
    np.testing.assert_array_equal(down, [[1.5], [2.5]])


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
