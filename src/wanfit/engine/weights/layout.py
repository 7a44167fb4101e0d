"""How a network's weights are cut into units, and where each tensor lies within its unit.

A unit is what moves to the device as a whole: a transformer block, an embedder, or the rest. Its
tensors lie in one flat run of bytes, each at a multiple of 256, in file, host buffer and GPU slot
alike, so that moving a unit is one copy. Names are ours; dtypes are safetensors' words for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanfit.plan.plan import Precision
from wanfit.plan.weights import ONCE_UNITS, REST, TOKEN_EMBED, align

# These are units of their own; all others of their network are blocks, or in REST.
_OWN_UNITS = (TOKEN_EMBED, *ONCE_UNITS)
_UNIT = re.compile(rf"(?P<unit>blocks\.\d+|{'|'.join(_OWN_UNITS)})\.(?P<inner>.+)")

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
PRECISION_DTYPES: Mapping[Precision, str] = {"fp32": "F32", "bf16": "BF16", "fp8": "BF16"}


class Place(NamedTuple):
    """One tensor of a unit."""

    name: str  # within the unit, as in "self_attn.q.weight"; the full name in REST
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the unit's begin

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """The places of a unit's tensors, in order of offset."""

    places: tuple[Place, ...]
    num_bytes: int  # a multiple of ALIGN_BYTES


def split_name(parameter: str) -> tuple[str, str]:
    """(unit, name within it): "blocks.3.ffn.up.bias" is ("blocks.3", "ffn.up.bias")."""
    found = _UNIT.fullmatch(parameter)
    return (found["unit"], found["inner"]) if found else (REST, parameter)


def join_name(unit: str, inner: str) -> str:
    """The inverse of `split_name`."""
    return inner if unit == REST else f"{unit}.{inner}"


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> UnitLayout:
    """Places (name, dtype, shape) one after the other, in the order given."""
    places, offset = [], 0
    for name, dtype, shape in tensors:
        place = Place(name, dtype, tuple(shape), offset)
        places.append(place)
        offset = align(offset + place.num_bytes)
    return UnitLayout(tuple(places), offset)


def network_layouts(network: nn.Module, precision: Precision) -> dict[str, UnitLayout]:
    """Unit name -> layout, in the order in which a forward pass uses the units, REST first.

    `network` may lie on the meta device. It says which parameters stay fp32 (FP32_PARAMETERS) and
    which are fp8 when `precision` is (FP8_PARAMETERS: ends of names, within blocks).
    """
    units: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {REST: []}
    for name, parameter in network.named_parameters():
        unit, inner = split_name(name)
        shape = tuple(parameter.shape)
        tensors = units.setdefault(unit, [])
        if precision == "fp8" and is_fp8(network, name):
            tensors.append((inner, "F8_E4M3", shape))
            tensors.append((f"{inner.removesuffix('weight')}scale", "F32", (shape[0], 1)))
        else:
            dtype = "F32" if stays_fp32(network, name) else PRECISION_DTYPES[precision]
            tensors.append((inner, dtype, shape))
    return {unit: lay_out(tensors) for unit, tensors in units.items()}


def is_fp8(network: nn.Module, parameter: str) -> bool:
    """Whether fp8 precision stores this parameter in fp8: the large weights of the blocks."""
    ends: tuple[str, ...] = getattr(network, "FP8_PARAMETERS", ())
    return parameter.startswith("blocks.") and parameter.endswith(ends)


def stays_fp32(network: nn.Module, parameter: str) -> bool:
    """Whether this parameter is fp32 in every precision."""
    parts: tuple[str, ...] = getattr(network, "FP32_PARAMETERS", ())
    return any(part in parameter for part in parts)


def views(flat: Tensor, layout: UnitLayout) -> dict[str, Tensor]:
    """Name -> the tensor at its place in `flat` (uint8 [num_bytes] or longer), no copy."""
    return {
        place.name: flat[place.offset : place.offset + place.num_bytes]
        .view(TORCH_DTYPES[place.dtype])
        .view(place.shape)
        for place in layout.places
    }
