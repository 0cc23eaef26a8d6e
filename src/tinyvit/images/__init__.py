"""Images: read them, make them a model's input, and draw what a model sees.

Each file is imported by its own name, and none needs torch:

* ``tinyvit.images.decode``: a path, bytes, an array or a tensor -> RGB uint8 [H, W, 3].
* ``tinyvit.images.preprocess``: resize, normalise and pad as an ``ImageSpec`` says.
* ``tinyvit.images.draw``: masks, boxes, points and feature maps over an image; PNG files.
"""
