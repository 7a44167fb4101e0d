#!/bin/sh
# Makes a virtual environment from the first Python here that is 3.11, 3.12 or 3.13.
#
#   scripts/make_venv.sh DIR
#
# PYTHON names the interpreter to use instead. `python3` comes first because it is the one that the
# person chose; the others are tried when it is too old or too new. Debian splits `ensurepip` out of
# its Python: without it, pip is put in by a pip that is already on the machine. An environment that
# is there and works is left alone.
set -eu

dir=$1
supported='import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

works() { "$1" -c "$2" >/dev/null 2>&1; }

if works "$dir/bin/python" "$supported; import pip"; then
    exit 0
fi

without_pip=
for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    works "$python" "$supported" || continue
    if works "$python" 'import ensurepip'; then
        "$python" -m venv --clear "$dir"
        exit 0
    fi
    without_pip=${without_pip:-$python}
done

if [ -z "$without_pip" ]; then
    echo "make_venv: no Python 3.11, 3.12 or 3.13 here (looked for: ${PYTHON:-python3 python3.13 python3.12 python3.11}). Install one, or name it: make PYTHON=/path/to/python" >&2
    exit 1
fi

# `pip --python` puts packages into another environment (pip 22.3 and later).
if works "$without_pip" 'import pip'; then
    "$without_pip" -m venv --clear --without-pip "$dir"
    if "$without_pip" -m pip --python "$dir/bin/python" install --quiet pip; then
        exit 0
    fi
    rm -rf "$dir"
fi
echo "make_venv: $without_pip can make no virtual environment with pip in it. On Debian and Ubuntu: apt-get install python3-venv" >&2
exit 1
