"""``embed_images``: what is encoded, copied, kept, failed and deleted, and what it refuses."""

import os
import shutil
import unicodedata

import numpy as np
import pytest

import tiny
from tiny import make_tiny_engine
from tinyvit import CheckpointError, EmbeddingStore, embed_images
from tinyvit.embed import EmbedEstimate, EmbedOutcome, EmbedReport, estimate, run

NAMES = ["a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png", "b/5.png"]


def counts(report):
    """(stored, copied, kept, failed, gone)."""
    return report.stored, report.copied, report.kept, len(report.failed), report.gone


def facts(store):
    """What is stored of each image, as it would be compared."""
    return {row.path: row.features.tobytes() for _, row in store.iterate(raw=True)}


@pytest.fixture
def encoded(monkeypatch, engine):
    """The number of images that were encoded."""
    count = [0]
    encode = type(engine).encode

    def counting(self, inputs, **options):
        for found in encode(self, inputs, **options):
            count[0] += 1
            yield found

    monkeypatch.setattr(type(engine), "encode", counting)
    return count


def test_a_folder_becomes_a_store_once(photos, url, engine, encoded):
    told, shown = [], []
    report = embed_images(
        photos, url, engine, tell=told.append, progress=lambda *now: shown.append(now)
    )
    assert isinstance(report, EmbedReport)
    assert counts(report) == (6, 0, 0, 0, 0)
    assert told == [EmbedOutcome(name, "stored") for name in NAMES]
    assert shown == [(n, 6, 0) for n in range(1, 7)]
    store = EmbeddingStore.open(url)
    assert list(store) == NAMES
    for name in NAMES:
        (wanted,) = engine.stream(photos / name, pooled=True)
        got = store[name]
        assert np.array_equal(got.features, wanted.features.astype(np.float16))
        assert got.placement == wanted.placement
        assert got.image_spec == engine.image_spec
        assert got.weights_sha256 == engine.weights_sha256()
        assert got.precision == "fp32"
    before, encoded[0] = facts(store), 0
    assert counts(embed_images(photos, url)) == (0, 0, 6, 0, 0)  # by the encoder in the store
    assert encoded[0] == 0
    assert facts(EmbeddingStore.open(url)) == before


def test_what_is_new_or_changed_is_encoded_and_the_rest_copied(photos, url, engine, encoded):
    embed_images(photos, url, engine)
    encoded[0] = 0
    tiny.write_image(photos / "a/0.png", 30, 31, seed=100)  # changed
    tiny.write_image(photos / "c/new.png", 30, 31, seed=101)
    (photos / "a/2.png").rename(photos / "a/renamed.png")
    os.utime(photos / "b/1.png", ns=(1, 1))  # touched
    shutil.copyfile(photos / "b/3.png", photos / "b/copy.png")
    shutil.copyfile(photos / "c/new.png", photos / "c/same.png")  # both are new
    (photos / "b/5.png").unlink()
    report = embed_images(photos, url, engine)
    assert counts(report) == (2, 4, 2, 0, 2)
    assert encoded[0] == 2
    store = EmbeddingStore.open(url)
    assert {"a/2.png", "b/5.png", "c/same.png", "a/renamed.png"} <= set(store)
    assert np.array_equal(store["a/renamed.png"].features, store["a/2.png"].features)
    assert np.array_equal(store["c/same.png"].features, store["c/new.png"].features)
    assert store["a/0.png"].original_size == (30, 31)
    assert counts(embed_images(photos, url, engine, prune=True)) == (0, 0, 8, 0, 2)
    assert sorted(EmbeddingStore.open(url)) == sorted(
        path.relative_to(photos).as_posix() for path in photos.rglob("*.png")
    )


def test_content_is_checked_where_asked_for(photos, url, engine, encoded):
    embed_images(photos, url, engine)
    encoded[0] = 0
    state = (photos / "a/0.png").stat()
    tiny.write_image(photos / "a/0.png", 24, 40, seed=100)  # of the same size, and the same time
    assert (photos / "a/0.png").stat().st_size == state.st_size  # noise cannot be compressed
    os.utime(photos / "a/0.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert counts(embed_images(photos, url, engine)) == (0, 0, 6, 0, 0)
    assert counts(embed_images(photos, url, engine, check="content")) == (1, 0, 5, 0, 0)
    assert encoded[0] == 1


def test_a_broken_image_is_a_row_with_a_reason(photos, url, engine):
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_text("no image")
    whole = (photos / "a/0.png").read_bytes()
    (photos / "short.png").write_bytes(whole[: len(whole) // 2])
    (photos / "dangling.png").symlink_to(photos / "nowhere.png")
    os.mkfifo(photos / "pipe.png")
    report = embed_images(photos, url, engine)
    assert counts(report) == (6, 0, 0, 5, 0)
    store = EmbeddingStore.open(url)
    reasons = {row.path: row.reason for row in store.rows("failed")}
    assert reasons == dict(report.failed)
    assert "is empty (0 bytes)" in reasons["empty.jpg"]
    assert "it is text" in reasons["text.jpg"]
    assert "cut short" in reasons["short.png"]
    assert "No such file" in reasons["dangling.png"]
    assert "it is no file" in reasons["pipe.png"]
    assert len(store) == 6
    assert counts(embed_images(photos, url, engine)) == (0, 0, 6, 5, 0)  # still named, not read
    (photos / "nowhere.png").write_bytes(whole)
    assert counts(embed_images(photos, url, engine)) == (0, 2, 6, 4, 0)  # it changed
    (photos / "empty.jpg").write_bytes(whole)
    assert counts(embed_images(photos, url, engine, retry_failed=True)) == (0, 1, 8, 3, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_it_fails(photos, url, engine):
    (photos / "a/0.png").chmod(0)
    assert "Permission denied" in embed_images(photos, url, engine).failed[0][1]


def test_a_file_that_vanishes_or_changes_while_it_is_read(photos, url, engine, monkeypatch):
    from tinyvit.embed import sources

    read = sources.read_bytes

    def reading(place):
        data = read(place)
        if place.endswith("0.png"):
            with open(place, "ab") as file:
                file.write(b"more")  # each time
        if place.endswith("1.png"):
            os.unlink(place)
        return data

    monkeypatch.setattr(sources, "read_bytes", reading)
    report = embed_images(photos, url, engine)
    assert report.stored == 4
    reasons = dict(report.failed)
    assert "changes while it is read" in reasons["a/0.png"]
    assert "No such file" in reasons["b/1.png"]


def test_names_of_all_kinds(tmp_path, url, engine):
    names = [
        "line\nbreak.png",
        "quote's.png",
        'double".png',
        "🐈 😀.png",
        "percent%_.png",
        "back\\slash.png",
        "x" * 251 + ".png",
        unicodedata.normalize("NFD", "é.png"),
    ]
    folder = tmp_path / "odd"
    folder.mkdir()
    for number, name in enumerate(names):
        tiny.write_image(folder / name, 20, 20, seed=number)
    raw = os.fsencode(folder) + b"/no utf-8 \xff.png"
    shutil.copyfile(folder / "quote's.png", raw)
    assert counts(embed_images(folder, url, engine)) == (8, 1, 0, 0, 0)
    store = EmbeddingStore.open(url)
    for number, name in enumerate(names):
        stored = unicodedata.normalize("NFC", name)
        (wanted,) = engine.stream(tiny.noise(20, 20, 0) if number < 0 else folder / name)
        assert np.array_equal(store[stored].features, wanted.features.astype(np.float16))
    assert "no utf-8 \\xff.png" in store
    assert counts(embed_images(folder, url, engine)) == (0, 0, 9, 0, 0)


def test_lists_and_single_files(photos, url, engine):
    listing = photos.parent / "list.txt"
    listing.write_text(f"photos/a/0.png\n\nphotos/none.png\n{photos / 'b/1.png'}\nphotos/b\n")
    report = embed_images([f"@{listing}", photos / "a/2.png"], url, engine)
    assert counts(report)[0] == 5
    assert [path for path, _ in report.failed] == ["photos/none.png"]
    assert {"photos/a/0.png", "2.png", "3.png"} <= set(EmbeddingStore.open(url))


def test_parts_make_the_whole(photos, url, engine):
    reports = [embed_images(photos, url, engine, part=(i, 3), prune=True) for i in range(3)]
    assert sum(report.stored for report in reports) == 6
    assert [report.gone for report in reports] == [0, 0, 0]
    assert sorted(EmbeddingStore.open(url)) == NAMES


def test_an_estimate_writes_nothing(photos, url, engine):
    found = estimate(photos, url, engine)
    assert isinstance(found, EmbedEstimate)
    assert (found.new, found.changed, found.kept) == (6, 0, 0)
    assert found.nbytes == 6 * (16 * 4 * 4 * 2 + 16 * 4)
    assert found.seconds > 0
    assert not url.exists()
    embed_images(photos, url, engine)
    os.utime(photos / "a/0.png", ns=(1, 1))
    (photos / "b/1.png").unlink()
    found = estimate(photos, url, engine)
    assert (found.new, found.changed, found.kept, found.gone) == (0, 1, 4, 1)
    assert estimate(photos / "a", url, engine).seconds is not None
    embed_images(photos, url, engine)
    assert estimate(photos, url, engine).seconds is None


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda: {"engine": make_tiny_engine(seed=1)},
            "weights_sha256 is .*… in the store and .*… here",
        ),
        (
            lambda: {"engine": make_tiny_engine(size=96)},
            "image_spec is .*64.*in the store and .*96",
        ),
        (lambda: {"dtype": "int8"}, "dtype is fp16 in the store and int8 here"),
        (lambda: {"keep": "pooled"}, "keep is all in the store and pooled here"),
        (lambda: {"early": True}, "early is False in the store and True here"),
    ],
)
def test_nothing_else_goes_into_a_store(photos, url, engine, change, words):
    embed_images(photos, url, engine)
    before = EmbeddingStore.open(url).dataset.version
    with pytest.raises(CheckpointError, match=rf"made in another way: .*{words}"):
        embed_images(photos, url, **{"engine": engine, **change()})
    assert EmbeddingStore.open(url).dataset.version == before


def test_another_precision_is_refused(photos, url, engine):
    from tinyvit import Engine

    embed_images(photos, url, engine)
    other = Engine(engine.model, backend="torch", precision="bf16")
    with pytest.raises(CheckpointError, match="precision is fp32 in the store and bf16 here"):
        embed_images(photos, url, other)


def test_what_is_refused_of_sources(photos, url, engine, tmp_path):
    with pytest.raises(ValueError, match="there is no file or folder"):
        embed_images(tmp_path / "none", url, engine)
    with pytest.raises(ValueError, match=r"lies in '.*photos', whose images it is made of"):
        embed_images(photos, photos / "photos.lance", engine)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        embed_images("@none.txt", url, engine)
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é.png")
        tiny.write_image(tmp_path / "twins" / name, 20, 20)
    with pytest.raises(ValueError, match=r"would both be 'é.png' in the store"):
        embed_images(tmp_path / "twins", url, engine)
    assert not url.exists()  # nothing was made
    embed_images(photos, url, engine)
    with pytest.raises(ValueError, match="lies in the store"):
        embed_images(url / "data", url, engine)


def test_an_interruption_keeps_what_is_done(photos, url, engine):
    def stop(done, total, failed):
        if done == 3:
            raise KeyboardInterrupt

    told = []
    with pytest.raises(KeyboardInterrupt):
        embed_images(photos, url, engine, progress=stop, tell=told.append)
    assert [outcome.path for outcome in told] == NAMES[:3]
    assert list(EmbeddingStore.open(url)) == NAMES[:3]
    assert counts(embed_images(photos, url, engine)) == (3, 0, 3, 0, 0)


def test_a_kill_costs_a_minute_or_half_a_gigabyte_at_most(photos, url, engine, monkeypatch):
    assert (run.COMMIT_SECONDS, run.COMMIT_BYTES) == (60, 512 << 20)

    def commits():
        """Images of each commit, as they are reported behind it."""
        shutil.rmtree(url, ignore_errors=True)
        versions = []

        def tell(outcome):
            versions.append(EmbeddingStore.open(url).dataset.version)

        embed_images(photos, url, engine, tell=tell)
        return [versions.count(one) for one in sorted(set(versions))]

    assert commits() == [6]
    row = next(EmbeddingStore.open(url).iterate(raw=True))[1]
    with monkeypatch.context() as patch:
        patch.setattr(run, "COMMIT_BYTES", 2 * row.nbytes)
        assert commits() == [2, 2, 2]
    monkeypatch.setattr(run, "COMMIT_SECONDS", 0.0)
    assert commits() == [1] * 6


def test_features_that_are_not_finite_are_a_failure(photos, url):
    engine = make_tiny_engine(seed=5)
    with_nan = engine.model.neck[0].weight
    with_nan.data[0, 0] = float("nan")
    report = embed_images(photos, url, engine)
    assert report.stored == 0 and len(report.failed) == 6
    assert "not all finite numbers; try --precision fp32" in report.failed[0][1]
