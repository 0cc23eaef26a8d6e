"""``python -m tinyvit.bench`` is the worker of ``measure``; people type ``tinyvit bench``."""

from .workers import make, serve

if __name__ == "__main__":
    serve(make)
