"""``python -m tinyvit.bench`` is the worker of ``measure``; people type ``tinyvit bench``."""

from .runners import make
from .workers import serve

if __name__ == "__main__":
    serve(make)
