"""What our parameters are called in every kind of file, as tables that a person can read.

A row has our name, the official one (Wan-Video/Wan2.2, also ComfyUI's, Kijai's, LightX2V's, and
GGUF's for the transformer), the one of diffusers and transformers, and for the text encoder that of
llama.cpp. `*` stands for the number of a block, stage or layer and is carried over. Where a row
ends in a dot it maps everything below it. Every parameter has exactly one row: a key without one is
an error, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

from wanfit.plan.plan import NetworkName
from wanfit.specs import ModelSpec, VaeSpec

Naming = Literal["official", "diffusers", "gguf"]


class Row(NamedTuple):
    ours: str
    official: str
    diffusers: str
    gguf: str = ""  # llama.cpp's; where it is empty, a GGUF file has the official name


def _attention(ours: str, official: str, diffusers: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}.q.", f"{official}.q.", f"{diffusers}.to_q."),
        Row(f"{ours}.k.", f"{official}.k.", f"{diffusers}.to_k."),
        Row(f"{ours}.v.", f"{official}.v.", f"{diffusers}.to_v."),
        Row(f"{ours}.o.", f"{official}.o.", f"{diffusers}.to_out.0."),
        Row(f"{ours}.norm_q.", f"{official}.norm_q.", f"{diffusers}.norm_q."),
        Row(f"{ours}.norm_k.", f"{official}.norm_k.", f"{diffusers}.norm_k."),
    )


# official: wan/modules/model.py. diffusers: WanTransformer3DModel.
DIT: tuple[Row, ...] = (
    Row("patch_embed.", "patch_embedding.", "patch_embedding."),
    Row("text_embed.up.", "text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    Row("text_embed.down.", "text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    Row("time_embed.up.", "time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    Row("time_embed.down.", "time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    Row("time_project.", "time_projection.1.", "condition_embedder.time_proj."),
    Row("blocks.*.modulation", "blocks.*.modulation", "blocks.*.scale_shift_table"),
    *_attention("blocks.*.self_attn", "blocks.*.self_attn", "blocks.*.attn1"),
    Row("blocks.*.cross_norm.", "blocks.*.norm3.", "blocks.*.norm2."),
    *_attention("blocks.*.cross_attn", "blocks.*.cross_attn", "blocks.*.attn2"),
    Row("blocks.*.ffn.up.", "blocks.*.ffn.0.", "blocks.*.ffn.net.0.proj."),
    Row("blocks.*.ffn.down.", "blocks.*.ffn.2.", "blocks.*.ffn.net.2."),
    Row("head.modulation", "head.modulation", "scale_shift_table"),
    Row("head.linear.", "head.head.", "proj_out."),
)

_HF = "encoder.block.*.layer"
# official: wan/modules/t5.py. diffusers: transformers' UMT5EncoderModel, which ComfyUI's files have
# too. gguf: llama.cpp, gguf-py's constants.py, MODEL_ARCH.T5ENCODER.
UMT5: tuple[Row, ...] = tuple(
    Row(*names)
    for names in (
        ("token_embed.", "token_embedding.", "shared.", "token_embd."),
        ("blocks.*.attn_norm.", "blocks.*.norm1.", f"{_HF}.0.layer_norm.", "enc.blk.*.attn_norm."),
        ("blocks.*.attn.q.", "blocks.*.attn.q.", f"{_HF}.0.SelfAttention.q.", "enc.blk.*.attn_q."),
        ("blocks.*.attn.k.", "blocks.*.attn.k.", f"{_HF}.0.SelfAttention.k.", "enc.blk.*.attn_k."),
        ("blocks.*.attn.v.", "blocks.*.attn.v.", f"{_HF}.0.SelfAttention.v.", "enc.blk.*.attn_v."),
        ("blocks.*.attn.o.", "blocks.*.attn.o.", f"{_HF}.0.SelfAttention.o.", "enc.blk.*.attn_o."),
        (
            "blocks.*.attn.position_bias.",
            "blocks.*.pos_embedding.embedding.",
            f"{_HF}.0.SelfAttention.relative_attention_bias.",
            "enc.blk.*.attn_rel_b.",
        ),
        ("blocks.*.ffn_norm.", "blocks.*.norm2.", f"{_HF}.1.layer_norm.", "enc.blk.*.ffn_norm."),
        (
            "blocks.*.ffn.gate.",
            "blocks.*.ffn.gate.0.",
            f"{_HF}.1.DenseReluDense.wi_0.",
            "enc.blk.*.ffn_gate.",
        ),
        (
            "blocks.*.ffn.up.",
            "blocks.*.ffn.fc1.",
            f"{_HF}.1.DenseReluDense.wi_1.",
            "enc.blk.*.ffn_up.",
        ),
        (
            "blocks.*.ffn.down.",
            "blocks.*.ffn.fc2.",
            f"{_HF}.1.DenseReluDense.wo.",
            "enc.blk.*.ffn_down.",
        ),
        ("norm_out.", "norm.", "encoder.final_layer_norm.", "enc.output_norm."),
    )
)
# The second name that transformers gives the embedding; files have one of the two, or both.
UMT5_TIED_NAME = "encoder.embed_tokens.weight"
UMT5_SHARED_NAME = "shared.weight"


def _res_block(ours: str, official: str, diffusers: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}.norm1.weight", f"{official}.residual.0.gamma", f"{diffusers}.norm1.gamma"),
        Row(f"{ours}.conv1.", f"{official}.residual.2.", f"{diffusers}.conv1."),
        Row(f"{ours}.norm2.weight", f"{official}.residual.3.gamma", f"{diffusers}.norm2.gamma"),
        Row(f"{ours}.conv2.", f"{official}.residual.6.", f"{diffusers}.conv2."),
        Row(f"{ours}.shortcut.", f"{official}.shortcut.", f"{diffusers}.conv_shortcut."),
    )


def _resample(ours: str, official: str, diffusers: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}.spatial.conv.", f"{official}.resample.1.", f"{diffusers}.resample.1."),
        Row(f"{ours}.temporal.conv.", f"{official}.time_conv.", f"{diffusers}.time_conv."),
    )


def _vae_ends(part: str) -> tuple[Row, ...]:
    middle, attention = f"{part}.middle.1", f"{part}.mid_block.attentions.0"
    return (
        Row(f"{part}.conv_in.", f"{part}.conv1.", f"{part}.conv_in."),
        *_res_block(f"{part}.mid.res_in", f"{part}.middle.0", f"{part}.mid_block.resnets.0"),
        Row(f"{part}.mid.attn.norm.weight", f"{middle}.norm.gamma", f"{attention}.norm.gamma"),
        Row(f"{part}.mid.attn.qkv.", f"{middle}.to_qkv.", f"{attention}.to_qkv."),
        Row(f"{part}.mid.attn.out.", f"{middle}.proj.", f"{attention}.proj."),
        *_res_block(f"{part}.mid.res_out", f"{part}.middle.2", f"{part}.mid_block.resnets.1"),
        Row(f"{part}.norm_out.weight", f"{part}.head.0.gamma", f"{part}.norm_out.gamma"),
        Row(f"{part}.conv_out.", f"{part}.head.2.", f"{part}.conv_out."),
    )


# official: wan/modules/vae2_1.py and vae2_2.py. diffusers: AutoencoderKLWan.
_VAE_COMMON: tuple[Row, ...] = (
    Row("to_moments.", "conv1.", "quant_conv."),
    Row("from_latents.", "conv2.", "post_quant_conv."),
    *_vae_ends("encoder"),
    *_vae_ends("decoder"),
)


@cache
def vae_rows(spec: VaeSpec) -> tuple[Row, ...]:
    """The VAE's table. 2.2 has a list of layers per stage; 2.1 numbers all layers in one list."""
    down, up = spec.res_blocks, spec.res_blocks + 1  # residual blocks, then the resampling
    if spec.generation == "2.2":
        official_down = "encoder.downsamples.*.downsamples"
        official_up = "decoder.upsamples.*.upsamples"
        return (
            *_VAE_COMMON,
            *_resample(
                "encoder.stages.*", f"{official_down}.{down}", "encoder.down_blocks.*.downsampler"
            ),
            *_res_block(
                "encoder.stages.*.res.*", f"{official_down}.*", "encoder.down_blocks.*.resnets.*"
            ),
            *_resample("decoder.stages.*", f"{official_up}.{up}", "decoder.up_blocks.*.upsampler"),
            *_res_block(
                "decoder.stages.*.res.*", f"{official_up}.*", "decoder.up_blocks.*.resnets.*"
            ),
        )
    rows = list(_VAE_COMMON)
    for stage in range(len(spec.width_multipliers)):
        rows += _flat_down_stage(stage, down)
        rows += _flat_up_stage(stage, up)
    return tuple(rows)


def _flat_down_stage(stage: int, num_res: int) -> list[Row]:
    """An encoder stage of VAE 2.1: layer n of both lists. 2 blocks: stage 1 is n = 3, 4 and 5."""
    ours, first = f"encoder.stages.{stage}", stage * (num_res + 1)
    rows: list[Row] = []
    for i in range(num_res):
        n = first + i
        rows += _res_block(
            f"{ours}.res.{i}", f"encoder.downsamples.{n}", f"encoder.down_blocks.{n}"
        )
    n = first + num_res
    rows += _resample(ours, f"encoder.downsamples.{n}", f"encoder.down_blocks.{n}")
    return rows


def _flat_up_stage(stage: int, num_res: int) -> list[Row]:
    """A decoder stage of VAE 2.1: layer n of the official list, a block of its own in diffusers.

    3 blocks: stage 1 is n = 4, 5, 6 and 7 (upsampling).
    """
    ours, theirs = f"decoder.stages.{stage}", f"decoder.up_blocks.{stage}"
    first = stage * (num_res + 1)
    rows: list[Row] = []
    for i in range(num_res):
        rows += _res_block(
            f"{ours}.res.{i}", f"decoder.upsamples.{first + i}", f"{theirs}.resnets.{i}"
        )
    rows += _resample(ours, f"decoder.upsamples.{first + num_res}", f"{theirs}.upsamplers.0")
    return rows


def network_names(spec: ModelSpec) -> tuple[NetworkName, ...]:
    """The networks of this model, in the order in which a clip from text uses them."""
    return ("umt5", *spec.experts, "vae")


def listed(names: Sequence[str]) -> str:
    """Up to three names, and how many more there are: for a message."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def rows_of(spec: ModelSpec, network: NetworkName) -> Sequence[Row]:
    """The table of a network."""
    match network:
        case "umt5":
            return UMT5
        case "vae":
            return vae_rows(spec.vae)
        case "high_noise" | "low_noise":
            return DIT


def their_name(ours: str, rows: Sequence[Row], naming: Naming) -> str:
    """A file's name of our parameter. Raises KeyError when no row has it."""
    for row in rows:
        name = _carried(ours, row.ours, _theirs(row, naming))
        if name is not None:
            return name
    raise KeyError(ours)


def our_name(theirs: str, rows: Sequence[Row], naming: Naming) -> str:
    """Our name of a file's tensor. Raises KeyError when no row has it."""
    for row in rows:
        name = _carried(theirs, _theirs(row, naming), row.ours)
        if name is not None:
            return name
    raise KeyError(theirs)


def to_diffusers(name: str, rows: Sequence[Row]) -> str:
    """diffusers' name of our parameter. Raises KeyError when no row has it."""
    return their_name(name, rows, "diffusers")


def file_shape(ours: str, theirs: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a file: the VAE's norm weights carry the axes that they broadcast over."""
    if not theirs.endswith(".gamma"):
        return tuple(shape)
    return (*shape, 1, 1) if ".attn." in ours else (*shape, 1, 1, 1)


def _theirs(row: Row, naming: Naming) -> str:
    match naming:
        case "official":
            return row.official
        case "diffusers":
            return row.diffusers
        case "gguf":
            return row.gguf or row.official


def _carried(name: str, source: str, target: str) -> str | None:
    """`name`, which matches `source`, as `target` has it; None when it does not match."""
    match = _pattern(source).match(name)
    if match is None:
        return None
    for number in match.groups():
        target = target.replace("*", number, 1)
    return target + name[match.end() :]


@cache
def _pattern(text: str) -> re.Pattern[str]:
    pattern = re.escape(text).replace(r"\*", r"(\d+)")
    return re.compile(pattern if text.endswith(".") else f"{pattern}$")
