"""Which parameters of a model a LoRA file changes, and whether it fits the model at all.

Every key is used: a module that the model does not have, or has in another shape, is an error that
says which model the file is of. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wanfit.engine.weights.headers import TensorEntry
from wanfit.engine.weights.keys import listed
from wanfit.engine.weights.lora_file import Lora, LoraModule
from wanfit.engine.weights.lora_keys import (
    OTHER_WIDTHS,
    Kind,
    Leaf,
    Naming,
    dit_shapes,
    parameters_named,
)
from wanfit.engine.weights.lora_scale import number_at
from wanfit.errors import WeightsBroken, WeightsMismatch
from wanfit.specs import MODELS, DitSpec, Expert, ModelSpec

# Which parameter a kind of tensor changes; "down" and "up" are the two halves of one change.
_LEAVES: Mapping[Kind, Leaf] = {
    "up": "weight", "diff": "weight", "up_bias": "bias", "diff_b": "bias", "diff_m": "modulation",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds factor * B A to a weight."""

    down: TensorEntry  # A [r, in], or [r, ...] of a convolution
    up: TensorEntry  # B [out, r]
    factor: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Adds factor * a tensor of the parameter's own shape."""

    entry: TensorEntry
    factor: float


Change = LowRank | Difference


class _Misfit(NamedTuple):
    """Why a file does not belong to a model."""

    unknown: list[str]  # keys of modules that it does not have
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # key, found, wanted


def changes_of(
    lora: Lora, spec: ModelSpec, expert: Expert, models: Sequence[ModelSpec] = MODELS
) -> dict[str, list[Change]]:
    """Our parameter name -> what is added to it. Reads the alphas, a few bytes each.

    models: that the file may be of instead, for the message. Raises WeightsMismatch for a file of
    another model, WeightsBroken for keys that no module of `spec` takes.
    """
    modules = lora.of_expert(expert)
    named = _our_names(modules, spec.dit)
    misfit = _misfit(named, spec.dit)
    if misfit.unknown or misfit.shapes:
        _refuse(lora, spec, misfit, models)
    changes: dict[str, list[Change]] = {}
    for module, names in named:
        factor = _factor(lora, module)
        for kind, ours in names.items():
            new = _change(module, kind, factor)
            changes.setdefault(ours, [])
            if any(type(old) is type(new) for old in changes[ours]):
                raise WeightsBroken(f"{lora.path} changes {module.tensors[kind].name} twice")
            changes[ours].append(new)
    return changes


def models_of(lora: Lora, models: Sequence[ModelSpec] = MODELS) -> tuple[ModelSpec, ...]:
    """Those of `models` whose transformers have these modules and shapes."""
    return tuple(spec for spec in models if _fits(lora, spec))


_Named = list[tuple[LoraModule, dict[Kind, str]]]  # kind -> our parameter


def _our_names(modules: Sequence[LoraModule], spec: DitSpec) -> _Named:
    """What the modules change; by the one naming, of the two, that knows more of them."""
    namings: tuple[Naming, ...] = ("official", "diffusers")
    tries: list[_Named] = [
        [(module, dict(_named(module, spec, naming))) for module in modules] for naming in namings
    ]
    return max(tries, key=lambda named: sum(len(names) for _, names in named))


def _named(module: LoraModule, spec: DitSpec, naming: Naming) -> Iterator[tuple[Kind, str]]:
    table = parameters_named(spec, naming, underscored=module.underscored)
    for kind in module.tensors:
        ours = table.get((module.name, _LEAVES[kind])) if kind in _LEAVES else None
        if ours is not None:
            yield kind, ours


def _misfit(named: _Named, spec: DitSpec) -> _Misfit:
    misfit = _Misfit([], [])
    shapes = dit_shapes(spec)
    for module, names in named:
        for kind, entry in module.tensors.items():
            if kind not in _LEAVES:
                continue
            if kind not in names:
                misfit.unknown.append(entry.name)
                continue
            wanted, found = shapes[names[kind]], entry.shape
            if kind == "up":
                found = (entry.shape[0], *module.tensors["down"].shape[1:])
                flat = found[0], math.prod(found[1:])
                if len(wanted) > 1 and flat == (wanted[0], math.prod(wanted[1:])):
                    continue  # a convolution's kernel, as it is or in a row
            if found != wanted:
                misfit.shapes.append((entry.name, found, wanted))
    return misfit


def _fits(lora: Lora, spec: ModelSpec) -> bool:
    if lora.has_both_experts and spec.boundary is None:
        return False
    for expert in spec.experts:
        misfit = _misfit(_our_names(lora.of_expert(expert), spec.dit), spec.dit)
        if misfit.unknown or misfit.shapes:
            return False
    return True


def _refuse(lora: Lora, spec: ModelSpec, misfit: _Misfit, models: Sequence[ModelSpec]) -> None:
    owners = [owner.name for owner in models_of(lora, models)]
    detail = f"it holds {listed(misfit.unknown)}, of modules that are not there"
    if misfit.shapes:
        key, found, wanted = misfit.shapes[0]
        detail = f"{key} belongs to a tensor {list(found)}, not {list(wanted)}"
        sides = {side for _, shape, _ in misfit.shapes for side in shape}
        owners = owners or [name for width, name in OTHER_WIDTHS.items() if width in sides]
    elif not owners:
        raise WeightsBroken(
            f"{lora.path} holds keys that no module of {spec.name} has: {listed(misfit.unknown)}",
            hint="Nothing is left out silently; get the adapter that was made for this model",
        )
    made = f"was made for {' or '.join(owners)}" if owners else "was made for another model"
    raise WeightsMismatch(
        f"{lora.path} {made}, and {spec.name} was asked for: {detail}",
        hint=f"Get the adapter that was made for {spec.name}",
    )


def _change(module: LoraModule, kind: Kind, factor: float) -> Change:
    entry = module.tensors[kind]
    match kind:
        case "up":
            return LowRank(module.tensors["down"], entry, factor)
        case "up_bias":
            return Difference(entry, factor)
        case _:
            return Difference(entry, 1.0)


def _factor(lora: Lora, module: LoraModule) -> float:
    """alpha / r of a module with a pair of matrices; 1 where nothing says otherwise."""
    if "down" not in module.tensors:
        return 1.0
    alpha = module.tensors.get("alpha")
    if alpha is not None:
        return number_at(lora.path, alpha) / module.rank
    scale = lora.scales.get(module.stack) or lora.scales.get(None)
    return scale.factor(module.name, module.rank) if scale else 1.0
