"""Tiny random models of every kind, and the reference libraries' networks with the same weights.

Nothing is mocked: these are the real networks, a few channels wide. Weights are drawn at a scale
at which every part matters (modulation, norms and biases are not at their idle values), so that a
part left out shows.
"""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.weights import configs
from wanfit.engine.weights.directory import file_tensors, write_directory
from wanfit.specs import (
    I2V_A14B,
    T2V_A14B,
    TI2V_5B,
    VAE_21,
    VAE_22,
    DitSpec,
    Expert,
    ModelSpec,
    Umt5Spec,
    VaeSpec,
)

# What the tiny tokenizer knows. Ids 0 to 3 are T5's special tokens, in T5's order.
WORDS = ("a", "red", "blue", "circle", "star", "moves", "left", "right", "on", ",", ".", "!")
N = TypeVar("N", bound=nn.Module)

SPECIAL_TOKENS = ("<pad>", "</s>", "<s>", "<unk>")


def tiny_dit(latent_channels: int = 4, *, image_channels: int = 0, heads: int = 2) -> DitSpec:
    return DitSpec(
        in_channels=latent_channels + image_channels,
        out_channels=latent_channels,
        num_heads=heads,
        num_blocks=3,
        ffn_width=40,
        head_dim=16,
        text_width=24,
        sinusoid_width=32,
    )


def tiny_vae(base: VaeSpec, latent_channels: int = 4, **changes: Any) -> VaeSpec:
    """`base` (VAE_21 or VAE_22) a few channels wide."""
    small = replace(
        base,
        latent_channels=latent_channels,
        encoder_width=4,
        decoder_width=4 if base.generation == "2.1" else 8,
        latents_mean=base.latents_mean[:latent_channels],
        latents_std=base.latents_std[:latent_channels],
        res_blocks=1,
    )
    return replace(small, **changes)


TINY_UMT5 = Umt5Spec(
    vocab_size=20, width=24, num_heads=3, head_dim=8, ffn_width=40, num_blocks=2, relative_buckets=8
)

TINY_TI2V = replace(TI2V_5B, name="tiny-ti2v", dit=tiny_dit(), vae=tiny_vae(VAE_22), umt5=TINY_UMT5)
TINY_T2V = replace(T2V_A14B, name="tiny-t2v", dit=tiny_dit(), vae=tiny_vae(VAE_21), umt5=TINY_UMT5)
TINY_I2V = replace(
    I2V_A14B,
    name="tiny-i2v",
    dit=tiny_dit(image_channels=8),  # 4 mask + 4 image latent
    vae=tiny_vae(VAE_21),
    umt5=TINY_UMT5,
)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A model directory on disk, and the networks that were written to it."""

    path: Path
    spec: ModelSpec
    umt5: Umt5
    dits: dict[Expert, Dit]
    vae: Vae


def random_umt5(spec: Umt5Spec, seed: int = 0) -> Umt5:
    umt5 = randomise(Umt5(spec), seed)
    with torch.no_grad():
        for name, parameter in umt5.named_parameters():
            if name.endswith("attn.q.weight"):  # T5 does not scale its logits: its weights do
                parameter.div_(math.sqrt(spec.head_dim))
    return umt5


def randomise(network: N, seed: int) -> N:
    """Draws every parameter: matrices keep the scale of what they read, norms lie around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                # Sharp attention to the text: else 500 rows of padding hide a dozen words.
                scale = 4 if "cross_attn.norm_q" in name else 1
                parameter.copy_(scale * (1 + 0.2 * noise))
            elif "modulation" in name:
                parameter.copy_(0.4 * noise)
            elif "embed.weight" in name and parameter.ndim == 2:  # a table of embeddings
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return network.requires_grad_(False).eval()


def write_tiny(
    path: Path, spec: ModelSpec, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> TinyModel:
    """A directory of `spec` with random weights; every expert has its own."""
    umt5, vae = random_umt5(spec.umt5, seed), randomise(Vae(spec.vae), seed + 1)
    dits: dict[Expert, Dit] = {
        expert: randomise(Dit(spec.dit), seed + 2 + i) for i, expert in enumerate(spec.experts)
    }
    tokenizer_json = path.parent / f"{path.name}-tokenizer.json"
    tokenizer_json.write_text(json.dumps(tiny_tokenizer()), encoding="utf-8")
    write_directory(
        path, spec, umt5=umt5, dits=dits, vae=vae, tokenizer_json=tokenizer_json, dtype=dtype
    )
    return TinyModel(path, spec, umt5, dits, vae)


def tiny_tokenizer() -> dict[str, Any]:
    """A tokenizer.json of whole words: lower case, split at spaces and punctuation."""
    return _tokenizer(
        model={
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate((*SPECIAL_TOKENS, *WORDS))},
            "unk_token": "<unk>",
        },
        normalizer={"type": "Lowercase"},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "Punctuation", "behavior": "Isolated"},
            ],
        },
    )


def tiny_unigram_tokenizer() -> dict[str, Any]:
    """A tokenizer.json of pieces, laid out as google/umt5-xxl's: Unigram behind a Metaspace."""
    pieces = [*SPECIAL_TOKENS, "▁", "▁red", "▁cir", "cle", "s", "▁a"]
    return _tokenizer(
        model={
            "type": "Unigram",
            "unk_id": 3,
            "vocab": [[piece, 0.0 if i < 4 else -1.0 - i] for i, piece in enumerate(pieces)],
            "byte_fallback": False,
        },
        normalizer=None,
        pre_tokenizer={
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True,
        },
    )  # fmt: skip


def _tokenizer(model: Any, normalizer: Any, pre_tokenizer: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        # Stored settings that must not leak into ours.
        "truncation": {
            "max_length": 6, "strategy": "LongestFirst", "stride": 0, "direction": "Right",
        },
        "padding": {
            "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
        },
        "added_tokens": [
            {
                "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for i, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": None,
        "model": model,
    }  # fmt: skip


def reference_class(library: str, name: str) -> Any:
    """A class of diffusers or transformers, which are typed only in part."""
    return getattr(importlib.import_module(library), name)


def reference_dit(dit: Dit, *, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' WanTransformer3DModel with the same weights.

    In low precision its own rule holds: the modules that diffusers keeps in fp32 stay so.
    """
    transformer_class = reference_class("diffusers", "WanTransformer3DModel")
    reference = transformer_class.from_config(configs.dit_config(dit.spec))
    _load(reference, file_tensors(dit, torch.float32))
    if dtype == torch.bfloat16:
        kept = transformer_class._keep_in_fp32_modules
        for name, parameter in reference.named_parameters():
            if not any(part in kept for part in name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return reference
    return reference.to(dtype)


def reference_vae(vae: Vae, *, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' AutoencoderKLWan with the same weights."""
    reference = reference_class("diffusers", "AutoencoderKLWan").from_config(
        configs.vae_config(vae.spec)
    )
    _load(reference, file_tensors(vae, torch.float32))
    return reference.to(dtype)


def reference_umt5(umt5: Umt5, *, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' UMT5EncoderModel with the same weights."""
    state = file_tensors(umt5, torch.float32)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    config = reference_class("transformers", "UMT5Config")
    encoder_class = reference_class("transformers", "UMT5EncoderModel")
    reference = encoder_class(config(**configs.umt5_config(umt5.spec, "float32")))
    _load(reference, state)
    return reference.to(dtype)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|, both as fp64."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    difference = (ours.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _load(reference: nn.Module, state: dict[str, Tensor]) -> None:
    """Strict: every tensor of the reference is set from ours, and none of ours is left over."""
    reference.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    reference.requires_grad_(False).eval()
