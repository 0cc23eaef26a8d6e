"""Run code where some packages are not installed: ``python tests/without.py torch,onnx CODE``."""

import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"


class Without(PathFinder):
    """Finds everything but the packages that are to be missing."""

    missing = frozenset()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in cls.missing:
            return None
        return super().find_spec(name, path, target)


def run_without(missing, code, *arguments, fails=False):
    """What code prints in a process without these packages; with ``fails`` what it says on stderr.

    ``sys.argv[1:]`` are the arguments.
    """
    command = [sys.executable, __file__, ",".join(missing), code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def main():
    _, missing, code, *arguments = sys.argv
    Without.missing = frozenset(missing.split(","))
    places = [place for place in sys.meta_path if place is not PathFinder]
    sys.meta_path[:] = [*places, Without]
    sys.path[0] = str(SRC)
    sys.argv = ["", *arguments]
    exec(compile(code, "code", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
