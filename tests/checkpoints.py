"""Wan 2.2 checkpoints as people have them: true key names, dtypes and file layout of every format.

Each `write_*` makes one format's files at a path and returns what they hold: network -> our name ->
the value in fp32, as a reader has to understand it (scales multiplied, blocks dequantised). The
weights are random, or `meta_weights`: then the files have their true size and are holes, so that a
checkpoint of the full-size models costs no disk. Key names come from `weights.keys`, whose tables
`test_keys` holds against diffusers, transformers, gguf and a skeleton of the official modules.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from tests.engine.tiny_models import TINY_T2V, random_umt5, randomise, tiny_tokenizer
from tests.weight_encodings import (
    Store,
    Stored,
    comfy_fp8,
    comfy_quant,
    comfy_scaled_only,
    comfy_umt5_fp8,
    kijai_fp8,
    lightx2v,
    plain,
)
from tests.weight_writers import (
    DTYPES,
    TINY_PIECES,
    Files,
    GgufTensor,
    save_by_block,
    save_gguf,
    save_pth,
    save_safetensors,
    save_sharded,
    tiny_spiece,
    write_json,
)
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.weights import configs
from wanfit.engine.weights.configs import Json
from wanfit.engine.weights.keys import Naming, file_shape, network_names, rows_of, their_name
from wanfit.engine.weights.networks import on_meta
from wanfit.plan.plan import NetworkName
from wanfit.specs import DitSpec, Expert, ModelSpec, Umt5Spec

__all__ = [
    "DTYPES", "T5_PTH", "TINY_PIECES", "WIDE_T2V", "Files", "GgufTensor", "Weights", "gguf_named",
    "meta_weights", "named", "official_config", "plain", "prefixed", "random_weights",
    "save_by_block", "save_gguf", "save_pth", "save_safetensors", "save_sharded", "tiny_spiece",
    "write_all_in_one", "write_comfy", "write_diffusers", "write_gguf", "write_json",
    "write_kijai", "write_lightx2v", "write_official",
]  # fmt: skip

Weights = dict[NetworkName, dict[str, Tensor]]  # by our names
Fp8Storage = Literal["fp8_scaled", "comfy_quant", "comfy_metadata"]

EXPERT_FOLDERS: Mapping[Expert, str] = {
    "high_noise": "high_noise_model",
    "low_noise": "low_noise_model",
}
T5_PTH = "models_t5_umt5-xxl-enc-bf16.pth"
# Every matrix has rows of 256, so that K-quants are possible.
WIDE_T2V = replace(
    TINY_T2V,
    name="wide-t2v",
    dit=DitSpec(
        in_channels=4, out_channels=4, num_heads=4, num_blocks=2, ffn_width=512, head_dim=64,
        text_width=256, sinusoid_width=256,
    ),
    umt5=Umt5Spec(
        vocab_size=20, width=256, num_heads=4, head_dim=64, ffn_width=512, num_blocks=2,
        relative_buckets=8,
    ),
)  # fmt: skip


def random_weights(spec: ModelSpec, seed: int = 0) -> Weights:
    """fp32, the same as `write_tiny` has; every expert has its own."""
    networks: dict[NetworkName, torch.nn.Module] = {
        "umt5": random_umt5(spec.umt5, seed),
        "vae": randomise(Vae(spec.vae), seed + 1),
    }
    for i, expert in enumerate(spec.experts):
        networks[expert] = randomise(Dit(spec.dit), seed + 2 + i)
    return {name: dict(network.state_dict()) for name, network in networks.items()}


def meta_weights(spec: ModelSpec) -> Weights:
    """The same names and shapes without values."""
    return {name: dict(on_meta(spec, name).state_dict()) for name in network_names(spec)}


# --- the files ------------------------------------------------------------------------------------


def named(
    spec: ModelSpec, network: NetworkName, weights: Weights, naming: Naming, store: Store
) -> tuple[Files, dict[str, Tensor]]:
    """(the tensors of a file by its names, their values by ours)."""
    rows = rows_of(spec, network)
    files: Files = {}
    values: dict[str, Tensor] = {}
    for name, value in weights[network].items():
        theirs = their_name(name, rows, naming)
        stored = store(name, value)
        files[theirs] = stored.tensor.reshape(file_shape(name, theirs, tuple(value.shape)))
        values[name] = stored.value
        for part, tensor in stored.beside.items():
            files[f"{theirs.removesuffix('weight')}{part}"] = tensor
    return files, values


def prefixed(files: Files, prefix: str) -> Files:
    return {f"{prefix}{name}": tensor for name, tensor in files.items()}


def write_official(
    path: Path,
    spec: ModelSpec,
    *,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 2,
) -> Weights:
    """A Wan-AI/Wan2.2-* repository. Transformers in `dtype`, UMT5 bf16, VAE fp32."""
    weights = weights or random_weights(spec)
    held: Weights = {}
    for expert in spec.experts:
        folder = path if spec.boundary is None else path / EXPERT_FOLDERS[expert]
        tensors, held[expert] = named(spec, expert, weights, "official", plain(dtype))
        save_sharded(folder, "diffusion_pytorch_model", tensors, num_shards)
        write_json(folder / "config.json", official_config(spec))
    tensors, held["umt5"] = named(spec, "umt5", weights, "official", plain(torch.bfloat16))
    save_pth(path / T5_PTH, tensors)
    tensors, held["vae"] = named(spec, "vae", weights, "official", plain(torch.float32))
    save_pth(path / f"Wan{spec.vae.generation}_VAE.pth", tensors)
    write_json(path / "google/umt5-xxl/tokenizer.json", tiny_tokenizer())
    return held


def official_config(spec: ModelSpec) -> Json:
    """config.json of WanModel, without the fields that it leaves out (`ignore_for_config`)."""
    dit = spec.dit
    return {
        "_class_name": "WanModel", "_diffusers_version": "0.33.0", "dim": dit.width,
        "eps": dit.eps, "ffn_dim": dit.ffn_width, "freq_dim": dit.sinusoid_width,
        "in_dim": dit.in_channels, "model_type": spec.task, "num_heads": dit.num_heads,
        "num_layers": dit.num_blocks, "out_dim": dit.out_channels, "text_len": 512,
    }  # fmt: skip


def write_diffusers(
    path: Path,
    spec: ModelSpec,
    *,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
) -> Weights:
    """A Wan-AI/Wan2.2-*-Diffusers repository."""
    weights = weights or random_weights(spec)
    held: Weights = {}
    for network in network_names(spec):
        folder = path / configs.FOLDERS[network]
        stem = "model" if network == "umt5" else "diffusion_pytorch_model"
        module = {"umt5": Umt5, "vae": Vae}.get(network, Dit)

        def store(name: str, value: Tensor, module: Any = module) -> Stored:
            kept = any(part in name for part in getattr(module, "FP32_PARAMETERS", ()))
            return plain(torch.float32 if kept else dtype)(name, value)

        tensors, held[network] = named(spec, network, weights, "diffusers", store)
        if num_shards > 1:
            save_sharded(folder, stem, tensors, num_shards)
        else:
            save_safetensors(folder / f"{stem}.safetensors", tensors, {"format": "pt"})
        write_json(folder / "config.json", configs.component_config(spec, configs.FOLDERS[network]))
    write_json(path / "tokenizer/tokenizer.json", tiny_tokenizer())
    write_json(path / "model_index.json", configs.model_index(spec))
    return held


def write_comfy(
    path: Path,
    spec: ModelSpec,
    *,
    weights: Weights | None = None,
    storage: Literal["fp16", "bf16", "fp32"] | Fp8Storage = "fp16",
    prefix: str = "",
) -> Weights:
    """A ComfyUI models folder: diffusion_models/, text_encoders/, vae/; the tokenizer is in UMT5.

    storage: fp8_scaled is Comfy-Org's; comfy_quant and comfy_metadata are the newer layouts.
    """
    weights = weights or random_weights(spec)
    held: Weights = {}
    stores: dict[str, tuple[Store, Store]] = {
        "fp8_scaled": (comfy_fp8, comfy_umt5_fp8),
        "comfy_quant": (comfy_quant, comfy_quant),
        "comfy_metadata": (comfy_scaled_only, comfy_scaled_only),
        **{name: (plain(dtype), plain(dtype)) for name, dtype in _PLAIN.items()},
    }
    dit_store, umt5_store = stores[storage]
    for expert in spec.experts:
        tensors, held[expert] = named(spec, expert, weights, "official", dit_store)
        metadata = comfy_metadata(tensors) if storage == "comfy_metadata" else None
        if storage == "fp8_scaled":
            tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
        file = path / "diffusion_models" / f"{comfy_name(spec, expert)}_{storage}.safetensors"
        save_safetensors(file, prefixed(tensors, prefix), metadata)
    tensors, held["umt5"] = named(spec, "umt5", weights, "diffusers", umt5_store)
    metadata = comfy_metadata(tensors) if storage == "comfy_metadata" else None
    tensors["spiece_model"] = torch.tensor(list(tiny_spiece()), dtype=torch.uint8)
    if storage == "fp8_scaled":
        tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_safetensors(path / f"text_encoders/umt5_xxl_{storage}.safetensors", tensors, metadata)
    vae_dtype = _PLAIN.get(storage, torch.float16)
    tensors, held["vae"] = named(spec, "vae", weights, "official", plain(vae_dtype))
    vae_name = "wan_2.1_vae" if spec.vae.generation == "2.1" else "wan2.2_vae"
    save_safetensors(path / f"vae/{vae_name}.safetensors", tensors)
    return held


def comfy_name(spec: ModelSpec, expert: Expert) -> str:
    """As Comfy-Org names it: wan2.2_t2v_high_noise_14B."""
    return "wan2.2_ti2v_5B" if spec.boundary is None else f"wan2.2_{spec.task}_{expert}_14B"


def comfy_metadata(tensors: Files) -> dict[str, str]:
    """`_quantization_metadata` of the layers in fp8."""
    layers = {
        name.removesuffix(".weight"): {"format": "float8_e4m3fn"}
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float8_e4m3fn
    }
    return {"_quantization_metadata": json.dumps({"layers": layers})}


def write_all_in_one(file: Path, spec: ModelSpec, *, weights: Weights | None = None) -> Weights:
    """One fp16 file with the transformer, the VAE and the text encoder (ComfyUI's prefixes)."""
    weights = weights or random_weights(spec)
    held: Weights = {}
    store = plain(torch.float16)
    dit, held["high_noise"] = named(spec, "high_noise", weights, "official", store)
    vae, held["vae"] = named(spec, "vae", weights, "official", store)
    umt5, held["umt5"] = named(spec, "umt5", weights, "diffusers", store)
    umt5["spiece_model"] = torch.tensor(list(tiny_spiece()), dtype=torch.uint8)
    tensors = prefixed(dit, "model.diffusion_model.") | prefixed(vae, "vae.")
    tensors |= prefixed(umt5, "text_encoders.umt5xxl.transformer.")
    save_safetensors(file, tensors)
    return held


def write_kijai(
    path: Path,
    spec: ModelSpec,
    *,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scaled: bool = True,
) -> Weights:
    """Files as Kijai/WanVideo_comfy has them, in one folder, with a tokenizer.json beside."""
    weights = weights or random_weights(spec)
    held: Weights = {}
    model = {"t2v": "T2V-A14B", "i2v": "I2V-A14B", "ti2v": "TI2V-5B"}[spec.task]
    storage = f"{'fp8_e4m3fn' if dtype == torch.float8_e4m3fn else 'fp8_e5m2'}"
    storage += "_scaled_KJ" if scaled else ""
    for expert in spec.experts:
        tensors, held[expert] = named(
            spec, expert, weights, "official", kijai_fp8(dtype, scaled=scaled)
        )
        which = {"high_noise": "-HIGH", "low_noise": "-LOW"}[expert] if spec.boundary else ""
        save_safetensors(path / f"Wan2_2-{model}{which}_{storage}.safetensors", tensors)
    bf16 = plain(torch.bfloat16)
    tensors, held["umt5"] = named(spec, "umt5", weights, "official", bf16)
    save_safetensors(path / "umt5-xxl-enc-bf16.safetensors", tensors)
    tensors, held["vae"] = named(spec, "vae", weights, "official", bf16)
    vae_name = f"Wan{spec.vae.generation.replace('.', '_')}_VAE_bf16.safetensors"
    save_safetensors(path / vae_name, prefixed(tensors, "model."))
    write_json(path / "tokenizer.json", tiny_tokenizer())
    return held


def write_lightx2v(
    path: Path,
    spec: ModelSpec,
    *,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    by_block: bool = False,
) -> Weights:
    """LightX2V's converter's output: transformer and UMT5 quantised by rows, VAE as official."""
    weights = weights or random_weights(spec)
    held: Weights = {}
    storage = "int8" if dtype == torch.int8 else "fp8_e4m3"
    for expert in spec.experts:
        tensors, held[expert] = named(spec, expert, weights, "official", lightx2v(dtype))
        folder = path if spec.boundary is None else path / EXPERT_FOLDERS[expert]
        if by_block:
            save_by_block(folder, tensors)
        else:
            name = f"wan2.2_{spec.task}_A14b_{expert}_scaled_{storage}_lightx2v_4step.safetensors"
            save_safetensors(path / name, tensors)
    tensors, held["umt5"] = named(
        spec, "umt5", weights, "official", lightx2v(dtype, torch.bfloat16)
    )
    save_pth(path / f"models_t5_umt5-xxl-enc-{storage[:4].rstrip('_')}.pth", tensors)
    tensors, held["vae"] = named(spec, "vae", weights, "official", plain(torch.float32))
    save_pth(path / f"Wan{spec.vae.generation}_VAE.pth", tensors)
    write_json(path / "google/umt5-xxl/tokenizer.json", tiny_tokenizer())
    return held


# --- GGUF -----------------------------------------------------------------------------------------

_K_QUANTS: Mapping[str, tuple[tuple[int, ...], int]] = {  # where fp16 scales lie; bytes of a block
    "Q2_K": ((80, 82), 84), "Q3_K": ((108,), 110), "Q4_K": ((0, 2), 144), "Q5_K": ((0, 2), 176),
    "Q6_K": ((208,), 210),
}  # fmt: skip
_NOT_QUANTISED = ("text_embedding.", "time_embedding.", "time_projection.", "head.", "attn_rel_b")


def gguf_stored(
    theirs: str, value: Tensor, qtype: gguf.GGMLQuantizationType
) -> tuple[GgufTensor, Tensor]:
    """A tensor as city96's converter and quantiser store it, and its value in fp32.

    1-D, modulation, patch embedding and up to 1024 elements F32; matrices outside blocks F16.
    gguf-py has no quantiser for K-quants: those blocks are random bytes, with small scales.
    """
    kind = qtype
    if value.ndim != 2 or value.numel() <= 1024 or "modulation" in theirs:
        kind = gguf.GGMLQuantizationType.F32
    elif theirs.startswith(_NOT_QUANTISED) or "attn_rel_b" in theirs:
        kind = gguf.GGMLQuantizationType.F16
    shape = tuple(value.shape)
    if value.is_meta:
        return (None, kind, shape), value
    if kind.name in _K_QUANTS:
        data = _random_blocks(kind.name, value)
    else:
        data = np.ascontiguousarray(quantize(value.numpy(), kind))
    decoded = np.array(dequantize(data, kind), dtype=np.float32).reshape(shape)
    return (data, kind, shape), torch.from_numpy(decoded)


def write_gguf(
    path: Path,
    spec: ModelSpec,
    *,
    weights: Weights | None = None,
    qtype: str = "Q8_0",
    arch: str | None = "wan",
    umt5: bool = True,
) -> Weights:
    """QuantStack's folders with city96's conversion; UMT5 as llama.cpp's; the VAE as ComfyUI's.

    umt5: False leaves the text encoder out, for a test that takes another.
    """
    weights = weights or random_weights(spec)
    held: Weights = {}
    model = {"t2v": "T2V-A14B", "i2v": "I2V-A14B", "ti2v": "TI2V-5B"}[spec.task]
    kind = gguf.GGMLQuantizationType[qtype]
    for expert in spec.experts:
        tensors, held[expert] = gguf_named(spec, expert, weights, kind)
        noise = {"high_noise": "HighNoise", "low_noise": "LowNoise"}[expert]
        name = f"Wan2.2-{model}-{noise}-{qtype}.gguf" if spec.boundary else f"{model}-{qtype}.gguf"
        save_gguf(path / noise / name if spec.boundary else path / name, tensors, arch)
    if umt5:
        tensors, held["umt5"] = gguf_named(spec, "umt5", weights, kind)
        save_gguf(path / f"umt5-xxl-encoder-{qtype}.gguf", tensors, "t5encoder", vocabulary=True)
    files, held["vae"] = named(spec, "vae", weights, "official", plain(torch.bfloat16))
    save_safetensors(path / "VAE" / f"Wan{spec.vae.generation}_VAE.safetensors", files)
    return held


def gguf_named(
    spec: ModelSpec, network: NetworkName, weights: Weights, kind: gguf.GGMLQuantizationType
) -> tuple[dict[str, GgufTensor], dict[str, Tensor]]:
    """As `named`, for GGUF."""
    rows = rows_of(spec, network)
    tensors: dict[str, GgufTensor] = {}
    values: dict[str, Tensor] = {}
    for name, value in weights[network].items():
        theirs = their_name(name, rows, "gguf")
        tensors[theirs], values[name] = gguf_stored(theirs, value, kind)
    return tensors, values


def _random_blocks(kind: str, value: Tensor) -> np.ndarray[Any, Any]:
    """Blocks of random bytes whose scales are small: uint8 [rows, bytes of a row]."""
    scales, block_bytes = _K_QUANTS[kind]
    generator = np.random.default_rng(zlib.crc32(f"{kind} {tuple(value.shape)}".encode()))
    rows, blocks = value.shape[0], value.shape[1] // 256
    data = generator.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    for at in scales:
        scale = (generator.random((rows, blocks, 1)) * 1e-3).astype("<f2")
        data[:, :, at : at + 2] = scale.view(np.uint8)
    return data.reshape(rows, blocks * block_bytes)


_PLAIN: Mapping[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
