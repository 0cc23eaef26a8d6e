import collections
import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest

from manifest import SPLITS, Background, Row, is_done, read_rows, split_of, write_rows

ROW = Row(
    "photo/a.png", "photo", 'a "frog", green', "animals", 30, 40, 0.781, "tp:frog", "train",
    "stamps 1.0", "animals/frog.png", "GPL-2",
)  # fmt: skip
GROUND = Background("b.jpg", 900, 600, "walls 2", "usr/b.jpg", "CC0", "val")


@pytest.mark.parametrize(("row", "kind"), [(ROW, Row), (GROUND, Background)])
def test_what_is_written_is_read(tmp_path, row, kind):
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, [row, row], kind)
    assert read_rows(path, kind) == [row, row]
    assert [file.name for file in path.parent.iterdir()] == ["rows.csv"]  # nothing temporary


def test_columns_are_those_that_were_agreed(tmp_path):
    write_rows(tmp_path / "o.csv", [], Row)
    write_rows(tmp_path / "b.csv", [], Background)
    assert (tmp_path / "o.csv").read_text() == (
        "file,kind,label,category,width,height,fill,group,split,package,source,license\n"
    )
    assert (tmp_path / "b.csv").read_text() == ("file,width,height,package,source,license,split\n")


def test_a_failure_while_writing_leaves_the_old_table(tmp_path):
    path = tmp_path / "o.csv"
    write_rows(path, [ROW], Row)

    def rows():
        yield dataclasses.replace(ROW, file="other.png")
        raise ValueError("an image is broken")

    with pytest.raises(ValueError, match="broken"):
        write_rows(path, rows(), Row)
    assert read_rows(path, Row) == [ROW]


def test_a_table_with_other_columns_or_no_numbers_is_refused(tmp_path):
    path = tmp_path / "o.csv"
    write_rows(path, [GROUND], Background)
    with pytest.raises(ValueError, match=r"has the columns \['file', 'width'.*wanted \['file', 'k"):
        read_rows(path, Row)
    path.write_text(path.read_text().replace("900", "wide"))
    with pytest.raises(ValueError, match=r"o.csv, line 2: invalid literal .*'wide'"):
        read_rows(path, Background)
    write_rows(path, [GROUND], Background)
    path.write_text(path.read_text() + "b.jpg,1\n")
    with pytest.raises(ValueError, match="line 3 has more or fewer fields"):
        read_rows(path, Background)


def test_done_means_that_every_image_is_there(tmp_path):
    path = tmp_path / "photo.csv"
    assert not is_done(path, Row)
    write_rows(path, [ROW], Row)
    assert not is_done(path, Row)
    (tmp_path / "photo").mkdir()
    (tmp_path / ROW.file).touch()
    assert is_done(path, Row)


def test_splits_have_their_shares_and_never_change():
    count = collections.Counter(split_of(f"group {number}") for number in range(4000))
    assert set(count) == set(SPLITS)
    # 4000 draws: three standard deviations are below 0.02 of all
    assert count["train"] / 4000 == pytest.approx(0.85, abs=0.02)
    assert count["val"] / 4000 == pytest.approx(0.05, abs=0.02)
    assert [split_of(name) for name in ("em:cat", "em:clock", "oc:food/apple")] == FIXED


FIXED = ["train", "val", "train"]


@hypothesis.given(st.text())
def test_every_name_has_a_split(name):
    assert split_of(name) in SPLITS
