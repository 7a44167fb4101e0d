"""A LoRA file, by its header: which tensors it has for which module. Imports no torch.

Everything is checked before a weight is read: a key that is not understood, half a pair, ranks that
differ, an adapter of another kind is an error. Which model the file is of is for `lora_fit`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wanfit.engine.weights.container import open_container
from wanfit.engine.weights.headers import PLAIN_DTYPES, TensorEntry
from wanfit.engine.weights.keys import listed
from wanfit.engine.weights.lora_keys import (
    WAN_21_IMAGE,
    Kind,
    Stack,
    other_kind,
    split_key,
)
from wanfit.engine.weights.lora_scale import NUMBERS, PeftScale, peft_scales
from wanfit.engine.weights.naming import expert_word
from wanfit.errors import WeightsBroken, WeightsMismatch
from wanfit.specs import Expert

_PAIR: tuple[Kind, ...] = ("down", "up", "up_bias", "alpha")  # that mean nothing without a pair


@dataclass(frozen=True, slots=True)
class LoraModule:
    """What a file holds of one module."""

    name: str  # as the file has it, without prefix
    stack: Stack | None
    underscored: bool
    raw_peft: bool
    tensors: Mapping[Kind, TensorEntry]

    @property
    def rank(self) -> int:
        """Of its pair of matrices."""
        return self.tensors["down"].shape[0]


@dataclass(frozen=True, slots=True)
class Lora:
    """One LoRA file, which is whole."""

    path: Path
    modules: tuple[LoraModule, ...]
    expert: Expert | None  # by its keys, or by the name of file or folder
    scales: Mapping[Stack | None, PeftScale]  # None: of all others

    @property
    def has_both_experts(self) -> bool:
        """Whether its keys name diffusers' two transformers."""
        return {"transformer", "transformer_2"} <= {module.stack for module in self.modules}

    def of_expert(self, expert: Expert) -> tuple[LoraModule, ...]:
        """What it has for an expert: all, if its keys do not tell the two apart."""
        if not self.has_both_experts:
            return self.modules
        stack = "transformer" if expert == "high_noise" else "transformer_2"
        return tuple(module for module in self.modules if module.stack == stack)


def read_lora(path: Path) -> Lora:
    """The LoRA at `path`, by its header.

    Raises WeightsMissing or WeightsBroken for a file that is not whole, that holds other tensors
    than a LoRA's or other adapters (DoRA, LoKr, ...), half a pair, an alpha without one, ranks that
    differ, and for one that peft saved without its scale (`lora_scale`); WeightsMismatch for one
    of Wan 2.1's image-to-video model.
    """
    container = open_container(path)
    parts, unknown = _parts(path, container.entries)
    if unknown:
        _refuse_unknown(path, unknown)
    if not parts:
        raise WeightsBroken(f"{path} holds no tensor", hint="Give a LoRA file")
    modules = tuple(
        LoraModule(name, stack, underscored, raw_peft, tensors)
        for (name, stack, underscored, raw_peft), tensors in parts.items()
    )
    for module in modules:
        _check_module(path, module)
    _refuse_wan_21(path, modules)
    stacks = {module.stack for module in modules}
    if "transformer_2" in stacks and None in stacks:
        raise WeightsBroken(f"{path} has keys of transformer_2 beside keys of no transformer")
    pairs = [module for module in modules if "down" in module.tensors]
    scales: Mapping[Stack | None, PeftScale] = {}
    if not any("alpha" in module.tensors for module in pairs):
        raw_peft_rank = next((module.rank for module in pairs if module.raw_peft), None)
        scales = peft_scales(path, container.metadata, raw_peft_rank)
    return Lora(path, modules, _expert(path, stacks), scales)


def _expert(path: Path, stacks: set[Stack | None]) -> Expert | None:
    """`transformer` alone tells nothing: diffusers loads such a file into either expert."""
    if "transformer_2" in stacks:
        return "low_noise" if stacks == {"transformer_2"} else None
    return expert_word(path)


def distilled_hint(lora: Lora) -> str | None:
    """What to sample with, where the name of file or folder says that it was distilled to 4 steps.

    That it was is the name's word alone: nothing in the file says so. The settings are those of
    LightX2V's and Lightning's files (`weights.lora` has the table).
    """
    if not re.search(r"(?<!\d)4[-_ ]?steps?", f"{lora.path.parent.name}/{lora.path.name}", re.I):
        return None
    return (
        "By its name it was made for 4 steps; use --steps 4 --solver euler --shift 5 --guidance 1"
    )


_PartKey = tuple[str, Stack | None, bool, bool]


def _parts(
    path: Path, entries: Mapping[str, TensorEntry]
) -> tuple[dict[_PartKey, dict[Kind, TensorEntry]], list[str]]:
    """The tensors by module; and the keys that are no LoRA's."""
    parts: dict[_PartKey, dict[Kind, TensorEntry]] = {}
    unknown = []
    for name, entry in entries.items():
        key = split_key(name)
        if key is None:
            unknown.append(name)
            continue
        part = (key.module, key.stack, key.underscored, key.raw_peft)
        tensors = parts.setdefault(part, {})
        if key.kind in tensors:
            raise WeightsBroken(f"{path} holds {tensors[key.kind].name} again as {name}")
        tensors[key.kind] = entry
    return parts, unknown


def _refuse_unknown(path: Path, keys: list[str]) -> None:
    for key in keys:
        kind = other_kind(key)
        if kind:
            raise WeightsBroken(
                f"{path} is an adapter of another kind, {kind}: it holds {listed(keys)}",
                hint="LoRA is what can be merged",
            )
    raise WeightsBroken(
        f"{path} holds keys that no LoRA has: {listed(keys)}", hint="Give a LoRA file"
    )


def _refuse_wan_21(path: Path, modules: Iterable[LoraModule]) -> None:
    found = [module.name for module in modules if any(part in module.name for part in WAN_21_IMAGE)]
    if found:
        raise WeightsMismatch(
            f"{path} was made for Wan 2.1 image-to-video: it changes {listed(found)}, which"
            " Wan 2.2 does not have",
            hint="Get the adapter that was made for Wan 2.2",
        )


def _check_module(path: Path, module: LoraModule) -> None:
    tensors = module.tensors
    down, up = tensors.get("down"), tensors.get("up")
    for kind, entry in tensors.items():
        if kind == "alpha":
            if entry.num_values != 1 or entry.dtype not in NUMBERS:
                raise WeightsBroken(
                    f"{path} holds {entry.name} as {entry.dtype} {list(entry.shape)}, not a number"
                )
        elif entry.dtype not in PLAIN_DTYPES:
            raise WeightsBroken(
                f"{path} holds {entry.name} as {entry.dtype}, which is not read here",
                hint=f"Get the adapter in one of {', '.join(PLAIN_DTYPES)}",
            )
        if kind in _PAIR and not (down and up):
            missing = "its pair of matrices" if not (down or up) else "its other half"
            raise WeightsBroken(f"{path} has {entry.name} without {missing}")
    if down and up:
        ranks = down.shape[:1], up.shape[1:2]
        if ranks[0] != ranks[1] or 0 in (*ranks[0], *down.shape) or math.prod(up.shape[2:]) != 1:
            raise WeightsBroken(
                f"{path} has {down.name} {list(down.shape)} beside {up.name} {list(up.shape)}:"
                " their ranks differ"
            )
