"""``tinyvit verify``: changed files, wrong values, files without a certificate; without torch."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tiny import make_tiny_classifier, make_tiny_sam, write_tiny_sam
from tinyvit.cli.main import app
from tinyvit.compat.segment_anything.utils.onnx import SamOnnxModel
from tinyvit.errors import CheckpointError
from tinyvit.export import ChangedFileError, comparing, export_model, verify
from tinyvit.export.certificate import Case, compare, file_facts, keep
from tinyvit.export.presets import DECODER_INPUTS, DECODER_OUTPUTS
from tinyvit.export.verify import read_facts

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def recertify(folder, **changes):
    """Write the hashes of the files as they are now into the certificate."""
    path = folder / "certificate.json"
    certificate = json.loads(path.read_text())
    for name in certificate["files"]:
        certificate["files"][name] = file_facts(folder / name)
    path.write_text(json.dumps({**certificate, **changes}))


def flip_a_byte(folder):
    data = bytearray((folder / "decoder.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "decoder.onnx").write_bytes(data)


def cut_a_file(folder):
    data = (folder / "decoder.onnx").read_bytes()
    (folder / "decoder.onnx").write_bytes(data[: len(data) // 2])


def scale_a_weight(folder):
    model = onnx.load(folder / "encoder.onnx")
    kernel = next(node for node in model.graph.node if node.op_type == "Conv").input[1]
    first = next(one for one in model.graph.initializer if one.name == kernel)  # of the stem
    scaled = onnx.numpy_helper.to_array(first) * np.float32(1.01)
    first.CopyFrom(onnx.numpy_helper.from_array(scaled, first.name))
    onnx.save(model, folder / "encoder.onnx")


def say(folder, **texts):
    """Change what the decoder says of itself."""
    model = onnx.load(folder / "decoder.onnx")
    for entry in model.metadata_props:
        entry.value = texts.get(entry.key.removeprefix("tinyvit."), entry.value)
    onnx.save(model, folder / "decoder.onnx")


MUTANTS = {  # change, whether the certificate's hashes are made to fit it, exit code, words
    "nothing": (lambda folder: None, False, 0, "passed: "),
    "a flipped byte": (flip_a_byte, False, 4, "is not the file that was certified"),
    "a truncated file": (cut_a_file, False, 4, "is not the file that was certified"),
    "a truncated file, certified": (cut_a_file, True, 4, "cannot be read as a graph"),
    "a scaled weight": (scale_a_weight, False, 4, "is not the file that was certified"),
    "a scaled weight, certified": (scale_a_weight, True, 3, "FAILED encoder-1x3x64x64 image"),
    "another part": (lambda f: say(f, part="encoder"), True, 4, "says it is encoder, not decoder"),
    "other weights": (lambda f: say(f, weights_sha256="0"), True, 4, "is of other weights"),
    "another pair": (lambda f: say(f, pair="0"), True, 4, "come from different exports"),
    "a missing file": (lambda f: (f / "decoder.onnx").unlink(), False, 4, "is missing"),
    "no certificate": (
        lambda f: (f / "certificate.json").unlink(), False, 4, "was not written by 'tinyvit export'"
    ),
    "a damaged certificate": (
        lambda f: (f / "certificate.json").write_text("{"), False, 4, "is damaged"
    ),
    "lost references": (
        lambda f: (f / "certificate.npz").unlink(), False, 4, "has no certificate.npz"
    ),
}  # fmt: skip

WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
from typer.testing import CliRunner
from tinyvit.cli.main import app
for path in sys.argv[1:]:
    done = CliRunner().invoke(app, ["verify", path])
    print(json.dumps([done.exit_code, done.output]))
"""


@pytest.fixture(scope="module")
def outcomes(folder, tmp_path_factory):
    """Exit code and words for each mutant, in a process without torch."""
    import shutil

    root = tmp_path_factory.mktemp("mutants")
    for name, (change, is_certified, *_) in MUTANTS.items():
        target = shutil.copytree(folder, root / name)
        change(target)
        if is_certified:
            recertify(target)
    paths = [str(root / name) for name in MUTANTS]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *paths], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(MUTANTS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found_without_torch(mutant, outcomes):
    code, words = outcomes[mutant]
    assert (code, MUTANTS[mutant][3] in words) == (MUTANTS[mutant][2], True), words


def test_the_decoder_of_another_export_is_no_pair(sam, copied, tmp_path):
    export_model(sam, tmp_path / "other", name="tiny", licence="Apache-2.0")
    target = copied()
    (target / "decoder.onnx").write_bytes((tmp_path / "other" / "decoder.onnx").read_bytes())
    with pytest.raises(ChangedFileError, match="is not the file that was certified"):
        verify(target)
    recertify(target)
    with pytest.raises(ChangedFileError, match="come from different exports"):
        verify(target)


def test_a_scaled_weight_shows_in_the_encoder_alone(copied):
    target = copied()
    scale_a_weight(target)
    recertify(target)
    found = verify(target)
    assert all(case.output == "image_embeddings" for case in found.cases if not case.passed)
    assert found.to_dict()["passed"] is False


def test_a_newer_certificate(copied):
    target = copied()
    recertify(target, format=99)
    with pytest.raises(CheckpointError, match="format 99"):
        verify(target)
    (target / "tinyvit.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99"):
        read_facts(target)
    (target / "tinyvit.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no folder of 'tinyvit export'"):
        read_facts(target)


def test_a_folder_of_format_1_stays_verified():
    folder = Path(__file__).parents[1] / "data" / "formats" / "exported_1"
    found = verify(folder)
    assert found.passed and len(found.cases) == 5
    assert read_facts(folder)["classes"] == ["cat", "dog", "gnu"]


def test_against_a_checkpoint(sam, folder):
    assert comparing.verify_against(folder, sam).passed
    assert not comparing.verify_against(folder, make_tiny_sam(seed=5)).passed
    with pytest.raises(ValueError, match="compare it with a checkpoint of a SAM"):
        comparing.verify_against(folder, sam.image_encoder)


def test_files_of_ours_alone(sam, copied, tmp_path):
    target = copied()
    for name in ("encoder.onnx", "decoder.onnx"):
        (tmp_path / name).write_bytes((target / name).read_bytes())
        words = f"{name} has no certificate; made by tinyvit; inputs image"
        with pytest.raises(CheckpointError, match=words):
            verify(tmp_path / name)
        assert comparing.verify_against(tmp_path / name, sam).passed
        assert not comparing.verify_against(tmp_path / name, make_tiny_sam(seed=5)).passed
    assert verify(target / "encoder.onnx").passed  # by the folder's certificate
    (target / "encoder.onnx").rename(target / "other.onnx")
    with pytest.raises(CheckpointError, match=r"other\.onnx has no certificate"):
        verify(target / "other.onnx")  # beside a certificate that does not name it


def test_a_file_of_segment_anythings_exporter(tmp_path):
    """Another exporter's decoder: single mask, multiplied mask input, axes without names."""
    path = tmp_path / "sam_decoder.onnx"
    sam = make_tiny_sam(loadable=True)
    grid, width = 4, 16
    example = (
        torch.randn(1, width, grid, grid), torch.rand(1, 5, 2) * 64,
        torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]]), torch.randn(1, 1, 4 * grid, 4 * grid),
        torch.ones(1), torch.tensor([48.0, 64.0]),
    )  # fmt: skip
    axes = {"point_coords": {1: "num_points"}, "point_labels": {1: "num_points"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            SamOnnxModel(sam, return_single_mask=True), example, path, dynamo=False,
            input_names=list(DECODER_INPUTS), output_names=list(DECODER_OUTPUTS),
            dynamic_axes=axes, opset_version=17,
        )  # fmt: skip
    done = CliRunner().invoke(app, ["verify", str(path)])
    assert done.exit_code == 4
    words = (
        f"{path} has no certificate; made by pytorch; inputs image_embeddings float32 "
        "[1, 16, 4, 4], point_coords float32 [1, num_points, 2], "
    )
    text = " ".join(done.output.split())
    assert words in text and text.endswith("verify it with --against CHECKPOINT")
    right, wrong = (write_tiny_sam(tmp_path / f"{seed}.safetensors", seed) for seed in (0, 5))
    done = CliRunner().invoke(app, ["verify", str(path), "--against", str(right), "--json"])
    assert done.exit_code == 0, done.output
    assert {case["output"] for case in json.loads(done.stdout)["cases"]} == set(DECODER_OUTPUTS)
    done = CliRunner().invoke(app, ["verify", str(path), "--against", str(wrong)])
    assert done.exit_code == 3 and "FAILED decoder-" in done.output


def test_a_classifier_of_another_exporter(tmp_path):
    path, model = tmp_path / "classifier.onnx", make_tiny_classifier(size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.zeros(1, 3, 32, 32),), path, dynamo=False, opset_version=17)
    found = comparing.verify_against(path, model)
    assert found.passed and [case.id for case in found.cases] == [
        f"classifier-1x3x32x32 {found.cases[0].output}"
    ]
    assert not comparing.verify_against(path, make_tiny_classifier(size=32, seed=4)).passed


def test_an_interface_that_is_not_known(sam, tmp_path):
    value = onnx.helper.make_tensor_value_info
    kinds = [value(name, onnx.TensorProto.FLOAT, [2]) for name in ("a", "b", "c")]
    node = onnx.helper.make_node("Add", ["a", "b"], ["c"])
    graph = onnx.helper.make_graph([node], "sum", kinds[:2], kinds[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "sum.onnx")
    with pytest.raises(CheckpointError, match="made by somebody who left no name; inputs a float"):
        verify(tmp_path / "sum.onnx")
    with pytest.raises(CheckpointError, match=r"takes [ab], [ab] and gives c, which is no inter"):
        comparing.verify_against(tmp_path / "sum.onnx", sam)
    with pytest.raises(CheckpointError, match="cannot be read as a graph"):
        (tmp_path / "empty.onnx").write_bytes(b"")
        comparing.verify_against(tmp_path / "empty.onnx", sam)
    with pytest.raises(CheckpointError, match=r"there is no file or folder .*nothing\.onnx"):
        comparing.verify_against(tmp_path / "nothing.onnx", sam)


def test_references_are_kept_at_places_of_their_own():
    values = np.arange(10_000.0)
    assert len(keep(values, "a")) == 4096
    assert (keep(values, "a") == keep(values, "a")).all()
    assert (keep(values, "a") != keep(values, "b")).any()
    case = Case("c", "decoder", (1,))
    wrong = compare(case, "masks", values * np.nan, keep(values, "c masks"), 1e-4)
    assert not wrong.passed


def cut_references(folder):
    data = (folder / "certificate.npz").read_bytes()
    (folder / "certificate.npz").write_bytes(data[: len(data) // 2])


def empty_references(folder):
    np.savez(folder / "certificate.npz", other=np.zeros(3))


@pytest.mark.parametrize(
    "change, words", [(cut_references, "is damaged"), (empty_references, "lacks encoder-1x3x64x64")]
)
def test_references_that_are_damaged(copied, change, words):
    target = copied()
    change(target)
    with pytest.raises(ChangedFileError, match=words):
        verify(target)


def test_the_command_line(tmp_path):
    runner, target = CliRunner(), str(tmp_path / "out")
    small = str(write_tiny_sam(tmp_path / "small.safetensors"))
    arguments = ["export", small, "-o", target, "--part", "encoder"]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "passed: 5 comparisons by onnx" in done.output
    again = runner.invoke(app, ["verify", target, "--json"])
    assert (again.exit_code, json.loads(again.stdout)["passed"]) == (0, True)
    again = runner.invoke(app, ["verify", target, "--against", small])
    assert again.exit_code == 0, again.output
    assert runner.invoke(app, arguments).exit_code == 1  # it is not empty
    assert runner.invoke(app, ["export", "x", "-o", target, "--for", "me"]).exit_code == 2
