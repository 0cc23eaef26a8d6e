"""Images of a folder, or of a whole cluster, embedded once and kept in one Lance dataset.

``store.py`` reads it, ``run.py`` fills it; ``plan.py``, ``work.py`` and ``commits.py`` are the
three steps of filling, which may run in processes of their own. Needs the extra ``store``
(pylance). Names are found on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
