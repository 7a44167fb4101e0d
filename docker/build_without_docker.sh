#!/usr/bin/env bash
# Executes docker/Dockerfile for real where there is no Docker daemon and no registry: Debian's
# buildah as root, chroot isolation, a Debian root from debootstrap as BASE, torch for the CPU.
# Ends in a clip that `wanfit generate` makes inside the image. Needs Debian 12 and root:
#
#   apt-get install -y buildah debootstrap
#   docker/build_without_docker.sh [WORK_DIRECTORY]      default /tmp/wanfit-image
#
# WHEELS   a directory with torch's CPU wheel; without it, torch comes from PyPI with its CUDA
# KEEP=1   leaves image and base behind
# Prints seconds and CPU seconds of every build (cold; unchanged; after a change of code) and the
# size of every layer. Everything it makes lies in the work directory; it is removed at the end.
set -euo pipefail

cd "$(dirname "$0")/.."
work=${1:-/tmp/wanfit-image}
image=localhost/wanfit
base=localhost/wanfit-base
export STORAGE_DRIVER=${STORAGE_DRIVER:-overlay} BUILDAH_ISOLATION=chroot TMPDIR=$work/tmp
store=(--root "$work/storage" --runroot "$work/run")
mkdir -p "$work/tmp"

clean_up() {
  if [ "${KEEP:-0}" = 1 ]; then return; fi
  buildah "${store[@]}" rm --all >/dev/null 2>&1 || true
  buildah "${store[@]}" rmi --all --force >/dev/null 2>&1 || true
  if grep -q " $work/" /proc/mounts; then
    echo "left alone: something is still mounted under $work" >&2
    return
  fi
  rm -rf --one-file-system "$work/storage" "$work/run" "$work/root" "$work/context" "$work/tmp"
}
trap clean_up EXIT

# Children's wall and CPU seconds, as bash counts them.
timed() {
  local name=$1
  shift
  local TIMEFORMAT="$name: %R s, CPU %U user + %S system"
  time "$@"
}

make_base() {
  if [ ! -x "$work/root/usr/bin/python3" ]; then
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv \
      bookworm "$work/root" http://deb.debian.org/debian >"$work/debootstrap.log"
  fi
  local container
  container=$(buildah "${store[@]}" from scratch)
  buildah "${store[@]}" add -q "$container" "$work/root" / >/dev/null
  buildah "${store[@]}" commit -q "$container" "$base" >/dev/null
  buildah "${store[@]}" rm "$container" >/dev/null
}

# The context is a copy, so that the change of code is not made in the tree.
copy_context() {
  rm -rf "$work/context"
  mkdir "$work/context"
  cp -a src docker pyproject.toml constraints.txt README.md LICENSE .dockerignore "$work/context"
}

build() {
  local options=(--layers --format docker --build-arg "BASE=$base" --target "${TARGET:-serve}" -t "$image")
  options+=(--build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
  if [ -n "${WHEELS:-}" ]; then
    options+=(--volume "$WHEELS:$WHEELS:ro" --build-arg "UV_FIND_LINKS=$WHEELS")
  fi
  if [ -n "${SSL_CERT_FILE:-}" ]; then # a proxy of this machine's; not left in the image
    options+=(--volume "/etc/ssl/certs:/etc/ssl/certs:ro")
    options+=(--build-arg "SSL_CERT_FILE=$SSL_CERT_FILE" --build-arg "PIP_CERT=$SSL_CERT_FILE")
  fi
  buildah "${store[@]}" bud "${options[@]}" -f docker/Dockerfile "$work/context" 2>&1 |
    while IFS= read -r line; do printf '%(%H:%M:%S)T %s\n' -1 "$line"; done
}

make_clip() {
  local container
  container=$(buildah "${store[@]}" from --pull-never "$image")
  # The entry point is given by hand: `buildah run` does not use the image's.
  buildah "${store[@]}" run "$container" -- tini -g -- /opt/wanfit-docker/entry.sh \
    generate "a red ball rolls to the right" --model demo --output /data/clip.mp4
  buildah "${store[@]}" run "$container" -- python3 -c \
    "import av; s = av.open('/data/clip.mp4').streams.video[0]; n = sum(1 for _ in s.container.decode(s)); print(f'clip.mp4: {s.width}x{s.height}, {n} frames'); assert n > 1"
  buildah "${store[@]}" run "$container" -- id
  # The server answers its health check within a minute and ends on SIGTERM.
  # shellcheck disable=SC2016
  buildah "${store[@]}" run "$container" -- sh -euc '
    export WANFIT_PORT=18765 WANFIT_HOST=127.0.0.1
    check="python3 /opt/wanfit-docker/healthy.py"
    if $check serve >/dev/null; then echo "port $WANFIT_PORT is taken"; exit 1; fi
    if $check runpod >/dev/null; then echo "a worker that is not there is healthy"; exit 1; fi
    /opt/wanfit-docker/entry.sh serve & server=$!
    for _ in $(seq 60); do $check serve && break; sleep 1; done
    $check serve
    kill -TERM $server
    wait $server && echo "server: ended with 0"'
  buildah "${store[@]}" rm "$container" >/dev/null
}

# What each layer adds, in the order of the image.
print_layers() {
  buildah "${store[@]}" push -q "$image" "dir:$work/pushed" >/dev/null
  python3 - "$work/pushed" <<'PY'
import json, pathlib, sys, gzip
root = pathlib.Path(sys.argv[1])
blob = lambda digest: root / digest.partition(":")[2]
manifest = json.loads((root / "manifest.json").read_text())
steps = [h for h in json.loads(blob(manifest["config"]["digest"]).read_text())["history"] if not h.get("empty_layer")]
total = 0
for layer, step in zip(manifest["layers"], steps):
    file = blob(layer["digest"])
    packed = file.stat().st_size
    head = file.open("rb").read(2)
    size = packed
    if head == b"\x1f\x8b":
        with gzip.open(file) as stream:
            size = 0
            while chunk := stream.read(1 << 24):
                size += len(chunk)
    total += size
    print(f"{size / 1e6:9.1f} MB  {packed / 1e6:9.1f} MB packed  {step.get('created_by', '')[:110]}")
print(f"{total / 1e6:9.1f} MB")
PY
  rm -rf "$work/pushed"
}

timed "base" make_base
copy_context
timed "cold" build
timed "unchanged" build
echo "# a change of code" >>"$work/context/src/wanfit/cli.py"
timed "code changed" build
timed "clip" make_clip
print_layers
