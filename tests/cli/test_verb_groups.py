from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tinyvit.cli.main import GROUPS, app

HEAVY = ("torch", "numpy", "PIL", "safetensors", "rich.progress")
VERBS = [(group, *verb) for group, (_, verbs) in GROUPS.items() for verb in verbs]
DOCS = Path(__file__).parents[2] / "docs"
DOCUMENTS = [DOCS / "training.md", *sorted((DOCS / "guides").glob("*.md"))]
IDS = [f"{group} {name}" for group, name, *_ in VERBS]


def test_every_group_is_registered():
    assert [group.name for group in app.registered_groups] == list(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_verbs(run, group):
    result = run(group, "--help")
    assert result.code == 0
    for name, _, _ in GROUPS[group][1]:
        assert f"\n  {name} " in result.out
    assert "..." not in result.out.split("Commands:")[1]  # no summary is cut short
    assert run(group).code == 2


@pytest.mark.parametrize(("group", "name", "verb", "examples"), VERBS, ids=IDS)
def test_every_verb_has_a_help_with_examples(run, group, name, verb, examples):
    result = run(group, name, "-h")
    assert result.code == 0
    assert examples
    for example in examples:
        assert f"\n    {example}\n" in result.out
    assert any(example.startswith(f"tinyvit {group} {name} ") for example in examples)
    text = result.out.split("Arguments:")[0]
    assert len(text.strip().splitlines()) > 4


def test_their_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom tinyvit.cli.main import main\n"
        "for words in (['--help'], ['train', 'classify', '-h'], ['evaluate', 'agreement', '-h']):\n"
        "    try:\n        main(words)\n    except SystemExit:\n        pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def commands_in(path):
    """Command lines of ``tinyvit train`` and ``evaluate`` in a document, as words."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    found = re.findall(rf"^(?:torchrun .*-m )?tinyvit ((?:{'|'.join(GROUPS)}) .+)$", text, re.M)
    return [shlex.split(line) for line in found]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documents_are_understood(path):
    commands = commands_in(path)
    assert commands
    root = typer.main.get_command(app)
    for group, name, *words in commands:
        verb = root.commands[group].commands[name]
        verb.make_context(name, words)  # raises for an unknown option or a wrong value
