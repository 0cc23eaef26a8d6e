"""What the tests of promptable segmentation share: images of noise."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def photo():
    """``photo(height, width)``: RGB noise, [H, W, 3] uint8, that depends on the size alone."""

    def make(height, width, seed=0):
        generator = np.random.default_rng([height, width, seed])
        return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)

    return make
