"""The benchmark of starting: what it writes of its numbers."""

import json


def test_the_report(load_benchmark, tmp_path):
    startup = load_benchmark("startup")
    spread = {"median": 1.5, "lower": 1.0, "upper": 2.0}
    row = {"seconds": spread, "cpu_seconds": spread, "peak_memory": {"median": 2e8},
           "installed": 3e8, "pixels": 10, "loads_torch": False}  # fmt: skip
    report = {"machine": {"cpu": "x", "cores": 2}, "rounds": 3, "threads": 1, "load": 9.0,
              "results": {"torch": row, "ONNX Runtime": {**row, "pixels": 12}}}  # fmt: skip
    startup.write(report, tmp_path)
    text = (tmp_path / "startup.md").read_text()
    assert "| torch | 1.50 (1.00 to 2.00) | 1.50 (1.00 to 2.00) | 200 | 300 |" in text
    assert "10 to 12 pixels" in text and "load 9 on 2 cores" in text
    assert json.loads((tmp_path / "startup.json").read_text())["load"] == 9.0
    startup.write({**report, "load": 0.5}, tmp_path)
    assert "Other programs" not in (tmp_path / "startup.md").read_text()


def test_what_is_installed_is_counted_without_pip(load_benchmark, tmp_path):
    startup = load_benchmark("startup")
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("numpy", "pip"):
        (site / name).mkdir(parents=True)
        (site / name / "data").write_bytes(b"x" * 9000)
    found = startup.size_of(tmp_path / "bin" / "python")
    assert 9000 <= found < 18000
