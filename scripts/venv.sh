#!/bin/sh
# venv.sh PYTHON STAMP: makes .venv, or leaves it and STAMP alone where it is whole and belongs to this folder.
set -eu
python=$1
stamp=$2

# A virtual environment holds absolute paths: one that was moved or copied runs the other folder's code.
whole() {
    [ -e "$stamp" ] &&
        grep -qxF "path = $PWD/.venv" "$stamp" &&
        .venv/bin/python -c 'import pip' 2>/dev/null
}

refuse() {
    echo "make: $*" >&2
    exit 1
}

whole && exit 0

command -v "$python" >/dev/null ||
    refuse "no $python here. Python 3.11 or newer is needed (Debian: apt-get install python3 python3-venv)."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    refuse "$("$python" --version) is too old: 3.11 or newer is needed. Another one: make PYTHON=python3.12 ..."
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    refuse "$python cannot make virtual environments (Debian: apt-get install python3-venv)."
command -v "${CXX:-c++}" >/dev/null ||
    refuse "no C++ compiler here; llama.cpp is built from source (Debian: apt-get install g++)."

echo "making .venv with $("$python" --version)"
# Where an earlier start was interrupted, what is there may be half of anything.
"$python" -m venv --clear .venv
mkdir -p "$(dirname "$stamp")"
echo "path = $PWD/.venv" >"$stamp"
