"""Exported classifiers and features as engines, and in ``tinyvit classify`` without torch."""

import json

import numpy as np
import pytest

from tiny import make_tiny_classifier, noise, write_image
from tinyvit.embed.recipe import check_exact
from tinyvit.errors import CheckpointError
from tinyvit.inference import Engine
from tinyvit.inference.backend import LogitsBackend, StageBackend
from tinyvit.inference.bundle import open_pair
from without import run_without

pytest.importorskip("onnx")
WAYS = [("tinyvit", "onnx"), ("tinyvit", "openvino"), ("openvino", "openvino"),
        ("tensorrt", "onnx"), ("web", "onnx")]  # fmt: skip
SIZES = ((32, 32), (1, 1), (33, 90), (200, 7), (32, 24), (5, 300))


@pytest.fixture(scope="module")
def model():
    return make_tiny_classifier(classes=4, size=32)


@pytest.mark.parametrize("preset, backend", WAYS)
def test_a_classifier_gives_torchs_logits(preset, backend, exported, model):
    folder = exported(preset, part="classifier")
    ours = Engine(folder, backend=backend, threads=1, batch_size=3)
    theirs = Engine(model, backend="torch")
    assert isinstance(ours.backend, LogitsBackend) and not isinstance(ours.backend, StageBackend)
    assert (ours.backend.num_classes, ours.backend.facts.classes) == (
        4, ("cat", "dog", "gnu", "emu")
    )  # fmt: skip
    assert ours.weights_sha256() == theirs.weights_sha256()
    assert ours.image_spec == theirs.image_spec
    images = [noise(*size) for size in SIZES]
    wanted = theirs.logits(images)
    assert np.array_equal(theirs.classify(images).numpy(), wanted)
    allowed = (2e-2 if preset == "web" else 1e-4) * np.abs(wanted).max()
    np.testing.assert_allclose(ours.logits(images), wanted, atol=allowed)
    np.testing.assert_allclose(ours.classify(images[0]), wanted[:1], atol=allowed)
    np.testing.assert_allclose(next(ours.stream(images)).features, wanted[0], atol=allowed)
    ours.close()


@pytest.mark.parametrize("preset, backend", WAYS)
def test_features_are_torchs_stages(preset, backend, exported, model):
    ours = Engine(exported(preset, part="features"), backend=backend, batch_size=2)
    theirs = Engine(model, backend="torch")
    assert isinstance(ours.backend, StageBackend) and not isinstance(ours.backend, LogitsBackend)
    images = [noise(*size) for size in SIZES]
    allowed = 2e-2 if preset == "web" else 1e-4
    for mine, its in zip(ours.stream(images, stages=True), theirs.stream(images, stages=True),
                         strict=True):  # fmt: skip
        assert len(mine.stages) == len(its.stages) == 4
        for one, other in zip(mine.stages, its.stages, strict=True):
            np.testing.assert_allclose(one, other, atol=allowed * np.abs(other).max())
        np.testing.assert_array_equal(mine.features, mine.stages[-1])
    assert len(ours.stages(images[0])[0]) == 4


def test_what_a_part_does_not_give(exported):
    classifier, features, pair = (
        Engine(folder) for folder in
        (exported(part="classifier"), exported(part="features"), exported())
    )  # fmt: skip
    image = noise(20, 20)
    for engine in (features, pair):
        with pytest.raises(ValueError, match="gives no logits"):
            engine.logits(image)
    for engine in (classifier, pair):
        with pytest.raises(ValueError, match="gives no stages"):
            next(engine.stream(image, stages=True))
    for engine in (classifier, features):
        with pytest.raises(ValueError, match="gives no vector of an image; embed with the check"):
            next(engine.stream(image, pooled=True))
        with pytest.raises(CheckpointError, match="embeddings of a store come from an encoder"):
            check_exact(engine.backend)
    assert next(pair.stream(image, pooled=True)).pooled.shape == (32,)
    check_exact(pair.backend)
    with pytest.raises(CheckpointError, match="has no encoder, only classifier; export again"):
        open_pair(exported(part="classifier"))


CLASSIFY = """
import sys
from tinyvit import Engine
from tinyvit.errors import MissingExtraError
try:
    Engine(sys.argv[2]).classify(sys.argv[1])
except MissingExtraError as err:
    print(err, file=sys.stderr)
from tinyvit.cli.main import main
try:
    main(["classify", sys.argv[1], "--checkpoint", sys.argv[2], "--json", *sys.argv[3:]])
finally:
    assert "torch" not in sys.modules
"""


def test_classify_without_torch(exported, model, tmp_path):
    image, folder = write_image(tmp_path / "a.png", 40, 30), exported(part="classifier")
    missing = ("torch", "onnx", "tinyvit_native")
    found = json.loads(run_without(missing, CLASSIFY, image, folder))
    shares = Engine(model, backend="torch").classify(image)[0].softmax(0)
    assert (found["classes"], found["failed"]) == (4, [])
    (row,) = found["pictures"]
    names = ("cat", "dog", "gnu", "emu")
    assert [names[one["class"]] for one in row["top"]] == [one["label"] for one in row["top"]]
    assert [one["class"] for one in row["top"]] == shares.argsort(descending=True).tolist()
    for one in row["top"]:
        assert abs(one["probability"] - float(shares[one["class"]])) < 1e-5
    labels = tmp_path / "labels.txt"
    labels.write_text("v\nw\nx\ny\n")
    given = run_without(missing, CLASSIFY, image, folder, "--labels", labels, "--top-k", 1)
    assert json.loads(given)["pictures"][0]["top"][0]["label"] == "vwxy"[int(shares.argmax())]


@pytest.mark.parametrize(
    "part, words, said",
    [
        ("features", (), "has no classifier, only features; export one with --part classifier"),
        (None, (), "has no classifier, only encoder"),
        ("classifier", ("--size", 64), "was exported at one size of one model; leave --size out"),
        ("classifier", ("--backend", "torch"), "'torch' does not run these exported files"),
    ],
)
def test_what_classify_refuses(part, words, said, exported, tmp_path):
    from typer.testing import CliRunner

    from tinyvit.cli.main import app

    image = write_image(tmp_path / "a.png", 20, 20)
    folder = exported(part=part)
    done = CliRunner().invoke(app, ["classify", str(image), "--checkpoint", str(folder),
                                    *map(str, words)])  # fmt: skip
    assert done.exit_code != 0
    assert said in f"{done.output} {done.exception}"
