"""``tinyvit embed``, ``tinyvit store`` and ``tinyvit search`` as they are typed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import tiny
from tinyvit import EmbeddingStore, ImageEmbedding
from tinyvit.cli.embed import grouped, in_words
from tinyvit.hub import save_pretrained


@pytest.fixture
def photos(tmp_path, photo):
    for number in range(6):
        photo(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", 30, 40 + number, number)
    return tmp_path / "photos"


@pytest.fixture
def url(tmp_path):
    return tmp_path / "photos.lance"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options for a small encoder."""
    folder = tmp_path_factory.mktemp("encoder") / "small"
    return ("--checkpoint", save_pretrained(tiny.make_tiny_engine().model, folder))


def test_a_store_is_made_kept_and_brought_up_to_date(run, photos, url, small, photo):
    (photos / "empty.jpg").write_bytes(b"")
    made = run("embed", photos, "-o", url, *small)
    assert (made.code, made.out) == (1, "")
    lines = made.err.splitlines()
    backends = ("native", "torch")  # whichever is installed here
    assert any(f"{small[1]}: {name}, cpu, fp32, input 64x64" in lines[0] for name in backends)
    assert lines[-3].startswith("failed: empty.jpg: the image in ")
    assert lines[-2].startswith("stored 6, kept 0, taken over 0, failed 1, gone 0; 0.0 MB in ")
    assert lines[-2].endswith(f": {url}")
    assert lines[-1] == "failed 1, named above"
    again = run("embed", photos, "-o", url, "--json")
    assert again.code == 1
    assert {**again.json, "seconds": 0} == {
        **{"store": str(url), "stored": 0, "copied": 0, "kept": 6, "gone": 0, "seconds": 0},
        **{
            "nbytes": 0,
            "failed": [{"path": "empty.jpg", "error": again.json["failed"][0]["error"]}],
        },
    }
    (photos / "empty.jpg").unlink()
    os.rename(photos / "a/0.png", photos / "a/zero.png")
    photo(photos / "b/1.png", 50, 50, 99)
    moved = run("embed", photos, "-o", url)
    assert moved.code == 0
    assert "stored 1, kept 4, taken over 1, failed 0, gone 2; " in moved.err
    assert "rows of files that are gone stay; --prune deletes them" in moved.err
    pruned = run("embed", photos, "-o", url, "--prune")
    assert "stored 0, kept 6, taken over 0, failed 0, deleted 2; " in pruned.err


def test_a_dry_run_writes_nothing(run, photos, url, small):
    told = run("embed", photos, "-o", url, *small, "--dry-run")
    assert told.code == 0 and not url.exists()
    assert [line.split()[0] for line in told.out.splitlines()][:2] == ["new", "to"]
    assert "new               6" in told.out and "hours)" in told.out
    found = run("embed", photos, "-o", url, *small, "--dry-run", "--json").json
    assert found["new"] == 6 and found["nbytes"] == 6 * (16 * 4 * 4 * 2 + 64)


def test_parts(run, photos, url, small):
    for part in ("1/2", "2/2"):
        assert run("embed", photos, "-o", url, *small, "--part", part).code == 0
    assert len(EmbeddingStore.open(url)) == 6
    for part in ("0/2", "3/2", "a/b", "2"):
        wrong = run("embed", photos, "-o", url, "--part", part)
        assert wrong.code == 2
        assert f"{part!r} is not I/N with I from 1 to N" in " ".join(wrong.err.split())


def test_errors_are_one_line(run, photos, url, small, monkeypatch, tmp_path):
    none = run("store", "info", url)
    assert none.code == 1
    assert f"error: there is no embedding store at {url}; make one with: tinyvit em" in none.err
    run("embed", photos, "-o", url, *small)
    other = save_pretrained(tiny.make_tiny_engine(seed=1).model, tmp_path / "other")
    wrong = run("embed", photos, "-o", url, "--checkpoint", other)
    assert wrong.code == 1 and "weights_sha256 is" in wrong.err
    sized = run("embed", photos, "-o", url, "--size", 32)
    assert sized.code == 1 and "leave --model and --size out" in sized.err
    for name in ("embed", "search"):
        words = [photos, "-o", url] if name == "embed" else [url, "a/0.png"]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "lance", None)
            missing = run(name, *words)
        assert missing.code == 1 and "pip install 'tinyvit[store]'" in missing.err


def test_light_hq_sam_keeps_its_early_map(run, photos, url, tmp_path):
    file = tiny.write_tiny_sam(tmp_path / "hq.safetensors", is_hq=True)
    assert run("embed", photos, "-o", url, "--checkpoint", file).code == 0
    assert EmbeddingStore.open(url).recipe.early
    assert EmbeddingStore.open(url)["a/0.png"].interm_features is not None
    assert run("embed", photos, "-o", url).code == 0


def test_info_says_what_a_store_is(run, photos, url, small):
    (photos / "empty.jpg").write_bytes(b"")
    run("embed", photos, "-o", url, *small, "--dtype", "int8")
    told = run("store", "info", url)
    assert told.code == 0
    assert "images        6, and 1 that failed" in told.out
    assert "features and pooled vectors, int8" in told.out
    assert "failed: empty.jpg: the image in" in told.out
    found = run("store", "info", url, "--json").json
    assert found["images"] == 6 and found["recipe"]["dtype"] == "int8"
    assert found["made_by"]["backend"] in ("native", "torch")  # what is installed here


def test_verify_finds_and_repairs_damage(run, photos, url, small):
    run("embed", photos, "-o", url, *small)
    whole = run("store", "verify", url)
    assert whole.code == 0
    assert "6 rows are as they were written, 0 of them of images that failed; 0 d" in whole.err
    store = EmbeddingStore.open(url)
    where = "path = 'a/2.png'"
    store.dataset.update({"sha256": f"'{'0' * 64}'"}, where=where)
    broken = run("store", "verify", url, "--json")
    assert broken.code == 1 and broken.json["damaged"] == ["a/2.png"]
    assert "damaged: a/2.png" in broken.err
    assert run("store", "verify", url, "--repair").code == 0
    assert run("embed", photos, "-o", url, "--json").json["stored"] == 1
    assert run("store", "verify", url).code == 0


def test_masks_of_a_store_are_those_of_the_images(run, photos, url, tmp_path):
    file = tiny.write_tiny_sam(tmp_path / "sam.safetensors")
    run("embed", photos, "-o", url, "--checkpoint", file)
    proof = run("store", "verify", url, "--masks", 3, "--checkpoint", file, "--json")
    assert proof.code == 0
    masks = proof.json["masks"]
    assert (masks["images"], masks["masks"], masks["missing"]) == (3, 27, 0)
    assert masks["mean_iou"] > 0.97
    os.rename(photos, tmp_path / "moved")
    lost = run("store", "verify", url, "--masks", 3, "--checkpoint", file)
    assert lost.code == 1 and "say with --images FOLDER where" in lost.err
    moved = run(
        *("store", "verify", url, "--masks", 3, "--checkpoint", file),
        *("--images", tmp_path / "moved"),
    )
    assert moved.code == 0 and "27 masks on 3 images: mean IoU" in moved.err


def test_index_puts_a_store_in_order(run, photos, url, small, photo, monkeypatch):

    run("embed", photos, "-o", url, *small)
    for number in range(8):
        photo(photos / f"{number}.png", 20, 20, 50 + number)
        run("embed", photos, "-o", url)
    told = run("store", "index", url)
    assert told.code == 0 and "indexes of paths and contents, " in told.err
    assert "vectors are indexed" not in told.err
    assert len(EmbeddingStore.open(url).dataset.get_fragments()) < 8


@pytest.mark.parametrize("to", ["files", "npy", "parquet"])
def test_export(run, photos, url, small, tmp_path, to):
    run("embed", photos, "-o", url, *small)
    done = run("store", "export", url, "--to", to, "-o", tmp_path / "out")
    assert done.code == 0 and "wrote 6 rows of" in done.err
    store = EmbeddingStore.open(url)
    if to == "files":
        read = ImageEmbedding.load(tmp_path / "out" / "a" / "0.png.safetensors")
        np.testing.assert_array_equal(read.features, store["a/0.png"].features)
        assert read.placement == store["a/0.png"].placement
    elif to == "npy":
        names = (tmp_path / "out" / "paths.txt").read_text().splitlines()
        matrix = np.load(tmp_path / "out" / "pooled.npy")
        np.testing.assert_array_equal(matrix, store.vectors()[1])
        assert names == list(store)
    else:
        from pyarrow import parquet

        table = parquet.read_table(tmp_path / "out" / "rows.parquet")
        assert table["path"].to_pylist() == list(store)
        assert "features" not in table.column_names and "pooled" in table.column_names
    again = run("store", "export", url, "--to", to, "-o", tmp_path / "out")
    assert again.code == 1 and "is there and not empty" in again.err


def test_search(run, photos, url, small, photo, tmp_path):
    run("embed", photos, "-o", url, *small)
    found = run("search", url, "a/0.png", "-k", 3, "--sheet", tmp_path / "sheet.png")
    assert found.code == 0
    store = EmbeddingStore.open(url)
    assert found.out.splitlines() == [
        f"{match.similarity:.4f}  {match.path}" for match in store.similar("a/0.png", 3)
    ]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 700
    by_file = run("search", url, photos / "a" / "0.png", "-k", 3, "--json").json
    assert [one["path"] for one in by_file["matches"]] == [
        match.path for match in store.similar("a/0.png", 3)
    ]
    new = photo(tmp_path / "new.png", 33, 44, 77)
    (encoded,) = store.load_engine().stream(new, pooled=True)
    by_new = run("search", url, new, "-k", 2, "--json").json
    assert [one["path"] for one in by_new["matches"]] == [
        match.path for match in store.similar(encoded.pooled, 2)
    ]
    unknown = run("search", url, "a/9.png")
    assert unknown.code == 1 and "has no image 'a/9.png'; the nearest are " in unknown.err


def test_a_signal_ends_a_run_with_everything_committed(photos, url, small, photo):
    for number in range(300):
        photo(photos / "many" / f"{number}.png", 20, 20, number)
    words = ("-m", "tinyvit", "embed", photos, "-o", url, *small, "--batch-size", 1)
    running = subprocess.Popen(
        [sys.executable, *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    folder = url / "_attempts"
    while running.poll() is None:  # until some are done
        if any(path.read_text().count('"end"') > 5 for path in folder.glob("*.jsonl")):
            break
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    err = running.communicate()[1]
    assert running.returncode == 130 and err.endswith("interrupted\n"), err
    assert not any(folder.iterdir())
    stored = len(EmbeddingStore.open(url))
    assert 0 < stored < 306


def test_words():
    assert [in_words(n) for n in (20, 90, 130, 10_000, 600_000)] == [
        *("20 s", "90 s", "2 minutes", "3 hours", "7 days"),
    ]
    assert grouped(1_000_000) == "1 000 000"
