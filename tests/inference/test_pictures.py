from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinyvit.errors import ImageError
from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_input
from tinyvit.inference.engine import each, preparations, prepare

SPEC = ImageSpec.sam(16, pad=False)
IMAGE = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)


def test_one_and_many() -> None:
    stream, pil, tensor = io.BytesIO(), Image.fromarray(IMAGE), torch.from_numpy(IMAGE)
    for one in ("a.png", Path("a.png"), b"x", bytearray(b"x"), memoryview(b"x"), stream, pil):
        assert list(each(one)) == [one]  # type: ignore[arg-type]
    assert [image is IMAGE for image in each(IMAGE)] == [True]
    assert [image is tensor for image in each(tensor)] == [True]
    assert [image.shape for image in each(np.stack([IMAGE] * 3))] == [IMAGE.shape] * 3  # type: ignore[union-attr]
    paths = (path for path in ("a", "b"))
    assert each(paths) is paths


def test_files_are_read_when_the_work_is_done_and_the_rest_when_it_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(IMAGE).save(path)
    buffer = IMAGE.copy()
    tensor = torch.from_numpy(IMAGE.copy()).permute(2, 0, 1)
    given = [path, str(path), path.read_bytes(), Image.open(path), path.open("rb"), buffer, tensor]
    work = list(preparations(given, SPEC))
    given[4].close()  # type: ignore[union-attr]
    buffer[:], tensor[:] = 0, 0
    wanted, placement = prepare(IMAGE, SPEC)
    np.testing.assert_array_equal(wanted, to_input(decode(IMAGE), SPEC)[0])
    for job in work:
        np.testing.assert_array_equal(job()[0], wanted)
        assert job()[1] == placement
    Image.fromarray(255 - IMAGE).save(path)
    assert not np.array_equal(work[0]()[0], wanted)


def test_errors_come_when_the_image_is_read(tmp_path: Path) -> None:
    [job] = preparations([tmp_path / "none.png"], SPEC)
    with pytest.raises(ImageError, match="there is no file"):
        job()
    with pytest.raises(ImageError, match="has no pixels"):
        next(preparations([np.zeros((0, 4, 3), np.uint8)], SPEC))
    with pytest.raises(TypeError, match="wanted a path, bytes"):
        next(preparations([3], SPEC))  # type: ignore[list-item]
