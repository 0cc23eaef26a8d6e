import sys

import numpy as np
import pytest
from PIL import Image

import regions
from manifest import Background, read_rows

pytest.importorskip("skimage", reason="the regions need scikit-image")


def scene(noise=3.0, seed=0):
    """A sky above a meadow, with a house on the meadow: [120, 160, 3], and the truth [120, 160]."""
    truth = np.zeros((120, 160), np.int64)
    truth[60:] = 1
    truth[45:90, 50:100] = 2
    colours = np.array([(120, 170, 230), (60, 130, 40), (200, 60, 50)], np.float64)
    pixels = colours[truth] + np.random.default_rng(seed).normal(0, noise, (*truth.shape, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), truth


def test_the_coarsest_stage_finds_what_differs():
    pixels, truth = scene()
    found = regions.find_regions(pixels)
    assert found.dtype == np.uint8 and found.shape == pixels.shape
    coarse = found[..., 2]
    assert 3 <= coarse.max() <= 5  # a border's blur may be a region of its own
    for number in range(3):
        true = truth == number
        best = max(
            (true & (coarse == other)).sum() / (true | (coarse == other)).sum()
            for other in range(1, 6)
        )
        assert best > 0.9


def test_a_coarser_stage_joins_and_never_cuts():
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((160, 120), Image.Resampling.NEAREST))
    fine, middle, whole = np.moveaxis(regions.find_regions(pixels), -1, 0)
    assert fine.max() > middle.max() > whole.max() >= 1
    for below, above in ((fine, middle), (middle, whole)):
        pairs = np.unique(np.stack((below.ravel(), above.ravel())), axis=1)
        assert len(np.unique(pairs[0])) == pairs.shape[1]  # each lies in one of the next stage


def test_numbers_fall_with_the_size():
    counts = np.bincount(regions.find_regions(scene()[0])[..., 2].ravel())
    assert counts[0] == 0 and list(counts[1:]) == sorted(counts[1:], reverse=True)


def test_one_colour_is_one_region():
    found = regions.find_regions(np.full((50, 40, 3), 77, np.uint8))
    assert (found == 1).all()


def test_more_regions_than_a_byte_holds_have_no_number():
    labels = np.arange(400).reshape(20, 20)
    labels[0] = 0
    found = regions._numbered(labels)
    assert found.max() == 255 and (found == 0).sum() == 381 - 255 and (found[0] == 1).all()


def test_the_command_makes_what_is_left(tmp_path, make_supply, capsys):
    work = make_supply(tmp_path)
    names = [row.file for row in read_rows(work / "backgrounds" / "manifest.csv", Background)]
    done = regions.regions_path(work, names[0])
    done.parent.mkdir()
    done.write_bytes(b"mine")
    assert regions.main([str(work)]) == 0
    assert f"regions of {len(names) - 1} photographs" in capsys.readouterr().out
    assert done.read_bytes() == b"mine"
    with Image.open(regions.regions_path(work, names[1])) as image:
        assert image.mode == "RGB" and image.size == (96, 80)
    assert regions.main([str(work)]) == 0
    assert "done before" in capsys.readouterr().out
    assert sorted(path.stem for path in done.parent.iterdir()) == sorted(n[:-4] for n in names)


def test_errors_are_one_line(tmp_path, make_supply, capsys, monkeypatch):
    assert regions.main([str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert regions.main([str(make_supply(tmp_path))]) == 1
    err = capsys.readouterr().err
    assert "scikit-image" in err and "requirements.txt" in err and err.count("\n") == 1
