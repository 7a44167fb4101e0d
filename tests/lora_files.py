"""Synthetic LoRA files in every style that people have, with the true key names and dtypes.

The same adapters go through every style: a style says the scale in its own way (alphas, peft's
settings, or folded into B), so that all must give the same merge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.engine.tiny_models import TINY_TI2V, randomise
from wanfit.engine.models.dit import Dit
from wanfit.engine.weights.keys import DIT, Naming, their_name
from wanfit.engine.weights.lora import Merge
from wanfit.engine.weights.networks import on_meta, shapes_of
from wanfit.specs import Expert, ModelSpec

Style = Literal[
    "native", "native-ab", "all-in-one", "bare", "bare-default", "musubi", "diffusers",
    "diffusers-metadata", "raw-peft", "raw-peft-diffusers-names",
]  # fmt: skip
STYLES: tuple[Style, ...] = (
    "native", "native-ab", "all-in-one", "bare", "bare-default", "musubi", "diffusers",
    "diffusers-metadata", "raw-peft", "raw-peft-diffusers-names",
)  # fmt: skip
WITH_DIFFS: tuple[Style, ...] = ("native", "native-ab", "all-in-one", "bare", "diffusers")

# style -> prefix, ending of A, ending of B
_WORDS: Mapping[Style, tuple[str, str, str]] = {
    "native": ("diffusion_model.", "lora_down.weight", "lora_up.weight"),  # LightX2V, Kijai
    "native-ab": ("diffusion_model.", "lora_A.weight", "lora_B.weight"),  # diffusion-pipe
    "all-in-one": ("model.diffusion_model.", "lora_down.weight", "lora_up.weight"),
    "bare": ("", "lora_A.weight", "lora_B.weight"),
    "bare-default": ("", "lora_A.default.weight", "lora_B.default.weight"),  # DiffSynth
    "musubi": ("lora_unet_", "lora_down.weight", "lora_up.weight"),
    "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight"),
    "diffusers-metadata": ("transformer.", "lora_A.weight", "lora_B.weight"),
    "raw-peft": ("base_model.model.", "lora_A.weight", "lora_B.weight"),
    "raw-peft-diffusers-names": ("base_model.model.", "lora_A.weight", "lora_B.weight"),
}
_DIFFUSERS_NAMES = ("diffusers", "diffusers-metadata", "raw-peft-diffusers-names")
_WITH_ALPHAS = ("native", "all-in-one", "musubi")
_WITH_PEFT_SETTINGS = ("diffusers-metadata", "raw-peft", "raw-peft-diffusers-names")


@dataclass(frozen=True)
class Pair:
    """What is added to one module's weight: alpha / r * B A."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r]
    alpha: float

    @property
    def factor(self) -> float:
        return self.alpha / self.down.shape[0]


@dataclass(frozen=True)
class Adapters:
    """By our names: pairs of modules ("blocks.0.self_attn.q"), differences of parameters."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    diffs: dict[str, Tensor] = field(default_factory=dict)


def linear_modules(spec: ModelSpec, *, blocks_only: bool = True) -> list[str]:
    """Our names of the modules that an adapter of rank 64 usually changes: ten per block."""
    return [
        name.removesuffix(".weight")
        for name, shape in shapes_of(on_meta(spec, "high_noise")).items()
        if len(shape) == 2 and (name.startswith("blocks.") or not blocks_only)
    ]


def random_adapters(
    spec: ModelSpec,
    *,
    rank: int = 4,
    alpha: float = 2.0,
    seed: int = 0,
    modules: Iterable[str] | None = None,
    diffs: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Adapters:
    """Drawn at a scale at which the adapters matter; values are those that `dtype` has."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of(on_meta(spec, "high_noise"))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    pairs = {}
    for module in linear_modules(spec) if modules is None else modules:
        out, *inner = shapes[f"{module}.weight"]
        down = draw(rank, *inner) / math.sqrt(rank)
        pairs[module] = Pair(down.to(dtype), draw(out, rank, *[1] * (len(inner) - 1)), alpha)
    return Adapters(pairs, {name: draw(*shapes[name]) for name in diffs})


def write_lora(
    path: Path,
    adapters: Adapters,
    style: Style = "native",
    *,
    prefix: str | None = None,
    alpha: Tensor | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes one file; prefix: instead of the style's own. alpha: its bytes, of every module."""
    save_file(
        lora_tensors(adapters, style, prefix, alpha), path, _metadata(adapters, style, metadata)
    )
    if style in ("raw-peft", "raw-peft-diffusers-names"):
        write_adapter_config(path.parent, adapters)
    return path


def lora_tensors(
    adapters: Adapters,
    style: Style = "native",
    prefix: str | None = None,
    alpha: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file, by its names."""
    own_prefix, down, up = _WORDS[style]
    prefix = own_prefix if prefix is None else prefix
    tensors: dict[str, Tensor] = {}
    for module, pair in adapters.pairs.items():
        name = prefix + file_module(module, style)
        matrix = pair.up
        if style in _WITH_ALPHAS:
            tensors[f"{name}.alpha"] = torch.tensor(pair.alpha) if alpha is None else alpha
        elif style not in _WITH_PEFT_SETTINGS:
            matrix = matrix * pair.factor  # a power of two: exact
        tensors[f"{name}.{down}"], tensors[f"{name}.{up}"] = pair.down, matrix
    for parameter, tensor in adapters.diffs.items():
        tensors[prefix + diff_key(parameter, style)] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def write_adapter_config(folder: Path, adapters: Adapters, **changes: Any) -> None:
    """peft's adapter_config.json, as its save_pretrained writes it."""
    pair = next(iter(adapters.pairs.values()))
    config = {
        "alpha_pattern": {}, "bias": "none", "lora_alpha": pair.alpha, "peft_type": "LORA",
        "r": pair.down.shape[0], "rank_pattern": {}, "target_modules": ["q", "k", "v", "o"],
        "use_dora": False, "use_rslora": False, **changes,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def file_module(module: str, style: Style) -> str:
    """A module's name in a file, without prefix."""
    naming: Naming = "diffusers" if style in _DIFFUSERS_NAMES else "official"
    name = their_name(f"{module}.weight", DIT, naming).removesuffix(".weight")
    return name.replace(".", "_") if style == "musubi" else name


def diff_key(parameter: str, style: Style) -> str:
    """A difference's name in a file, without prefix."""
    naming: Naming = "diffusers" if style in _DIFFUSERS_NAMES else "official"
    module, _, leaf = their_name(parameter, DIT, naming).rpartition(".")
    ending = {"weight": "diff", "bias": "diff_b"}.get(leaf, "diff_m")
    return f"{module}.{ending}" if module else ending


def write_sparse(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A safetensors file of (dtype, shape) whose values are a hole of zeros."""
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + sizes[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


def added(adapters: Adapters, parameter: str) -> Tensor:
    """What they add to our parameter, in fp64, computed at once; 0 where nothing."""
    total = torch.zeros((), dtype=torch.float64)
    module, _, leaf = parameter.rpartition(".")
    if leaf == "weight" and module in adapters.pairs:
        pair = adapters.pairs[module]
        product = pair.up.double().flatten(1) @ pair.down.double().flatten(1)
        total = total + pair.factor * product.view(len(pair.up), *pair.down.shape[1:])
    if parameter in adapters.diffs:
        total = total + adapters.diffs[parameter].double()
    return total


def tiny_weights(spec: ModelSpec = TINY_TI2V, seed: int = 9) -> dict[str, Tensor]:
    """What is merged into: the parameters of one transformer, in fp32."""
    return dict(randomise(Dit(spec.dit), seed).state_dict())


def merged(
    merge: Merge, spec: ModelSpec = TINY_TI2V, expert: Expert = "high_noise"
) -> dict[str, Tensor]:
    return {
        name: merge.apply(expert, name, 0, weight) for name, weight in tiny_weights(spec).items()
    }


def assert_merged(
    found: dict[str, Tensor], wanted: dict[str, Tensor], magnitude: float = 40
) -> None:
    """Equal within fp32 rounding of sums of a few dozen terms of at most `magnitude`."""
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32
        assert (found[name].double() - tensor).abs().max() < 8 * 2**-24 * magnitude, name


def attention_keys(
    width: int, num_blocks: int, rank: int = 8
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For `write_sparse`: pairs of all attention weights, of a transformer of this width."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for i in range(num_blocks):
        for module in (f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"):
            stem = f"diffusion_model.blocks.{i}.{module}"
            tensors[f"{stem}.lora_A.weight"] = ("BF16", (rank, width))
            tensors[f"{stem}.lora_B.weight"] = ("BF16", (width, rank))
    return tensors


def _metadata(
    adapters: Adapters, style: Style, metadata: dict[str, str] | None
) -> dict[str, str] | None:
    """diffusers' save_lora_weights writes peft's settings, each under its transformer's name."""
    if style != "diffusers-metadata":
        return metadata
    pair = next(iter(adapters.pairs.values()))
    settings = {
        "transformer.alpha_pattern": {}, "transformer.lora_alpha": pair.alpha,
        "transformer.r": pair.down.shape[0], "transformer.rank_pattern": {},
        "transformer.use_rslora": False,
    }  # fmt: skip
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings), **(metadata or {})}
