"""The UMT5 text encoder: token ids in, one embedding per token out.

T5's encoder with a relative position bias in every layer, no biases in the linear layers, and no
scaling of the logits. Left out: the decoder, dropout, and the guard against fp16 overflow (we run
it in bf16 or fp32).

Dims: B batch, S text tokens, D width, N heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanfit.engine.models.present import Present, always_present
from wanfit.engine.ops.attention import attention
from wanfit.engine.ops.norm import RmsNorm
from wanfit.specs import Umt5Spec


class Umt5(nn.Module):
    """The encoder. Parameter names are ours; `weights.keys` maps them to the files' names."""

    FP32_PARAMETERS: tuple[str, ...] = ()

    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.spec = spec
        self.present: Present = always_present
        self.token_embed: nn.Module = nn.Embedding(spec.vocab_size, spec.width)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_blocks))
        self.norm_out = RmsNorm(spec.width, spec.eps)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids: int64 [B, S]; mask: bool [B, S], false on padding. Returns [B, S, D].

        Rows at padded positions are computed but mean nothing: the caller cuts them.
        """
        return self._run([ids], [mask])[0]

    def encode(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """The embeddings [1, S, D] of each of some texts, int64 [1, S] without padding.

        Every block sees all the texts before the next block does, so its weights come once.
        """
        return self._run(texts, [torch.ones_like(ids, dtype=torch.bool) for ids in texts])

    def _run(self, texts: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        streams: list[Tensor] = [self.token_embed(ids) for ids in texts]
        biases = []
        for x, mask in zip(streams, masks, strict=True):
            padding = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
            padding = padding.masked_fill(~mask, torch.finfo(x.dtype).min)[:, None, None, :]
            biases.append((relative_buckets(mask.shape[1], self.spec, mask.device), padding))
        for block in self.blocks:
            with self.present(block):
                streams = [block(x, *bias) for x, bias in zip(streams, biases, strict=True)]
        return [self.norm_out(x).to(x.dtype) for x in streams]


class Block(nn.Module):
    """Attention and a gated feed-forward, each behind a norm and added to its input."""

    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.attn_norm = RmsNorm(spec.width, spec.eps)
        self.attn = Attention(spec)
        self.ffn_norm = RmsNorm(spec.width, spec.eps)
        self.ffn = GatedMlp(spec)

    def forward(self, x: Tensor, bucket: Tensor, padding: Tensor) -> Tensor:
        # Each norm is rounded once, after its weight.
        x = x + self.attn(self.attn_norm(x).to(x.dtype), bucket, padding)
        out: Tensor = x + self.ffn(self.ffn_norm(x).to(x.dtype))
        return out


class Attention(nn.Module):
    """Unscaled attention with this layer's own bias for each distance and head."""

    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        inner = spec.num_heads * spec.head_dim
        self.num_heads = spec.num_heads
        self.q, self.k, self.v = (nn.Linear(spec.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, spec.width, bias=False)
        self.position_bias = nn.Embedding(spec.relative_buckets, spec.num_heads)

    def forward(self, x: Tensor, bucket: Tensor, padding: Tensor) -> Tensor:
        """x: [B, S, D]; bucket: int64 [S, S]; padding: [B, 1, 1, S]. Returns [B, S, D]."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v)
        )
        bias = self.position_bias(bucket).permute(2, 0, 1).unsqueeze(0) + padding
        out: Tensor = self.o(attention(q, k, v, bias=bias.to(q.dtype), scale=1.0).flatten(2))
        return out


class GatedMlp(nn.Module):
    """down(gelu(gate x) * up x), gelu in its tanh form."""

    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.width, spec.ffn_width, bias=False)
        self.up = nn.Linear(spec.width, spec.ffn_width, bias=False)
        self.down = nn.Linear(spec.ffn_width, spec.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))
        return out


def relative_buckets(length: int, spec: Umt5Spec, device: torch.device) -> Tensor:
    """The bucket of each (query, key) distance: int64 [S, S].

    Half of the buckets for keys after the query; in each half, exact for short distances and
    logarithmic up to the maximum. official: t5.py, T5RelativeEmbedding; the log is fp32 there.
    """
    position = torch.arange(length, device=device)
    relative = position[None, :] - position[:, None]  # key - query
    half = spec.relative_buckets // 2
    exact = half // 2
    distance = relative.abs()
    steps = torch.log(distance.float().clamp(min=1) / exact) / math.log(
        spec.relative_max_distance / exact
    )
    far = (exact + (steps * (half - exact)).long()).clamp(max=half - 1)
    return half * (relative > 0) + torch.where(distance < exact, distance, far)
