"""What ``tinyvit train`` adds to the library: settings put together, the screen, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import typer

from tiny import make_tiny_vit, write_mask_folder, write_tiny_sam
from tinyvit import create_model, from_pretrained, save_pretrained
from tinyvit.cli.console import Console
from tinyvit.cli.train import (
    CLASSIFY,
    SEGMENT,
    gather,
    metrics_text,
    shown,
    task_toml,
    time_text,
)
from tinyvit.image_spec import ImageSpec
from tinyvit.inference.graph_backend import export_onnx
from tinyvit.train import Progress, TrainSettings
from tinyvit.train.tasks.settings import ClassifySettings

QUICK = ("--epochs", 1, "--batch-size", 4)


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
    return ("train", "classify", images, *start, *QUICK, "--val-part", 0.25)


# -- settings put together ---------------------------------------------------------------------


def choose(config=None, resume=False, **given):
    """(the loop's settings, the task's)."""
    return gather(CLASSIFY, given, config, resume)


@pytest.fixture
def begun(tmp_path):
    """A run's folder as a first call leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    task = choose(folder=str(folder), data=["a"], mixup=0.8, window_sizes=[4, 4, 2, 1])[1]
    (folder / "task.toml").write_text(task_toml(CLASSIFY, task), encoding="utf-8")
    settings = TrainSettings(str(folder), epochs=3, learning_rate=0.01)
    (folder / "settings.toml").write_text(settings.to_toml(), encoding="utf-8")
    return folder


def test_options_become_settings():
    loop, task = choose(folder="run", data=["a"], seed=7, mixup=0.8, lora_rank=None)
    assert loop == TrainSettings("run", seed=7)
    assert task == ClassifySettings("a", mixup=0.8, seed=7)


def test_options_go_before_a_file(tmp_path):
    file = tmp_path / "choices.toml"
    file.write_text('folder = "there"\ndata = "b"\nepochs = 5\nmoving = "head"\nflip = false\n')
    loop, task = choose(config=str(file), epochs=9, folder="here")
    assert loop == TrainSettings("here", epochs=9, trainable="head")
    assert task == ClassifySettings("b", flip=False)


def test_bf16_is_a_precision(run, monkeypatch, tmp_path):
    seen = []

    def stop(verb, given, config, is_resumed):
        seen.append(given["precision"])
        raise ValueError("enough")

    monkeypatch.setattr("tinyvit.cli.train.gather", stop)
    for flag in ("--bf16", "--fp32", "--precision=bf16"):
        assert run("train", "classify", ".", "-o", tmp_path, flag).code == 1
    assert seen == ["bf16", "fp32", "bf16"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch = 3\n", "choices.toml: unknown settings epoch; known are accumulate, augment,"),
        ("bf16 = true\n", "unknown settings bf16"),
        ('mixup = "much"\n', "choices.toml: mixup must be a number, got 'much'"),
        ("epochs 3\n", "choices.toml is no TOML file: "),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, said):
    file = tmp_path / "choices.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        choose(config=str(file), folder="run", data=["a"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": ["a"]}, "name the folder of the run with -o RUN_FOLDER"),
        ({"folder": "run"}, "name the data to train on"),
        ({"folder": "run", "resume": True}, "begun in run"),
        ({"folder": "run", "data": ["a.tar", "b.tar"]}, "2 places of data were named"),
    ],
)
def test_what_is_missing_is_wrong_usage(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.BadParameter, match=said):
        choose(**given)


def test_a_run_is_resumed_by_its_folder_alone(begun):
    loop, task = choose(folder=str(begun), resume=True, workers=2, data=["moved"])
    assert task == ClassifySettings("moved", mixup=0.8, window_sizes=(4, 4, 2, 1))
    assert loop == TrainSettings(str(begun), epochs=3, learning_rate=0.01, workers=2)
    assert choose(folder=str(begun), data=["a"])[1] == ClassifySettings("a")  # not resumed


def test_other_settings_of_the_task_are_refused(begun):
    with pytest.raises(ValueError, match=r"other settings.*mixup was 0\.8 and is 0\.5"):
        choose(folder=str(begun), resume=True, mixup=0.5)
    with pytest.raises(ValueError, match="augment was 'light' and is 'full'"):
        choose(folder=str(begun), resume=True, augment="full")  # against the default
    assert choose(folder=str(begun), resume=True, mixup=0.8, augment="light", on_broken="error")
    with pytest.raises(ValueError, match="holds a run of 'tinyvit train classify', not of segment"):
        gather(SEGMENT, {"folder": str(begun)}, None, True)


def test_a_run_folder_of_version_0_1(begun):
    """Only what was given stood in task.toml, and ``trainable`` was called ``moving``."""
    (begun / "task.toml").write_text('task = "classify"\ndata = "a"\nmixup = 0.8\n')
    (begun / "settings.toml").write_text('folder = "x"\nepochs = 3\nseed = 4\nmoving = "head"\n')
    loop, task = choose(folder=str(begun), resume=True)
    assert loop == TrainSettings(str(begun), epochs=3, seed=4, trainable="head")
    assert task == ClassifySettings("a", mixup=0.8, seed=4)


def test_places_that_exist_are_kept_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "söme \"'").mkdir()
    task = choose(folder="run", data=["söme \"'"], checkpoint="tinyvit_sam_2m")[1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/task.toml").write_text(task_toml(CLASSIFY, task), encoding="utf-8")
    found = choose(folder="run", resume=True)[1]
    assert (found.data, found.checkpoint) == (str(tmp_path / "söme \"'"), "tinyvit_sam_2m")


# -- runs --------------------------------------------------------------------------------------


def test_a_run_its_summary_and_its_end(run, words, tmp_path, allocator):
    folder = tmp_path / "run"
    result = run(*words, "-o", folder, "--lr", "1e-3", "--warmup", 1, "--json")
    assert result.code == 0, result.err
    found = result.json
    assert (found["task"], found["goal"], found["broken"]) == ("classify", ["top1", "max"], {})
    assert found["steps"] == found["best_step"] == 2
    assert found["best"] == found["figures"]["top1"]
    assert found["best_weights"] == str(folder / "best.safetensors")
    lines = result.err.splitlines()
    assert lines[0] == f"classify: 6 samples to train on, in {folder}"
    assert lines[1].startswith("step 2 of 2 (epoch 1 of 1): top1 ")
    assert lines[2].startswith("trained classify to step 2 in 0:00:0")
    assert lines[3].endswith(f" after step 2: {folder / 'best.safetensors'}")
    assert str(folder / "last.safetensors") in lines[4]
    assert {path.name for path in folder.iterdir()} == {
        *("settings.toml", "task.toml", "log.jsonl", "curves.png"),
        *("state.safetensors", "best.safetensors", "last.safetensors"),
    }
    assert len(allocator) == (sys.platform == "linux")
    again = run(*words, "-o", folder)
    assert (again.code, len(again.err.splitlines())) == (1, 2)
    assert f"error: {folder} already holds a run; resume it (--resume)" in again.err
    resumed = run("train", "classify", "-o", folder, "--resume", "--json", "-q")
    assert (resumed.code, resumed.err, resumed.json["steps"]) == (0, "", 2)
    for changed, said in (
        (("--epochs", 3), "--epochs was 1 and is 3"),
        (("--mixup", 0.5), "--mixup was 0.0 and is 0.5"),
    ):
        refused = run("train", "classify", "-o", folder, "--resume", *changed)
        assert refused.code == 1
        assert said in refused.err


def test_unreadable_images_are_named_at_the_end(run, words, images, tmp_path):
    (images / "ant" / "9.png").write_bytes(b"no image")
    (images / "bee" / "9.png").write_bytes(b"no image")
    result = run(*words, "-o", tmp_path / "run", "--json", "--epochs", 3)
    assert result.code == 0
    assert set(result.json["broken"]) == {"ant/9.png", "bee/9.png"}
    assert sum(line.startswith("skipped: ") for line in result.err.splitlines()) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--lr", -1), "error: --lr must be above 0, got -1.0"),
        (("--batch-size", 2, "--accumulate", 3), "error: --accumulate must be at most the batch"),
        (("--drop-last", "--batch-size", 9), "error: --batch-size is 9, and 6 samples give"),
        (("--move", "decoder"), "error: --trainable must be one of full, lora, head for this"),
        (("--val-part", 2), "error: the part to hold out must be above 0 and below 1, got 2.0"),
        (("--checkpoint", "none.safetensors"), "none.safetensors"),
    ],
)
def test_wrong_settings_are_one_line(run, words, tmp_path, more, said):
    result = run(*words, "-o", tmp_path / "run", *more)
    assert result.code == 1
    assert said in result.err.splitlines()[-1]


def test_errors_leave_names_as_they_are(run, tmp_path):
    """A folder was once called 'my --seed 3.dir', and settings of a file as options."""
    result = run("train", "classify", "my  seed=3 .dir", "-o", tmp_path / "run")
    assert (result.code, "'my  seed=3 .dir'" in result.err) == (1, True)
    empty = tmp_path / "lr=1  images=... .d"
    empty.mkdir()
    result = run("train", "classify", empty, "-o", tmp_path / "run")
    assert f"error: {str(empty)!r} has no subfolders with images; wanted" in result.err
    assert " .bmp .gif " in result.err
    file = tmp_path / "choices.toml"
    for text, said in (
        ("epochz = 3", "unknown settings epochz; known are accumulate, augment, batch_size, "),
        ("batch_size = 0", "batch_size must be at least 1, got 0"),
    ):
        file.write_text(text)
        result = run("train", "classify", tmp_path, "-o", tmp_path / "run", "--config", file)
        assert result.err.startswith(f"error: {file}: {said}")


MISSING = (
    (("classify", "nowhere"), "there is no file or folder 'nowhere' for DATA; check the path"),
    (("classify", "x-*.tar"), "there is no file or folder 'x-*.tar' for DATA; check the path"),
    (("classify", ".", "--val", "no"), "there is no file or folder 'no' for --val; check the path"),
    (("classify", ".", "--checkpoint", "a.pt"), "no such file: a.pt for --checkpoint; check"),
    (("classify", ".", "--checkpoint", "tinyvit_sam_2n"), "did you mean 'tinyvit_sam_2m'?"),
    (("classify", ".", "--config", "no.toml"), "no.toml: No such file or directory"),
    (("segment", ".", "--images", "no"), "there is no file or folder 'no' for --images; check"),
    (("distill-logits", ".", "--logits", "no"), "no file or folder 'no' for --logits"),
    (("distill-features", ".", "--features", ".", "--sam", "a.pt"), "no such file: a.pt for --sam"),
    (("write-logits", "nowhere", "--teacher", "tinyvit_sam_2m"), "'nowhere' for DATA"),
    (("store-features", ".", "--teacher", "no.onnx"), "no such file: no.onnx for --teacher"),
)


def test_what_is_missing_is_found_before_torch_is_loaded(tmp_path):
    """It took 41 seconds to say that a folder is not there; here torch cannot be imported."""
    code = (
        "import json, sys\n"
        "sys.modules['torch'] = None\n"
        "from typer.testing import CliRunner\n"
        "from tinyvit.cli.main import app\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    result = CliRunner().invoke(app, ['train', *words, '-o', 'run'])\n"
        "    print(json.dumps([result.exit_code, result.stderr]))\n"
    )
    words = [words for words, _ in MISSING]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    for line, (_, said) in zip(done.stdout.splitlines(), MISSING, strict=True):
        status, err = json.loads(line)
        assert (status, err.count("\n")) == (1, 1)
        assert said in err
    assert list(tmp_path.iterdir()) == []


def test_other_processes_are_silent(run, words, tmp_path, monkeypatch):
    """One process alone, told that it is the second: it speaks of nothing and writes no summary."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    result = run(*words, "-o", tmp_path / "run", "--json")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_segment(run, tmp_path):
    cells = write_mask_folder(tmp_path / "cells")
    sam = write_tiny_sam(tmp_path / "sam.safetensors")
    words = ("--checkpoint", sam, "--size", 64, "--trainable", "decoder", "--objects", 1)
    result = run("train", "segment", cells, "-o", tmp_path / "run", *QUICK, *words, "--json")
    assert result.code == 0, result.err
    assert result.json["goal"] == ["mean_iou", "max"]
    assert "objects = 1\n" in (tmp_path / "run" / "task.toml").read_text()


def test_segment_with_new_weights(run, tmp_path, monkeypatch):
    """``--model`` alone names no checkpoint, here seen where the library is called."""
    seen = []

    def stop(settings):
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("tinyvit.train.tasks.segment.make_task", stop)
    for words in (("--model", "tiny_vit_2m_sam"), ()):
        assert (
            run("train", "segment", tmp_path, "-o", tmp_path / "run", *words, "--seed", 3).code == 1
        )
    assert [(one.checkpoint, one.model, one.seed) for one in seen] == [
        (None, "tiny_vit_2m_sam", 3),
        ("tinyvit_sam_2m", None, 3),
    ]


def test_distil_logits(run, images, checkpoints, tmp_path):
    split, teacher = ("--val-part", 0.3), checkpoints / "five.safetensors"
    start = ("--checkpoint", teacher, "--img-size", 32, *split, *QUICK)
    first = run("train", "classify", images, "-o", tmp_path / "teacher", *start)
    assert first.code == 0, first.err
    predictions = tmp_path / "answers"
    written = run(
        *("train", "write-logits", images, "--teacher", tmp_path / "teacher/best.safetensors"),
        *("-o", predictions, *split, "--views", 2, "--top-k", 2, "--json"),
    )
    assert written.code == 0, written.err
    words = ("train", "distill-logits", images, *start)
    result = run(*words, "--logits", predictions, "-o", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert result.json["task"] == "distill-logits"
    assert run("train", "distill-logits", "-o", tmp_path / "run", "--resume").code == 0
    missing = run(*words, "-o", tmp_path / "other")
    assert missing.code == 1
    assert missing.err.startswith("error: --logits is missing: Folder of a teacher's predictions")


def test_distil_features(run, checkpoints, tmp_path):
    images = write_mask_folder(tmp_path / "cells") / "images"
    sam = write_tiny_sam(tmp_path / "sam.safetensors")
    features = tmp_path / "features"
    kept = run("train", "store-features", images, "--teacher", sam, "-o", features, "--json")
    assert kept.code == 0, kept.err
    student = ("--checkpoint", checkpoints / "encoder.safetensors")
    size = ("--size", 16 * kept.json["shape"][1], *QUICK)
    words = ("train", "distill-features", images, *student, *size, "--features", features)
    result = run(*words, "-o", tmp_path / "run", "--loss", "huber", "--json")
    assert result.code == 0, result.err
    assert {"cosine", "cosine_floor", "mse"} <= set(result.json["figures"])
    wanted = run(*words, "-o", tmp_path / "two", "--mask-weight", 1)
    assert wanted.code == 1
    assert "error: --mask-weight must be 0 without a SAM" in wanted.err


def test_distil_features_of_sam_3(run, tmp_path):
    """A student with EfficientSAM3's neck learns from maps of 72 x 72; images are squashed."""
    pytest.importorskip("onnxruntime")
    images = write_mask_folder(tmp_path / "cells") / "images"
    shape = {"neck_dim": 8, "neck_size": 72, "strides": (2, 2, 2), "head": False}
    for name, seed in (("teacher", 7), ("student", 1)):
        model = make_tiny_vit(seed, **shape)
        model.image_spec = ImageSpec.sam3(64)
        save_pretrained(model, tmp_path / name)
    (tmp_path / "teacher.onnx").write_bytes(export_onnx(from_pretrained(tmp_path / "teacher")))
    words = ("--teacher", tmp_path / "teacher.onnx", "--teacher-size", 64)
    words = ("store-features", images, *words, "--teacher-images", "sam3", "-o", tmp_path / "maps")
    kept = run("train", *words, "--json")
    assert kept.code == 0 and kept.json["shape"] == [8, 72, 72], kept.err
    start = ("--checkpoint", tmp_path / "student" / "model.safetensors", "--size", 64)
    words = ("train", "distill-features", images, *start, "--features", tmp_path / "maps")
    result = run(*words, *QUICK, "-o", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert -1 <= result.json["figures"]["cosine"] <= 1
    trained = create_model(checkpoint=tmp_path / "run" / "last.safetensors")
    assert (trained.neck_size, trained.image_spec) == (72, ImageSpec.sam3(64))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("classify", "a", "-o", "x", "--augment", "much"), "'much' is not one of 'none', 'light'"),
        (("classify", "a", "-o", "x", "--move", "all"), "'all' is not one of 'full', 'decoder'"),
        (("classify", "a"), "name the folder of the run with -o"),
        (("segment", "-o", "x"), "name the data to train on"),
        (("segment", "a", "-o", "x", "--mixup", "1"), "No such option"),
        (("everything", "a"), "No such command 'everything'"),
    ],
)
def test_wrong_usage_is_exit_code_2(run, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", *words)
    assert result.code == 2
    assert said in " ".join(result.err.split())


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")
def test_ctrl_c_saves_and_says_how_to_resume(run, words, tmp_path, monkeypatch):
    pressed = []

    def press(progress):
        if progress.step == 1 and not pressed:  # a second time would end at once
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return "loss"

    monkeypatch.setattr("tinyvit.cli.train._speed", press)
    folder = tmp_path / "run"
    result = run(*words, "-o", folder, "--epochs", 4)
    assert result.code == 130
    assert result.err.splitlines()[-3:] == [
        f"stopped after step 2 of 8, with its state in {folder}",
        f"go on with: tinyvit train classify -o {folder} --resume",
        "interrupted",
    ]
    assert (folder / "state.safetensors").is_file()


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
        assert done.stderr.count("samples to train on") == 1  # one process speaks
        outputs.append(json.loads(done.stdout))  # and one answers
    two, one = outputs
    assert two["steps"] == one["steps"] == 2
    # the same batches: what differs is the order of sums in float32
    assert two["figures"]["loss"] == pytest.approx(one["figures"]["loss"], rel=1e-3)


# -- the screen --------------------------------------------------------------------------------

BEGUN = Progress("train", 0, 20, 1, 2, None, 1e-3, 0.0, None, {})
STEP = replace(BEGUN, step=10, loss=0.51234, images_per_second=25.04, seconds_left=133.2)
VALIDATED = replace(STEP, metrics={"top1": 0.98765, "loss": 0.2})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(*reports, is_quiet=False):
    with shown(Console(is_quiet=is_quiet)) as report:
        for progress in reports:
            report(progress)


def test_a_validation_is_one_line(capsys):
    show(BEGUN, STEP, replace(STEP, phase="validate"), VALIDATED, VALIDATED)
    assert capsys.readouterr().err == (
        "step 10 of 20 (epoch 1 of 2): top1 0.9877, loss 0.2000; training loss 0.5123, "
        "25.0 images/s, 0:02:13 left\n"
    )
    show(replace(BEGUN, phase="validate"), replace(BEGUN, metrics={"top1": 0.1}))
    assert capsys.readouterr().err == "step 0 of 20: top1 0.1000; training not begun\n"
    end = replace(VALIDATED, step=20)
    show(replace(end, phase="validate"), replace(end, phase="done"))
    assert capsys.readouterr().err.endswith("25.0 images/s\n")


def test_a_line_a_minute_where_nobody_looks(capsys, monkeypatch):
    clock = iter([0.0, 30.0, 61.0, 61.0, 62.0])
    monkeypatch.setattr("tinyvit.cli.train.monotonic", lambda: next(clock))
    show(*(replace(STEP, step=step) for step in (1, 2, 3)))
    lines = capsys.readouterr().err
    assert re.findall(r"^step (\d+) of", lines, re.MULTILINE) == ["2"]


def test_words_are_told_and_quiet_is_quiet(capsys):
    broken = replace(BEGUN, words="a state was broken")
    show(broken)
    assert capsys.readouterr().err == "a state was broken\n"
    show(replace(broken, phase="validate"), VALIDATED, is_quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_bar_on_a_terminal(monkeypatch, is_quiet):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    show(STEP, replace(STEP, phase="validate"), VALIDATED, is_quiet=is_quiet)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    if is_quiet:
        assert text == ""
        return
    assert "10/20 loss 0.5123, 25.0 images/s, 0:02:13 left" in text
    assert "step 10 of 20 (epoch 1 of 2): top1 0.9877" in text  # stays above the bar


def test_texts():
    assert metrics_text({}) == "not validated"
    assert metrics_text({"a": 1, "b": 0.25}) == "a 1.0000, b 0.2500"
    assert time_text(3725.4) == "1:02:05"
