"""Attention, behind one function, so that a faster backend is one change for every network.

Dims: B batch, L query tokens, S key tokens, N heads, K head dim.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale + bias) v, for each head.

    q is [B, L, N, K]; k and v are [B, S, N, K]; `bias` broadcasts to [B, N, L, S], in q's
    dtype. `scale` defaults to 1 / sqrt(K). Returns [B, L, N, K] in q's dtype.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2)
