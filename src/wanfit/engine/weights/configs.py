"""The JSON files of a model directory in diffusers layout, made from a spec or checked against it.

A config that leaves a field out means the default of diffusers' class, which for the transformer
is T2V-A14B and for the VAE is 2.1. Fields that change nothing in the forward pass (dropout, the
dtype on disk, versions) are written but not checked, and unknown fields are ignored: published
files have some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wanfit.errors import WeightsMismatch
from wanfit.plan.plan import NetworkName
from wanfit.specs import (
    MODELS,
    NUM_TRAIN_TIMESTEPS,
    ROPE_POSITIONS,
    T2V_A14B,
    TEXT_TOKENS,
    VAE_21,
    DitSpec,
    ModelSpec,
    Umt5Spec,
    VaeSpec,
)

Component = Literal["transformer", "transformer_2", "vae", "text_encoder"]
Json = dict[str, Any]

FOLDERS: Mapping[NetworkName, Component] = {
    "umt5": "text_encoder",
    # convert_wan_to_diffusers.py: the high-noise expert, and a dense model's only one, comes first.
    "high_noise": "transformer",
    "low_noise": "transformer_2",
    "vae": "vae",
}

DIFFUSERS_VERSION = "0.35.0"  # the oldest that knows Wan 2.2's fields


def components_of(spec: ModelSpec) -> tuple[Component, ...]:
    """The folders with weights that a directory of this model has."""
    return ("text_encoder", "vae", *(FOLDERS[expert] for expert in spec.experts))


def dit_config(spec: DitSpec) -> Json:
    """transformer/config.json, for WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "added_kv_proj_dim": None,  # Wan 2.1's image encoder
        "attention_head_dim": spec.head_dim,
        "cross_attn_norm": True,
        "eps": spec.eps,
        "ffn_dim": spec.ffn_width,
        "freq_dim": spec.sinusoid_width,
        "image_dim": None,  # Wan 2.1's image encoder
        "in_channels": spec.in_channels,
        "num_attention_heads": spec.num_heads,
        "num_layers": spec.num_blocks,
        "out_channels": spec.out_channels,
        "patch_size": list(spec.patch),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": ROPE_POSITIONS,
        "text_dim": spec.text_width,
    }


def vae_config(spec: VaeSpec) -> Json:
    """vae/config.json, for AutoencoderKLWan; `temperal_downsample` is the file's own spelling."""
    pixel_channels = 3 * spec.pixel_patch**2
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attn_scales": [],
        "base_dim": spec.encoder_width,
        "decoder_base_dim": spec.decoder_width,
        "dim_mult": list(spec.width_multipliers),
        "dropout": 0.0,
        "in_channels": pixel_channels,
        "is_residual": spec.generation == "2.2",
        "latents_mean": list(spec.latents_mean),
        "latents_std": list(spec.latents_std),
        "num_res_blocks": spec.res_blocks,
        "out_channels": pixel_channels,
        "patch_size": spec.pixel_patch if spec.pixel_patch > 1 else None,
        "scale_factor_spatial": spec.stride_px,
        "scale_factor_temporal": spec.stride_frames,
        "temperal_downsample": list(spec.temporal_downsample),
        "z_dim": spec.latent_channels,
    }


def umt5_config(spec: Umt5Spec, dtype: str = "bfloat16") -> Json:
    """text_encoder/config.json, for transformers' UMT5EncoderModel; `dtype` is that on disk."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "d_ff": spec.ffn_width,
        "d_kv": spec.head_dim,
        "d_model": spec.width,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": spec.eps,
        "model_type": "umt5",
        "num_heads": spec.num_heads,
        "num_layers": spec.num_blocks,
        "pad_token_id": 0,
        "relative_attention_max_distance": spec.relative_max_distance,
        "relative_attention_num_buckets": spec.relative_buckets,
        "torch_dtype": dtype,
        "vocab_size": spec.vocab_size,
    }


def scheduler_config(spec: ModelSpec) -> Json:
    """scheduler/scheduler_config.json: UniPC with the authors' shift.

    The published files of the A14B models say 3.0, which is not what their authors sample with.
    """
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "flow_shift": spec.sampling.shift,
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }


def model_index(spec: ModelSpec) -> Json:
    """model_index.json: which class reads which folder."""
    dit = ["diffusers", "WanTransformer3DModel"]
    absent = [None, None]
    index: Json = {
        "_class_name": "WanImageToVideoPipeline" if spec.needs_image else "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "boundary_ratio": spec.boundary,
        "expand_timesteps": spec.task == "ti2v",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        # Reads any tokenizer.json as it is; T5TokenizerFast would rebuild it as a T5 vocabulary.
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": dit,
        "transformer_2": absent if spec.boundary is None else dit,
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if spec.needs_image:
        index |= {"image_encoder": absent, "image_processor": absent}
    return index


def tokenizer_config() -> Json:
    """tokenizer/tokenizer_config.json: the special tokens that transformers asks for by name."""
    return {
        "eos_token": "</s>",
        "model_max_length": TEXT_TOKENS,
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }


def file_stem(component: Component) -> str:
    """The weight file's name without suffix, as the library that owns the component has it."""
    return "model" if component == "text_encoder" else "diffusion_pytorch_model"


def component_config(spec: ModelSpec, component: Component) -> Json:
    """The config.json that `component` of this model has."""
    return _RULES[component].make(spec)


def check_config(config: Mapping[str, Any], spec: ModelSpec, component: Component) -> None:
    """Raises WeightsMismatch when a config.json belongs to another model than `spec`.

    The message names the model that it belongs to, where that is one of ours, and the fields.
    """
    rules = _RULES[component]
    differing = _differing(config, spec, rules)
    if not differing:
        return
    found, wanted = _complete(config, rules), _complete(rules.make(spec), rules)
    differing.sort(key=lambda field: (field not in _TELLING_FIELDS, field))
    details = ", ".join(
        f"{field} {_brief(found.get(field))} instead of {_brief(wanted[field])}"
        for field in differing[:3]
    )
    if len(differing) > 3:
        details += f" and {len(differing) - 3} more"
    owners = [other.name for other in MODELS if not _differing(config, other, rules)]
    what = f"{component} is that of {' or '.join(owners)}" if owners else f"{component} differs"
    raise WeightsMismatch(
        f"{spec.name} was asked for, and this {what}: {details}",
        hint=f"Give the directory of {spec.name}, or name the model that this one holds",
    )


def check_official_config(config: Mapping[str, Any], spec: ModelSpec, file: Path) -> None:
    """Raises WeightsMismatch when the config.json of an official transformer is not that of `spec`.

    It has what wan/modules/model.py registers; a field that is not there tells nothing.
    """
    dit = spec.dit
    wanted: Json = {
        "model_type": spec.task, "dim": dit.width, "in_dim": dit.in_channels,
        "out_dim": dit.out_channels, "ffn_dim": dit.ffn_width, "freq_dim": dit.sinusoid_width,
        "num_heads": dit.num_heads, "num_layers": dit.num_blocks, "eps": dit.eps,
    }  # fmt: skip
    for field, value in wanted.items():
        if field in config and not _same(config[field], value):
            raise WeightsMismatch(
                f"{file} has {field} {_brief(config[field])}, and {spec.name} has {value}"
            )


def check_model_index(index: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raises WeightsMismatch when model_index.json is that of another kind of model."""
    boundary = index.get("boundary_ratio")
    if not _same(boundary, spec.boundary):
        raise WeightsMismatch(
            f"model_index.json has boundary_ratio {boundary}, and {spec.name} has {spec.boundary}",
            hint=_experts_hint(spec),
        )
    expands = bool(index.get("expand_timesteps", False))
    if expands != (spec.task == "ti2v"):
        raise WeightsMismatch(
            f"model_index.json has expand_timesteps {expands}, and {spec.name} is {spec.task}"
        )


def _experts_hint(spec: ModelSpec) -> str:
    count = "one transformer" if spec.boundary is None else "two transformers"
    return f"{spec.name} has {count}"


@dataclass(frozen=True, slots=True)
class _Rules:
    """How one component's config is made and compared."""

    make: Callable[[ModelSpec], Json]
    defaults: Json  # of diffusers' class, for fields that a file leaves out
    unchecked: frozenset[str]


_HOUSEKEEPING = frozenset({"_class_name", "_diffusers_version"})
_DIT_RULES = _Rules(lambda spec: dit_config(spec.dit), dit_config(T2V_A14B.dit), _HOUSEKEEPING)
_RULES: Mapping[Component, _Rules] = {
    "transformer": _DIT_RULES,
    "transformer_2": _DIT_RULES,
    "vae": _Rules(
        lambda spec: vae_config(spec.vae), vae_config(VAE_21), _HOUSEKEEPING | {"dropout"}
    ),
    "text_encoder": _Rules(
        lambda spec: umt5_config(spec.umt5),
        {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
        _HOUSEKEEPING
        | {
            "architectures", "decoder_start_token_id", "dense_act_fn", "dropout_rate",
            "eos_token_id", "is_encoder_decoder", "is_gated_act", "pad_token_id", "torch_dtype",
        },
    ),
}  # fmt: skip
# Named first in a message: they tell a person at once which model a file is of.
_TELLING_FIELDS = frozenset({"in_channels", "num_attention_heads", "z_dim", "d_model"})


def _differing(config: Mapping[str, Any], spec: ModelSpec, rules: _Rules) -> list[str]:
    found, wanted = _complete(config, rules), _complete(rules.make(spec), rules)
    return [
        field
        for field, value in wanted.items()
        if field not in rules.unchecked and not _same(found.get(field), value)
    ]


def _complete(config: Mapping[str, Any], rules: _Rules) -> Json:
    """The config with defaults filled in; the VAE's decoder is as wide as its encoder if unsaid."""
    complete = {**rules.defaults, **config}
    if "base_dim" in complete and config.get("decoder_base_dim") is None:
        complete["decoder_base_dim"] = complete["base_dim"]
    return complete


def _same(found: Any, wanted: Any) -> bool:
    """Equality; numbers to 1e-6, since files hold latent statistics in other roundings."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    return bool(found == wanted)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
