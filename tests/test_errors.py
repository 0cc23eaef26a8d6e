from __future__ import annotations

import copy
import pickle

import pytest

from tinyvit import errors
from tinyvit.errors import (
    CheckpointError,
    DownloadError,
    ImageError,
    MissingExtraError,
    TinyViTError,
)

FAMILY = {
    TinyViTError: (Exception,),
    CheckpointError: (TinyViTError, ValueError),
    DownloadError: (CheckpointError,),
    ImageError: (TinyViTError, ValueError),
    MissingExtraError: (TinyViTError, ImportError),
}


@pytest.mark.parametrize("error", FAMILY)
def test_what_catches_what(error: type[TinyViTError]) -> None:
    assert error.__bases__ == FAMILY[error]
    for wider in (TinyViTError, *FAMILY[error]):
        with pytest.raises(wider, match=r"^the words$"):
            raise error("the words")


@pytest.mark.parametrize("error", FAMILY)
def test_the_words_survive_other_processes(error: type[TinyViTError]) -> None:
    caught = error("wanted 1, came 2; try 3")
    for again in (pickle.loads(pickle.dumps(caught)), copy.copy(caught)):
        assert type(again) is error
        assert str(again) == "wanted 1, came 2; try 3"


def test_an_image_is_no_checkpoint() -> None:
    assert not issubclass(ImageError, CheckpointError)
    assert not issubclass(CheckpointError, OSError)
    assert not issubclass(TinyViTError, ValueError)


def test_all_are_listed_and_explained() -> None:
    found = {error for error in vars(errors).values() if isinstance(error, type)}
    assert found == set(FAMILY)
    assert all(error.__doc__ for error in FAMILY)
