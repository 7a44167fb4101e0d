"""Quantised weights in safetensors and .pth files: which scale belongs to which weight.

A weight W is stored as q with a scale: W = q.float() * scale. Who writes it how:

    who                    weight      scale (F32)              beside it
    ComfyUI until 2025     fp8         .scale_weight ()         .scale_input, scaled_fp8
    Kijai                  fp8         .scale_weight ()         scaled_fp8, or nothing
    ComfyUI since          fp8, int8   .weight_scale ()         .input_scale; .comfy_quant, or
                                                                _quantization_metadata
    LightX2V               fp8, int8   .weight_scale [O, 1]     nothing
    plain casts (Kijai)    fp8         none: the scale is 1

Sources: ComfyUI comfy/utils.py (convert_old_quants) and comfy/quant_ops.py; ComfyUI-WanVideoWrapper
nodes_model_loading.py; LightX2V tools/convert/converter.py and quant.py.

Scales of activations (.scale_input, .input_scale) belong to a product in fp8, which is not done
here, and markers say only what dtypes say too: both are left out. Formats that pack values or
scale by groups (nvfp4, mxfp8, AWQ, bitsandbytes, ...) are refused by name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanfit.engine.weights.headers import PLAIN_DTYPES, TensorEntry
from wanfit.errors import WeightsBroken

# Ends of names of a scale, of what is left out, and of ComfyUI's description of a layer.
SCALE_ENDS = (".scale_weight", ".weight_scale")
UNUSED_ENDS = (".scale_input", ".input_scale")
MARKER = "scaled_fp8"
QUANT_END = ".comfy_quant"
QUANT_METADATA = "_quantization_metadata"

# ComfyUI's word for a format -> the dtype of its weights; all other words are refused.
FORMATS: Mapping[str, str] = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8_tensorwise": "I8",
}
# Ends of names that only a layout has which is not decoded here.
OTHER_LAYOUTS: Mapping[str, str] = {
    ".weight_scale_2": "nvfp4",
    ".weight_scale_inv": "fp8 with scales by blocks",
    ".weight.absmax": "bitsandbytes",
    ".weight._data": "quanto",
    ".qweight": "AWQ or GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".wscales": "SVDQuant",
}
_USE_ANOTHER = "Use a file in bf16, fp16, fp8 scaled, or GGUF"
_MAX_QUANT_BYTES = 4096  # ours: ComfyUI's descriptions have about 30
_LEAST_SHARE = 0.02  # ours: of the values, to be named in `storage_words`
_WORDS: Mapping[str, str] = {
    "F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8",
    "F8_E5M2": "fp8 e5m2", "I8": "int8", "U8": "uint8",
}  # fmt: skip


def folded(
    path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, Any]
) -> dict[str, TensorEntry]:
    """The entries that are weights, each with its scale. `container.weights_of` says the rest.

    Raises WeightsBroken.
    """
    for name in entries:
        for end, layout in OTHER_LAYOUTS.items():
            if name.endswith(end):
                raise _not_decoded(path, name.removesuffix(end), layout)
    _check_formats(path, entries, metadata)
    weights = {name: entry for name, entry in entries.items() if not _is_beside(name)}
    for name, scale in entries.items():
        for end in SCALE_ENDS:
            if name.endswith(end):
                weight = f"{name.removesuffix(end)}.weight"
                weights[weight] = _scaled(path, name, scale, weights.get(weight))
    return weights


def storage_words(entries: Iterable[TensorEntry]) -> str:
    """`container.storage_of`."""
    values = Counter[str]()
    for entry in entries:
        word = _WORDS.get(entry.dtype, entry.dtype)
        values[f"{word} scaled" if entry.scale and word.startswith("fp8") else word] += (
            entry.num_values
        )
    least = _LEAST_SHARE * values.total()
    return " + ".join(word for word, count in values.most_common() if count >= least)


def _is_beside(name: str) -> bool:
    """Whether this is no weight, but belongs to one."""
    ends = (*SCALE_ENDS, *UNUSED_ENDS, QUANT_END)
    return name.endswith(ends) or name.rpartition(".")[2] == MARKER


def _scaled(path: Path, name: str, scale: TensorEntry, weight: TensorEntry | None) -> TensorEntry:
    if weight is None:
        raise WeightsBroken(f"{path} has the scale {name} without a weight")
    if weight.scale is not None:
        raise WeightsBroken(f"{path} has two scales for {weight.name}: {weight.scale.name}, {name}")
    if scale.dtype == "F8_E8M0":
        raise _not_decoded(path, weight.name, "mxfp8")
    rows = weight.shape[0] if weight.shape else 1
    if scale.dtype not in PLAIN_DTYPES or scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise WeightsBroken(
            f"{path} has the scale {name} as {scale.dtype} {list(scale.shape)}, and"
            f" {weight.name} {list(weight.shape)} takes one number, or one for each row",
            hint=_USE_ANOTHER,
        )
    return replace(weight, scale=scale)


def _check_formats(
    path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, Any]
) -> None:
    """Raises WeightsBroken unless every layer that ComfyUI describes is in a format of FORMATS."""
    described: dict[str, Any] = dict(_from_metadata(path, metadata))
    for name, entry in entries.items():
        if name.endswith(QUANT_END):
            described[name.removesuffix(QUANT_END)] = _read_description(entry)
    for layer, about in described.items():
        word = about.get("format") if isinstance(about, dict) else None
        if not isinstance(word, str):
            raise WeightsBroken(f"{path} describes {layer} as {about!r}, without a format")
        if word not in FORMATS or about.get("convrot"):
            raise _not_decoded(path, layer, f"{word} with convrot" if word in FORMATS else word)
        weight = entries.get(f"{layer}.weight")
        if weight is None or weight.dtype != FORMATS[word]:
            stored = f"stores it as {weight.dtype}" if weight else "has no weight of it"
            raise WeightsBroken(f"{path} describes {layer} as {word} and {stored}")
        if f"{layer}.weight_scale" not in entries and f"{layer}.scale_weight" not in entries:
            raise WeightsBroken(f"{path} describes {layer} as {word}, and has no scale for it")


def _from_metadata(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Layer -> its description, as `_quantization_metadata` has it."""
    text = metadata.get(QUANT_METADATA)
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise WeightsBroken(f"{path} has a malformed {QUANT_METADATA}") from None
    if not isinstance(layers, dict):
        raise WeightsBroken(f"{path} has a malformed {QUANT_METADATA}")
    return layers


def _read_description(entry: TensorEntry) -> Any:
    """What a comfy_quant tensor says: JSON in bytes."""
    if entry.dtype != "U8" or entry.num_bytes > _MAX_QUANT_BYTES:
        raise WeightsBroken(
            f"{entry.file} has {entry.name} as {entry.dtype} {list(entry.shape)}, and JSON in at"
            f" most {_MAX_QUANT_BYTES} bytes is wanted"
        )
    try:
        return json.loads(read_bytes(entry))
    except (ValueError, RecursionError):
        raise WeightsBroken(f"{entry.file} has {entry.name}, which is not JSON") from None


def read_bytes(entry: TensorEntry) -> bytes:
    """The bytes of one small tensor, such as a description or a vocabulary. Raises WeightsBroken"""
    try:
        handle = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = os.pread(handle, entry.num_bytes, entry.offset)
        finally:
            os.close(handle)
    except OSError as error:
        raise WeightsBroken(f"{entry.file} cannot be read: {error.strerror}") from None
    if len(content) < entry.num_bytes:
        raise WeightsBroken(
            f"{entry.file} ends within {entry.name}: {len(content)} of {entry.num_bytes} bytes"
        )
    return content


def _not_decoded(path: Path, layer: str, layout: str) -> WeightsBroken:
    return WeightsBroken(
        f"{path} stores {layer} as {layout}, which is not decoded", hint=_USE_ANOTHER
    )
