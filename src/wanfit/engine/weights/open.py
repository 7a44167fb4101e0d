"""One way to open a model on disk, whatever its layout."""

from __future__ import annotations

from pathlib import Path

from wanfit.engine.weights.checkpoint import choose, open_parts
from wanfit.engine.weights.files import ModelFiles
from wanfit.engine.weights.recognise import is_store
from wanfit.engine.weights.store import open_store
from wanfit.specs import ModelSpec


def open_model(path: Path, spec: ModelSpec) -> ModelFiles:
    """The model at `path`: a store, where wanfit.json is, or any layout of `weights.checkpoint`.

    Checks every file against `spec` and reads no tensor. Raises WeightsError (`open_store`,
    `choose`, `open_parts`).
    """
    return open_store(path, spec) if is_store(path) else open_parts(choose(path, spec))
