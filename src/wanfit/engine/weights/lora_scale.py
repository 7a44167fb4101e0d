"""What the product B A of a LoRA is multiplied by, where the file or what lies beside it says so.

A file with alphas says it per module: alpha / r (ComfyUI's comfy/weight_adapter/lora.py, LightX2V's
lora_loader.py, diffusers). Without alpha the factor is 1, except where peft's own settings are
there (peft's tuners/lora/layer.py): lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
diffusers writes them into the file, under "lora_adapter_metadata"; peft into adapter_config.json
beside it.

A file of peft's without its settings is refused. ComfyUI-WanVideoWrapper (nodes_model_loading.py,
compensate_rs_lora_format) takes any such file to be rank-stabilised with lora_alpha = r, ComfyUI
takes the factor to be 1: at rank 64 the two are 8 times apart, and nothing in the file tells.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanfit.engine.weights.headers import TensorEntry, read_json
from wanfit.engine.weights.lora_keys import Stack
from wanfit.errors import WeightsBroken, WeightsMissing

PEFT_CONFIG = "adapter_config.json"  # peft's utils/constants.py, CONFIG_NAME
DIFFUSERS_METADATA = "lora_adapter_metadata"  # diffusers' loaders/lora_base.py
NUMBERS: Mapping[str, str] = {  # struct's codes of what an alpha may be; BF16 has none
    "F64": "<d", "F32": "<f", "F16": "<e", "BF16": "", "I64": "<q", "I32": "<i", "I16": "<h",
    "I8": "<b", "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PeftScale:
    """peft's settings of the scale (LoraConfig); ranks are those of the matrices."""

    alpha: float
    rank_stabilised: bool
    alpha_of: Mapping[str, float] = field(default_factory=dict)  # end of a module's name -> alpha

    def factor(self, module: str, rank: int) -> float:
        """What B A of `module` is multiplied by."""
        ends = [end for end in self.alpha_of if f".{module}".endswith(f".{end}")]
        alpha = self.alpha_of[ends[0]] if ends else self.alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def peft_scales(
    path: Path, metadata: Mapping[str, Any], raw_peft_rank: int | None
) -> dict[Stack | None, PeftScale]:
    """peft's settings for a file without alphas, by transformer; None: of all others.

    metadata: the file's own. raw_peft_rank: for a file that peft itself saved, a rank of it. Raises
    WeightsMissing where such a file has no settings, WeightsBroken for settings that are malformed.
    """
    written = metadata.get(DIFFUSERS_METADATA)
    if written is not None:
        return _diffusers_scales(path, written)
    if raw_peft_rank is None:
        return {}
    config = path.parent / PEFT_CONFIG
    if not os.path.lexists(config):
        raise WeightsMissing(
            f"{path} was saved by peft, and {PEFT_CONFIG}, which says its scale, is not beside it",
            hint="Get it too, or write what you know the scale to be: "
            f'{{"lora_alpha": {raw_peft_rank}, "use_rslora": false}} is 1 at this rank of'
            f" {raw_peft_rank}",
        )
    return {None: _peft_scale(config, read_json(config))}


def number_at(path: Path, entry: TensorEntry) -> float:
    """The value of a tensor of one number, of any dtype in NUMBERS. Raises WeightsBroken."""
    try:
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            raw = stream.read(entry.num_bytes)
    except OSError as error:
        raise WeightsBroken(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) < entry.num_bytes:
        raise WeightsBroken(f"{path} ends before {entry.name}")
    if entry.dtype == "BF16":  # the upper half of an fp32
        value = float(struct.unpack("<f", b"\0\0" + raw)[0])
    else:
        value = float(struct.unpack(NUMBERS[entry.dtype], raw)[0])
    if not math.isfinite(value):
        raise WeightsBroken(f"{path} holds {entry.name} as {value}")
    return value


def _diffusers_scales(path: Path, written: Any) -> dict[Stack | None, PeftScale]:
    try:
        fields = json.loads(written)
    except (TypeError, ValueError):
        fields = None
    if not isinstance(fields, dict):
        raise WeightsBroken(f"{path} has {DIFFUSERS_METADATA} that is not a JSON object")
    scales: dict[Stack | None, PeftScale] = {}
    stacks: tuple[Stack, ...] = ("transformer", "transformer_2")
    for stack in stacks:
        own = {
            key.removeprefix(f"{stack}."): value
            for key, value in fields.items()
            if key.startswith(f"{stack}.")
        }
        if own:
            scales[stack] = _peft_scale(path, own)
    return scales or {None: _peft_scale(path, fields)}


def _peft_scale(source: Path, fields: Mapping[str, Any]) -> PeftScale:
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        raise WeightsBroken(f"{source} has peft_type {kind!r}", hint="LORA is what can be merged")
    pattern = fields.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise WeightsBroken(f"{source} has an alpha_pattern that is not an object")
    for name in pattern:
        if re.search(r"[^\w.^$]", name):  # peft takes it as a regular expression
            raise WeightsBroken(f"{source} has the alpha_pattern {name!r}, which is not understood")
    return PeftScale(
        _alpha(source, "all modules", fields.get("lora_alpha")),
        bool(fields.get("use_rslora", False)),
        {name.strip("^$"): _alpha(source, name, value) for name, value in pattern.items()},
    )


def _alpha(source: Path, module: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WeightsBroken(f"{source} has {value!r} as lora_alpha of {module}, not a number")
    return float(value)
