import json
import pickle

import pytest
import torch

from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec
from tinyvit.train.store import FeatureStore, StoredImage, StoreFacts, image_state

FACTS = StoreFacts("teacher", "ab" * 32, ImageSpec.sam(32))


def a_map(seed, shape=(3, 2, 2)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def images_in(root, *names):
    for name in names:
        (root / name).write_bytes(name.encode())
    return [StoredImage(name, *image_state(root / name), 10, 20) for name in names]


def test_what_is_added_is_read_again_also_by_others(tmp_path):
    store = FeatureStore(tmp_path / "store", FACTS)
    one, two, three = images_in(tmp_path, "a", "b", "c")
    store.add([a_map(0), a_map(1)], [], [one, two])
    store.add([a_map(2)], [], [three])
    for reader in (store, FeatureStore(store.folder), pickle.loads(pickle.dumps(store))):
        assert reader.good == ["a", "b", "c"]
        assert reader.facts == FACTS and reader.shape == (3, 2, 2)
        for seed, name in enumerate("abc"):
            assert torch.equal(reader.read(name), a_map(seed))
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors",
    ]  # fmt: skip
    assert (store.images["b"].height, store.images["b"].width) == (10, 20)


def test_what_is_there_and_true_is_not_missing(tmp_path):
    store = FeatureStore(tmp_path / "store", FACTS)
    store.add([a_map(0), a_map(1)], [], images_in(tmp_path, "a", "b"))
    (tmp_path / "b").write_bytes(b"longer")
    (tmp_path / "new").touch()
    assert store.missing(tmp_path, ["a", "b", "new"]) == ["b", "new"]
    store.add([a_map(7)], [], images_in(tmp_path, "b"))
    assert torch.equal(FeatureStore(store.folder).read("b"), a_map(7))
    assert store.missing(tmp_path, ["a", "b"]) == []
    (tmp_path / "a").unlink()
    assert store.missing(tmp_path, ["a"]) == ["a"]


def test_broken_images_are_entries_with_a_reason(tmp_path):
    store = FeatureStore(tmp_path / "store", FACTS)
    bad, good, worse = images_in(tmp_path, "bad", "good", "worse")
    bad, worse = (StoredImage(p.name, p.bytes, p.changed, reason="cut short") for p in (bad, worse))
    store.add([a_map(3)], [], [good], [bad])
    store.add([], [], [], [worse])
    reader = FeatureStore(store.folder)
    assert reader.good == ["good"] and torch.equal(reader.read("good"), a_map(3))
    assert reader.broken == {"bad": "cut short", "worse": "cut short"}
    assert reader.missing(tmp_path, ["bad", "worse"]) == []  # not tried again until it changes
    with pytest.raises(KeyError, match="cut short"):
        reader.read("bad")


def test_mirrored_features_are_kept_beside(tmp_path):
    with_flips = StoreFacts("teacher", "ab" * 32, ImageSpec.sam(32), flips=True)
    store = FeatureStore(tmp_path / "store", with_flips)
    store.add([a_map(0)], [a_map(1)], images_in(tmp_path, "a"))
    assert torch.equal(store.read("a"), a_map(0))
    assert torch.equal(store.read("a", flipped=True), a_map(1))
    with pytest.raises(ValueError, match="want 1 maps and 1 mirrored ones; came 1 and 0"):
        store.add([a_map(0)], [], images_in(tmp_path, "a"))
    plain = FeatureStore(tmp_path / "plain", FACTS)
    plain.add([a_map(0)], [], images_in(tmp_path, "a"))
    with pytest.raises(ValueError, match="store with flips"):
        plain.read("a", flipped=True)


@pytest.mark.parametrize(
    "other, words",
    [
        (StoreFacts("teacher", "cd" * 32, ImageSpec.sam(32)), "teacher_sha256 'abab"),
        (StoreFacts("teacher", "ab" * 32, ImageSpec.sam(64)), "image_spec .*32.* wanted .*64"),
        (StoreFacts("teacher", "ab" * 32, ImageSpec.sam(32), True), "flips False, wanted True"),
    ],
)
def test_features_of_another_teacher_are_not_mixed_in(tmp_path, other, words):
    FeatureStore(tmp_path / "store", FACTS)
    with pytest.raises(CheckpointError, match=words):
        FeatureStore(tmp_path / "store", other)


def test_a_damaged_shard_is_named_and_its_images_are_missing(tmp_path):
    store = FeatureStore(tmp_path / "store", FACTS)
    store.add([a_map(0)], [], images_in(tmp_path, "a"))
    store.add([a_map(1)], [], images_in(tmp_path, "b"))
    first = store.folder / "shard-00000.safetensors"
    first.write_bytes(first.read_bytes()[:-1])
    again = FeatureStore(store.folder, FACTS)
    assert again.damaged == [first.name]
    assert again.good == ["b"] and again.missing(tmp_path, ["a", "b"]) == ["a"]
    again.add([a_map(0)], [], images_in(tmp_path, "a"))
    assert FeatureStore(store.folder).good == ["a", "b"]  # a third shard; none is overwritten


def test_a_shard_of_another_store_is_not_taken_up(tmp_path):
    other = FeatureStore(tmp_path / "other", StoreFacts("b", "cd" * 32, ImageSpec.sam(32)))
    other.add([a_map(0)], [], images_in(tmp_path, "a"))
    FeatureStore(tmp_path / "store", FACTS)
    shard = other.folder / "shard-00000.safetensors"
    (tmp_path / "store" / shard.name).write_bytes(shard.read_bytes())
    assert FeatureStore(tmp_path / "store").damaged == [shard.name]


def test_maps_of_another_shape_are_refused(tmp_path):
    store = FeatureStore(tmp_path / "store", FACTS)
    store.add([a_map(0)], [], images_in(tmp_path, "a"))
    with pytest.raises(ValueError, match=r"\(3, 2, 2\); came \(3, 2, 3\).*padding"):
        FeatureStore(store.folder).add([a_map(0, (3, 2, 3))], [], images_in(tmp_path, "b"))


def test_folders_that_are_no_store(tmp_path):
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        FeatureStore(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(CheckpointError, match="its format is 9, this program knows 1"):
        FeatureStore(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be made a folder"):
        FeatureStore(tmp_path / "file" / "store", FACTS)


def test_a_shard_that_is_gone_is_said(tmp_path):
    store = FeatureStore(tmp_path / "store", FACTS)
    store.add([a_map(0)], [], images_in(tmp_path, "a"))
    (store.folder / "shard-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors cannot be read"):
        store.read("a")
