from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

TRAIN = ("train", "classify")
QUICK = ("--epochs", 1, "--batch-size", 4, "--workers", 0, "--val-part", 0.25)


@pytest.fixture(autouse=True)
def allocator(monkeypatch):
    """The allocator of the tests' process stays as it is; how often it would have been tuned."""
    calls = []
    monkeypatch.setattr("tinyvit.allocator.tune_allocator", lambda: calls.append(1))
    return calls


@pytest.fixture
def images(tmp_path, photo):
    for name in ("ant", "bee"):
        for number in range(4):
            photo(tmp_path / "pictures" / name / f"{number}.png", 16, 16, number)
    return tmp_path / "pictures"


@pytest.fixture
def words(images, checkpoints):
    """Arguments of a run that takes a second."""
    start = ("--checkpoint", checkpoints / "five.safetensors", "--img-size", 32)
    return (*TRAIN, images, *start, *QUICK)


def test_a_run_and_its_summary(run, words, tmp_path, allocator):
    folder = tmp_path / "run"
    result = run(*words, "-o", folder, "--lr", "1e-3", "--warmup", 1)
    assert result.code == 0, result.err
    assert result.out == ""
    lines = result.err.splitlines()
    assert lines[0] == f"classify: 6 samples to learn from, in {folder}"
    assert lines[1].startswith("step 2 of 2 (epoch 1 of 1): top1 ")
    assert lines[2].startswith("trained classify to step 2 in 0:00:0")
    assert lines[3].endswith(f" after step 2: {folder / 'best.safetensors'}")
    assert str(folder / "last.safetensors") in lines[4]
    assert {path.name for path in folder.iterdir()} == {
        *("settings.toml", "task.toml", "log.jsonl", "curves.png"),
        *("state.safetensors", "best.safetensors", "last.safetensors"),
    }
    assert "learning_rate = 0.001\n" in (folder / "settings.toml").read_text()
    assert len(allocator) == (sys.platform == "linux")


def test_the_result_as_json(run, words, tmp_path):
    found = run(*words, "-o", tmp_path / "run", "--json", "-q")
    assert found.err == ""
    assert found.json["task"] == "classify"
    assert found.json["goal"] == ["top1", "max"]
    assert found.json["steps"] == found.json["best_step"] == 2
    assert found.json["best"] == found.json["figures"]["top1"]
    assert found.json["best_weights"] == str(tmp_path / "run" / "best.safetensors")
    assert found.json["broken"] == {}


def test_a_finished_run_is_kept_and_goes_on_by_resume_only(run, words, tmp_path):
    folder = tmp_path / "run"
    assert run(*words, "-o", folder).code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = run(*words, "-o", folder)
    assert (again.code, len(again.err.splitlines())) == (1, 2)
    assert f"error: {folder} already holds a run; go on with it by --resume, or" in again.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    by_folder = run(*TRAIN, "-o", folder, "--resume", "--json")
    assert by_folder.code == 0
    assert by_folder.json["steps"] == 2


def test_other_settings_are_refused(run, words, tmp_path):
    folder = tmp_path / "run"
    assert run(*words, "-o", folder).code == 0
    for changed, said in (
        (("--lr", 0.5), "--lr was 0.001 and is 0.5"),
        (("--epochs", 3), "--epochs was 1 and is 3"),
        (("--mixup", 0.5), "--mixup was 0.0 and is 0.5"),
    ):
        result = run(*TRAIN, "-o", folder, "--resume", *changed)
        assert result.code == 1
        assert said in result.err
        assert result.err.count("error:") == 1


def test_broken_images_are_named_at_the_end(run, words, images, tmp_path):
    (images / "ant" / "9.png").write_bytes(b"no image")
    (images / "bee" / "9.png").write_bytes(b"no image")
    result = run(*words, "-o", tmp_path / "run", "--json", "--epochs", 3)
    assert result.code == 0
    assert set(result.json["broken"]) == {"ant/9.png", "bee/9.png"}
    assert sum(line.startswith("left out: ") for line in result.err.splitlines()) == 2
    stopped = run(*words, "-o", tmp_path / "other", "--on-broken", "error", "--epochs", 3)
    assert stopped.code == 1
    assert "9.png" in stopped.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--lr", -1), "error: --lr must be above 0, got -1.0"),
        (("--batch-size", 2, "--accumulate", 3), "error: --accumulate 3 parts cannot be made of"),
        (("--move", "decoder"), "error: --move 'decoder' wants a model with a decoder"),
        (("--val-part", 2), "error: the part to hold out must be above 0 and below 1, got 2.0"),
        (("--device", "abacus"), "abacus"),
        (("--checkpoint", "none.safetensors"), "none.safetensors"),
    ],
)
def test_wrong_choices_are_one_line(run, words, tmp_path, more, said):
    result = run(*words, "-o", tmp_path / "run", *more)
    assert result.code == 1
    assert said in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_other_processes_are_silent(run, words, tmp_path, monkeypatch):
    """One process alone, told that it is the second: it speaks of nothing and writes no summary."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    result = run(*words, "-o", tmp_path / "run", "--json")
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")
def test_ctrl_c_saves_and_says_how_to_go_on(words, tmp_path, run):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "tinyvit", *words, "-o", folder, "--epochs", 4000]
    job = subprocess.Popen(
        [str(word) for word in command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not (folder / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130
    lines = err.splitlines()
    assert lines[-3].startswith("stopped after step ")
    assert lines[-2:] == [
        f"go on with: tinyvit train classify -o {folder} --resume",
        "interrupted",
    ]
    assert "Traceback" not in err
    refused = run(*TRAIN, "-o", folder, "--resume", "--epochs", 1)
    assert "--epochs was 4000 and is 1" in refused.err


@pytest.mark.slow
def test_two_processes_by_torchrun(words, tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    outputs = []
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "tinyvit")
    for start, name in ((launch, "two"), (("tinyvit",), "one")):
        command = [sys.executable, "-m", *start, *words, "-o", tmp_path / name, "--json"]
        done = subprocess.run(
            [str(word) for word in (*command, "--device", "cpu", "--batch-stats", "frozen")],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.stderr.count("samples to learn from") == 1  # one process speaks
        outputs.append(json.loads(done.stdout))  # and one answers
    two, one = outputs
    assert two["steps"] == one["steps"] == 2
    # the same batches: what differs is the order of sums in float32
    assert two["figures"]["loss"] == pytest.approx(one["figures"]["loss"], rel=1e-3)
