import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.train.data.images import hold_out

NAMES = st.lists(st.text("abcd/.", min_size=1), min_size=2, max_size=30, unique=True)


@given(names=NAMES, part=st.floats(0.001, 0.999), seed=st.integers(0, 9))
def test_every_name_is_on_one_side_and_both_have_some(names, part, seed):
    learnt, held = hold_out(names, part, seed)
    assert learnt and held
    assert sorted(learnt + held) == sorted(names)
    assert not set(learnt) & set(held)


def test_a_name_keeps_its_side_when_others_come():
    names = [f"{n}.jpg" for n in range(300)]
    learnt, held = hold_out(names[:100], 0.3)
    more, more_held = hold_out(names, 0.3)
    assert set(learnt) <= set(more) and set(held) <= set(more_held)
    assert 60 < len(more_held) < 120  # 90 are expected, with a deviation of 8
    assert hold_out(names, 0.3, seed=1)[1] != more_held


def test_a_folder_can_be_held_out():
    names = ["a.jpg", "val/b.jpg", "value/c.jpg"]
    assert (
        hold_out(names, "val")
        == hold_out(names, "val/")
        == (["a.jpg", "value/c.jpg"], ["val/b.jpg"])
    )
    with pytest.raises(ValueError, match="'test' leaves 3 images to learn from and 0"):
        hold_out(names, "test")


def test_what_cannot_be_split_is_said():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        hold_out(["a"], 0.5)
    for part in (0.0, 1.0):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            hold_out(["a", "b"], part)
