#!/usr/bin/env bash
# The environment of the project, made or brought up to date: .venv/ with the pinned dependencies, the patched
# llama.cpp (Python package and programs), lukv-gguf itself. Nothing is built that was built before.
#
#     scripts/setup.sh [--cuda | --metal]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

python=
for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || die "Python 3.11 or newer is needed"
command -v git >/dev/null || die "git is needed (Debian: apt-get install git)"
command -v c++ >/dev/null || die "a C++ compiler is needed (Debian: apt-get install g++)"

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

if ! .venv/bin/python -c '' 2>/dev/null; then
    say "creating .venv"
    "$python" -m venv --clear .venv || die "cannot create .venv (Debian: apt-get install python3-venv)"
fi

say "installing the pinned dependencies"
.venv/bin/python -m pip install --quiet --requirement requirements.txt

wheel=$(.venv/bin/python scripts/build_llama_cpp.py "$@")
.venv/bin/python -m pip install --quiet --no-deps "$wheel"
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .

programs=$(.venv/bin/python -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("llama_cpp").origin).parent / "bin")')
for program in "$programs"/*; do
    chmod +x "$program"
    ln -sf "$program" .venv/bin/
done
