"""The tests want the library of ``scripts/native-check`` (or cmake with -DTINYVIT_TESTS=ON)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

BUILD = Path(os.environ.get("TINYVIT_NATIVE_BUILD", Path(__file__).parents[1] / "build"))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "python" / "src"))
os.environ.setdefault("TINYVIT_NATIVE_LIBRARY", str(BUILD / "libtinyvit.so"))
