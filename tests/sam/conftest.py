"""What the tests of promptable segmentation share: images of noise."""

import pytest

from tiny import noise


@pytest.fixture(scope="session")
def photo():
    """``photo(height, width)``: RGB noise, [H, W, 3] uint8, that depends on the size alone."""
    return noise
