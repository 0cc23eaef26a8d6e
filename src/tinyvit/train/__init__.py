"""Training: one loop for every task, on a laptop, a GPU or many, that can be stopped at any moment.

``task.py`` says what a task brings, ``settings.py`` what can be chosen, ``loop.py`` puts them
together; ``open_data_set`` and ``open_mask_set`` read labelled images and images with masks. Names
are found on first use: ``TrainSettings`` loads no torch.
"""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
