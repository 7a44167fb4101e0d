"""What the transformer does to some tokens at a time, and the buffers that hold all of them.

Everything but attention itself is the same for every token, so it runs on rows (some tokens): four
functions of tensors alone, weights among them, so that compiling each once serves all blocks.

Dims: B batch, P tokens per group, G groups of tokens that share a timestep, L = G P tokens, R rows
(some of L), D width, N heads, K head dim, S text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wanfit.engine.ops.attention import attention
from wanfit.engine.ops.linear import Unpacked
from wanfit.engine.ops.norm import rms_norm
from wanfit.specs import DitSpec


class Rotary(NamedTuple):
    """Rotation of each pair of channels at each token: cos and sin, [L, 1, K / 2], fp32."""

    cos: Tensor
    sin: Tensor


class Rows(NamedTuple):
    """Some neighbouring tokens: whole groups, or a part of the only one."""

    tokens: slice  # of L
    groups: slice  # of G
    num_groups: int


class Workspace:
    """The large buffers of `Dit.velocity`, made once for all blocks and steps of a clip.

    rows: tokens that position-wise layers see at a time. heads: attention heads at a time.
    """

    def __init__(
        self,
        spec: DitSpec,
        num_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        rows: int,
        heads: int,
        kernels: RowKernels | None = None,
    ) -> None:
        assert spec.num_heads % heads == 0, (spec.num_heads, heads)
        self.num_tokens, self.rows, self.heads = num_tokens, rows, heads
        self.kernels = kernels or EAGER
        self.residual = torch.empty(1, num_tokens, spec.width, device=device)
        self.q, self.k, self.v = (
            torch.empty(1, num_tokens, spec.num_heads, spec.head_dim, dtype=dtype, device=device)
            for _ in range(3)
        )

    def spans(self, num_groups: int) -> Iterator[Rows]:
        """All tokens, about `rows` at a time."""
        return row_spans(self.num_tokens, num_groups, self.rows)

    def attend(self) -> None:
        """Self attention, some heads at a time; what it gives takes the place of the queries."""
        for first in range(0, self.q.shape[2], self.heads):
            part = slice(first, first + self.heads)
            self.q[:, :, part] = attention(
                self.q[:, :, part], self.k[:, :, part], self.v[:, :, part]
            )

    def view(self, rows: Rows) -> Tensor:
        """The residual stream of some rows, [1, g, p, D]."""
        part: Tensor = self.residual[:, rows.tokens].unflatten(1, (rows.num_groups, -1))
        return part


def row_spans(num_tokens: int, num_groups: int, rows: int) -> Iterator[Rows]:
    """Cuts the tokens into nearly equal spans of at most `rows`: whole groups, or parts of one.

    So a span broadcasts one modulation per group, and none is ever spread over its tokens.
    """
    per_group = num_tokens // num_groups
    if per_group <= rows:
        count = -(-num_groups // (rows // per_group))
        for start, stop in _even_spans(num_groups, count):
            tokens = slice(start * per_group, stop * per_group)
            yield Rows(tokens, slice(start, stop), stop - start)
        return
    for group in range(num_groups):
        for start, stop in _even_spans(per_group, -(-per_group // rows)):
            first = group * per_group
            yield Rows(slice(first + start, first + stop), slice(group, group + 1), 1)


def _even_spans(size: int, count: int) -> Iterator[tuple[int, int]]:
    for i in range(count):
        yield size * i // count, size * (i + 1) // count


class QkvWeights(NamedTuple):
    """Self attention's projections, and the weights [D] of its norms."""

    q: Unpacked
    k: Unpacked
    v: Unpacked
    norm_q: Tensor
    norm_k: Tensor


class CrossWeights(NamedTuple):
    """Cross attention's norm before it, query projection, norm of queries, output projection."""

    norm: Tensor
    norm_bias: Tensor
    q: Unpacked
    norm_q: Tensor
    out: Unpacked


class AttendedText(NamedTuple):
    """What cross attention attends to: keys and values [B, S, N, K], bias [1, 1, 1, S] or None."""

    k: Tensor
    v: Tensor
    bias: Tensor | None


def project_qkv(
    x: Tensor, shift: Tensor, scale: Tensor, rotary: Rotary, weights: QkvWeights, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, R, N, K] of residual rows x [B, G, P, D], R = G P.

    Norm and rotation stay in fp32 between two roundings; the official code rounds between.
    """
    dtype = weights.v.weight.dtype
    y = modulate(x, shift, scale, eps).to(dtype).flatten(1, 2)
    heads = (-1, 2 * rotary.cos.shape[-1])
    q = rms_norm(weights.q(y), weights.norm_q, eps).unflatten(-1, heads)
    k = rms_norm(weights.k(y), weights.norm_k, eps).unflatten(-1, heads)
    v = weights.v(y).unflatten(-1, heads)
    return rotate(q, rotary).to(v.dtype), rotate(k, rotary).to(v.dtype), v


def project_out(attended: Tensor, gate: Tensor, out: Unpacked) -> Tensor:
    """What self attention adds to the residual stream: [B, R, N, K] to [B, G, P, D], gated."""
    y: Tensor = out(attended.flatten(2)).unflatten(1, (gate.shape[1], -1)) * gate
    return y


def cross_attend(x: Tensor, text: AttendedText, weights: CrossWeights, eps: float) -> Tensor:
    """What cross attention adds to residual rows x [B, G, P, D]."""
    y = F.layer_norm(x, x.shape[-1:], weights.norm, weights.norm_bias, eps)
    y = y.to(text.v.dtype).flatten(1, 2)
    q = rms_norm(weights.q(y), weights.norm_q, eps).to(text.v.dtype)
    y = attention(q.unflatten(-1, text.k.shape[2:]), text.k, text.v, bias=text.bias)
    return weights.out(y.flatten(2)).view_as(x)


def feed_forward(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, up: Unpacked, down: Unpacked, eps: float
) -> Tensor:
    """What the feed-forward adds to residual rows x [B, G, P, D], gated."""
    y = modulate(x, shift, scale, eps).to(up.weight.dtype)
    return down(F.gelu(up(y), approximate="tanh")) * gate


class RowKernels(NamedTuple):
    """The four functions on rows, as they are or compiled."""

    project_qkv: Callable[..., tuple[Tensor, Tensor, Tensor]]
    project_out: Callable[..., Tensor]
    cross_attend: Callable[..., Tensor]
    feed_forward: Callable[..., Tensor]


EAGER = RowKernels(project_qkv, project_out, cross_attend, feed_forward)


def compiled_kernels(backend: str | Callable[..., Any] = "inductor") -> RowKernels:
    """The four, compiled at their first use and then for every block: weights are arguments."""
    return RowKernels(
        torch.compile(project_qkv, dynamic=False, backend=backend),
        torch.compile(project_out, dynamic=False, backend=backend),
        torch.compile(cross_attend, dynamic=False, backend=backend),
        torch.compile(feed_forward, dynamic=False, backend=backend),
    )


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, in x's dtype (fp32)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotates adjacent channel pairs (2k, 2k + 1) of x [B, L, N, K], in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
