"""The errors that tinyvit raises for a caller to catch.

Each message says what was wanted, what came and what to do. Wrong arguments are ordinary
``ValueError`` / ``TypeError``; the classes here are for the world outside: files, images,
downloads and optional packages.
"""

from __future__ import annotations


class TinyViTError(Exception):
    """Base of all errors that belong to tinyvit; the command line prints them as one line."""


class CheckpointError(TinyViTError, ValueError):
    """A file of weights that cannot be read, is not what it claims, or does not fit a model."""


class DownloadError(CheckpointError):
    """A checkpoint that cannot be fetched: no network, wrong hash, offline mode, full disk."""


class ImageError(TinyViTError, ValueError):
    """An image that cannot be decoded, or is not an image."""


class MissingExtraError(TinyViTError, ImportError):
    """An optional package is not installed; the message names the ``pip install`` line."""
