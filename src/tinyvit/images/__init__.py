"""Images: read them, make them a model's input, and draw what a model sees.

Each file is imported by its own name, so that reading an image loads no torch:

* ``tinyvit.images.decode``: a path, bytes, an array or a tensor -> RGB uint8 [H, W, 3].
* ``tinyvit.images.decode``: the rules for pixels of every type.
* ``tinyvit.images.preprocess``: resize, normalise and pad as an ``ImageSpec`` says.
* ``tinyvit.images.draw``: feature maps as colours over the photograph; PNG files.
* ``tinyvit.images.draw``: masks, boxes and points over the photograph.
* ``tinyvit.images.draw``: smooth lines for them.
"""
