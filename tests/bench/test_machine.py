from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from tinyvit.bench import Spread, machine_facts, workers
from tinyvit.bench.workers import minor_faults, peak_memory


def test_facts_have_what_a_table_needs():
    facts = machine_facts("no-such-package", "numpy")
    assert facts["cpu"]
    assert isinstance(facts["cores"], int)
    assert facts["tinyvit"] == version("tinyvit")
    assert facts["torch"] == version("torch")
    assert facts["numpy"] == np.__version__
    assert "no-such-package" not in facts
    assert str(facts["date"]).endswith(" UTC")


def test_facts_of_a_machine_that_tells_nothing(monkeypatch):
    monkeypatch.setattr(workers, "_line_of", lambda path, name: None)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setenv("PATH", "")  # where no sysctl is found
    facts = machine_facts()
    assert facts["cpu"]
    assert facts["memory"] is None
    assert facts["instruction_sets"] == ""


def test_lines_that_are_not_there(tmp_path):
    assert workers._line_of(tmp_path / "none", "a") is None
    file = tmp_path / "some"
    file.write_text("a : 1\nflags\t: x y\n")
    assert workers._line_of(file, "flags") == "x y"
    assert workers._line_of(file, "b") is None


@pytest.mark.skipif(sys.platform == "win32", reason="nobody counts there")
def test_fresh_memory_counts_as_faults_and_as_peak():
    before, peak = minor_faults(), peak_memory()
    block = np.ones(64 << 20, np.uint8)
    assert minor_faults() > before
    assert peak_memory() >= peak
    assert peak_memory() >= block.nbytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="wants Linux's own mark")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    block = np.ones(200 << 20, np.uint8)
    code = "from tinyvit.bench.workers import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) < block.nbytes


def test_quartiles_lie_within_the_numbers():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)


def test_one_number_has_no_spread():
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread.of([7.0]).relative == 0


def test_relative_is_a_share_of_the_median():
    assert Spread(4.0, 3.0, 5.0).relative == 0.5
    assert Spread(0.0, 0.0, 0.0).relative == 0


def test_no_numbers_are_an_error():
    with pytest.raises(ValueError, match="at least one number, got none"):
        Spread.of([])
