"""How one tensor is stored by everybody's programs, and what it means."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file holds it, and what it means."""

    tensor: Tensor
    value: Tensor  # fp32
    beside: Mapping[str, Tensor] = field(default_factory=dict)  # "scale_weight" -> its scale


Store = Callable[[str, Tensor], Stored]  # (our name, fp32 value) -> as stored


def plain(dtype: torch.dtype) -> Store:
    def store(_: str, value: Tensor) -> Stored:
        return Stored(value.to(dtype), value.to(dtype).float())

    return store


def is_block_linear(name: str, value: Tensor) -> bool:
    """A matrix of a block of the transformer or of the text encoder."""
    return name.startswith("blocks.") and value.ndim == 2 and "position_bias" not in name


def is_linear(name: str, value: Tensor) -> bool:
    """Any matrix but a table of embeddings."""
    return value.ndim == 2 and "position_bias" not in name and not name.startswith("token_embed")


def fp8_tensorwise(
    value: Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """(values, fp32 scale [])."""
    scale = value.abs().amax().clamp(min=1e-5) / torch.finfo(dtype).max
    return (value / scale).to(dtype), scale


def comfy_fp8(name: str, value: Tensor) -> Stored:
    """ComfyUI's fp8 scaled: matrices in fp8 with two scalars beside, the rest fp16."""
    if not is_linear(name, value):
        return plain(torch.float16)(name, value)
    weight, scale = fp8_tensorwise(value)
    beside = {"scale_weight": scale, "scale_input": torch.ones((), device=scale.device)}
    return Stored(weight, weight.float() * scale, beside)


def comfy_umt5_fp8(name: str, value: Tensor) -> Stored:
    """umt5_xxl_fp8_e4m3fn_scaled: as `comfy_fp8`, without scales of inputs."""
    stored = comfy_fp8(name, value)
    return replace(stored, beside={k: v for k, v in stored.beside.items() if k == "scale_weight"})


def comfy_quant(name: str, value: Tensor) -> Stored:
    """ComfyUI's newer layout: weight_scale, and what it is as JSON in a uint8 tensor."""
    if not is_linear(name, value):
        return plain(torch.float16)(name, value)
    weight, scale = fp8_tensorwise(value)
    about = json.dumps({"format": "float8_e4m3fn"}).encode()
    marker = torch.tensor(list(about), dtype=torch.uint8)
    return Stored(weight, weight.float() * scale, {"weight_scale": scale, "comfy_quant": marker})


def comfy_scaled_only(name: str, value: Tensor) -> Stored:
    """The same with the JSON in the file's metadata."""
    stored = comfy_quant(name, value)
    beside = {part: tensor for part, tensor in stored.beside.items() if part != "comfy_quant"}
    return replace(stored, beside=beside)


def kijai_fp8(dtype: torch.dtype, *, scaled: bool) -> Store:
    """Kijai's: matrices of the blocks in fp8, scaled by one number or cast; modulation F32."""

    def store(name: str, value: Tensor) -> Stored:
        if "modulation" in name:
            return plain(torch.float32)(name, value)
        if not is_block_linear(name, value):
            return plain(torch.bfloat16)(name, value)
        if not scaled:
            return plain(dtype)(name, value)
        weight, scale = fp8_tensorwise(value, dtype)
        return Stored(weight, weight.float() * scale, {"scale_weight": scale})

    return store


def lightx2v(dtype: torch.dtype, other: torch.dtype = torch.float32) -> Store:
    """LightX2V's fp8 or int8: a scale for each row [O, 1]; the rest in `other`."""
    largest = 127.0 if dtype == torch.int8 else 448.0

    def store(name: str, value: Tensor) -> Stored:
        if not is_block_linear(name, value):
            return plain(other)(name, value)
        scale = value.abs().amax(dim=1, keepdim=True).clamp(min=1e-5) / largest
        weight = value / scale
        weight = (weight.round() if dtype == torch.int8 else weight).to(dtype)
        return Stored(weight, weight.float() * scale, {"weight_scale": scale})

    return store
