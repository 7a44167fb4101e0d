"""The RMS norm that the transformer and the text encoder share.

The autoencoder has one of its own, over the channel axis and without an epsilon in the root.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed and returned in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis of x [..., D], in fp32."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps)
