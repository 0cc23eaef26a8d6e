from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tinyvit.image_spec import ImageSpec
from tinyvit.images.preprocess import ResizeLongestSide, to_input
from tinyvit.sam.embedding import prepare_image, prepare_resized

SPECS = [ImageSpec.sam(64), ImageSpec.sam(64, pad=False)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model_format", ["RGB", "BGR"])
def test_the_model_gets_its_own_order(photo, spec, model_format):
    image = photo(30, 41)
    same = prepare_image(image, model_format, model_format, spec)
    wanted = to_input(image, spec)
    assert np.array_equal(same[0], wanted[0])
    assert same[1] == wanted[1]
    other = {"RGB": "BGR", "BGR": "RGB"}[model_format]
    swapped = prepare_image(image[:, :, ::-1], other, model_format, spec)[0]
    assert np.array_equal(swapped, wanted[0])


def test_grey_has_no_order_and_transparency_stays_behind(photo):
    image, spec = photo(30, 41), SPECS[0]
    grey = image[:, :, 0]
    for source in (grey, grey[:, :, None]):
        found = prepare_image(source, "BGR", "RGB", spec)[0]
        assert np.array_equal(found, prepare_image(source, "RGB", "RGB", spec)[0])
    clear = np.full((30, 41), 7, np.uint8)
    bgra = np.dstack([image[:, :, ::-1], clear])
    found = prepare_image(bgra, "BGR", "RGB", spec)[0]
    assert np.array_equal(found, prepare_image(np.dstack([image, clear]), "RGB", "RGB", spec)[0])


@pytest.mark.parametrize("spec", SPECS)
def test_a_resized_image_is_padded_and_normalised_the_same(photo, spec):
    image = photo(30, 41)
    resized = ResizeLongestSide(64).apply_image(image)
    pixels = torch.from_numpy(resized).permute(2, 0, 1)[None]
    found, placement = prepare_resized(pixels, (30, 41), spec)
    wanted, where = to_input(image, spec)
    # one subtraction and one division in float32 of numbers up to 255
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    assert placement == where


def test_what_is_refused(photo):
    with pytest.raises(ValueError, match=r"one of \('RGB', 'BGR'\), came 'GBR'"):
        prepare_image(photo(8, 8), "GBR", "RGB", SPECS[0])
    with pytest.raises(ValueError, match=r"'BGR' is for arrays; .*: leave it out"):
        prepare_image(Image.fromarray(photo(8, 8)), "BGR", "RGB", SPECS[0])
    for shape in ((3, 48, 64), (2, 3, 48, 64), (1, 1, 48, 64), (1, 3, 48, 63), (1, 3, 64, 65)):
        with pytest.raises(ValueError, match=r"with the longer side 64, .* came \["):
            prepare_resized(torch.zeros(shape), (48, 64), SPECS[0])
