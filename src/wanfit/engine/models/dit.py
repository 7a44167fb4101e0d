"""Wan 2.2's diffusion transformer: noisy latents, a time and a text in, a velocity out.

One class serves TI2V-5B, T2V-A14B, I2V-A14B and the demo; they differ by dimensions alone. The
residual stream, the norms, the modulation, the rotary embedding, the time path and the head are
computed in fp32, as in the official code; what goes through a matrix product has the dtype of
its weight. Where the official code embeds one timestep for every token, we embed one for every
latent frame (or for the whole clip): the values are the same, and 31 rows do for 27,280 tokens.

There are two ways through the network. `forward` takes whole tensors and can be differentiated.
`velocity` computes the same in little memory: the residual stream is updated in place, and all but
attention itself sees only some rows (tokens) at a time. Both are made of the four functions of
`dit_rows`.

Dims: B batch, C channels, T latent frames, H W latent sides, P tokens per group, G groups of
tokens that share a timestep (T or 1), L = G P tokens, R rows (some of L), D width, N heads, K head
dim, S text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanfit.engine.models.dit_rows import (
    AttendedText,
    CrossWeights,
    QkvWeights,
    Rotary,
    Workspace,
    cross_attend,
    feed_forward,
    modulate,
    project_out,
    project_qkv,
    row_spans,
)
from wanfit.engine.models.present import Present, always_present
from wanfit.engine.ops.attention import attention
from wanfit.engine.ops.linear import Linear
from wanfit.engine.ops.norm import RmsNorm
from wanfit.specs import DitSpec

ROPE_THETA = 10_000.0  # official: model.py rope_params
SINUSOID_PERIOD = 10_000.0  # official: model.py sinusoidal_embedding_1d
WIDENED_ROWS = 4096  # ours: output features at a time of a layer that is widened to fp32


class Moment(NamedTuple):
    """A timestep as the network reads it, or one for each latent frame."""

    time: Tensor  # [B, G, D] fp32, the embedded time, which the head reads
    modulation: Tensor  # [B, G, 6, D] fp32, which the blocks read


class BlockContext(NamedTuple):
    """What every block reads beside the residual stream."""

    modulation: Tensor  # [B, G, 6, D] fp32
    rotary: Rotary
    text: Tensor  # [B, S, D] in the weights' dtype
    text_bias: Tensor | None  # [1, 1, 1, S], added to the logits of the text


class Dit(nn.Module):
    """The transformer. Parameter names are ours; `weights.keys` maps them to the files' names."""

    # Parts of names of parameters that stay fp32 in a low-precision copy, as in the official code.
    # The time projection (630 MB in fp32 on A14B) and the head are stored in the copy's dtype
    # instead, and widened when used.
    FP32_PARAMETERS = ("time_embed.", "modulation", "cross_norm.")
    # Ends of names of the block parameters that fp8 precision stores in fp8.
    FP8_PARAMETERS = (
        ".q.weight", ".k.weight", ".v.weight", ".o.weight", ".up.weight", ".down.weight",
    )  # fmt: skip

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.spec = spec
        self.present: Present = always_present
        width = spec.width
        self.text_embed = Mlp(spec.text_width, width, width, nn.GELU(approximate="tanh"))
        self.time_embed = Mlp(spec.sinusoid_width, width, width, nn.SiLU())
        self.time_project = Linear(width, 6 * width)
        self.patch_embed = PatchEmbed(spec)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_blocks))
        self.head = Head(spec)

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, text_bias: Tensor | None = None
    ) -> Tensor:
        """The velocity, noise minus clean latents, as [B, C_out, T, H, W] in fp32.

        latents: [B, C_in, T, H, W]. timestep: [B], or [B, T] where latent frames differ in time
        (TI2V's given first frame has 0), in 0..1000. text: [B, S, D_text], padding rows zero.
        text_bias: [S], added to the logits of the text tokens; training uses it to let one zero
        row stand for many.
        """
        moment = self.embed_times(timestep if timestep.ndim == 2 else timestep[:, None])
        text = self.embed_texts([text])[0]
        bias = None if text_bias is None else text_bias.to(text.dtype).view(1, 1, 1, -1)
        grid = self._grid(latents)
        rotary = rotary_table(self.spec, grid, latents.device)
        context = BlockContext(moment.modulation, rotary, text, bias)

        x = self.patch_embed(self.patchify(latents)).float()  # [B, L, D]
        x = x.unflatten(1, (moment.time.shape[1], -1))  # [B, G, P, D]
        for block in self.blocks:
            x = block(x, context)
        return self.unpatchify(self.head(x, moment.time).flatten(1, 2), grid)

    def embed_texts(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Each text [B, S, D_text] as the blocks read it, [B, S, D] in the weights' dtype."""
        with self.present(self.text_embed):
            dtype = self.text_embed.up.weight.dtype
            return [self.text_embed(text.to(dtype)) for text in texts]

    def embed_times(self, timesteps: Tensor) -> Moment:
        """The moment of each of the timesteps [B, G] in 0..1000."""
        sinusoid = sinusoidal_embedding(timesteps, self.spec.sinusoid_width)
        with self.present(self.time_embed):
            time = self.time_embed(sinusoid.to(self.time_embed.up.weight.dtype)).float()
        with self.present(self.time_project):
            modulation = linear_fp32(self.time_project, F.silu(time)).unflatten(-1, (6, -1))
        return Moment(time, modulation)

    def velocity(self, latents: Tensor, moment: Moment, text: Tensor, work: Workspace) -> Tensor:
        """The same as `forward` for one clip, in little memory and without gradients.

        latents: [1, C_in, T, H, W]. text: [1, S, D], from `embed_texts`. `work` fits the clip.
        Returns [1, C_out, T, H, W] in fp32.
        """
        grid = self._grid(latents)
        context = BlockContext(
            moment.modulation, rotary_table(self.spec, grid, latents.device), text, None
        )
        patches = self.patchify(latents)
        for rows in row_spans(work.num_tokens, 1, work.rows):
            work.residual[:, rows.tokens] = self.patch_embed(patches[:, rows.tokens])
        for block in self.blocks:
            assert isinstance(block, Block)
            with self.present(block):
                block.update(context, work)
        parts = [
            self.head(work.view(rows), moment.time[:, rows.groups]).flatten(1, 2)
            for rows in work.spans(moment.time.shape[1])
        ]
        return self.unpatchify(torch.cat(parts, dim=1), grid)

    def patchify(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, L, C p_t p_h p_w], channels slowest, as the weight reads them."""
        for axis, size in zip((2, 4, 6), self.spec.patch, strict=True):
            latents = latents.unflatten(axis, (-1, size))
        # [B, C, t, p_t, h, p_h, w, p_w] -> [B, t, h, w, C, p_t, p_h, p_w]
        return latents.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def unpatchify(self, rows: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B, L, p_t p_h p_w C], channels fastest, to [B, C, T, H, W]. official: unpatchify."""
        channels = self.spec.out_channels
        x = rows.unflatten(-1, (*self.spec.patch, channels)).unflatten(1, grid)
        # [B, t, h, w, p_t, p_h, p_w, C] -> [B, C, t, p_t, h, p_h, w, p_w]
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        latents: Tensor = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return latents

    def _grid(self, latents: Tensor) -> tuple[int, ...]:
        return tuple(n // p for n, p in zip(latents.shape[2:], self.spec.patch, strict=True))


class PatchEmbed(nn.Conv3d):
    """A convolution whose stride is its kernel: a linear layer on patches."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__(spec.in_channels, spec.width, spec.patch, stride=spec.patch)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, R, C p_t p_h p_w] to [B, R, D], in the weight's dtype."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Block(nn.Module):
    """Self attention, cross attention to the text, feed-forward; the first and last modulated."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, spec.width))
        self.self_attn = Attention(spec)
        self.cross_norm = nn.LayerNorm(spec.width, spec.eps)  # official: norm3; diffusers: norm2
        self.cross_attn = Attention(spec)
        self.ffn = Mlp(spec.width, spec.ffn_width, spec.width, nn.GELU(approximate="tanh"))

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """x: the residual stream [B, G, P, D] fp32. Returns the same, changed."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self._modulation(context)
        dtype, eps = context.text.dtype, self.eps

        qkv = self.self_attn.unpack_qkv(dtype)
        q, k, v = project_qkv(x, shift_a, scale_a, context.rotary, qkv, eps)
        x = x + project_out(attention(q, k, v), gate_a, self.self_attn.o.unpack(dtype))
        x = x + cross_attend(x, self._text(context), self._unpack_cross(dtype), eps)
        up, down = self.ffn.up.unpack(dtype), self.ffn.down.unpack(dtype)
        return x + feed_forward(x, shift_f, scale_f, gate_f, up, down, eps)

    def update(self, context: BlockContext, work: Workspace) -> None:
        """Changes `work.residual` as `forward` does x, in place and some rows at a time."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self._modulation(context)
        spans = list(work.spans(shift_a.shape[1]))
        dtype, eps, run = context.text.dtype, self.eps, work.kernels

        qkv = self.self_attn.unpack_qkv(dtype)
        for rows in spans:
            rotary = Rotary(context.rotary.cos[rows.tokens], context.rotary.sin[rows.tokens])
            shift, scale = shift_a[:, rows.groups], scale_a[:, rows.groups]
            projected = run.project_qkv(work.view(rows), shift, scale, rotary, qkv, eps)
            for buffer, part in zip((work.q, work.k, work.v), projected, strict=True):
                buffer[:, rows.tokens] = part
            del projected, part  # before the next rows take as much
        del qkv
        work.attend()

        out, cross, text = (
            self.self_attn.o.unpack(dtype), self._unpack_cross(dtype), self._text(context)
        )  # fmt: skip
        for rows in spans:
            x = work.view(rows)
            x += run.project_out(work.q[:, rows.tokens], gate_a[:, rows.groups], out)
            x += run.cross_attend(x, text, cross, eps)
        del out, cross, text

        up, down = self.ffn.up.unpack(dtype), self.ffn.down.unpack(dtype)
        for rows in spans:
            x = work.view(rows)
            shift, scale = shift_f[:, rows.groups], scale_f[:, rows.groups]
            x += run.feed_forward(x, shift, scale, gate_f[:, rows.groups], up, down, eps)

    def _modulation(self, context: BlockContext) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the feed-forward: [B, G, 1, D] each."""
        return (self.modulation + context.modulation).unsqueeze(3).unbind(2)

    def _text(self, context: BlockContext) -> AttendedText:
        attn, dtype = self.cross_attn, context.text.dtype
        k = attn.norm_k(attn.k(context.text)).to(dtype)
        k, v = (part.unflatten(-1, (attn.num_heads, -1)) for part in (k, attn.v(context.text)))
        return AttendedText(k, v, context.text_bias)

    def _unpack_cross(self, dtype: torch.dtype) -> CrossWeights:
        attn, norm = self.cross_attn, self.cross_norm
        q, out = attn.q.unpack(dtype), attn.o.unpack(dtype)
        return CrossWeights(norm.weight, norm.bias, q, attn.norm_q.weight, out)


class Attention(nn.Module):
    """The weights of multi-head attention; q and k have RMS norms over their whole width."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        width = spec.width
        self.num_heads = spec.num_heads
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.norm_q = RmsNorm(width, spec.eps)
        self.norm_k = RmsNorm(width, spec.eps)

    def unpack_qkv(self, dtype: torch.dtype) -> QkvWeights:
        q, k, v = (layer.unpack(dtype) for layer in (self.q, self.k, self.v))
        return QkvWeights(q, k, v, self.norm_q.weight, self.norm_k.weight)


class Head(nn.Module):
    """The last norm, modulated by the embedded time itself, and the projection to patches."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        patch_frames, patch_rows, patch_columns = spec.patch
        self.eps = spec.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, spec.width))
        self.linear = Linear(
            spec.width, patch_frames * patch_rows * patch_columns * spec.out_channels
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B, G, P, D]; time: [B, G, D]. Returns [B, G, P, values of one patch] in fp32."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(3).unbind(2)
        return linear_fp32(self.linear, modulate(x, shift, scale, self.eps))


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, out: int, activation: nn.Module) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.activation = activation
        self.down = Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.activation(self.up(x)))
        return y


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in fp32, whatever the dtype of its weights; x is fp32.

    Widened a part at a time: A14B's time projection would take 630 MB.
    """
    parts = zip(
        layer.weight.split(WIDENED_ROWS), layer.bias.split(WIDENED_ROWS), strict=True
    )  # fmt: skip
    return torch.cat([F.linear(x, weight.float(), bias.float()) for weight, bias in parts], dim=-1)


def sinusoidal_embedding(timestep: Tensor, width: int) -> Tensor:
    """cos then sin of timestep times `width / 2` frequencies: [...] -> [..., width] fp32.

    Computed in fp64 as official (model.py, sinusoidal_embedding_1d): in fp32, cos(979) is off by
    6e-5.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angle = timestep.double().unsqueeze(-1) * SINUSOID_PERIOD**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def rotary_table(spec: DitSpec, grid: tuple[int, ...], device: torch.device) -> Rotary:
    """The rotation of every token of a grid (t, h, w), channels split between the three axes.

    h and w take 2 (K // 6) channels each and t the rest (44, 42, 42 of 128), in that order, and
    every axis has frequencies of its own. official: model.py, rope_params and rope_apply.
    """
    side = 2 * (spec.head_dim // 6)
    angles = []
    for axis, (channels, length) in enumerate(
        zip((spec.head_dim - 2 * side, side, side), grid, strict=True)
    ):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        position = torch.arange(length, dtype=torch.float64, device=device)
        shape = [1, 1, 1, -1]
        shape[axis] = length
        angles.append(torch.outer(position, ROPE_THETA**-exponent).view(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)  # [L, 1, K / 2]
    return Rotary(angle.cos().float(), angle.sin().float())
