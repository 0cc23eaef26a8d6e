from typing import get_args

import pytest
import typer

from tinyvit.cli.evaluate import BACKENDS, parse_backend
from tinyvit.inference.backend import BackendName


def test_the_backends_are_the_engine_s():
    assert get_args(BackendName) == BACKENDS


def test_backends_are_parsed():
    assert [parse_backend(name) for name in BACKENDS] == list(BACKENDS)
    with pytest.raises(typer.BadParameter, match=r"^'tpu' is not one of 'auto', 'torch'"):
        parse_backend("tpu")
