"""Exported folders as engines: which backend, what their files say, and every error of theirs."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest

from tiny import make_tiny_sam, noise
from tinyvit.errors import CheckpointError, MissingExtraError
from tinyvit.image_spec import ImageSpec
from tinyvit.inference import Backend, Engine, OnnxGraph, OpenVINOGraph
from tinyvit.inference.bundle import engine_for, files_of, is_exported, open_pair
from without import run_without

onnx = pytest.importorskip("onnx")
BACKENDS = ("onnx", "openvino")


@pytest.fixture(scope="module")
def folder(exported):
    return exported()


@pytest.fixture(scope="module")
def sam():
    return make_tiny_sam()


def copied(folder, tmp_path, name="copy"):
    return shutil.copytree(folder, tmp_path / name)


def change(folder, part, **texts):
    """Write other metadata into an exported file."""
    path = folder / f"{part}.onnx"
    model = onnx.load(path)
    for entry in model.metadata_props:
        entry.value = texts.get(entry.key.removeprefix("tinyvit."), entry.value)
    onnx.save(model, path)


# -- which backend ---------------------------------------------------------------------------------


def test_which_backend_runs_what(folder, exported, tmp_path, monkeypatch):
    assert is_exported(folder) and is_exported(str(folder))
    assert not any(map(is_exported, (None, "", "mobile_sam", tmp_path, folder / "encoder.onnx")))
    assert engine_for(folder) == "onnx"
    assert engine_for(folder, "openvino") == "openvino"
    assert engine_for(exported("openvino")) == "openvino"
    assert engine_for("mobile_sam", "torch") == "torch"
    assert engine_for(None, "onnx") == "onnx"
    with pytest.raises(ValueError, match="'torch' does not run these exported files; 'onnx' and"):
        engine_for(folder, "torch")
    with pytest.raises(ValueError, match="'onnx' does not run these exported files; 'openvino' d"):
        engine_for(exported("openvino"), "onnx")
    with pytest.raises(ValueError, match="backend must be one of"):
        engine_for(folder, "tensorrt")
    monkeypatch.chdir(tmp_path)
    copied(folder, tmp_path, "tinyvit_sam_2m")
    assert not is_exported("tinyvit_sam_2m")  # a name of the catalog wins
    assert is_exported("./tinyvit_sam_2m")


INSTALLED = """
import sys
from tinyvit.inference.bundle import engine_for
print(engine_for(sys.argv[1] if sys.argv[1:] else None))
"""


@pytest.mark.parametrize(
    "missing, is_folder, wanted",
    [
        (("torch", "tinyvit_native"), True, "onnx\n"),
        (("torch", "onnxruntime"), True, "openvino\n"),
        (("onnx", "tinyvit_native"), False, "torch\n"),
    ],
)
def test_what_is_installed_decides(missing, is_folder, wanted, folder):
    assert run_without(missing, INSTALLED, *([folder] if is_folder else [])) == wanted


@pytest.mark.parametrize(
    "missing, is_folder, words",
    [
        (
            ("torch", "onnxruntime", "openvino"),
            True,
            "no engine for an exported folder is installed here; pip install 'tinyvit[onnx]' or "
            "'tinyvit[openvino]'",
        ),
        (
            ("torch", "tinyvit_native"),
            False,
            "no engine is installed here; pip install 'tinyvit[native]' (segment, encode, serve) "
            "or 'tinyvit[torch]' (everything)",
        ),
    ],
)
def test_nothing_is_installed(missing, is_folder, words, folder):
    said = run_without(missing, INSTALLED, *([folder] if is_folder else []), fails=True)
    assert said.splitlines()[-1] == f"tinyvit.errors.MissingExtraError: {words}"


def test_a_backend_by_name_that_is_not_installed(folder):
    code = "import sys; from tinyvit import Engine; Engine(sys.argv[1], backend='onnx')"
    said = run_without(("torch", "onnxruntime"), code, folder, fails=True).splitlines()[-1]
    assert "the ONNX Runtime backend needs the package onnxruntime" in said
    assert "pip install 'tinyvit[onnx]'" in said
    code = "from tinyvit import Engine; Engine('tinyvit_sam_2m', backend='onnx')"
    said = run_without(("torch",), code, fails=True).splitlines()[-1]
    assert "runs a checkpoint with the help of torch" in said and "'tinyvit[torch]'" in said


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_gives_what_torch_gives(backend, folder, sam):
    ours = Engine(folder, backend=backend, threads=1, batch_size=3)
    theirs = Engine(sam.image_encoder, backend="torch", image_spec=ours.image_spec)
    assert isinstance(ours.backend, Backend) and ours.summary() == f"{backend}, cpu, fp32"
    assert ours.weights_sha256() == theirs.weights_sha256()
    images = [noise(*size) for size in ((64, 64), (1, 1), (33, 90), (200, 7), (64, 48), (5, 300))]
    for mine, its in zip(ours.stream(images), theirs.stream(images), strict=True):
        assert mine.placement == its.placement
        scale = np.abs(its.features).max()
        np.testing.assert_allclose(mine.features, its.features, atol=1e-4 * scale)
    assert ours.embed(images[:2]).shape == (2, 32, 4, 4)
    ours.close()


@pytest.mark.parametrize("preset", ["samexporter", "osam", "openvino"])
def test_other_layouts_give_the_same(preset, exported, sam):
    ours = Engine(exported(preset, side=None if preset == "openvino" else 64), batch_size=2)
    theirs = Engine(sam.image_encoder, backend="torch", image_spec=ours.image_spec)
    images = [noise(64, 40), noise(64, 40, 1), noise(30, 90)]
    for mine, its in zip(ours.stream(images), theirs.stream(images), strict=True):
        scale = np.abs(its.features).max()
        np.testing.assert_allclose(mine.features, its.features, atol=1e-4 * scale)


def test_weights_of_another_size_are_prepared_for_the_graph(folder, tmp_path):
    adapted = copied(folder, tmp_path)
    change(adapted, "encoder", input_size="128")
    engine = Engine(adapted)
    assert engine.image_spec.size == (128, 128)
    assert next(engine.stream(noise(50, 60))).features.shape == (32, 8, 8)


def test_precisions(folder):
    assert Engine(folder, precision="auto").precision == "fp32"
    assert Engine(folder, precision="torch.float32").precision == "fp32"
    with pytest.raises(ValueError, match="'onnx' computes in precision 'fp32' only, got 'bf16'"):
        Engine(folder, precision="bf16")
    with pytest.raises(ValueError, match="precision 'fp16' is refused"):
        Engine(folder, precision="fp16", backend="openvino")
    assert Engine(folder, precision="auto", backend="openvino").precision in ("fp32", "bf16")
    with pytest.raises(ValueError, match="backend 'onnx' runs on device 'cpu', got 'cuda'"):
        Engine(folder, device="cuda")
    with pytest.raises(ValueError, match="threads must be at least 1"):
        Engine(folder, threads=0)


@pytest.mark.parametrize("graph", [OnnxGraph, OpenVINOGraph])
def test_graphs_say_what_they_are_and_can_be_copied(graph, folder):
    one = graph(folder / "decoder.onnx", threads=1)
    assert one.inputs["point_coords"] == (1, None, 2)
    assert one.outputs["iou_predictions"][-1] == 4
    assert one.metadata["tinyvit.part"] == "decoder"
    inputs = {
        name: np.zeros([side or 2 for side in shape], np.float32)
        for name, shape in one.inputs.items()
    }
    inputs["orig_im_size"] += 8
    wanted = one.run(inputs)
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        for name, values in again.run(inputs).items():
            np.testing.assert_allclose(values, wanted[name], atol=1e-5)
    one.close()
    with pytest.raises(RuntimeError, match=f"this {graph.__name__} was closed"):
        one.run(inputs)


# -- errors ----------------------------------------------------------------------------------------


def test_a_folder_that_lacks_a_part(folder, tmp_path):
    lacking = copied(folder, tmp_path)
    (lacking / "decoder.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"lacks its decoder decoder\.onnx; export again"):
        open_pair(lacking)
    index = json.loads((lacking / "tinyvit.json").read_text())
    (lacking / "tinyvit.json").write_text(json.dumps({**index, "decoder": None}))
    with pytest.raises(CheckpointError, match="has no decoder, only encoder"):
        open_pair(lacking)
    assert Engine(lacking).embed(noise(9, 9)).shape == (1, 32, 4, 4)
    shutil.copy(folder / "decoder.onnx", lacking)
    (lacking / "tinyvit.json").write_text(json.dumps({**index, "encoder": None}))
    with pytest.raises(CheckpointError, match="has no encoder, only decoder; export again with an"):
        Engine(lacking)
    (lacking / "tinyvit.json").write_text(json.dumps({**index, "style": "transformers"}))
    with pytest.raises(CheckpointError, match=r"is for transformers\.js and is not run here"):
        files_of(lacking)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_different_exports(backend, folder, tmp_path):
    mixed = copied(folder, tmp_path)
    change(mixed, "decoder", pair="f00d")
    with pytest.raises(
        CheckpointError, match=r"encoder\.onnx and decoder\.onnx are not of one exp"
    ):
        open_pair(mixed, backend)
    shutil.copy(folder / "encoder.onnx", mixed / "decoder.onnx")
    with pytest.raises(CheckpointError, match="is an encoder and no decoder; give the decoder"):
        open_pair(mixed, backend)


def test_newer_formats_and_damage(folder, tmp_path):
    newer = copied(folder, tmp_path)
    change(newer, "encoder", format="9", version="7.1")
    with pytest.raises(
        CheckpointError, match=r"written by tinyvit 7\.1, format 9; this reads up to"
    ):
        Engine(newer)
    change(newer, "encoder", format="1", image_spec="{")
    with pytest.raises(CheckpointError, match="damaged metadata"):
        Engine(newer)
    index = json.loads((newer / "tinyvit.json").read_text())
    (newer / "tinyvit.json").write_text(json.dumps({**index, "format": 9}))
    with pytest.raises(CheckpointError, match="format 9; this reads up to 1"):
        Engine(newer)
    (newer / "tinyvit.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tinyvit\.json is damaged"):
        Engine(newer)


@pytest.mark.parametrize("opset, ir_version", [(99, 8), (17, 99)])
def test_an_opset_that_the_runtime_does_not_know(opset, ir_version, folder, tmp_path):
    newer = copied(folder, tmp_path)
    model = onnx.load(newer / "encoder.onnx")
    model.opset_import[0].version, model.ir_version = opset, ir_version
    onnx.save(model, newer / "encoder.onnx")
    words = "is of a newer opset than ONNX Runtime .* reads; pip install --upgrade onnxruntime, or "
    with pytest.raises(CheckpointError, match=words) as caught:
        Engine(newer, backend="onnx")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_graph(folder, tmp_path):
    wrong = copied(folder, tmp_path)
    (wrong / "encoder.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"ONNX Runtime cannot read .*encoder\.onnx as a gr"):
        Engine(wrong)


def test_values_that_are_not_finite(folder, monkeypatch):
    engine = Engine(folder)
    monkeypatch.setattr(engine, "backend", type("Broken", (), {
        "name": "onnx", "device": "cpu", "takes_arrays": True,
        "__call__": lambda self, batch: np.full((len(batch), 1, 1, 1), np.nan, np.float32),
    })())  # fmt: skip
    with pytest.raises(ValueError, match="backend onnx gave values that are not finite"):
        next(engine.stream(noise(5, 5)))


def test_sizes_that_a_graph_does_not_take(exported):
    engine = Engine(exported("osam", side=64), pad=False)
    with pytest.raises(
        ValueError, match=r"takes images of 64 x 64 alone, got 32 x 64; leave pad=F"
    ):
        next(engine.stream(noise(20, 40)))


def test_files_without_our_metadata(folder, tmp_path, sam):
    bare = copied(folder, tmp_path)
    for part in ("encoder", "decoder"):
        model = onnx.load(bare / f"{part}.onnx")
        del model.metadata_props[:]
        onnx.save(model, bare / f"{part}.onnx")
    pair = (bare / "encoder.onnx", bare / "decoder.onnx")
    with pytest.raises(
        CheckpointError, match="has no metadata of 'tinyvit export'; say how images"
    ):
        open_pair(pair)
    found = open_pair(pair, image_spec=ImageSpec.sam(64))
    with pytest.raises(ValueError, match=r"encoder\.onnx does not say which weights it has"):
        found.encoder.weights_sha256()
    with pytest.raises(CheckpointError, match=r"no such file: .*nothing\.onnx for decoder="):
        open_pair((pair[0], bare / "nothing.onnx"))
    with pytest.raises(CheckpointError, match="are not of one export"):
        open_pair((folder / "encoder.onnx", pair[1]))
    assert isinstance(MissingExtraError("x"), ImportError)
