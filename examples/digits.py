"""Write scikit-learn's 1797 handwritten digits as a folder of PNG files, one subfolder a class.

    pip install scikit-learn
    python examples/digits.py digits

The images are 8 x 8 pixels, grey, of 43 people's writing (UCI "Optical Recognition of Handwritten
Digits", E. Alpaydin and C. Kaynak, CC BY 4.0). They come with scikit-learn; nothing is downloaded.
docs/guides/classify.md trains a classifier on them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image


def write_digits(folder: Path, most: int | None = None) -> int:
    """Write ``folder/0/0000.png`` and so on.

    Args:
        folder: Made if need be.
        most: Images to write; None for all.

    Returns:
        How many were written.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)[:most]  # [N, 8, 8]; 16 is white
    for number, (pixels, label) in enumerate(zip(images, data.target, strict=False)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:04d}.png")
    return len(images)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("wanted the name of a folder to write: python examples/digits.py digits")
    print(f"{write_digits(Path(sys.argv[1]))} images in {sys.argv[1]}")
