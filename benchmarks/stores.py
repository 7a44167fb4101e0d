"""Stores of true size for the benchmarks, made when asked for, as whole as the disk allows.

How much of a store is bytes on the disk, and not a hole (benchmarks.true_size), is its fidelity:

- "whole": everything.
- "experts": both transformers and the VAE; the text encoder is a hole.
- "first": the first transformer and the VAE.
- "hollow": the VAE, and the small remainders. For figures of memory alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from benchmarks.figures import note
from benchmarks.true_size import store_bytes, write_true_size
from wanfit.engine.weights.recognise import is_store
from wanfit.plan.plan import NetworkName, Precision
from wanfit.specs import ModelSpec

Fidelity = Literal["whole", "experts", "first", "hollow"]
FIDELITIES: tuple[Fidelity, ...] = get_args(Fidelity)  # the best first
SPARE_BYTES = 3_000_000_000  # left free: clips, logs

HOLLOW: Mapping[Fidelity, frozenset[NetworkName]] = {
    "whole": frozenset(),
    "experts": frozenset({"umt5"}),
    "first": frozenset({"umt5", "low_noise"}),
    "hollow": frozenset({"umt5", "low_noise", "high_noise"}),
}


class Stores:
    """The stores in one directory, which is nobody else's: they are removed to make room."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def get(self, spec: ModelSpec, precision: Precision, wanted: Fidelity) -> Path:
        """A store of at least the fidelity `wanted`, or the best below it that the disk can hold.

        A note says what was written and what is a hole.
        """
        best = FIDELITIES.index(wanted)
        for fidelity in FIDELITIES[: best + 1]:
            path = self._path(spec, precision, fidelity)
            if is_store(path):
                return path
        for fidelity in FIDELITIES[best:]:
            needed = _disk_bytes(spec, precision, fidelity) + SPARE_BYTES
            self._make_room(needed)
            if shutil.disk_usage(self._root).free >= needed or fidelity == "hollow":
                return self._write(spec, precision, fidelity)
        raise AssertionError("a hollow store is always written")

    def remove(self) -> None:
        """All of them."""
        for path in self._root.iterdir():
            shutil.rmtree(path)

    def _path(self, spec: ModelSpec, precision: Precision, fidelity: Fidelity) -> Path:
        return self._root / f"{spec.name}-{precision}-{fidelity}"

    def _make_room(self, needed_bytes: int) -> None:
        """Removes stores, those that take most disk first, until there is room or none is left."""
        for path in sorted(self._root.iterdir(), key=_taken_bytes, reverse=True):
            if shutil.disk_usage(self._root).free >= needed_bytes:
                return
            shutil.rmtree(path)

    def _write(self, spec: ModelSpec, precision: Precision, fidelity: Fidelity) -> Path:
        path = self._path(spec, precision, fidelity)
        hollow = HOLLOW[fidelity]
        written = write_true_size(
            path, spec, precision, real_blocks=dict.fromkeys(hollow, 0), seed=0
        )
        note(
            "store", path=str(path), fidelity=fidelity, holes=dict(written.holes),
            num_bytes=written.num_bytes, disk_bytes=written.disk_bytes,
            elapsed_s=written.elapsed_s, free_bytes=shutil.disk_usage(self._root).free,
        )  # fmt: skip
        return path


def _disk_bytes(spec: ModelSpec, precision: Precision, fidelity: Fidelity) -> int:
    sizes = store_bytes(spec, precision)
    return sum(size for network, size in sizes.items() if network not in HOLLOW[fidelity])


def _taken_bytes(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
