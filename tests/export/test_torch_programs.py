"""Programs of torch.export: the same certificate; nothing that could run code is read."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

from tiny import make_tiny_classifier, make_tiny_sam
from tinyvit.errors import CheckpointError
from tinyvit.export import export_model, programs, verify

pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("programs") / "pair"
    assert export_model(make_tiny_sam(), target, preset="torch", is_reproducible=True).passed
    return target


def test_a_pair_of_programs_is_verified_again(folder):
    found = verify(folder)
    assert found.passed and found.backend == "torch"
    assert {case.output for case in found.cases} == {
        "image_embeddings", "iou_predictions", "low_res_masks"
    }  # fmt: skip
    program = torch.export.load(folder / "encoder.pt2")  # as its consumer does
    assert program.module()(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 4, 4)
    with pytest.raises(ValueError, match="'onnx' does not run these files, which are for torch"):
        verify(folder, backend="onnx")


def test_a_classifier_as_a_program(tmp_path):
    model = make_tiny_classifier(size=32)
    assert export_model(model, tmp_path / "out", preset="torch").passed
    assert verify(tmp_path / "out").passed
    with pytest.raises(ValueError, match=r"stored in fp32; leave storage='fp16' out"):
        export_model(model, tmp_path / "half", preset="torch", storage="fp16")


def test_without_torch_it_says_what_to_do(folder):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tinyvit.cli.main import main\n"
        f"main(['verify', {os.fspath(folder)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "encoder.pt2 is a program of torch.export, which only torch runs" in done.stderr
    assert "pip install 'tinyvit[torch]'" in done.stderr


class Touch:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (os.fspath(self.path),)


def rewritten(source, target, change):
    """A copy of an archive; ``change`` gives the bytes of each member, or None to keep them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            found = change(name, data)
            new.writestr(name, data if found is None else found)
    return target


def in_description(text, other):
    def change(name, data):
        if name.endswith("models/model.json"):
            assert text in data.decode()
            return data.decode().replace(text, other).encode()

    return change


def marked_as_pickles(name, data):
    if name.endswith("weights_config.json") and b'"use_pickle": false' in data:
        return data.replace(b'"use_pickle": false', b'"use_pickle": true')


@pytest.mark.parametrize(
    "change, words",
    [
        (in_description("torch.ops.aten.relu.default", "torch.os.system"), "the operator"),
        (in_description("Integer(5)", "open('x', 'w')"), "the formula"),
        (marked_as_pickles, "a pickle"),
    ],
)
def test_what_could_run_code_is_refused(folder, change, words, tmp_path):
    file = rewritten(folder / "decoder.pt2", tmp_path / "x.pt2", change)
    with pytest.raises(CheckpointError, match=f"holds {words}.* which could run code"):
        programs.Program(file)


def test_pickled_inputs_are_refused(folder, tmp_path):
    stream = io.BytesIO()
    torch.save(Touch(tmp_path / "touched"), stream)

    def change(name, data):
        return stream.getvalue() if name.endswith(".pt") else None

    file = rewritten(folder / "decoder.pt2", tmp_path / "x.pt2", change)
    with pytest.raises(CheckpointError, match="cannot be read as a program"):
        programs.Program(file)
    assert not (tmp_path / "touched").exists()
    pickle.loads(pickle.dumps(Touch(tmp_path / "touched")))  # it would have
    assert (tmp_path / "touched").exists()


def test_objects_under_other_names_are_refused(folder, tmp_path):
    def change(name, data):
        if name.endswith("weights_config.json"):
            values = json.loads(data)
            next(iter(values["config"].values()))["path_name"] = "custom_obj_0"
            return json.dumps(values).encode()

    file = rewritten(folder / "decoder.pt2", tmp_path / "x.pt2", change)
    with pytest.raises(CheckpointError, match="holds the object 'custom_obj_0'"):
        programs.Program(file)
    (tmp_path / "broken.pt2").write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot be read as a program"):
        programs.Program(tmp_path / "broken.pt2")
