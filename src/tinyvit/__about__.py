"""The version of the installed package; read on first use, since the reader takes milliseconds."""

from importlib.metadata import version

__version__ = version("tinyvit")
