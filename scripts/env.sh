# Sourced by the other scripts: creates .venv and installs the package into it, once.
# Usage: . scripts/env.sh EXTRAS   (e.g. "[torch]" or "[dev]"; "none" installs nothing)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1-}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "tinyvit needs Python 3.10 or newer, got $("$python" --version); set PYTHON=..." >&2
  exit 1
}
# pip install for a python: a line for each package, so that the minutes it takes show.
pip_install() {
  "$1" -m pip install --disable-pip-version-check --progress-bar off "${@:2}" |
    awk '/^(Collecting|Obtaining) / { print "  " $2; fflush() }
      /^Installing collected/ { print "  unpacking them"; fflush() }' >&2
}
# The native engine is in no index: its wheel is built here, where a C++ compiler is there.
build_native() {
  local stamp=.venv/.installed-native wheels
  if ! command -v "${CXX:-c++}" >/dev/null; then
    echo "no C++ compiler here: tinyvit-native is not built, and torch computes instead" >&2
    return
  fi
  if [ -e $stamp ]; then
    [ -n "$(find native -newer $stamp -type f -not -path '*/tests/*' -print -quit)" ] || return 0
  fi
  echo "building tinyvit-native (a minute or two):" >&2
  wheels=$(mktemp -d)
  if CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-2} .venv/bin/python -m pip wheel \
    --quiet --disable-pip-version-check --no-deps --wheel-dir "$wheels" ./native >"$wheels/log" 2>&1; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index \
      --force-reinstall --find-links "$wheels" tinyvit-native
    touch $stamp
  else
    tail -5 "$wheels/log" >&2
    echo "tinyvit-native did not build (above), and torch computes instead" >&2
  fi
  rm -r "$wheels"
}
if [ "$extras" != none ]; then
  stamp=.venv/.installed$extras
  if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    echo "installing tinyvit$extras into .venv (some minutes the first time):" >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    pip_install .venv/bin/python --constraint constraints.txt --editable ".$extras"
    touch "$stamp"
  fi
  build_native
  export PATH="$PWD/.venv/bin:$PATH"
fi
