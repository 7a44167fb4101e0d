#!/usr/bin/env bash
# The start of a RunPod worker: finds the models, looks at the machine, says what it decided, and
# becomes the worker. A machine that cannot do the work ends here, in seconds, with what to change.
#
#   WANFIT_VOLUME   where the network volume is; without it /runpod-volume, then /workspace
#   WANFIT_MODEL    the model of jobs that name none, which must be there: demo, ti2v-5b, ...
#   WANFIT_PULL     a model to download when it is not there; nothing is downloaded otherwise
#   WANFIT_MODELS   directories to look for models in, before all others
#
# Exit codes are those of `wanfit doctor --for-worker` (8: unfit) and of `wanfit pull`.
set -euo pipefail

volume=
for place in "${WANFIT_VOLUME:-}" /runpod-volume /workspace; do
  if [ -n "$place" ] && [ -d "$place" ]; then
    volume=${place%/}
    break
  fi
done
if [ -n "${WANFIT_VOLUME:-}" ] && [ "$volume" != "${WANFIT_VOLUME%/}" ]; then
  echo "bootstrap: WANFIT_VOLUME is $WANFIT_VOLUME, and there is no such directory" >&2
  echo "bootstrap: attach the network volume to the endpoint, or unset WANFIT_VOLUME" >&2
  exit 8
fi

# RunPod's cached models have the layout of the Hub's cache, on the mount of the volume.
cached=
if [ -n "$volume" ] && [ -d "$volume/huggingface-cache/hub" ]; then
  cached=$volume/huggingface-cache/hub
fi

# wanfit searches RunPod's usual places by itself; another volume has to be named.
models=${WANFIT_MODELS:-}
if [ -z "$models" ] && [ -n "$volume" ]; then
  models=$volume/models:$volume
fi
if [ -n "$cached" ] && [ "${models#*"$cached"}" = "$models" ]; then
  models=$models:$cached
fi
if [ -n "$models" ]; then
  export WANFIT_MODELS=$models
fi

# Blocks of memory that grow and shrink: 12 to 15 % less is reserved (benchmarks/RESULTS.md).
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

is_here() {
  wanfit models --json | python3 -c '
import json, sys
models = {one["model"]: one for one in json.load(sys.stdin)["models"]}
sys.exit(0 if models.get(sys.argv[1], {}).get("weights") else 1)' "$1"
}

pulled="nothing (WANFIT_PULL is not set)"
if [ -n "${WANFIT_PULL:-}" ]; then
  export WANFIT_MODEL=${WANFIT_MODEL:-$WANFIT_PULL}
  if is_here "$WANFIT_PULL"; then
    pulled="nothing ($WANFIT_PULL is here)"
  else
    echo "bootstrap: $WANFIT_PULL is not here; downloading it" >&2
    wanfit pull "$WANFIT_PULL" >&2
    pulled=$WANFIT_PULL
  fi
fi

fit=0
diagnosis=$(wanfit doctor --for-worker) || fit=$?

if [ -n "${BUCKET_ENDPOINT_URL:-}" ]; then
  clips="the bucket at $BUCKET_ENDPOINT_URL"
else
  clips=${WANFIT_OUTPUTS:-"in the answer, up to 7 MB (no BUCKET_ENDPOINT_URL)"}
fi

row() { printf '%-14s %s\n' "$1" "$2"; }
{
  echo "--- wanfit worker ---"
  row "volume" "${volume:-none}"
  row "cached models" "${cached:-none}"
  row "looks in" "${models:-the usual places}"
  row "model" "${WANFIT_MODEL:-demo}"
  row "downloaded" "$pulled"
  row "allocator" "$PYTORCH_ALLOC_CONF"
  row "clips go" "$clips"
  row "jobs at once" "${WANFIT_CONCURRENCY:-1}"
  printf '%s\n' "$diagnosis"
  echo "---------------------"
} >&2

if [ "$fit" -ne 0 ]; then
  echo "bootstrap: this machine cannot do the work; what to change stands after the arrows" >&2
  exit "$fit"
fi
exec wanfit worker runpod "$@"
