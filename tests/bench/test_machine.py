from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from tinyvit.bench import machine, machine_facts
from tinyvit.bench.machine import minor_faults, peak_memory


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
    monkeypatch.setattr(machine, "_line_of", lambda path, name: None)
    monkeypatch.setattr(machine, "_output_of", lambda *command: None)
    facts = machine_facts()
    assert facts["cpu"]
    assert facts["memory"] is None
    assert facts["instruction_sets"] == ""


def test_lines_and_outputs_that_are_not_there(tmp_path):
    assert machine._line_of(tmp_path / "none", "a") is None
    file = tmp_path / "some"
    file.write_text("a : 1\nflags\t: x y\n")
    assert machine._line_of(file, "flags") == "x y"
    assert machine._line_of(file, "b") is None
    assert machine._output_of(sys.executable, "-c", "print(' x ')") == "x"
    assert machine._output_of(str(tmp_path / "none")) is None


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
    code = "from tinyvit.bench.machine import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) < block.nbytes
