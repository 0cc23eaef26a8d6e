import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec
from tinyvit.train.store import Row, Store, StoreMismatchError, image_state

FORMATS = Path(__file__).parents[1] / "data" / "formats"
FACTS = {
    "teacher": "teacher", "teacher_sha256": "ab" * 32, "image_spec": ImageSpec.sam(32).to_dict(),
    "flips": False,
}  # fmt: skip


def a_map(seed, shape=(3, 2, 2)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def rows_of(root, **maps):
    for name in maps:
        (root / name).write_bytes(name.encode())
    return [
        Row(name, {"features": array}, {**image_state(root / name), "height": 10})
        for name, array in maps.items()
    ]


def test_what_is_added_is_read_again_also_by_others(tmp_path):
    store = Store(tmp_path / "store", FACTS)
    store.add(rows_of(tmp_path, a=a_map(0), b=a_map(1)))
    store.add(rows_of(tmp_path, c=a_map(2)))
    for reader in (store, Store(store.folder), pickle.loads(pickle.dumps(store))):
        assert reader.good == ["a", "b", "c"]
        assert reader.facts == FACTS and reader.shapes == {"features": (3, 2, 2)}
        for seed, name in enumerate("abc"):
            np.testing.assert_array_equal(reader.read(name, "features"), a_map(seed))
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors",
    ]  # fmt: skip
    assert store.entries["b"].info["height"] == 10
    assert json.loads((store.folder / "manifest.json").read_text())["format"] == 2
    with pytest.raises(ValueError, match="no 'flipped', only features"):
        store.read("a", "flipped")


def test_rows_of_several_arrays_keep_their_types(tmp_path):
    store = Store(tmp_path, {"views": 2})
    arrays = {
        "seed": np.array([2**63, 1], np.uint64),
        "classes": np.array([[1], [2]], np.uint16),
        "probabilities": np.array([[0.5], [0.25]], np.float16),
    }
    store.add([Row("0", arrays), Row("7", arrays)])
    for key, value in arrays.items():
        found = Store(tmp_path).read("7", key)
        np.testing.assert_array_equal(found, value)
        assert found.dtype == value.dtype


def test_files_that_changed_are_missing(tmp_path):
    store = Store(tmp_path / "store", FACTS)
    store.add(rows_of(tmp_path, a=a_map(0), b=a_map(1)))
    (tmp_path / "b").write_bytes(b"longer")
    (tmp_path / "new").touch()
    assert store.missing(["a", "b", "new"]) == ["new"]
    assert store.missing(["a", "b", "new"], tmp_path) == ["b", "new"]
    store.add(rows_of(tmp_path, b=a_map(7)))
    np.testing.assert_array_equal(Store(store.folder).read("b", "features"), a_map(7))
    assert store.missing(["a", "b"], tmp_path) == []
    (tmp_path / "a").unlink()
    assert store.missing(["a"], tmp_path) == ["a"]


def test_what_could_not_be_read_is_an_entry_with_a_reason(tmp_path):
    store = Store(tmp_path / "store", FACTS)
    (good,) = rows_of(tmp_path, good=a_map(3))
    bad, worse = (Row(n, info=image_state(tmp_path / n), reason="cut") for n in ("bad", "worse"))
    store.add([bad, good])
    store.add([worse])
    reader = Store(store.folder)
    np.testing.assert_array_equal(reader.read("good", "features"), a_map(3))
    assert reader.good == ["good"] and reader.unreadable == {"bad": "cut", "worse": "cut"}
    assert reader.missing(["bad", "worse"], tmp_path) == []  # not tried again until it changes
    with pytest.raises(KeyError, match="cut"):
        reader.read("bad", "features")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"teacher_sha256": "cd" * 32}, "teacher_sha256 is 'abab.* there and 'cdcd.* here"),
        (
            {"image_spec": ImageSpec.sam(64).to_dict()},
            r"image_spec is .*32.* there and .*64.* here",
        ),
        ({"flips": True, "k": 3}, "flips is False there and True here; k is None there and 3 here"),
    ],
)
def test_a_store_of_something_else_is_left_alone(tmp_path, changes, words):
    Store(tmp_path / "store", FACTS)
    before = (tmp_path / "store" / "manifest.json").read_bytes()
    with pytest.raises(StoreMismatchError, match=f"{words}; choose another folder"):
        Store(tmp_path / "store", {**FACTS, **changes})
    assert (tmp_path / "store" / "manifest.json").read_bytes() == before
    assert Store(tmp_path / "store", {**FACTS, "teacher": "another name"}).facts == FACTS


def test_check_does_not_mind_tuples(tmp_path):
    store = Store(tmp_path, {"classes": ("ant", "bee", "cat", "dog", "eel"), "k": 2})
    store.check(k=2, classes=("ant", "bee", "cat", "dog", "eel"))
    with pytest.raises(StoreMismatchError, match="classes is 5 names from 'ant' to 'eel' there"):
        store.check(classes=("x",))


def test_a_damaged_shard_is_named_and_its_rows_are_missing(tmp_path):
    store = Store(tmp_path / "store", FACTS)
    store.add(rows_of(tmp_path, a=a_map(0)))
    store.add(rows_of(tmp_path, b=a_map(1)))
    first = store.folder / "shard-00000.safetensors"
    first.write_bytes(first.read_bytes()[:-1])
    again = Store(store.folder, FACTS)
    assert again.damaged == [first.name]
    assert again.good == ["b"] and again.missing(["a", "b"], tmp_path) == ["a"]
    again.add(rows_of(tmp_path, a=a_map(0)))
    assert Store(store.folder).good == ["a", "b"]  # a third shard; none is overwritten


def test_a_shard_of_another_store_is_not_taken_up(tmp_path):
    other = Store(tmp_path / "other", {**FACTS, "teacher_sha256": "cd" * 32})
    other.add(rows_of(tmp_path, a=a_map(0)))
    Store(tmp_path / "store", FACTS)
    shard = other.folder / "shard-00000.safetensors"
    (tmp_path / "store" / shard.name).write_bytes(shard.read_bytes())
    assert Store(tmp_path / "store").damaged == [shard.name]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    store = Store(tmp_path / "store", FACTS)
    store.add(rows_of(tmp_path, a=a_map(0)))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tinyvit.train.store.save_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            store.add(rows_of(tmp_path, b=a_map(1)))
    assert Store(store.folder).good == ["a"]


def test_rows_of_another_shape_are_refused(tmp_path):
    store = Store(tmp_path / "store", FACTS)
    store.add(rows_of(tmp_path, a=a_map(0)))
    with pytest.raises(ValueError, match=r"\(3, 2, 2\)\}; 'b' has .*\(3, 2, 3\).*padding"):
        Store(store.folder).add(rows_of(tmp_path, b=a_map(0, (3, 2, 3))))


def test_folders_that_are_no_store(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no store: there is no manifest\.json"):
        Store(tmp_path)
    (tmp_path / "manifest.json").write_text("[")
    with pytest.raises(CheckpointError, match="is no manifest of a store"):
        Store(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 9, "writer": "7.0"}))
    with pytest.raises(CheckpointError, match=r"by tinyvit 7\.0, format 9; this reads up to 2"):
        Store(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be made a folder"):
        Store(tmp_path / "file" / "store", FACTS)


def test_a_shard_that_is_gone_is_said(tmp_path):
    store = Store(tmp_path / "store", FACTS)
    store.add(rows_of(tmp_path, a=a_map(0)))
    (store.folder / "shard-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors cannot be read"):
        store.read("a", "features")


def test_features_of_format_1_are_read_and_not_written():
    """Written by ``FeatureStore`` of tinyvit 0.1."""
    store = Store(FORMATS / "features_format1")
    plain = np.arange(12, dtype=np.float16).reshape(3, 2, 2)
    assert store.good == ["a.png", "b.png"] and store.unreadable == {"bad.png": "cut short"}
    np.testing.assert_array_equal(store.read("b.png", "features"), plain + 100)
    np.testing.assert_array_equal(store.read("a.png", "flipped"), plain[:, :, ::-1])
    assert store.facts == {**FACTS, "flips": True}
    assert store.entries["a.png"].info == {"bytes": 3, "changed": 5, "height": 10, "width": 20}
    with pytest.raises(CheckpointError, match="of format 1, which is read but no longer written"):
        Store(FORMATS / "features_format1", store.facts)


def test_logits_of_version_1_are_read_and_not_written(tmp_path):
    """Written by ``LogitStore`` of tinyvit 0.1: of image 1 the second view is missing."""
    store = pickle.loads(pickle.dumps(Store(FORMATS / "logits_version1")))
    assert store.good == ["0", "1", "2"]
    assert (store.facts["images"], store.facts["k"], store.facts["seed"]) == (3, 2, 7)
    assert store.read("2", "seed").tolist() == [2, 11]
    assert store.read("1", "seed").tolist() == [1]
    assert store.read("1", "probabilities").tolist() == [[0.75, 0.25]]
    assert store.read("0", "classes").tolist() == [[2, 0], [2, 0]]
    with pytest.raises(CheckpointError, match="no longer written"):
        Store(FORMATS / "logits_version1", store.facts)
    shutil.copytree(FORMATS / "logits_version1", tmp_path / "s")
    raw = bytearray((tmp_path / "s" / "logits.bin").read_bytes())
    raw[20 * 1 + 9] ^= 4  # a byte of image 1
    (tmp_path / "s" / "logits.bin").write_bytes(raw)
    assert Store(tmp_path / "s").good == ["0", "2"]
    (tmp_path / "s" / "logits.bin").write_bytes(raw[:17])
    with pytest.raises(CheckpointError, match="holds no good store of logits"):
        Store(tmp_path / "s")
