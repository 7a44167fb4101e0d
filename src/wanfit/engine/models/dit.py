"""Wan 2.2's diffusion transformer: noisy latents, a time and a text in, a velocity out.

One class serves TI2V-5B, T2V-A14B, I2V-A14B and the demo; they differ by dimensions alone. The
residual stream, the norms, the modulation, the rotary embedding, the time path and the head are
computed in fp32, as in the official code; what goes through a matrix product has the dtype of
its weight. Where the official code embeds one timestep for every token, we embed one for every
latent frame (or for the whole clip): the values are the same, and 31 rows do for 27,280 tokens.

Dims: B batch, C channels, T latent frames, H W latent sides, P tokens per group, G groups of
tokens that share a timestep (T or 1), L = G P tokens, D width, N heads, K head dim, S text tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanfit.engine.ops.attention import attention
from wanfit.engine.ops.norm import RmsNorm
from wanfit.specs import DitSpec

ROPE_THETA = 10_000.0  # official: model.py rope_params
SINUSOID_PERIOD = 10_000.0  # official: model.py sinusoidal_embedding_1d


class Rotary(NamedTuple):
    """Rotation of each pair of channels at each token: cos and sin, [L, 1, K / 2], fp32."""

    cos: Tensor
    sin: Tensor


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

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.patch_embed = nn.Conv3d(spec.in_channels, width, spec.patch, stride=spec.patch)
        self.text_embed = Mlp(spec.text_width, width, width, nn.GELU(approximate="tanh"))
        self.time_embed = Mlp(spec.sinusoid_width, width, width, nn.SiLU())
        self.time_project = nn.Linear(width, 6 * width)
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
        x, time, context = self.embed(latents, timestep, text, text_bias)
        for block in self.blocks:
            x = block(x, context)
        grid = tuple(n // p for n, p in zip(latents.shape[2:], self.spec.patch, strict=True))
        return self.unpatchify(self.head(x, time), grid)

    def embed(
        self, latents: Tensor, timestep: Tensor, text: Tensor, text_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, BlockContext]:
        """The residual stream [B, G, P, D] fp32, the embedded time [B, G, D] fp32, the context."""
        dtype = self.patch_embed.weight.dtype
        patches = self.patch_embed(latents.to(dtype))  # [B, D, T, H / 2, W / 2]
        rotary = rotary_table(self.spec, patches.shape[2:], patches.device)

        groups = timestep if timestep.ndim == 2 else timestep[:, None]  # [B, G]
        sinusoid = sinusoidal_embedding(groups, self.spec.sinusoid_width)
        time = self.time_embed(sinusoid.to(self.time_embed.up.weight.dtype)).float()
        modulation = linear_fp32(self.time_project, F.silu(time)).unflatten(-1, (6, -1))

        x = patches.float().flatten(2).transpose(1, 2).unflatten(1, (groups.shape[1], -1))
        text = self.text_embed(text.to(dtype))
        bias = None if text_bias is None else text_bias.to(text.dtype).view(1, 1, 1, -1)
        return x, time, BlockContext(modulation, rotary, text, bias)

    def unpatchify(self, rows: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B, L, p_t p_h p_w C], channels fastest, to [B, C, T, H, W]. official: unpatchify."""
        channels = self.spec.out_channels
        x = rows.unflatten(-1, (*self.spec.patch, channels)).unflatten(1, grid)
        # [B, t, h, w, p_t, p_h, p_w, C] -> [B, C, t, p_t, h, p_h, w, p_w]
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        latents: Tensor = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return latents


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
        """x: the residual stream [B, G, P, D] fp32. Returns the same."""
        dtype = self.ffn.up.weight.dtype
        modulation = (self.modulation + context.modulation).unsqueeze(3)  # [B, G, 6, 1, D]
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.unbind(2)

        y: Tensor = modulate(x, shift_a, scale_a, self.eps).to(dtype).flatten(1, 2)
        y = self.self_attn(y, y, rotary=context.rotary)
        x = x + y.view_as(x) * gate_a

        y = self.cross_norm(x).to(dtype).flatten(1, 2)
        x = x + self.cross_attn(y, context.text, bias=context.text_bias).view_as(x)

        y = self.ffn(modulate(x, shift_f, scale_f, self.eps).to(dtype))
        return x + y * gate_f


class Attention(nn.Module):
    """Multi-head attention with RMS norms over the whole width of q and k."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        width = spec.width
        self.num_heads = spec.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q = RmsNorm(width, spec.eps)
        self.norm_k = RmsNorm(width, spec.eps)

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        *,
        rotary: Rotary | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x: queries [B, L, D]; source: keys and values [B, S, D]. Returns [B, L, D]."""
        # Norm and rotation stay in fp32 between two roundings; the official code rounds between.
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        k = self.norm_k(self.k(source)).unflatten(-1, (self.num_heads, -1))
        v = self.v(source).unflatten(-1, (self.num_heads, -1))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)
        out: Tensor = self.o(attention(q, k, v, bias=bias).flatten(2))
        return out


class Head(nn.Module):
    """The last norm, modulated by the embedded time itself, and the projection to patches."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        patch_frames, patch_rows, patch_columns = spec.patch
        self.eps = spec.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, spec.width))
        self.linear = nn.Linear(
            spec.width, patch_frames * patch_rows * patch_columns * spec.out_channels
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [B, G, P, D]; time: [B, G, D]. Returns [B, L, values of one patch] in fp32."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(3).unbind(2)
        return linear_fp32(self.linear, modulate(x, shift, scale, self.eps)).flatten(1, 2)


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, out: int, activation: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.activation = activation
        self.down = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.activation(self.up(x)))
        return y


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, in x's dtype (fp32)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in fp32, whatever the dtype of its weights; x is fp32."""
    return F.linear(x, layer.weight.float(), layer.bias.float())


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


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotates adjacent channel pairs (2k, 2k + 1) of x [B, L, N, K], in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
