import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyvit.image_spec import ImageSpec
from tinyvit.images import draw
from tinyvit.images.draw import feature_rgb, overlay, save_png, stage_grid

PHOTO = np.full((30, 60, 3), 100, np.uint8)
PLACE = ImageSpec.sam(64).place(30, 60)  # 32 rows of 64 hold the photograph


def random_map(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class TestFeatureRGB:
    def test_components_come_strongest_first(self):
        h, w = 8, 8
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        features = torch.zeros(5, h, w)
        features[3] = rows * 10.0
        features[1] = columns * 1.0
        got = feature_rgb(features)
        assert got.shape == (h, w, 3)
        assert got.dtype == np.uint8
        red, green, blue = got.transpose(2, 0, 1).astype(int)
        assert (np.diff(red, axis=0) > 0).all()
        assert (np.diff(red, axis=1) == 0).all()
        assert (np.diff(green, axis=1) > 0).all()
        assert (np.diff(green, axis=0) == 0).all()
        assert (blue == draw.GREY).all()  # there is no third component
        assert (red.min(), red.max()) == (draw.DARK, draw.BRIGHT)

    def test_it_is_the_same_each_time_and_for_mirrored_signs(self):
        features = random_map(6, 5, 7)
        got = feature_rgb(features)
        np.testing.assert_array_equal(feature_rgb(features.clone()), got)
        np.testing.assert_array_equal(feature_rgb(features.double()), got)
        # a mirrored map is the mirror image of the scale: no sign is left to chance
        mirrored = feature_rgb(-features).astype(int)
        # a level of rounding
        np.testing.assert_allclose(mirrored, draw.DARK + draw.BRIGHT - got.astype(int), atol=1)

    def test_one_outlier_does_not_take_the_scale(self):
        features = torch.zeros(1, 20, 20)
        features[0] = torch.linspace(0, 1, 400).view(20, 20)
        features[0, 3, 3] = 1e4
        red = feature_rgb(features)[:, :, 0].astype(int)
        assert red[0, 5] < red[10, 5] < red[19, 5]
        assert red[19, 5] - red[0, 5] > 150

    @pytest.mark.parametrize("value", [0.0, 1.1, -3e30])
    @pytest.mark.parametrize("shape", [(4, 3, 3), (1, 1, 1), (9, 1, 1)])
    def test_a_constant_map_is_grey(self, value, shape):
        assert (feature_rgb(torch.full(shape, value)) == draw.GREY).all()

    def test_cells_that_are_not_finite_are_black(self):
        features = random_map(4, 4, 4)
        clean = feature_rgb(features)
        features[2, 0, 0] = torch.nan
        features[1, 3, 3] = torch.inf
        got = feature_rgb(features)
        assert (got[0, 0] == 0).all()
        assert (got[3, 3] == 0).all()
        assert (got[1, 1] != 0).all()
        assert np.unique(got.reshape(-1, 3), axis=0).shape[0] > 8
        assert clean.min() >= draw.DARK
        assert (feature_rgb(torch.full((2, 2, 2), torch.nan)) == 0).all()

    def test_padding_does_not_spend_the_colours(self):
        features = random_map(4, 6, 6)
        alone = feature_rgb(features[:, :4, :5])
        features[:, 4:] = 1e3
        features[:, :, 5:] = -1e3
        got = feature_rgb(features, visible=(4, 5))
        np.testing.assert_array_equal(got[:4, :5], alone)
        assert (feature_rgb(features)[:4, :5] != alone).any()

    def test_a_large_map_is_fitted_to_some_of_its_cells(self, monkeypatch):
        features = torch.arange(400.0).view(1, 20, 20)
        whole = feature_rgb(features).astype(int)
        monkeypatch.setattr(draw, "MOST_FITTED", 50)
        # every ninth cell gives nearly the same quantiles
        np.testing.assert_allclose(feature_rgb(features), whole, atol=8)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
    def test_other_types(self, dtype):
        assert feature_rgb((random_map(4, 3, 3) * 9).to(dtype)).shape == (3, 3, 3)

    def test_wrong_input(self):
        with pytest.raises(ValueError, match=r"one feature map \[C, h, w\]; came \[1, 2, 3, 4\]"):
            feature_rgb(torch.zeros(1, 2, 3, 4))
        with pytest.raises(ValueError, match=r"came \[3, 0, 2\]"):
            feature_rgb(torch.zeros(3, 0, 2))
        for visible in ((0, 1), (1, 4), (3, 1)):
            with pytest.raises(ValueError, match="visible must lie within the 2 x 3 map"):
                feature_rgb(torch.zeros(1, 2, 3), visible=visible)


class TestOverlay:
    def test_padding_is_cut_away(self):
        colours = np.zeros((4, 4, 3), np.uint8)
        colours[:2] = 200  # the rows that hold the photograph
        got = overlay(PHOTO, colours, PLACE, alpha=1.0, interpolation="nearest")
        assert (got == 200).all()
        half = overlay(PHOTO, colours, PLACE, alpha=0.25, interpolation="nearest")
        assert (half == 125).all()
        assert (overlay(PHOTO, colours, PLACE, alpha=0) == PHOTO).all()
        assert (PHOTO == 100).all()  # the photograph itself is left alone

    def test_cells_lie_where_the_model_saw_them(self):
        colours = np.zeros((4, 4, 3), np.uint8)
        colours[1, 2] = 250  # model pixels x 32..48, y 16..32 -> image x 30..45, y 15..30
        got = overlay(PHOTO, colours, PLACE, alpha=1.0, interpolation="nearest")
        wanted = np.zeros_like(PHOTO)
        wanted[15:30, 30:45] = 250
        np.testing.assert_array_equal(got, wanted)

    def test_bilinear_is_smooth(self):
        colours = np.zeros((4, 4, 3), np.uint8)
        colours[:, 2:] = 250
        got = overlay(PHOTO, colours, PLACE, alpha=1.0)[0, :, 0].astype(int)
        assert (np.diff(got) >= 0).all()
        assert len(np.unique(got)) > 8

    def test_outside_the_crop_the_photograph_stays(self):
        spec = ImageSpec((20, 20), "crop", shorter_side=20)
        place = spec.place(40, 80)  # resized to 20 x 40, crop of columns 10..30
        photo = np.full((40, 80, 3), 9, np.uint8)
        got = overlay(photo, np.full((5, 5, 3), 99, np.uint8), place, alpha=1.0)
        wanted = photo.copy()
        wanted[:, 20:60] = 99
        np.testing.assert_array_equal(got, wanted)

    @settings(deadline=None)
    @given(
        st.integers(1, 400),
        st.integers(1, 400),
        st.integers(1, 9),
        st.sampled_from([ImageSpec.sam(64), ImageSpec.timm(24), ImageSpec.timm(512)]),
    )
    def test_every_size_can_be_drawn(self, height, width, cells, spec):
        photo = np.full((height, width, 3), 9, np.uint8)
        colours = np.full((cells, cells, 3), 99, np.uint8)
        got = overlay(photo, colours, spec.place(height, width), alpha=1.0)
        assert got.shape == photo.shape
        assert (got == 99).any()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"image": PHOTO[:, :, 0]}, r"image must be an image .*came \[30, 60\] uint8"),
            ({"colours": PHOTO / 2}, r"colours must be an image .*came \[30, 60, 3\] float64"),
            ({"colours": [1]}, "colours must be an image .*came list"),
            ({"colours": PHOTO[:0]}, r"colours must be .*came \[0, 60, 3\]"),
            ({"image": PHOTO[:9]}, r"image of \(30, 60\) .* image is \(9, 60\)"),
            ({"alpha": 1.5}, "alpha must be from 0 to 1, but is 1.5"),
            ({"alpha": float("nan")}, "alpha must be from 0 to 1, but is nan"),
            ({"interpolation": "cubic"}, "must be one of nearest, bilinear, but is 'cubic'"),
        ],
    )
    def test_wrong_input(self, change, words):
        good = {"image": PHOTO, "colours": PHOTO, "placement": PLACE}
        with pytest.raises(ValueError, match=words):
            overlay(**{**good, **change})


class TestStageGrid:
    stages = (random_map(4, 16, 16), random_map(5, 8, 8), random_map(6, 4, 4), random_map(7, 4, 4))

    def test_panels_stand_side_by_side(self):
        grid = stage_grid(PHOTO, self.stages, PLACE)
        assert grid.shape == (160 + draw.GAP + draw.CAPTION, 5 * 320 + 6 * draw.GAP, 3)
        assert (grid[0] == 255).all()
        top, gap = draw.GAP, draw.GAP
        np.testing.assert_array_equal(grid[top : top + 160, gap : gap + 320], 100)
        for number in range(1, 5):
            left = gap + number * (320 + gap)
            panel = grid[top : top + 160, left : left + 320]
            assert len(np.unique(panel.reshape(-1, 3), axis=0)) > 4
            assert (grid[top : top + 160, left - gap : left] == 255).all()
            caption = grid[top + 160 :, left : left + 320]
            assert caption.min() < 90  # there is ink, and most is paper
            assert (caption == 255).mean() > 0.8

    def test_rows(self):
        row, rows = (stage_grid(PHOTO, self.stages, PLACE, columns=n) for n in (None, 3))
        height, pitch = row.shape[0], 320 + draw.GAP
        assert rows.shape == (2 * height, 3 * pitch + draw.GAP, 3)
        np.testing.assert_array_equal(rows[:height], row[:, : 3 * pitch + draw.GAP])
        np.testing.assert_array_equal(rows[height:, : 2 * pitch], row[:, 3 * pitch : 5 * pitch])
        assert (rows[height:, 2 * pitch + draw.GAP :] == 255).all()  # there is no sixth panel

    def test_captions_widen_the_columns(self):
        tall = np.full((60, 2, 3), 7, np.uint8)
        place = ImageSpec.sam(64).place(60, 2)
        grid = stage_grid(tall, self.stages[:1], place, captions=["a" * 40, "b"])
        assert grid.shape[1] > 2 * 11 + 2 * 200
        assert stage_grid(tall, [], place).shape[0] == 320 + draw.GAP + draw.CAPTION

    def test_outside_the_crop_it_is_faded(self):
        place = ImageSpec((20, 20), "crop", shorter_side=20).place(30, 60)
        grid = stage_grid(PHOTO, self.stages[:1], place)
        left = draw.GAP + 320 + draw.GAP
        assert (grid[draw.GAP + 5, left + 5] == 255 - 155 // 3).all()

    def test_wrong_input(self):
        with pytest.raises(ValueError, match="wanted 5 captions, the photograph's first; came 4"):
            stage_grid(PHOTO, self.stages, PLACE, captions=["a"] * 4)
        with pytest.raises(ValueError, match=r"image of \(30, 60\)"):
            stage_grid(PHOTO[:8], self.stages, PLACE)
        with pytest.raises(ValueError, match="image must be an image"):
            stage_grid(PHOTO / 2, self.stages, PLACE)


class TestSavePNG:
    def test_it_comes_back(self, tmp_path):
        path = tmp_path / "out.png"
        for pixels in (PHOTO, PHOTO[:9] + 1):
            save_png(path, pixels)
            np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
        assert os.listdir(tmp_path) == ["out.png"]

    def test_a_failure_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "out.png"
        save_png(path, PHOTO)
        before = path.read_bytes()

        def fail(self, file, **_):
            file.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            save_png(path, PHOTO)
        assert os.listdir(tmp_path) == ["out.png"]
        assert path.read_bytes() == before

    def test_wrong_input(self, tmp_path):
        with pytest.raises(ValueError, match="pixels must be an image"):
            save_png(tmp_path / "out.png", PHOTO[0])
        with pytest.raises(FileNotFoundError):
            save_png(tmp_path / "none" / "out.png", PHOTO)
        assert not list(tmp_path.iterdir())
