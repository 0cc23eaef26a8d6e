"""Every block of README.md and docs/ runs, offline, as a reader would run it.

The blocks of a page run in order, in one folder: Python in one namespace; commands of ``tinyvit``
in this process, where nothing is imported anew; others in a shell. A block that cannot run says why
in a comment above it: ``<!-- not run: REASON -->``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tinyvit
from tinyvit.checkpoints import from_canonical, write_state_dict
from tinyvit.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(ROOT / "docs" / "export.md")  # tests/export runs its blocks, in minutes
FENCE = re.compile(r"(?:<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = ("tinyvit", "scripts/", "pip", "python", "curl", "torchrun")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str  # "python", "shell"
    text: str
    reason: str  # why it is not run; "" where it is


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        reason, language, body = match.groups()
        is_shell = language in ("bash", "sh") or (not language and body.startswith(COMMANDS))
        if language == "python" or is_shell:
            name, line = page.relative_to(ROOT).as_posix(), text.count("\n", 0, match.start(2)) + 1
            kind = "shell" if is_shell else "python"
            found.append(Block(name, line, kind, body, (reason or "").strip()))
    return found


def commands_of(text: str) -> list[list[str]] | None:
    """The words after ``tinyvit`` of each line; None where another program or a shell is wanted."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    for words in commands:
        if words[0] != "tinyvit" or re.search(r"[|<>&$*;()`]", " ".join(words)):
            return None
    return [words[1:] for words in commands]


def run_shell(block: Block) -> None:
    """Run the commands of a block; raises where one fails."""
    commands = commands_of(block.text)
    for words in commands or []:
        told = CliRunner().invoke(app, words)
        assert told.exit_code == 0, f"{block.page}:{block.line}\n{words}\n{told.output}"
    if commands is None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{block.page}:{block.line}\n{block.text}\n{done.stderr}"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of published ones, as a cache folder that has them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    sam = tinyvit.sam_model_registry["vit_t"]()
    torch.save(sam.state_dict(), folder / "mobile_sam.pt")
    state = tinyvit.create_model("tiny_vit_5m_224").state_dict()
    for name in ("tiny_vit_5m_224.dist_in22k_ft_in1k", "tiny_vit_5m_224.in1k"):
        write_state_dict(folder / f"{name}.safetensors", from_canonical(state, "timm"))
    return folder


@pytest.fixture
def desk(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """The folder of a reader: the repository's examples, some photographs, some masks."""
    for name in ("examples", "tests", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    pictures = ROOT / "examples" / "pictures"
    cat = Image.open(pictures / "chelsea.png").convert("RGB")
    for name in ("cat.jpg", "photo.jpg", "a.jpg", "b.jpg", "b.png"):
        cat.save(tmp_path / name)
    for folder in ("photos", "photos/trip", "images", "images/val", "pictures", "pictures/val"):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(("cat", "coffee", "rocket")):
            side = 240 + 32 * number
            cat.resize((side, 180)).save(tmp_path / folder / f"{name}.jpg")
    for folder in ("images", "masks"):
        (tmp_path / "my_masks" / folder).mkdir(parents=True)
    for number in range(4):
        mask = np.zeros((96, 128), np.uint8)
        mask[20 : 60 + number, 30:90] = 1
        mask[70:90, 5:25] = 2
        cat.resize((128, 96)).save(tmp_path / "my_masks" / "images" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "my_masks" / "masks" / f"{number}.png")
    points, box = {"points": [[172, 118]]}, {"box": [160, 10, 420, 220]}
    (tmp_path / "prompts.json").write_text(
        json.dumps({"chelsea.png": [points], "coffee.png": [box]})
    )
    (tmp_path / "mobile_sam.pt").symlink_to(weights / "mobile_sam.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TINYVIT_CACHE", str(weights))
    monkeypatch.setenv("TINYVIT_OFFLINE", "1")
    return tmp_path


@pytest.mark.filterwarnings("ignore:nobody states a sha256")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(page: Path, desk: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.reason:
            continue
        if block.kind == "python":
            # as many blank lines as there are above the block: a traceback names the page's line
            exec(compile("\n" * block.line + block.text, block.page, "exec"), names)
        else:
            run_shell(block)


def test_every_reason_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [block for page in PAGES for block in blocks_of(page)]
    left_out = [block for block in blocks if block.reason]
    with capsys.disabled():
        print(f"\n{len(blocks)} blocks, {len(left_out)} of them are not run:")
        print(*(f"  {block.page}:{block.line}: {block.reason}" for block in left_out), sep="\n")
    assert all(len(block.reason.split()) > 2 for block in left_out)
    assert len(blocks) - len(left_out) >= 25  # the others must not creep into comments
