import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.train.store import LogitStore, StoreHeader, StoreMismatchError

NAMES = ("ant", "bee", "cat", "dog")


def header(**changes):
    values = {
        "images": 5,
        "views": 3,
        "k": 2,
        "classes": NAMES,
        "data": "d" * 64,
        "augmentation": {"flip": 0.5, "scale": [0.6, 1.0]},
        "teacher": "big",
        "teacher_sha256": "a" * 64,
        "teacher_input": {"size": [8, 8]},
    }
    return StoreHeader(**{**values, **changes})


def rows(count, k=2, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.integers(2**63, size=count, dtype=np.uint64),
        rng.random((count, k)).astype(np.float32),
        np.array([rng.permutation(len(NAMES))[:k] for _ in range(count)]),
    )


def test_what_is_written_is_read(tmp_path):
    store = LogitStore.create(tmp_path / "s", header())
    seeds, chances, classes = rows(3)
    store.write(1, np.array([4, 0, 2]), seeds, chances, classes)
    again = LogitStore.open(tmp_path / "s")
    assert again.header == store.header
    for place, image in enumerate((4, 0, 2)):
        seed, probabilities, numbers = again.read(1, image)
        assert seed == seeds[place]
        np.testing.assert_array_equal(numbers, classes[place])
        # half precision: 11 bits
        np.testing.assert_allclose(probabilities, chances[place], rtol=2**-11, atol=1e-7)
    assert again.read(1, 1) is None
    assert again.read(0, 4) is None
    assert again.missing(1).tolist() == [1, 3]
    assert again.missing(0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "classes, k, size", [(4, 2, 20), (1000, 10, 52), (21841, 100, 412), (70000, 10, 72)]
)
def test_the_size_of_a_record(classes, k, size):
    names = tuple(str(i) for i in range(classes))
    made = header(classes=names, k=k)
    assert made.record.itemsize == size
    assert made.bytes_per_image == 3 * size
    assert size == (12 + 4 * k if classes <= 65536 else 12 + 6 * k)


def test_the_file_has_its_whole_length_from_the_start(tmp_path):
    store = LogitStore.create(tmp_path, header())
    assert (tmp_path / "logits.bin").stat().st_size == 5 * store.header.bytes_per_image


@given(st.integers(0, 19), st.integers(1, 255))
def test_any_changed_byte_is_noticed(tmp_path_factory, place, change):
    folder = tmp_path_factory.mktemp("s")
    store = LogitStore.create(folder, header())
    store.write(0, np.array([2]), *rows(1))
    raw = bytearray((folder / "logits.bin").read_bytes())
    raw[2 * 20 + place] ^= change
    (folder / "logits.bin").write_bytes(raw)
    assert store.read(0, 2) is None
    assert 2 in store.missing(0)


def test_a_kill_in_the_middle_of_a_write_costs_that_record_alone(tmp_path):
    store = LogitStore.create(tmp_path, header())
    store.write(0, np.arange(5), *rows(5))
    raw = bytearray((tmp_path / "logits.bin").read_bytes())
    raw[3 * 20 + 9 : 4 * 20] = bytes(11)  # the second half of record 3 never came
    (tmp_path / "logits.bin").write_bytes(raw)
    going_on = LogitStore.create(tmp_path, header())
    assert going_on.missing(0).tolist() == [3]
    assert going_on.read(0, 4) is not None


def test_a_full_disk_leaves_what_was_written(tmp_path, monkeypatch):
    store = LogitStore.create(tmp_path, header())
    store.write(0, np.array([0]), *rows(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.write(0, np.array([1]), *rows(1))
    assert store.read(0, 0) is not None


def test_a_store_of_something_else_is_left_alone(tmp_path):
    store = LogitStore.create(tmp_path, header())
    store.write(0, np.array([0]), *rows(1))
    before = (tmp_path / "logits.bin").read_bytes()
    for changes, words in (
        ({"teacher_sha256": "b" * 64}, "teacher_sha256 is 'aaa"),
        ({"k": 3}, "k is 2 there and 3 here"),
        ({"classes": NAMES[::-1]}, r"classes is \('ant', 'bee'"),
        ({"augmentation": {"flip": 0.0}}, r"augmentation is \{'flip': 0.5"),
        ({"seed": 1, "views": 4}, "views is 3 there and 4 here; seed is 0 there and 1 here"),
    ):
        with pytest.raises(StoreMismatchError, match=words):
            LogitStore.create(tmp_path, header(**changes))
    assert LogitStore.create(tmp_path, header(teacher="another name")).header.teacher == "big"
    assert (tmp_path / "logits.bin").read_bytes() == before


def test_check_names_each_difference(tmp_path):
    store = LogitStore.create(tmp_path, header())
    store.check(k=2, classes=NAMES, augmentation={"scale": [0.6, 1.0], "flip": 0.5})
    with pytest.raises(StoreMismatchError, match="k is 2 there and 9 here; data is 'ddd"):
        store.check(k=9, data="x")


@pytest.mark.parametrize("name", ["store.json", "logits.bin"])
def test_no_store(tmp_path, name):
    LogitStore.create(tmp_path, header())
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"holds no store of answers .*{name} is missing"):
        LogitStore.open(tmp_path)


def test_a_damaged_store(tmp_path):
    LogitStore.create(tmp_path, header())
    with (tmp_path / "logits.bin").open("r+b") as file:
        file.truncate(17)
    with pytest.raises(ValueError, match="has 17 bytes and should have 300: it is cut short"):
        LogitStore.open(tmp_path)
    values = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps({**values, "k": 77}))
    with pytest.raises(ValueError, match="is damaged: k must be from 1 to"):
        LogitStore.open(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps({**values, "version": 9}))
    with pytest.raises(ValueError, match="a store of version 9; this reads 1"):
        LogitStore.open(tmp_path)


@pytest.mark.parametrize("values", [{"images": 0}, {"views": 0}, {"k": 0}, {"k": 5}])
def test_wrong_numbers(values):
    with pytest.raises(ValueError, match=r"wants images and views|number of classes, 4"):
        header(**values)


@pytest.mark.parametrize("place", [(3, 0), (-1, 0), (0, 5), (0, -1)])
def test_there_is_no_such_record(tmp_path, place):
    with pytest.raises(ValueError, match="views 0 to 2 and images 0 to 4, got view"):
        LogitStore.create(tmp_path, header()).read(*place)
