# Sourced by the other scripts: creates .venv and installs the package into it, once.
# Usage: . scripts/env.sh EXTRAS   (EXTRAS is "" or e.g. "[dev]"; "none" installs nothing)
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
if [ "$extras" != none ]; then
  stamp=.venv/.installed$extras
  if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    echo "installing tinyvit$extras into .venv (some minutes the first time):" >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    pip_install .venv/bin/python --constraint constraints.txt --editable ".$extras"
    touch "$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
fi
