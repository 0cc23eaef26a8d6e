"""Images: read them, make them a model's input, and draw what a model sees.

``decode`` reads, ``preprocess`` makes a model's input, ``draw`` draws. Each file is imported by its
own name, and none needs torch.
"""
