import io

import numpy as np
import pytest
from PIL import Image

from materials import LARGEST_TEXTURE, LEAST_GLASS, read_materials


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def one(text, **files):
    return read_materials("newmtl it\n" + text, lambda name: files.get(name.split(".")[0]))["it"]


def test_colours_are_light():
    found = one("Kd 1 0.5 0\nKs .2 .2 .8\nNs 20\n")
    assert found.diffuse == pytest.approx((1, 0.5**2.2, 0))
    assert found.specular == pytest.approx(0.4)
    assert (found.shininess, found.opacity, found.texture) == (20, 1, None)


def test_names_may_have_blanks_and_there_may_be_many():
    found = read_materials("# c\nnewmtl a b\nKd 1 1 1\n\n newmtl c\nd 0.0\n", lambda name: None)
    assert set(found) == {"a b", "c"}
    assert found["c"].opacity == 0


@pytest.mark.parametrize("written, read", [("0", 0), ("0.1", LEAST_GLASS), ("0.9", 0.9), ("1", 1)])
def test_glass_is_never_fainter_than_a_mask_shows(written, read):
    assert one(f"d {written}\n").opacity == read
    assert LEAST_GLASS > 127 / 255


def test_a_texture_is_linear_and_premultiplied():
    texture = one("map_Kd a.png\n", a=png([[[255, 0, 188, 255], [255, 255, 255, 51]]])).texture
    assert texture.dtype == np.float32
    # 188 of 255 is half of the light, by the rule 2.2 to 1 %.
    np.testing.assert_allclose(texture[0, 0], [1, 0, 0.5, 1], atol=0.015)
    np.testing.assert_allclose(texture[0, 1], [0.2] * 4, atol=1e-6)


@pytest.mark.parametrize("colour, tint", [("0 0 0", (1, 1, 1)), ("0.8 0.8 0.8", (1, 1, 1))])
def test_grey_and_black_do_not_darken_a_texture(colour, tint):
    assert one(f"Kd {colour}\nmap_Kd a.png\n", a=png([[[9, 9, 9]]])).diffuse == tint


def test_a_colour_tints_a_texture():
    found = one("Kd 0.8 0.4 0.4\nmap_Kd a.png\n", a=png([[[9, 9, 9]]]))
    assert found.diffuse == pytest.approx((1, 0.5**2.2, 0.5**2.2))


def test_a_texture_of_holes_serves_where_there_is_no_other():
    found = one("map_d a.png\n", a=png([[[0, 0, 0, 0], [255, 0, 0, 255]]]))
    assert found.texture[0, :, 3].tolist() == [0, 1]


def test_large_textures_are_made_smaller():
    found = one("map_Kd a.png\n", a=png(np.zeros((4, 2 * LARGEST_TEXTURE, 3))))
    assert found.texture.shape == (2, LARGEST_TEXTURE, 4)


@pytest.mark.parametrize(
    "data",
    [None, b"", b"no image", png(np.zeros((8, 8, 3)))[:40]],
    ids=["none", "empty", "other", "cut off"],
)
def test_a_missing_or_damaged_texture_leaves_the_colour(data):
    found = one("Kd 1 0 0\nmap_Kd a.png\n", **({} if data is None else {"a": data}))
    assert found.texture is None
    assert found.diffuse == (1, 0, 0)
