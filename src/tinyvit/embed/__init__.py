"""Images of a folder, or of a whole cluster, embedded once and kept in one Lance dataset.

``store.py`` reads it, ``run.py`` fills it; ``plan.py``, ``work.py`` and ``commits.py`` are the
three steps of filling, which may run in processes of their own. Needs the extra ``store``
(pylance). Names are found on first use.
"""

from tinyvit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
