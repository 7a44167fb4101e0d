"""What our parameters are called in diffusers' files, as tables that a person can read.

A row is (ours, theirs); `*` stands for the number of a block, stage or layer and is carried over.
Where a row ends in a dot it maps everything below it. Every parameter has exactly one row: a key
without one is an error, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from wanfit.specs import VaeSpec


class Row(NamedTuple):
    ours: str
    theirs: str


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}.q.", f"{theirs}.to_q."),
        Row(f"{ours}.k.", f"{theirs}.to_k."),
        Row(f"{ours}.v.", f"{theirs}.to_v."),
        Row(f"{ours}.o.", f"{theirs}.to_out.0."),
        Row(f"{ours}.norm_q.", f"{theirs}.norm_q."),
        Row(f"{ours}.norm_k.", f"{theirs}.norm_k."),
    )


DIT: tuple[Row, ...] = (
    Row("patch_embed.", "patch_embedding."),
    Row("text_embed.up.", "condition_embedder.text_embedder.linear_1."),
    Row("text_embed.down.", "condition_embedder.text_embedder.linear_2."),
    Row("time_embed.up.", "condition_embedder.time_embedder.linear_1."),
    Row("time_embed.down.", "condition_embedder.time_embedder.linear_2."),
    Row("time_project.", "condition_embedder.time_proj."),
    Row("blocks.*.modulation", "blocks.*.scale_shift_table"),
    *_attention("blocks.*.self_attn", "blocks.*.attn1"),
    Row("blocks.*.cross_norm.", "blocks.*.norm2."),
    *_attention("blocks.*.cross_attn", "blocks.*.attn2"),
    Row("blocks.*.ffn.up.", "blocks.*.ffn.net.0.proj."),
    Row("blocks.*.ffn.down.", "blocks.*.ffn.net.2."),
    Row("head.modulation", "scale_shift_table"),
    Row("head.linear.", "proj_out."),
)

UMT5: tuple[Row, ...] = (
    Row("token_embed.", "shared."),
    Row("blocks.*.attn_norm.", "encoder.block.*.layer.0.layer_norm."),
    Row("blocks.*.attn.q.", "encoder.block.*.layer.0.SelfAttention.q."),
    Row("blocks.*.attn.k.", "encoder.block.*.layer.0.SelfAttention.k."),
    Row("blocks.*.attn.v.", "encoder.block.*.layer.0.SelfAttention.v."),
    Row("blocks.*.attn.o.", "encoder.block.*.layer.0.SelfAttention.o."),
    Row(
        "blocks.*.attn.position_bias.",
        "encoder.block.*.layer.0.SelfAttention.relative_attention_bias.",
    ),
    Row("blocks.*.ffn_norm.", "encoder.block.*.layer.1.layer_norm."),
    Row("blocks.*.ffn.gate.", "encoder.block.*.layer.1.DenseReluDense.wi_0."),
    Row("blocks.*.ffn.up.", "encoder.block.*.layer.1.DenseReluDense.wi_1."),
    Row("blocks.*.ffn.down.", "encoder.block.*.layer.1.DenseReluDense.wo."),
    Row("norm_out.", "encoder.final_layer_norm."),
)


def _res_block(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}.norm1.weight", f"{theirs}.norm1.gamma"),
        Row(f"{ours}.conv1.", f"{theirs}.conv1."),
        Row(f"{ours}.norm2.weight", f"{theirs}.norm2.gamma"),
        Row(f"{ours}.conv2.", f"{theirs}.conv2."),
        Row(f"{ours}.shortcut.", f"{theirs}.conv_shortcut."),
    )


def _vae_ends(part: str) -> tuple[Row, ...]:
    return (
        Row(f"{part}.conv_in.", f"{part}.conv_in."),
        *_res_block(f"{part}.mid.res_in", f"{part}.mid_block.resnets.0"),
        Row(f"{part}.mid.attn.norm.weight", f"{part}.mid_block.attentions.0.norm.gamma"),
        Row(f"{part}.mid.attn.qkv.", f"{part}.mid_block.attentions.0.to_qkv."),
        Row(f"{part}.mid.attn.out.", f"{part}.mid_block.attentions.0.proj."),
        *_res_block(f"{part}.mid.res_out", f"{part}.mid_block.resnets.1"),
        Row(f"{part}.norm_out.weight", f"{part}.norm_out.gamma"),
        Row(f"{part}.conv_out.", f"{part}.conv_out."),
    )


def _resample(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}.spatial.conv.", f"{theirs}.resample.1."),
        Row(f"{ours}.temporal.conv.", f"{theirs}.time_conv."),
    )


_VAE_COMMON: tuple[Row, ...] = (
    Row("to_moments.", "quant_conv."),
    Row("from_latents.", "post_quant_conv."),
    *_vae_ends("encoder"),
    *_vae_ends("decoder"),
    *_res_block("decoder.stages.*.res.*", "decoder.up_blocks.*.resnets.*"),
)


def vae_rows(spec: VaeSpec) -> tuple[Row, ...]:
    """The VAE's table. 2.1 numbers the encoder's layers in one flat list, so rows depend on it."""
    if spec.generation == "2.2":
        return (
            *_VAE_COMMON,
            *_res_block("encoder.stages.*.res.*", "encoder.down_blocks.*.resnets.*"),
            *_resample("encoder.stages.*", "encoder.down_blocks.*.downsampler"),
            *_resample("decoder.stages.*", "decoder.up_blocks.*.upsampler"),
        )
    per_stage = spec.res_blocks + 1  # residual blocks, then the downsampling
    encoder: list[Row] = []
    for stage in range(len(spec.width_multipliers)):
        flat = stage * per_stage
        for i in range(spec.res_blocks):
            encoder += _res_block(
                f"encoder.stages.{stage}.res.{i}", f"encoder.down_blocks.{flat + i}"
            )
        encoder += _resample(
            f"encoder.stages.{stage}", f"encoder.down_blocks.{flat + spec.res_blocks}"
        )
    return (
        *_VAE_COMMON,
        *encoder,
        *_resample("decoder.stages.*", "decoder.up_blocks.*.upsamplers.0"),
    )


def to_diffusers(name: str, rows: Sequence[Row]) -> str:
    """Their name of our parameter `name`. Raises KeyError when no row has it."""
    for ours, theirs in rows:
        pattern = re.escape(ours).replace(r"\*", r"(\d+)")
        if not ours.endswith("."):
            pattern += "$"
        match = re.match(pattern, name)
        if match:
            for number in match.groups():
                theirs = theirs.replace("*", number, 1)
            return theirs + name[match.end() :]
    raise KeyError(name)
