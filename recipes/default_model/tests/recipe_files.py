"""Where the recipe's files are, and how a test gets one whose name a package of tests has, too."""

import importlib.util
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[1]

# Appended, not inserted: there are packages of tests called ``train`` and ``evaluate``, too.
if str(RECIPE) not in sys.path:
    sys.path.append(str(RECIPE))


def load(name):
    """One file of the recipe as a module, under a name that no package of tests has."""
    known = f"default_model_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, RECIPE / f"{name}.py")
        sys.modules[known] = importlib.util.module_from_spec(spec)  # dataclasses look there
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]
