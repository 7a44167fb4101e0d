#!/bin/sh
# What the container does: `serve` and `runpod` are its two modes; anything else is a command of
# wanfit's ("plan ...", "keys ...") or, where it is a program, that program.
set -eu

here=$(dirname "$0")
mode=${1:-}
case $mode in
  serve)
    exec wanfit "$@"
    ;;
  runpod)
    shift
    if [ ! -f "$here/bootstrap.sh" ]; then
      echo "entry.sh: this image was built without docker/bootstrap.sh, so it is no worker; build it from a tree that has it" >&2
      exit 78 # EX_CONFIG of sysexits.h
    fi
    exec bash "$here/bootstrap.sh" "$@"
    ;;
  "")
    echo "entry.sh: say serve, runpod or a command; wanfit --help lists wanfit's" >&2
    exit 64 # EX_USAGE of sysexits.h
    ;;
  *)
    if command -v "$mode" >/dev/null 2>&1; then exec "$@"; fi
    exec wanfit "$@"
    ;;
esac
