"""``--checkpoint exported/`` in the verbs that take it, and a server of such a folder."""

import asyncio

import numpy as np
import pytest
import safetensors.numpy

from tinyvit.bench.workers import make
from tinyvit.inference import Engine
from tinyvit.serve import ServeSettings
from tinyvit.serve.schema import EverythingRequest
from tinyvit.serve.service import Service

pytest.importorskip("onnx")


def test_segment(run, photo, exported, tmp_path):
    image, out = photo(tmp_path / "a.png", 48, 64), tmp_path / "out"
    words = ("segment", image, "--checkpoint", exported(), "-o", out, "--json")
    done = run(*words, "--point", "20,30", "--multimask", "--threads", 1)
    assert done.code == 0, done.err
    (row,) = done.json["written"]
    assert (row["count"], len(done.json["model_sha256"])) == (3, 64)
    assert (out / "a.mask-1-3.png").is_file() and (out / "a.overlay.png").is_file()
    again = run(*words, "--point", "20,30", "--multimask", "--threads", 1)
    assert len(again.json["skipped"]) == 1
    other = run(*words, "--point", "20,30", "--multimask", "--backend", "openvino")
    assert other.code == 0 and len(other.json["skipped"]) == 1


def test_everything(run, photo, exported, tmp_path):
    words = ("segment", photo(tmp_path / "a.png", 48, 64), "--everything", "--points-per-side", 3)
    more = ("--pred-iou-thresh", 0, "--stability-score-thresh", 0, "-o", tmp_path / "out", "--json")
    done = run(*words, *more, "--checkpoint", exported())
    assert done.code == 0 and done.json["written"][0]["count"] > 0
    single = run(*words, *more, "--checkpoint", exported("samexporter", side=64))
    assert single.code == 1 and "export again with --all-masks" in single.err


def test_encode(run, photo, exported, tmp_path):
    image, out = photo(tmp_path / "a.png", 48, 64), tmp_path / "out"
    done = run("encode", image, "--checkpoint", exported(), "-o", out, "--json")
    assert done.code == 0, done.err
    assert (out / "a.png").is_file()  # the photograph and the features; there are no stages
    found = safetensors.numpy.load_file(out / "a.safetensors")["features"]
    (wanted,) = Engine(exported()).stream([image])
    np.testing.assert_allclose(found, wanted.features, atol=1e-5)
    assert done.json["weights_sha256"] == Engine(exported()).weights_sha256()


def test_embed(run, photo, exported, tmp_path):
    pytest.importorskip("lance")
    image, url = photo(tmp_path / "photos" / "a.png", 48, 64), tmp_path / "photos.lance"
    words = ("embed", image.parent, "-o", url, "--json")
    done = run(*words, "--checkpoint", exported(), "--threads", 1)
    assert done.code == 0, done.err
    assert done.json["stored"] == 1
    photo(tmp_path / "photos" / "b.png", 40, 64, 1)
    again = run(*words)  # by the encoder in the store
    assert again.code == 0, again.err
    assert (again.json["stored"], again.json["kept"]) == (1, 1)
    assert ": onnx, cpu, fp32" in again.err
    found = run("search", url, photo(tmp_path / "c.png", 30, 30, 2), "--json")
    assert found.code == 0, found.err
    assert len(found.json["matches"]) == 2
    verified = run("store", "verify", url, "--masks", 2, "--checkpoint", exported(), "--json")
    assert verified.code == 0, verified.err
    assert verified.json["masks"]["worst_iou"] > 0.9
    sized = run("embed", image, "-o", tmp_path / "x", "--checkpoint", exported(), "--size", 32)
    assert sized.code == 1 and "was exported at one size of one model" in sized.err


@pytest.mark.parametrize(
    "words, said",
    [
        (("--size", 32), "was exported at one size of one model; leave --size out"),
        (("--backend", "torch"), "'torch' does not run these exported files"),
        (("--no-pad",), "an exported decoder takes padded images"),
    ],
)
def test_what_an_exported_folder_does_not_do(words, said, run, photo, exported, tmp_path):
    image = photo(tmp_path / "a.png", 20, 30)
    more = ("--checkpoint", exported(), "--point", "3,3", "-o", tmp_path / "out")
    done = run("segment", image, *more, *words)
    assert done.code == 1 and said in done.err


def test_bench(run, exported):
    spec = {"model": None, "checkpoint": str(exported()), "size": None, "batch": 2}
    spec |= {"backend": "auto", "precision": "fp32", "device": "auto", "threads": 1}
    call, facts = make(spec)
    assert call().shape == (2, 32, 4, 4)
    assert (facts["backend"], facts["size"], facts["threads"]) == ("onnx", (64, 64), 1)
    assert facts["gflop"] == 0  # no variant of the catalog
    sized = run("bench", "--checkpoint", exported(), "--size", 64)
    assert sized.code == 1 and "leave --size out" in sized.err


def test_serve(photo, exported, tmp_path):
    service = Service(ServeSettings(checkpoint=str(exported()), threads=1))
    service.load()
    assert service.state == "ready"
    assert service.model.sha256 == Engine(exported()).weights_sha256()
    data = photo(tmp_path / "a.png", 40, 50).read_bytes()

    async def ask():
        stored = await service.encode(data, "me")
        masks, _ = await service.segment(stored.id, [], "auto", "me")
        options = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "points_per_side": 2}
        records, _, _ = await service.everything(stored.id, EverythingRequest(**options), "me")
        return stored, masks, records

    stored, masks, records = asyncio.run(ask())
    service.close()
    assert stored.embedding.features.shape == (32, 4, 4)
    assert len(masks) == 0 and len(records) > 0
