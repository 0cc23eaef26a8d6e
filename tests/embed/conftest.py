"""A small encoder, a folder of small images, and a store of them."""

import pytest

import tiny


@pytest.fixture(scope="module")
def engine():
    return tiny.make_tiny_engine()


@pytest.fixture
def photos(tmp_path):
    """Six images in two folders."""
    for number in range(6):
        place = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        tiny.write_image(place, 24 + number, 40, seed=number)
    return tmp_path / "photos"


@pytest.fixture
def url(tmp_path):
    return tmp_path / "photos.lance"
