"""Exported folders: every preset, every mutant, and the command line."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tiny import make_tiny_sam
from tinyvit.cli.main import app
from tinyvit.export import (
    PRESETS,
    ParityError,
    Preset,
    Verified,
    comparing,
    export_model,
    graphs,
    verify,
)
from tinyvit.export.certificate import Case, compare, keep
from tinyvit.export.comparing import verify_against
from tinyvit.export.verify import open_graph, uncut

onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "torch"])  # test_programs.py
def test_every_preset_is_certified_and_verified_again(sam, name, tmp_path):
    side = 128 if PRESETS[name].side else None
    if PRESETS[name].style == "openvino":
        pytest.importorskip("openvino")
    found = export_model(sam, tmp_path / "out", preset=name, name="tiny", side=side)
    assert isinstance(found, Verified) and found.passed
    assert isinstance(PRESETS[name], Preset)
    again = verify(tmp_path / "out")
    assert again.passed and len(again.cases) == len(found.cases)
    assert (tmp_path / "out" / "README.txt").read_text().startswith("For ")


@pytest.mark.parametrize("name", ["samexporter", "cvat", "osam"])
def test_weights_of_another_size_are_adapted_in_the_graph(sam, name, tmp_path, monkeypatch):

    row = dataclasses.replace(PRESETS[name], side=256)
    monkeypatch.setitem(PRESETS, name, row)
    assert export_model(sam, tmp_path / "out", preset=name).passed
    facts = json.loads((tmp_path / "out" / "tinyvit.json").read_text())
    assert (facts["side"], facts["factor"]) == (256, 4)
    monkeypatch.setitem(PRESETS, name, dataclasses.replace(row, side=100))
    with pytest.raises(ValueError, match="no whole multiple of the weights' 64"):
        export_model(sam, tmp_path / "other", preset=name)


def test_metadata_and_names(folder):
    decoder = onnx.load(folder / "decoder.onnx")
    facts = {entry.key: entry.value for entry in decoder.metadata_props}
    assert facts["tinyvit.part"] == "decoder"
    assert facts["tinyvit.weights_licence"] == "Apache-2.0"
    assert len(facts["tinyvit.weights_sha256"]) == 64
    assert (decoder.producer_name, decoder.opset_import[0].version) == ("tinyvit", 17)
    names = [entry.name for entry in decoder.graph.input]
    assert names[:3] == ["image_embeddings", "point_coords", "point_labels"]
    encoder = onnx.load(folder / "encoder.onnx")
    pair = {entry.key: entry.value for entry in encoder.metadata_props}["tinyvit.pair"]
    assert pair == facts["tinyvit.pair"]
    assert os.fspath(folder) not in decoder.SerializeToString().decode("latin-1")


EXPORT = """
import sys
from tiny import make_tiny_sam
from tinyvit.export import export_model
export_model(make_tiny_sam(), sys.argv[1], name="tiny", licence="Apache-2.0", is_reproducible=True)
"""


def run(code, *arguments, **changes):
    """Run code in a process of its own that finds the tests' modules, too."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )


def test_a_reproducible_export_is_equal_byte_for_byte_in_another_process(folder, tmp_path):
    done = run(EXPORT, str(tmp_path / "b"), PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes(), name


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a larger file is an error then, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process, and /sys")
def test_a_target_that_is_full_or_read_only_is_left_as_it_was(sam, tmp_path):
    done = run(FULL + EXPORT, str(tmp_path / "a" / "out"))
    assert done.returncode == 1 and "File too large" in done.stderr.splitlines()[-1], done.stderr
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(OSError):
        export_model(sam, "/sys/out")
    assert not any("out" in name for name in os.listdir("/sys"))
    done = CliRunner().invoke(app, ["export", "tinyvit_sam_2m", "-o", "/sys/out"])
    assert done.exit_code == 1 and "the folder '/sys/out' cannot be written" in done.output


def test_weights_in_half_take_half_the_room(sam, folder, tmp_path):
    assert export_model(sam, tmp_path / "half", storage="fp16").passed
    for one, most in ((folder, 4.1), (tmp_path / "half", 2.2)):
        weights = onnx.load(one / "decoder.onnx").graph.initializer
        large = [tensor for tensor in weights if np.prod(tensor.dims) >= 256]
        size = sum(len(tensor.raw_data) for tensor in large)
        assert size <= most * sum(np.prod(tensor.dims) for tensor in large)


def pooled_elsewhere(own):
    """A mask that is shrunk one pixel off."""
    return lambda mask, has: own(mask.roll(1, -1), has)


def test_transformers_js_finds_halves_under_the_name_of_their_dtype(sam, tmp_path):
    assert export_model(sam, tmp_path / "out", preset="transformers.js", storage="fp16").passed
    assert {path.name for path in (tmp_path / "out" / "onnx").iterdir()} == {
        "vision_encoder_fp16.onnx", "prompt_encoder_mask_decoder_fp16.onnx"
    }  # fmt: skip
    assert verify(tmp_path / "out" / "onnx" / "vision_encoder_fp16.onnx").passed


MUTANTS = {
    "a mask that is shifted": ("embed_mask", pooled_elsewhere),
    "a coordinate without its half pixel": (
        "embed_points",
        lambda own: lambda c, x: own(c - 0.5, x),
    ),
    "a multiplied mask": (
        "embed_mask",
        lambda own: lambda mask, has: own(mask * has, torch.ones_like(has)),
    ),
    "a transposed size": ("enlarge", lambda own: lambda m, size: own(m, size.flip(0))),
    "the wrong best mask": (
        "best",
        lambda own: lambda m, s, points: (m[:, 1:2], s[:, 1:2]),
    ),
}


def test_padding_beside_a_box_is_dropped_where_that_is_wanted(sam, folder, tmp_path):
    assert export_model(sam, tmp_path / "out", drop_padding=True).passed
    given = {
        "image_embeddings": np.random.default_rng(1).standard_normal((1, 32, 4, 4), np.float32),
        "point_coords": np.array([[[5, 6], [50, 40], [0, 0]]], np.float32),
        "point_labels": np.array([[2, 3, -1]], np.float32),
        "mask_input": np.zeros((1, 1, 16, 16), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([64, 64], np.float32),
    }
    without = {**given, **{name: given[name][:, :2] for name in ("point_coords", "point_labels")}}
    keeps, drops = (open_graph(one / "decoder.onnx") for one in (folder, tmp_path / "out"))
    np.testing.assert_array_equal(drops(given)[0], drops(without)[0])
    np.testing.assert_allclose(drops(given)[0], keeps(without)[0], atol=1e-5)
    assert np.abs(keeps(given)[0] - keeps(without)[0]).max() > 0.01


def shapes_of(path):
    """Lengths, or names of what may have any, of every input and output of a file."""
    graph = onnx.load(path).graph
    return {one.name: [side.dim_param or side.dim_value for side in one.type.tensor_type.shape.dim]
            for one in (*graph.input, *graph.output)}  # fmt: skip


@pytest.mark.parametrize("name", ["tensorrt", "samexporter", "cvat", "torch"])
def test_a_fixed_number_of_points(sam, name, tmp_path):
    side = None if name == "torch" else 64
    found = export_model(sam, tmp_path / "out", preset=name, side=side, num_points=5)
    assert found.passed and all(case.id.startswith(("encoder-", "decoder-5_"))
                                for case in found.cases)  # fmt: skip
    if name == "tensorrt":
        assert verify(tmp_path / "out").passed
        shapes = shapes_of(tmp_path / "out" / "decoder.onnx")
        assert shapes["point_coords"] == [1, 5, 2] and shapes["low_res_masks"] == [1, 1, 16, 16]
        assert all(isinstance(side, int) for sides in shapes.values() for side in sides)
        text = (tmp_path / "out" / "README.txt").read_text()
        assert "give 5 points in every prompt" in text and "--minShapes" not in text


@pytest.mark.parametrize("name", ["tinyvit", "samexporter", "web"])
def test_many_prompts_in_a_call(sam, name, tmp_path):
    side = 64 if PRESETS[name].side else None
    found = export_model(sam, tmp_path / "out", preset=name, side=side, many_prompts=True)
    assert found.passed and verify(tmp_path / "out").passed
    assert {case.id.split()[0][-2:] for case in found.cases if "decoder" in case.id} == {
        "_1", "_2", "_3"
    }  # fmt: skip
    facts = json.loads((tmp_path / "out" / "tinyvit.json").read_text())
    shapes = shapes_of(tmp_path / "out" / facts["decoder"])
    assert shapes["point_coords"] == ["num_prompts", "num_points", 2]
    assert shapes["iou_predictions"][0] == "num_prompts"
    assert shapes["mask_input"][0] == 1


def test_a_file_alone_says_itself_which_prompts_it_takes(sam, tmp_path):
    for number, ways in enumerate(({"num_points": 3}, {"many_prompts": True})):
        export_model(sam, tmp_path / f"{number}", **ways)
        alone = tmp_path / f"{number}.onnx"
        (tmp_path / f"{number}" / "decoder.onnx").rename(alone)
        found = verify_against(alone, sam)
        assert found.passed
        assert ("decoder-3_" in found.cases[0].id, found.cases[0].id.count("_")) == (
            (True, 4) if number == 0 else (False, 5)
        )


def test_prompts_of_one_call_that_are_mixed_up_are_found(sam, tmp_path, monkeypatch):
    own = graphs.DecoderGraph.embed_points
    first = lambda self, c, x: own(self, c, x[:1].expand(x.shape))  # noqa: E731
    monkeypatch.setattr(graphs.DecoderGraph, "embed_points", first)
    with pytest.raises(ParityError, match="differs from the model: decoder-"):
        export_model(sam, tmp_path / "out", many_prompts=True)


def test_the_readme_for_tensorrt_has_its_shapes(sam, tmp_path):
    export_model(sam, tmp_path / "a", preset="tensorrt", side=64)
    assert (
        "--maxShapes=point_coords:1x10x2,point_labels:1x10"
        in (tmp_path / "a/README.txt").read_text()
    )
    export_model(sam, tmp_path / "b", preset="tensorrt", side=64, many_prompts=True, num_points=3)
    assert (
        "--maxShapes=point_coords:64x3x2,point_labels:64x3"
        in (tmp_path / "b/README.txt").read_text()
    )
    export_model(sam, tmp_path / "c", preset="tensorrt", part="encoder")
    assert "Shapes" not in (tmp_path / "c/README.txt").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_points": 0}, "num_points must be at least 1, came 0"),
        ({"num_points": 5, "drop_padding": True}, "drop_padding leaves points out of one prompt"),
        ({"many_prompts": True, "drop_padding": True}, "drop_padding leaves points out"),
        ({"num_points": 5, "part": "encoder"}, "are for mask decoders, and there is none"),
        ({"num_points": 5, "preset": "transformers.js"}, "any number of points and prompts by its"),
        ({"many_prompts": True, "preset": "cvat"}, "CVAT's .* takes one prompt at a time"),
        ({"many_prompts": True, "preset": "torch"}, "takes one prompt at a time"),
    ],
)
def test_prompts_that_an_export_does_not_take(sam, arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export_model(sam, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_decoder_are_found(sam, mutant, tmp_path, monkeypatch):
    name, change = MUTANTS[mutant]
    original = getattr(graphs.DecoderGraph, name)

    def changed(self, *values):
        return change(lambda *more: original(self, *more))(*values)

    monkeypatch.setattr(graphs.DecoderGraph, name, changed)
    with pytest.raises(ParityError, match="differs from the model"):
        export_model(sam, tmp_path / "out", single_mask=True)
    assert list(tmp_path.iterdir()) == []


def test_a_swapped_channel_is_found(sam, tmp_path, monkeypatch):
    original = graphs.EncoderGraph.forward
    swapped = lambda self, x: original(self, x[:, [2, 1, 0]])  # noqa: E731
    monkeypatch.setattr(graphs.EncoderGraph, "forward", swapped)
    with pytest.raises(ParityError) as caught:
        export_model(sam, tmp_path / "out", keep_failed=True)
    assert not caught.value.verified.passed
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["verdict"] == "failed"


def test_wrong_arguments(sam, tmp_path):
    with pytest.raises(ValueError, match="unknown preset 'labelme'; known are tinyvit, sam"):
        export_model(sam, tmp_path / "a", preset="labelme")
    with pytest.raises(ValueError, match="opset must be from 16 to 20, came 9"):
        export_model(sam, tmp_path / "a", opset=9)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(FileExistsError, match="is there and not empty"):
        export_model(sam, tmp_path / "full")
    with pytest.raises(ValueError, match="Light HQ-SAM needs a second embedding"):
        export_model(make_tiny_sam(is_hq=True), tmp_path / "hq")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.slow  # 20 s of CPU
def test_the_newer_exporter_does_not_take_the_encoder_at_dynamic_sizes_yet(sam):
    """When this fails, ``graph_backend.trace`` can change over to it."""
    pytest.importorskip("onnxscript")
    from torch.onnx._internal.exporter._errors import ConversionError

    sizes = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    with pytest.raises(ConversionError):
        torch.onnx.export(
            sam.image_encoder, (torch.zeros(2, 3, 75, 58),), dynamo=True, dynamic_shapes=(sizes,)
        )


def test_a_cut_mask_is_compared_in_the_image():
    """One pixel more at the edge moves the box: it is one pixel of the image, not another mask."""
    masks = []
    for right in (19, 20):
        cut = np.ones((1, 1, 10, right - 4), np.uint8)
        cut[0, 0, 1:, 15:] = 0  # the twentieth column has one pixel
        scores = np.zeros((1, 1), np.float32)
        mask, *others = uncut([cut, scores, *map(np.int64, (5, 10, right, 19))], (40, 50))
        assert others == [scores]
        masks.append(mask)
    one, other = masks
    assert one.shape == other.shape == (1, 1, 40, 50)
    assert (one.sum(), other.sum()) == (150, 151)
    assert one[0, 0, 10:20, 5:20].all() and other[0, 0, 10, 20]
    assert comparing._iou(one, other) == 150 / 151
    case = Case("decoder-1", "decoder", ())
    kept = keep(one, "decoder-1 masks")
    found = compare(case, "masks", other, kept, 1e-4)
    assert found.passed and found.value == 1 / 2000 and found.allowed == 1e-3
    assert not compare(case, "masks", ~one, kept, 1e-4).passed
