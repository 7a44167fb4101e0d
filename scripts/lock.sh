#!/bin/sh
# Writes the pinned versions of everything that wanfit and its tests need.
#
#   scripts/lock.sh constraints.txt
#
# They come from a clean environment with the newest releases that pyproject.toml admits. torch stays
# at the version that the file names already; to move it, edit that line first. Left out: wanfit
# itself, torch's "+cpu", and the CUDA libraries, which torch pins itself.
set -eu

target=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

scripts/make_venv.sh "$dir/venv"
python=$dir/venv/bin/python
"$python" scripts/install_torch.py --constraints "$target" --build cpu
"$python" -m pip install --quiet --disable-pip-version-check ".[dev]"
{
    echo "# Written by \`make lock\`. The versions that \`make install\` and \`make test\` install."
    "$python" -m pip freeze --exclude wanfit |
        sed -E 's/^(torch==[^+]*)\+cpu$/\1/' | LC_ALL=C sort --ignore-case
} > "$dir/constraints.txt"
mv "$dir/constraints.txt" "$target"
