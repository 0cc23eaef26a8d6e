from __future__ import annotations

import pytest
import typer

from tinyvit.cli.segment import Box, Point, parse_box, parse_point


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("3,4", Point(3, 4, 1)),
        ("3,4,1", Point(3, 4, 1)),
        (" 3.5, -4 ,0", Point(3.5, -4, 0)),
    ],
)
def test_points(text, point):
    assert parse_point(text) == point


@pytest.mark.parametrize("text", ["", "3", "3,4,1,1", "a,b", "3;4", "3,,4"])
def test_what_is_no_point(text):
    with pytest.raises(typer.BadParameter, match="is not X,Y or X,Y,LABEL; for example 320,240"):
        parse_point(text)


@pytest.mark.parametrize("text", ["3,4,2", "3,4,-1", "3,4,0.5", "3,4,nan"])
def test_a_label_is_0_or_1(text):
    with pytest.raises(typer.BadParameter, match=r"must be 1 .the object. or 0 .not the object."):
        parse_point(text)


def test_boxes():
    assert parse_box("1,2,3.5,4") == Box(1, 2, 3.5, 4)
    for text in ("", "1,2,3", "1,2,3,4,5", "1,2,3,x"):
        with pytest.raises(typer.BadParameter, match="is not X0,Y0,X1,Y1"):
            parse_box(text)
