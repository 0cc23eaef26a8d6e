import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from cutouts import LONGEST, cut_out, fill_of, has_hard_edge, is_one_object, write_whole

from .packages_made import disc


def test_a_cut_out_ends_where_the_object_ends():
    cutout = cut_out(Image.fromarray(disc(40, 30, border=9)))
    assert cutout.mode == "RGBA"
    assert cutout.size == (30, 40)


def test_faint_pixels_do_not_widen_it():
    pixels = disc(40, 30, border=9)
    pixels[0, 0, 3] = 16
    assert cut_out(Image.fromarray(pixels)).size == (30, 40)
    pixels[0, 0, 3] = 17
    assert cut_out(Image.fromarray(pixels)).size == (39, 49)


def test_an_image_that_shows_nothing_has_no_cut_out():
    assert cut_out(Image.new("RGBA", (20, 20), (255, 0, 0, 16))) is None


@hypothesis.given(st.integers(1, 60), st.integers(385, 900), st.booleans())
def test_large_ones_are_made_small_and_keep_their_shape(short, long, is_tall):
    size = (short, long) if is_tall else (long, short)
    cutout = cut_out(Image.new("RGBA", size, (9, 9, 9, 255)))
    assert max(cutout.size) == LONGEST
    assert min(cutout.size) == max(1, round(short * LONGEST / long))


def test_what_is_invisible_gives_no_colour_to_the_edge():
    pixels = disc(800, 800, (0, 0, 250), border=0)
    pixels[pixels[..., 3] == 0] = (255, 255, 255, 0)
    small = np.asarray(cut_out(Image.fromarray(pixels)))
    seen = small[..., 3] > 16
    # Premultiplied colour of alpha 17 is known to one part in 17 only, a tenth of 255 at most.
    assert small[seen][:, 0].max() <= 26


def test_modes_without_a_channel_of_alpha_get_one():
    palette = Image.new("P", (20, 10), 0)
    palette.putpalette([0, 0, 0, 250, 0, 0])
    palette.paste(1, (5, 2, 11, 9))
    palette.info["transparency"] = 0
    cutout = cut_out(palette)
    assert cutout.size == (6, 7)
    assert fill_of(cutout) == 1


def test_fill_is_the_share_above_half():
    cutout = Image.fromarray(disc(100, 100, border=0))
    assert fill_of(cutout) == pytest.approx(np.pi / 4, abs=0.02)  # a disc in its square


def two(share):
    """Two squares apart; the smaller has this share of the alpha."""
    pixels = np.zeros((20, 120, 4), np.uint8)
    pixels[:, :100] = (9, 9, 9, 255)
    pixels[:, 100:102, 3] = 0
    pixels[:, 102:, :] = (9, 9, 9, round(255 * share / (1 - share) * 100 / 18))
    return Image.fromarray(pixels)


def test_one_object_is_one_large_piece():
    assert is_one_object(two(0.09))
    assert not is_one_object(two(0.11))
    assert is_one_object(two(0.11), share=0.8)
    assert not is_one_object(Image.new("RGBA", (9, 9)))


def test_pieces_that_touch_at_a_corner_are_one():
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[:10, :10, 3] = pixels[10:, 10:, 3] = 255
    assert is_one_object(Image.fromarray(pixels))


def test_glows_have_no_hard_edge_and_smooth_borders_have():
    y, x = np.mgrid[-1:1:80j, -1:1:80j]
    pixels = disc(80, 80, border=0)
    far = np.hypot(x, y)
    pixels[..., 3] = 255 * np.clip((0.9 - far) * 40, 0, 1)
    assert has_hard_edge(Image.fromarray(pixels))
    pixels[..., 3] = 255 * np.clip((0.9 - far) * 2, 0, 1)
    assert not has_hard_edge(Image.fromarray(pixels))
    assert not has_hard_edge(Image.new("RGBA", (9, 9)))


def test_writing_leaves_nothing_half_done(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.png"
    write_whole(Image.fromarray(disc()), path, optimize=True)
    before = path.read_bytes()

    def broken(self, file, *rest, **options):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="no space"):
        write_whole(Image.fromarray(disc()), path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_whole(Image.fromarray(disc(9, 9)), path)  # what was left behind is not in the way
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
