import subprocess
import sys


def test_python_m_tinyvit_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "tinyvit", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("tinyvit ")
    assert done.stderr == ""
