from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from tinyvit.cli import bench, embed, encode, export, segment, serve, store, weights
from tinyvit.cli.main import GROUPS, app, main, reordered
from tinyvit.cli.settings_options import examples_of

VERBS = {
    **dict.fromkeys(("models", "inspect", "convert", "download"), weights),
    "encode": encode,
    "classify": encode,
    "segment": segment,
    "serve": serve,
    "export": export,
    "verify": export,
    "embed": embed,
    "search": store,
    "bench": bench,
}
UNSEEN = (  # wrong words that need no model to be seen
    "segment IMAGE -o x",
    "segment IMAGE -o x --point 10",
    "segment none.jpg -o x --point 1,1",
    "segment IMAGE -o x --point 1,1 --checkpoint none.pt",
    "encode IMAGE -o /proc/nope",
    "classify IMAGE --checkpoint none.pt",
    "evaluate segment nofolder",
    "evaluate classify nofolder --checkpoint none.pt",
)
HEAVY = ("torch", "numpy", "PIL", "safetensors", "huggingface_hub")
COMMAND = [sys.executable, "-m", "tinyvit"]
CALM = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_every_verb_is_registered():
    assert [command.callback.__name__ for command in app.registered_commands] == list(VERBS)


def test_alone_it_prints_its_help_and_every_verb(run):
    alone, asked, short = run(), run("--help"), run("-h")
    assert alone.code == asked.code == 0
    assert alone.out == asked.out == short.out
    assert alone.err == ""
    for verb in VERBS:
        assert f"\n  {verb} " in alone.out
    assert "..." not in alone.out.split("Commands:")[1]  # no summary is cut short


def test_the_version_is_the_package_s(run):
    assert run("--version").out == f"tinyvit {version('tinyvit')}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_option_is_documented_with_an_example(run, verb):
    result = run(verb, "--help")
    assert result.code == 0
    assert "Examples:\n" in result.out
    for example in examples_of(getattr(VERBS[verb], verb)):
        assert f"\n    {example}\n" in result.out
        assert f"tinyvit {verb} " in f"{example} "
    assert len(result.out.split("Options:")[0].strip().splitlines()) > 4
    lines = result.out.split("Options:")[1].splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  -") and "--help" not in line:
            assert len(line.split("  ")) > 2 or following.startswith("      "), line


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], [], ["encode", "--help"], ["segment", "--help"]]
)
def test_talking_about_itself_loads_nothing_heavy(words):
    code = (
        "import sys\nfrom tinyvit.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_wrong_words_are_refused_before_torch_is_imported():
    """Found as 33 s of imports before one line that names a missing prompt."""
    image = Path(__file__).parents[2] / "examples" / "pictures" / "chelsea.png"
    calls = [call.replace("IMAGE", str(image)).split() for call in UNSEEN]
    code = (
        "import sys\nfrom tinyvit.cli.main import main\n"
        f"for words in {calls!r}:\n"
        "    try:\n        main(words)\n    except SystemExit as end:\n"
        "        print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(UNSEEN)
    assert all(line in ("1 False", "2 False") for line in lines), done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["--nothing"], "No such option"),
        (["models", "--nothing"], "No such option"),
        (["models", "more"], "unexpected extra argument"),
        (["inspect"], "Missing argument"),
        (["convert", "a", "b"], "Missing option '--to'"),
        (["encode", "a.jpg"], "Missing option '--output'"),
        (["encode", "-o", "x"], "Missing argument"),
        (["encode", "", "-o", "x"], "the path is empty"),  # was the folder it ran in
        (["segment", "a.jpg", "-o", "", "--point", "1,1"], "the path is empty"),
        (["encode", "a.jpg", "-o", "x", "--batch-size", "0"], "--batch-size"),
        (["encode", "a.jpg", "-o", "x", "--precision", "fp8"], "'fp8' is not one of"),
        (["encode", "a.jpg", "-o", "x", "--size", "big"], "--size"),
        (["classify", "a.jpg", "--top-k", "0"], "--top-k"),
        (["segment", "a.jpg"], "Missing option '--output'"),
        (["segment", "a.jpg", "-o", "x", "--point", "3"], "'3' is not X,Y or X,Y,LABEL"),
        (["segment", "a.jpg", "-o", "x", "--box", "1,2,3"], "is not X0,Y0,X1,Y1"),
        (["download"], "Missing argument"),
    ],
)
def test_wrong_usage_is_exit_code_2(run, words, named):
    result = run(*words)
    assert result.code == 2
    assert named in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "classify", "a", "-o", "x", "--confg", "y"], "(Possible options: --config)"),
        (["encode", "a", "-o", "x", "--checkpont", "y"], "(Possible options: --checkpoint)"),
    ],
)
def test_only_options_that_are_near_are_named(run, words, named):
    """Found as ``No such option: --confg (Possible options: --config, --json, --moving)``."""
    assert named in " ".join(run(*words).err.split())


def test_shared_options_may_stand_anywhere(run):
    assert reordered(["encode", "a", "-q", "--", "--debug"]) == [
        "-q",
        "encode",
        "a",
        "--",
        "--debug",
    ]
    for words in (["--debug", "inspect", "none.pt"], ["inspect", "none.pt", "--debug"]):
        assert "Traceback" in run(*words).err
    assert run("models").err != ""
    assert run("-q", "models").err == run("models", "--quiet").err == ""


def test_main_reads_the_process_s_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tinyvit", "--version"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert capsys.readouterr().out.startswith("tinyvit ")


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m tinyvit models --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "{\n"
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="wants a device that is always full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "models", "-q"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")
def test_ctrl_c_leaves_nothing_half_written_and_the_rest_can_follow(tmp_path, photo):
    images, out = tmp_path / "in", tmp_path / "out"
    for number in range(40):
        photo(images / f"{number:02}.png", 200, 300, number)
    words = [*COMMAND, "encode", str(images), "-o", str(out), "--batch-size", "1"]
    job = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=CALM)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130
    assert err.endswith("the same command goes on from there\ninterrupted\n")
    assert "Traceback" not in err
    done = len(list(out.glob("*.safetensors")))
    assert 2 <= done < 40
    assert all(path.suffix in (".safetensors", ".png") for path in out.iterdir())
    again = subprocess.run(
        [*words, "--no-pictures"], capture_output=True, text=True, env=CALM, check=True
    )
    assert f"kept {done} made before" in again.stderr
    assert len(list(out.glob("*.safetensors"))) == 40


NOT_FOR_HELP = ("torch", "numpy", "PIL", "safetensors", "rich.progress")
GROUP_VERBS = [(group, verb) for group, (_, verbs) in GROUPS.items() for verb in verbs]
DOCS = Path(__file__).parents[2] / "docs"
NAMES = [verb.__name__.replace("_", "-") for _, verb in GROUP_VERBS]


def test_every_group_is_registered():
    assert [group.name for group in app.registered_groups] == list(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_verbs(run, group):
    result = run(group, "--help")
    assert result.code == 0
    for verb in GROUPS[group][1]:
        assert f"\n  {verb.__name__.replace('_', '-')} " in result.out
    assert "..." not in result.out.split("Commands:")[1]  # no summary is cut short
    assert run(group).code == 2


@pytest.mark.parametrize(("group", "verb"), GROUP_VERBS, ids=NAMES)
def test_every_verb_has_a_help_with_examples(run, group, verb):
    name, examples = verb.__name__.replace("_", "-"), examples_of(verb)
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
        f"print([name for name in {NOT_FOR_HELP!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def commands_in(path):
    """Command lines of ``tinyvit train`` and ``evaluate`` in a document, as words."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    found = re.findall(rf"^(?:torchrun .*-m )?tinyvit ((?:{'|'.join(GROUPS)}) .+)$", text, re.M)
    return [shlex.split(line) for line in found]


DOCUMENTS = [path for path in sorted(DOCS.rglob("*.md")) if commands_in(path)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documents_are_understood(path):
    root = typer.main.get_command(app)
    for group, name, *words in commands_in(path):
        verb = root.commands[group].commands[name]
        verb.make_context(name, words)  # raises for an unknown option or a wrong value
