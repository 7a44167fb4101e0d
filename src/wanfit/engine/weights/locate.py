"""Which weights a clip is made from: what the caller named, or the best that is on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wanfit.engine.weights.checkpoint import Chosen, choose
from wanfit.engine.weights.headers import read_json
from wanfit.engine.weights.package import choose_packaged, packaged
from wanfit.engine.weights.recognise import STORE_FILE, STORE_PRECISIONS, is_store
from wanfit.engine.weights.search import (
    command_for,
    convert_command,
    is_quantised,
    search,
)
from wanfit.errors import WeightsError, WeightsMismatch, WeightsMissing
from wanfit.plan.plan import Precision
from wanfit.specs import ModelSpec

if TYPE_CHECKING:
    from wanfit.engine.weights.files import ModelFiles


@dataclass(frozen=True, slots=True)
class Located:
    """Where the weights of one model are; headers were read, and nothing else."""

    spec: ModelSpec
    path: Path  # that a person knows them by
    chosen: Chosen | None  # None: `path` is a store
    notice: str | None = None  # which they are, where nobody named them

    @property
    def precision(self) -> Precision | None:
        """That of a store; None for originals, and for a store whose index cannot be read."""
        if self.chosen is not None:
            return None
        try:
            found = read_json(self.path / STORE_FILE).get("precision")
        except WeightsError:
            return None  # `open` says what is wrong with it
        return next((known for known in STORE_PRECISIONS if known == found), None)

    def largest_file(self) -> Path:
        """The weight file that tells most of the disk's speed."""
        if self.chosen is None:
            files = list(self.path.glob("*.safetensors"))
        else:
            parts = self.chosen.networks.values()
            files = [file for part in parts for file in part.container.files]
        return max(files, key=lambda file: file.stat().st_size)

    def open(self) -> ModelFiles:
        """Checks all of it. Imports torch. Raises WeightsError."""
        if self.chosen is None:
            from wanfit.engine.weights.store import open_store

            return open_store(self.path, self.spec)
        from wanfit.engine.weights.checkpoint import open_parts

        return open_parts(self.chosen)


def locate(
    spec: ModelSpec, named: str | Path | None, precision: Precision | Literal["auto"]
) -> Located:
    """The weights of `spec` at `named`, or the best that is here for a clip in `precision`.

    named: a store, a directory of any layout, or a file in one. None: the demo models are in the
    package, all others are searched for. Imports no torch. Raises WeightsError.
    """
    if named is None and (shipped := packaged(spec)) is not None:
        return Located(spec, shipped, choose_packaged(spec))
    if named is None:
        return _found(spec, precision)
    path = Path(named)
    if is_store(path):
        return Located(spec, path, None)
    chosen = choose(path, spec)
    storages = {part.storage: None for part in chosen.networks.values() if is_quantised(part)}
    if storages:
        command = convert_command(path, spec, chosen.networks["high_noise"].storage, {}, precision)
        raise _quantised(spec, path, " and ".join(storages), command)
    return Located(spec, path, chosen)


def _found(spec: ModelSpec, precision: Precision | Literal["auto"]) -> Located:
    found = search(models=(spec,)).best(spec, precision)
    hint = f"wanfit pull {spec.name} brings them, --weights PATH names others"
    if found is None:
        raise WeightsMissing(f"The weights of {spec.name} are not here", hint=hint)
    if not found.is_complete:
        raise WeightsMissing(
            f"The weights of {spec.name} are not all here; missing: {', '.join(found.missing)}",
            hint=f"{hint}, wanfit models shows what is where",
        )
    if not found.runs_as_it_is:
        raise _quantised(spec, found.path, found.storage, command_for(found, precision))
    notice = f"Weights: {found.path} ({found.format}, {found.storage})"
    return Located(spec, found.path, None if found.kind == "store" else found.choose(), notice)


def _quantised(spec: ModelSpec, path: Path, storage: str, command: str) -> WeightsMismatch:
    return WeightsMismatch(
        f"{path} has {spec.name} in {storage}, which is quantised and does not run as it is",
        hint=f"Make a store of it: {command}",
    )
