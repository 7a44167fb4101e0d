"""The linear layer: its weight in the compute dtype, or in fp8 with a scale for each row.

fp8 here is storage (half the bytes on disk, over the link and in a slot); the product runs in the
compute dtype on a weight that is widened for the time of its use.

Dims: O output features, I input features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FP8_MAX = 448.0  # the largest finite value of e4m3fn
FP8_LEAST_SCALE = 1e-12  # ours: a row of zeros divides by this instead of by zero


class Unpacked(NamedTuple):
    """A layer's weight [O, I] and bias [O] as a product takes them."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Linear(nn.Linear):
    """x W^T + b. `scale` [O, 1] fp32 is set when the weight is fp8, and None otherwise."""

    scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_parameter("scale", None)

    def unpack(self, dtype: torch.dtype | None = None) -> Unpacked:
        """The layer ready for use, once for all the rows that it will see.

        An fp8 weight is widened to `dtype` (of the activations), which costs that many bytes until
        the result is let go; any other weight is given as it is.
        """
        if self.scale is None:
            return Unpacked(self.weight, self.bias)
        assert dtype is not None, "an fp8 weight is widened to the dtype of the activations"
        return Unpacked(self.weight.to(dtype).mul_(self.scale.to(dtype)), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpack(x.dtype)(x)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(fp8 e4m3 [O, I], scale fp32 [O, 1]) of a weight [O, I]: each row's largest value is 448.

    Computed in fp32, rounded once. weight is about fp8 * scale.
    """
    wide = weight.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=FP8_LEAST_SCALE)
    return (wide / scale).to(torch.float8_e4m3fn), scale
