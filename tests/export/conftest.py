"""One small SAM, and an exported folder of it that tests copy before they change it."""

import shutil

import pytest

from tiny import make_tiny_sam


@pytest.fixture(scope="session")
def sam():
    return make_tiny_sam()


@pytest.fixture(scope="session")
def folder(sam, tmp_path_factory):
    from tinyvit.export import export_model

    target = tmp_path_factory.mktemp("export") / "pair"
    export_model(sam, target, name="tiny", licence="Apache-2.0", is_reproducible=True)
    return target


@pytest.fixture
def copied(folder, tmp_path):
    """Copies the folder under a name."""
    return lambda name="copy": shutil.copytree(folder, tmp_path / name)
