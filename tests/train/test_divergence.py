import json

import torch

from tinyvit.checkpoints.files import read_state_dict
from tinyvit.errors import TinyViTError
from tinyvit.train import DivergedError
from tinyvit.train.run_folder import keep_batch


def test_the_batch_can_be_read_back(tmp_path):
    images = torch.tensor([[float("nan"), 1.0]])
    parts = [([(0, 4)], {"images": images, "names": ["a.png"]}), ([(0, 2)], {"images": images + 1})]
    words = keep_batch(tmp_path, 7, 1, parts)
    path = tmp_path / "diverged_step_7_rank_1.safetensors"
    assert words == f"its batch is kept in {path}"
    file = read_state_dict(path)
    torch.testing.assert_close(file.tensors["0/images"], images, equal_nan=True, rtol=0, atol=0)
    assert set(file.tensors) == {"0/images", "1/images"}
    assert json.loads(file.metadata["0/samples"]) == [[0, 4]]
    assert file.metadata["0/names"] == "['a.png']"


def test_a_folder_that_is_gone_is_said(tmp_path):
    words = keep_batch(tmp_path / "gone", 7, 0, [([(0, 1)], {"images": torch.ones(1)})])
    assert words.startswith("its batch could not be kept (no folder")


def test_it_is_an_error_of_ours():
    assert issubclass(DivergedError, TinyViTError)
