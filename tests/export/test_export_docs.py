"""Every block of docs/export.md runs, in the order of the page, with tiny weights."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny import make_tiny_classifier, make_tiny_sam, write_image
from tinyvit.checkpoints import write_state_dict
from tinyvit.checkpoints.files import header_for
from tinyvit.cli.main import app
from tinyvit.export import PRESETS, Verified, writing
from tinyvit.hub import save_pretrained

pytest.importorskip("onnx")

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def steps():
    """(kind of block, a line of commands or a whole block of Python), in the order of the page."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S):
        assert kind in ("", "python"), "no other language, which nobody would run"
        yield from [(kind, block)] if kind else [("", line) for line in block.splitlines()]


def commands():
    lines = [shlex.split(line, comments=True) for kind, line in steps() if not kind]
    return [words[1:] for words in lines if words[0] == "tinyvit"]


def test_the_table_has_every_preset():
    rows = re.findall(r"^\| `([\w.-]+)` \|", PAGE.read_text(), flags=re.M)
    assert rows[1:] == list(PRESETS)
    shown = {words[words.index("--for") + 1] for words in commands() if "--for" in words}
    assert shown == PRESETS.keys() - {"tinyvit"}


@pytest.fixture
def quick(monkeypatch):
    """Small inputs for the tools that hard-code 1024; only folders verified later are certified.

    test_export.py certifies every preset.
    """
    for name, row in PRESETS.items():
        monkeypatch.setitem(PRESETS, name, replace(row, side=row.side and 128))
    certify = writing.certify

    def certify_some(model, spec, folder, *more):
        is_verified = folder.name.startswith((".exported.", ".decoder."))
        return (
            certify(model, spec, folder, *more)
            if is_verified
            else Verified(str(folder), "none", ())
        )

    monkeypatch.setattr(writing, "certify", certify_some)


@pytest.mark.slow  # 120 s of CPU
def test_every_block_runs(tmp_path, monkeypatch, quick):
    pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    sam, classifier = tmp_path / "sam.safetensors", tmp_path / "classifier_weights"
    small = make_tiny_sam(size=64, loadable=True, head=False)
    header = header_for("tinyvit_sam", (2, 2, 1), small.image_encoder.image_spec)
    write_state_dict(sam, small.state_dict(), metadata=header)
    save_pretrained(make_tiny_classifier(size=32), classifier)
    for name in ("cat.jpg", "dog.jpg"):
        write_image(tmp_path / name, 480, 640)
    weights = {"tinyvit_sam_2m": sam}
    for kind, text in steps():
        if kind == "python":
            exec(text, {})
            continue
        program, *words = shlex.split(text, comments=True)
        if (
            program in ("pip", "uv", "python") or words[0] == "serve"
        ):  # tests/test_package.py, tests/serve
            continue
        assert program == "tinyvit"
        given = [str(weights.get(word, classifier if word.startswith("tiny_vit_") else word))
                 for word in words]  # fmt: skip
        if words[0] == "export" and Path(given[given.index("-o") + 1]).is_dir():
            continue  # shown again under its recipe
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, (words, done.output)
