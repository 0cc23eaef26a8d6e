"""The native engine as a backend; ``scripts/native-check`` builds its wheel and runs this file."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import tinyvit
from tinyvit.checkpoints.files import header_for, write_state_dict
from tinyvit.cli.main import main
from tinyvit.errors import CheckpointError, MissingExtraError
from tinyvit.factory import open_stored
from tinyvit.image_spec import ImageSpec
from tinyvit.inference import Backend, Engine, StageBackend
from tinyvit.inference import native_backend as native
from tinyvit.inference.backend import choose_backend, takes_native
from tinyvit.inference.native_backend import NativeBackend
from tinyvit.modules import TinyViT
from tinyvit.sam.model import build_sam

MakeModel = Callable[..., TinyViT]

needs_library = pytest.mark.skipif(
    find_spec("tinyvit_native") is None,
    reason="tinyvit-native is not installed; scripts/native-check builds it and runs this file",
)


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def starter() -> Path:
    return Path(tinyvit.__file__).parent / "weights" / "sam_2m.safetensors"


def test_without_the_library(make_tiny_vit: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinyvit_native", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tinyvit\[native\]'"):
        Engine(make_tiny_vit(), backend="native", image_spec=ImageSpec.sam(64))


@pytest.mark.parametrize(
    ("backend", "device", "is_installed", "wanted"),
    [
        ("native", "auto", False, True),
        ("auto", "cpu", True, True),
        ("auto", "auto", True, True),
        ("auto", "cpu", False, False),
        ("auto", "cuda", True, False),
        ("torch", "cpu", True, False),
        (object(), "auto", True, False),
    ],
)
def test_who_takes_it(
    backend: object,
    device: str,
    is_installed: bool,
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = object() if is_installed else None
    monkeypatch.setattr("tinyvit.inference.backend.find_spec", lambda name: found)
    monkeypatch.setattr("tinyvit.inference.backend.choose_device", lambda device: "cpu")
    assert takes_native(backend, device) is wanted


@needs_library
def test_every_output_is_the_models(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit()
    backend = NativeBackend(model)
    assert isinstance(backend, Backend) and isinstance(backend, StageBackend)
    x = torch.from_numpy(image(2, 3, 70, 49))
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        logits = model.classify(x)
    output, stages = backend.with_stages(x)
    for got, wanted in zip(
        [output, backend(x), *stages, *backend.stages(x), backend.logits(x)],
        [features, features, *maps, *maps, logits],
        strict=True,
    ):
        assert got.shape == wanted.shape and got.dtype == torch.float32
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert "(checked: error " in backend.explain()


@needs_library
@pytest.mark.parametrize(
    "changes",
    [{"neck_dim": None}, {"neck_dim": None, "head": False}, {"neck_size": 5}, {"in_chans": 4}],
)
def test_a_call_gives_what_forward_gives(
    make_tiny_vit: MakeModel, changes: dict[str, object]
) -> None:
    model = make_tiny_vit(**changes).double().train()
    x = image(1, model.in_chans, 64, 64)
    with torch.inference_mode():
        wanted = copy.deepcopy(model).float().eval()(torch.from_numpy(x)).numpy()
    got = NativeBackend(model)(x)
    assert isinstance(got, np.ndarray) and got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert model.training


@needs_library
def test_it_follows_the_weights(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit()
    backend, x = NativeBackend(model, threads=1), torch.from_numpy(image(1, 3, 64, 64))
    before = backend(x)
    with torch.no_grad():
        model.neck[2].weight.mul_(2)  # type: ignore[index]
        model.neck[3].weight.mul_(3)  # type: ignore[index]
        after = model(x)
    assert not torch.allclose(backend(x), before)
    assert (backend(x) - after).abs().max() <= 1e-4 * after.abs().max()


@needs_library
def test_a_model_that_it_cannot_run(make_tiny_vit: MakeModel) -> None:
    model, x = make_tiny_vit(), torch.from_numpy(image(1, 3, 64, 64))
    model.layers[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"layers\.0 has a forward hook; use backend='torch'"):
        NativeBackend(model)(x)
    engine = Engine(model, device="cpu", image_spec=ImageSpec.sam(64))  # "auto"
    with torch.inference_mode():
        assert torch.allclose(engine.backend(x), model(x), atol=1e-5)
    assert "torch instead (layers.0 has a forward hook)" in engine.explain()


@needs_library
def test_a_fault_of_the_library_is_found(
    make_tiny_vit: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = native.NativeNetwork.logits
    monkeypatch.setattr(native.NativeNetwork, "logits", lambda self, x: 1.01 * right(self, x))
    with pytest.raises(ValueError, match=r"the native form differs by 1\.0e-02; use backend"):
        NativeBackend(make_tiny_vit())(torch.zeros(1, 3, 32, 32))


@needs_library
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "backend 'native' runs on device 'cpu', got 'cuda'"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"precision": "fp16"}, "precision 'fp16' is refused"),
        ({"precision": "int8"}, "precision must be one of"),
    ],
)
def test_wrong_settings(
    make_tiny_vit: MakeModel, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend(make_tiny_vit(), "native", **settings)  # type: ignore[arg-type]


@needs_library
@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_precisions(make_tiny_vit: MakeModel, precision: str) -> None:
    model, x = make_tiny_vit(), torch.from_numpy(image(1, 3, 64, 64))
    backend, choice = choose_backend(model, "native", precision=precision)
    assert isinstance(backend, NativeBackend)
    assert backend.precision == precision or precision == "auto"
    assert choice.startswith(f"native {tinyvit.__version__} on cpu, {backend.precision} (")
    with torch.inference_mode():
        wanted = model(x)
    limit = {"fp32": 1e-4, "bf16": 0.1}[backend.precision]
    assert (backend(x) - wanted).abs().max() <= limit * wanted.abs().max()


@needs_library
def test_a_file_gives_what_torch_gives(tmp_path: Path) -> None:
    photo = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    pickled = tmp_path / "starter.pt"
    model = tinyvit.create_model(checkpoint=starter())
    folder = tmp_path / "folder"
    tinyvit.save_pretrained(model, folder)
    torch.save(model.state_dict(), pickled)
    plain = Engine(model, backend="torch")
    embedding = plain.embed(photo)
    [wanted] = plain.stream(photo, stages=True)
    assert wanted.stages is not None
    for source in ("tinyvit_sam_2m", starter(), folder, pickled):
        engine = Engine(source, backend="native")
        assert engine.image_spec == plain.image_spec
        assert engine.summary() == "native, cpu, fp32"
        assert engine.weights_sha256() == plain.weights_sha256()
        assert torch.allclose(engine.embed(photo), embedding, atol=1e-4)
        [encoded] = engine.stream(photo, stages=True)
        assert encoded.stages is not None
        for got, exact in zip(encoded.stages, wanted.stages, strict=True):
            assert np.abs(got - exact).max() <= 1e-4 * np.abs(exact).max()
        maps, _ = engine.stages(photo)
        assert all(np.array_equal(a, b) for a, b in zip(maps, encoded.stages, strict=True))


@needs_library
def test_a_file_that_makes_no_network(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = dict(open_stored(starter()).tensors)
    del tensors["layers.1.blocks.0.attn.qkv.bias"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: layers\.1\.blocks\.0\.attn\.qkv\.bias"):
        open_stored(tmp_path / "short.safetensors")
    stored = replace(open_stored(starter()), tensors=tensors)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.bias' is missing"):
        NativeBackend(stored)
    with pytest.raises(CheckpointError, match="no such file"):
        Engine(tmp_path / "none.safetensors", backend="native")


@needs_library
@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_or_lying_file(kept: float, tmp_path: Path) -> None:
    content = starter().read_bytes()
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    for open_file in (open_stored, partial(Engine, backend="native")):
        with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
            open_file(path)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    names = [name for name in header if name.endswith("attn.qkv.weight")]
    header[names[0]]["shape"] = header[names[0]]["shape"][::-1]  # as many bytes, another shape
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(CheckpointError, match=r"attn\.qkv\.weight has shape \["):
        open_stored(path)


@needs_library
def test_masks_of_a_segmenter() -> None:
    photo = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    sam = build_sam(starter())
    prompts = [[tinyvit.Prompt(points=[[60, 40]])]]
    ours, theirs = (
        next(iter(tinyvit.Segmenter(sam, backend=name).segment([photo], prompts)))
        for name in ("native", "torch")
    )
    assert np.abs(ours.low_res_logits[0] - theirs.low_res_logits[0]).max() < 1e-2


BLOCKED = """
import sys
import importlib.util
class Blocked:
    def find_spec(self, name, *a):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else find(name, *a)
"""

WITHOUT_TORCH = """
import sys
import numpy as np, tinyvit
for backend in ("native", "auto"):
    engine = tinyvit.Engine("tinyvit_sam_2m", backend=backend)
    photos = [np.full((90, 120, 3), value, np.uint8) for value in (0, 200)]
    shapes = {encoded.features.shape for encoded in engine.stream(photos)}
    assert shapes == {(256, 16, 16)}, shapes
    assert "native" in engine.explain(), engine.explain()
    engine.weights_sha256()
    segmenter = tinyvit.Segmenter(backend=backend)
    prompts = [{"points": [[60, 40]]}, {"box": [10, 10, 60, 60]}]
    (masks,) = segmenter.segment([photos[0]], [prompts])
    assert [mask.shape for mask in masks] == [(90, 120)] * 2, masks
    predictor = tinyvit.SamPredictor.from_checkpoint(backend=backend)
    predictor.set_image(photos[1])
    assert predictor.predict(box=np.array([10, 10, 60, 60]))[0].shape == (3, 90, 120)
    generator = tinyvit.SamAutomaticMaskGenerator("tinyvit_sam_2m", 2, backend=backend)
    generator.pred_iou_thresh = generator.stability_score_thresh = 0
    assert generator.generate(photos[0])
    try:
        segmenter.model
    except tinyvit.errors.MissingExtraError as err:
        assert "tinyvit[torch]" in str(err), err
    else:
        raise AssertionError("a Sam without torch")
from tinyvit.cli.main import main
photo = sys.argv[1]
prompts = ["--point", "60,40", "--box", "10,10,60,60"]
sys.argv = ["tinyvit", "segment", photo, *prompts, "-o", sys.argv[2]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not [name for name in sys.modules if name.startswith("torch.")]
"""


@needs_library
def test_torch_is_not_needed(tmp_path: Path) -> None:
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(np.full((90, 120, 3), 99, np.uint8)).save(photo)
    code = BLOCKED + WITHOUT_TORCH
    subprocess.run([sys.executable, "-c", code, str(photo), str(out)], check=True)
    assert sorted(path.name for path in out.iterdir()) == [
        f"photo.{end}" for end in ("json", "mask-1.png", "overlay.png")
    ]


@pytest.fixture
def without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``without_torch("encode", ...)``: what a command prints that has no torch in any process."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKED)
    places = [str(tmp_path / "site"), str(Path(tinyvit.__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))

    def run(*words: object) -> str:
        command = [sys.executable, "-m", "tinyvit", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@needs_library
@pytest.mark.parametrize("name", ["starter", "classifier"])
def test_encode_without_torch(
    name: str, tmp_path: Path, make_tiny_vit: MakeModel, without_torch: Callable[..., str]
) -> None:
    photo = tmp_path / "photo.png"
    pixels = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    file, more = starter(), ()
    if name == "classifier":
        file, more = write_classifier(tmp_path, make_tiny_vit), ("--size", 64)
    words = ("encode", photo, "--checkpoint", file, *more, "-o")
    without_torch(*words, tmp_path / "native")
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in (*words, tmp_path / "torch", "--backend", "torch", "-q")])
    assert not end.value.code
    found = {}
    for folder in ("native", "torch"):
        assert (tmp_path / folder / "photo.png").is_file()
        with safe_open(tmp_path / folder / "photo.safetensors", framework="numpy") as stored:
            found[folder] = stored.get_tensor("features"), stored.metadata()
    (ours, about), (theirs, about_theirs) = found["native"], found["torch"]
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * abs(theirs).max())
    assert about == about_theirs


@needs_library
def test_classify_without_torch(
    tmp_path: Path, make_tiny_vit: MakeModel, without_torch: Callable[..., str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((90, 120, 3), 99, np.uint8)).save(photo)
    file = write_classifier(tmp_path, make_tiny_vit)
    found = json.loads(without_torch("classify", photo, "--checkpoint", file, "--json"))
    top = found["pictures"][0]["top"]
    logits = Engine(tinyvit.create_model(checkpoint=file), backend="torch").classify(photo)[0]
    shares = logits.softmax(0)
    assert [row["class"] for row in top] == shares.argsort(descending=True).tolist()
    assert [row["label"] for row in top] == [CLASSES[row["class"]] for row in top]
    for row in top:
        assert row["probability"] == pytest.approx(float(shares[row["class"]]), abs=1e-5)


@needs_library
@pytest.mark.parametrize(
    ("words", "gflop"),
    [
        (("--model", "tiny_vit_2m_sam"), 2 * 0.83 / 16),
        (("--checkpoint", "tinyvit_sam_2m", "--precision", "bf16"), 2 * 0.83 / 16),
    ],
)
def test_bench_without_torch(
    words: tuple[str, ...], gflop: float, without_torch: Callable[..., str]
) -> None:
    how = ("--size", 64, "--repeats", 1, "--threads", 1, "--json")
    [result] = json.loads(without_torch("bench", *words, *how))["results"]
    assert result["backend"] == "native" and "1 threads" in result["chose"]
    assert (result["size"], result["threads"], result["gflop"]) == ([64, 64], 1, gflop)
    assert result["first_result_s"] > 0 and result["peak_memory"] < 200e6
    is_exact = "bf16" not in words
    assert (result["share"] is not None) is (result["matmul_gflops"] is not None) is is_exact


def write_classifier(folder: Path, make_tiny_vit: MakeModel) -> Path:
    model = make_tiny_vit(neck_dim=None, strides=(2, 2, 2))
    header = header_for("tinyvit", model.strides, classes=CLASSES)
    write_state_dict(folder / "classifier.safetensors", model.state_dict(), metadata=header)
    return folder / "classifier.safetensors"


CLASSES = ("ant", "bee", "cat", "dog", "elk")


@needs_library
def test_torch_is_not_loaded_where_it_is_there(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((90, 120, 3), 99, np.uint8)).save(photo)
    program = """
import sys
from tinyvit.cli.main import main
sys.argv[:] = ["tinyvit", "segment", sys.argv[1], "--everything", "--points-per-side", "2",
               "--pred-iou-thresh", "0", "--stability-score-thresh", "0", "-o", sys.argv[2]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(photo), str(tmp_path / "out")], check=True)
