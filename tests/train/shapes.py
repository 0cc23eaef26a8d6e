"""Images of simple shapes with their masks, as a data set on the disk."""

import numpy as np
from PIL import Image


def shapes(number, size=(48, 64)):
    """RGB [H, W, 3] and masks [2, H, W]: a disc and a rectangle on noise."""
    height, width = size
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0.5:height, 0.5:width] / height
    masks = np.stack(
        [
            np.hypot(x - 0.35, y - 0.35 - 0.1 * number % 0.3) < 0.22,
            (abs(x - 0.95) < 0.25) & (abs(y - 0.6) < 0.3),
        ]
    )
    image = rng.integers(0, 40, (height, width, 3)).astype(np.uint8)
    for mask, colour in zip(masks, ((200, 60, 40), (50, 90, 210)), strict=True):
        image[mask] += np.array(colour, np.uint8)
    return image, masks


def write_shapes(folder, count, size=(48, 64)):
    """``images/imageN.png`` and ``masks/imageN_M.png`` in a folder, which is returned."""
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(count):
        image, masks = shapes(number, size)
        Image.fromarray(image).save(folder / "images" / f"image{number}.png")
        for place, mask in enumerate(masks):
            name = f"image{number}_{place}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / name)
    return folder
