from dataclasses import fields

from tinyvit.cli.settings_options import CONTROL, LOOP
from tinyvit.train.settings import _CHOICES, _FREE, TrainSettings

ROWS = {row.name: row for row in LOOP}
KINDS = {"int": "int", "float": "float", "bool": "flag", "str": "text"}


def test_every_setting_of_the_loop_is_an_option_with_its_default():
    settings = {one.name: one for one in fields(TrainSettings)}
    assert set(ROWS) - {"bf16"} == set(settings)
    for name, one in settings.items():
        row = ROWS[name]
        if name != "folder":
            assert row.default == one.default, name
        assert row.kind == KINDS.get(str(one.type).partition(" | ")[0], "text"), name
        assert row.words == tuple(_CHOICES.get(name, ())), name
        if name != "folder":
            assert row.is_free == (one.metadata == _FREE), name


def test_no_flag_has_two_meanings():
    flags = [flag for row in (*LOOP, *CONTROL) for text in row.written for flag in text.split("/")]
    assert len(flags) == len(set(flags))
    assert {"--lr", "--warmup", "--ema", "--clip", "--bf16", "--move", "-o"} <= set(flags)
