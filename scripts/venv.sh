# Sourced by the scripts here: finds an interpreter, or makes a virtual environment in .venv and installs a requirements
# file into it. PYTHON may name the interpreter to make it with. An existing .venv is used, and what is missing installed.

# find_python "MODULES" CANDIDATE...: sets $python to the first candidate that has the modules; fails if none has.
find_python() {
  local modules=$1 candidate
  shift
  for candidate in "$@"; do
    # shellcheck disable=SC2086  # MODULES are words
    if "$candidate" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not all(map(f, sys.argv[1:])))' \
      $modules 2>/dev/null; then
      python=$candidate
      return
    fi
  done
  return 1
}

# need_venv FILE: sets $python to the environment's interpreter.
need_venv() {
  if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "installing into .venv, which can take minutes" >&2
    local interpreter=${PYTHON:-python3}
    "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
      echo "$0: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3" >&2
      return 2
    }
    if ! "$interpreter" -m venv .venv >/dev/null 2>&1; then
      as_root_install python3-venv && "$interpreter" -m venv .venv || {
        echo "$0: $interpreter cannot make .venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
        return 2
      }
    fi
  fi
  python=$PWD/.venv/bin/python
  "$python" -m pip install --quiet --disable-pip-version-check --requirement "$1"
}

# as_root_install PACKAGE: installs a Debian package if this is Debian or Ubuntu and the user is root.
as_root_install() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$1" >/dev/null
}
