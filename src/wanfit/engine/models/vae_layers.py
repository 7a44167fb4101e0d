"""Layers that the VAE's encoder and decoder share: residual blocks, resampling, attention, norm.

Each takes a whole clip [B, C, F, H, W], or with a history the next frame [B, C, H, W] (`causal`).

Dims: B batch, C channels, F frames, H W sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanfit.engine.models.causal import CausalConv3d, History, last_frame, merge_frames


class Mid(nn.Module):
    """Two residual blocks with attention within each frame between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.res_in = ResBlock(width, width)
        self.attn = FrameAttention(width)
        self.res_out = ResBlock(width, width)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        out: Tensor = self.res_out(self.attn(self.res_in(x, history)), history)
        return out


class ResBlock(nn.Module):
    """Twice norm, SiLU and convolution, added to the input (a 1x1x1 of it if widths differ)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = RmsNorm(width), CausalConv3d(width, out)
        self.norm2, self.conv2 = RmsNorm(out), CausalConv3d(out, out)
        self.shortcut = nn.Conv3d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        if history is None:
            y = self.conv1(activated(self.norm1, x))
            y = self.conv2(activated(self.norm2, y))
            return added(y, self.shortcut(x))
        y = x
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            stack = activated_stack(norm, conv, y, history)
            del y
            y = merge_frames(conv, stack)
            del stack
        around = self.shortcut
        return added(y, merge_frames(around, x) if isinstance(around, nn.Conv3d) else x)


class SpatialDown(nn.Module):
    """Half the sides, padded at the right and the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(lambda y: self.conv(F.pad(y, (0, 1, 0, 1))), x)


class SpatialUp(nn.Module):
    """Twice the sides by repetition, then a convolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(lambda y: self.conv(self.repeated(y)), x)

    @staticmethod
    def repeated(x: Tensor) -> Tensor:
        """[B, C, 2 H, 2 W] of a frame."""
        # Repetition is exact in any dtype; the official code goes through fp32 to the same values.
        return F.interpolate(x, scale_factor=2.0, mode="nearest-exact")


class FrameAttention(nn.Module):
    """One-head attention between the positions of a frame, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RmsNorm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return added(per_frame(self._attend, x), x)

    def _attend(self, x: Tensor) -> Tensor:
        # Channels last, since CUDA's fused kernels take nothing else: without one the scores, a
        # matrix of positions by positions, would lie in memory.
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()  # [BF, HW, 3C]
        y = F.scaled_dot_product_attention(*qkv.unsqueeze(1).chunk(3, dim=-1))
        del qkv
        y = y.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])  # [BF, C, H, W]
        streamed = x.is_contiguous(memory_format=torch.channels_last)
        out: Tensor = self.out(y if streamed else y.contiguous())
        return out


class RmsNorm(nn.Module):
    """x / |x| * sqrt(C) * weight over the channel axis (1). |x| is at least 1e-12, as official."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))  # official: gamma

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`out`: where the result goes; autograd cannot follow it."""
        weight: Tensor = self.weight.view(-1, *[1] * (x.ndim - 2)) * self.weight.shape[0] ** 0.5
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = F.normalize(wide, dim=1, out=out).to(x.dtype)
        return y.mul_(weight) if out is not None or in_place(y, weight) else y * weight


def activated(norm: RmsNorm, x: Tensor) -> Tensor:
    """SiLU of the norm of x, a new tensor."""
    y = norm(x)
    return F.silu(y, inplace=in_place(y))


def activated_stack(norm: RmsNorm, conv: CausalConv3d, x: Tensor, history: History) -> Tensor:
    """`history.join` of SiLU of the norm of frame x, which is made in its place in the stack."""
    stack = history.stack(conv)
    F.silu(norm(x, last_frame(conv, stack)), inplace=True)
    history.remember(conv, stack)
    return stack


def added(new: Tensor, other: Tensor) -> Tensor:
    """The sum, in `new`'s memory where possible: nobody else may need `new`."""
    return new.add_(other) if in_place(new, other) else new + other


def in_place(*tensors: Tensor) -> bool:
    """Whether the first may be overwritten: autograd is off, and no promotion is due."""
    return not torch.is_grad_enabled() and all(x.dtype == tensors[0].dtype for x in tensors)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A two-dimensional layer on a frame, or on every frame of a clip."""
    if x.ndim == 4:
        return layer(x)
    y = layer(x.transpose(1, 2).flatten(0, 1))
    frames: Tensor = y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    return frames
