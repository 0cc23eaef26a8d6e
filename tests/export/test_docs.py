"""Every command of docs/export.md runs, in the order of the page, with tiny weights."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny import make_tiny_classifier, write_tiny_sam
from tinyvit.cli.main import app
from tinyvit.export import PRESETS
from tinyvit.hub import save_pretrained

pytest.importorskip("onnx")

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def commands():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    assert {kind for kind, _ in blocks} == {""}  # no other language that nobody would run
    lines = [line for _, block in blocks for line in block.splitlines()]
    assert lines and all(line.startswith("tinyvit ") for line in lines)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_table_has_every_preset():
    rows = re.findall(r"^\| `([\w.-]+)` \|", PAGE.read_text(), flags=re.M)
    assert rows[1:] == list(PRESETS)
    shown = {words[words.index("--for") + 1] for words in commands() if "--for" in words}
    assert shown == PRESETS.keys() - {"tinyvit"}


@pytest.mark.slow  # 120 s of CPU
def test_every_command_runs(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    sam, classifier = tmp_path / "sam.safetensors", tmp_path / "classifier_weights"
    write_tiny_sam(sam, size=64)
    save_pretrained(make_tiny_classifier(size=32), classifier)
    weights = {"tinyvit_starter": sam, "mobile_sam": sam}
    for words in commands():
        given = [str(weights.get(word, classifier if word.startswith("tiny_vit_") else word))
                 for word in words]  # fmt: skip
        if given[:1] == ["export"] and Path(given[given.index("-o") + 1]).is_dir():
            continue  # shown again under its recipe
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, (words, done.output)
