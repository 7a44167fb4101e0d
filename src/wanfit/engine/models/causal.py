"""Convolutions over time that look only backwards, on a whole clip or on one frame at a time.

Without a `History` a layer reads a whole clip, with zeros before it: training does that. With a
history it reads one frame, and the history holds the few frames that it saw before. The results
are the same; one frame at a time takes the least memory.

A convolution that makes one frame from k frames is a convolution over a picture with k times the
channels, `merge_frames`. cuDNN's convolutions over two axes are faster than those over three, and
in fp32 its kernels want channels last: given anything else it makes copies of input and output
(see `wanfit.plan.vae`). So in a stream frames, stacks of frames and weights all lie channels last
in memory, and no layer changes that.

Dims: B batch, C channels, F frames, H W sides. A clip is [B, C, F, H, W], a frame [B, C, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIME_KERNEL = 3  # frames that a convolution over time sees: its own and two before it


class History:
    """The last input frames of each convolution over time.

    All memory is taken by `reserve`, before the first frame, and stays until the end: what lives
    long then never lies between what comes and goes, and the allocator's memory does not fray.
    """

    def __init__(self) -> None:
        self._tails: dict[nn.Module, list[Tensor]] = {}

    def reserve(self, layers: nn.Module, batch: int, rows: int, columns: int) -> None:
        """Zeros for all convolutions over time in `layers`, which see frames of that size."""
        for conv in layers.modules():
            if isinstance(conv, nn.Conv3d) and conv.kernel_size[0] > 1:
                before = conv.kernel_size[0] - conv.stride[0]
                shape = (batch, conv.in_channels, rows, columns)
                self._tails[conv] = [_empty(conv, shape).zero_() for _ in range(before)]

    def stack(self, conv: nn.Conv3d) -> Tensor:
        """What `merge_frames` reads, [B, k C, H, W]: the known frames, room for the next ones."""
        batch, channels, rows, columns = self._tails[conv][0].shape
        stack = _empty(conv, (batch, conv.kernel_size[0] * channels, rows, columns))
        for i, frame in enumerate(self._tails[conv]):
            stack[:, i * channels : (i + 1) * channels] = frame
        return stack

    def remember(self, conv: nn.Conv3d, stack: Tensor) -> None:
        """Takes the last frame of a stack in the place of the oldest that is known."""
        tail = self._tails[conv]
        tail.append(tail.pop(0).copy_(last_frame(conv, stack)))

    def join(self, conv: nn.Conv3d, *frames: Tensor) -> Tensor:
        """The stack of the known frames and `frames`, the last of which is remembered."""
        stack = self.stack(conv)
        for place, frame in zip(
            stack.split(conv.in_channels, 1)[-len(frames) :], frames, strict=True
        ):
            place.copy_(frame)
        self.remember(conv, stack)
        return stack


def last_frame(conv: nn.Conv3d, stack: Tensor) -> Tensor:
    """A view of the newest frame of a stack."""
    return stack[:, -conv.in_channels :]


def _empty(conv: nn.Conv3d, shape: tuple[int, ...]) -> Tensor:
    weight, layout = conv.weight, torch.channels_last
    return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=layout)


def to_frame(x: Tensor) -> Tensor:
    """A clip of one frame, [B, C, 1, H, W], as a frame [B, C, H, W], channels last."""
    return x.squeeze(2).contiguous(memory_format=torch.channels_last)


def lay_out_weights(network: nn.Module) -> None:
    """Brings the weights of all convolutions into the memory order that a stream needs.

    That is output channels, rows, columns, frames, input channels: `merge_frames` then has its
    weight as a view. Shapes, values and names stay, and at most one weight is there twice. Where
    it is done already nothing happens.
    """
    for conv in network.modules():
        if not isinstance(conv, nn.Conv2d | nn.Conv3d):
            continue
        order: tuple[int, ...] = (0, 2, 3, 1)
        back: tuple[int, ...] = (0, 3, 1, 2)
        if isinstance(conv, nn.Conv3d):
            order, back = (0, 3, 4, 2, 1), (0, 4, 3, 1, 2)
        weight = conv.weight
        if weight.permute(order).is_contiguous():
            continue
        # The parameter stays the same object, and an inference tensor only if it was one.
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            weight.data = weight.detach().permute(order).contiguous().permute(back)


def zeros_before(x: Tensor, frames: int) -> Tensor:
    """x [B, C, F, H, W] with `frames` frames of zeros in front."""
    return F.pad(x, (0, 0, 0, 0, frames, 0)) if frames else x


def merge_frames(conv: nn.Conv3d, stack: Tensor) -> Tensor:
    """The frame [B, O, H, W] that `conv` makes of k frames [B, k C, H, W], k its kernel's length.

    k is 1 for a 1x1x1 convolution.
    """
    return _merge(conv, conv.weight, conv.bias, stack)


def merge_in_bands(conv: CausalConv3d, stack: Tensor, bands: int) -> Tensor:
    """`merge_frames`, in bands of rows: for a convolution whose workspace is as large as its input.

    A band is a view of the stack for a batch of 1. It takes a row of its neighbours with it.
    """
    height = stack.shape[2]
    step = -(-height // bands)
    out = _empty(conv, (stack.shape[0], conv.out_channels, *stack.shape[2:]))
    for top in range(0, height, step):
        above, bottom = min(top, 1), min(top + step, height)
        band = merge_frames(conv, stack[:, :, top - above : bottom + 1])
        out[:, :, top:bottom] = band[:, :, above : above + bottom - top]
    return out


def _merge(conv: nn.Conv3d, weight: Tensor, bias: Tensor | None, stack: Tensor) -> Tensor:
    padding = (int(conv.padding[1]), int(conv.padding[2]))
    return F.conv2d(stack, weight.transpose(1, 2).flatten(1, 2), bias, padding=padding)


class CausalConv3d(nn.Conv3d):
    """A 3x3x3 convolution that sees each frame and the two before it.

    With a history: `merge_frames` of `history.join`.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, TIME_KERNEL, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: a clip."""
        return super().forward(zeros_before(x, TIME_KERNEL - 1))


class TemporalDown(nn.Module):
    """Half the frames after the first of the clip, which passes as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, (TIME_KERNEL, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: a clip."""
        return torch.cat([x[:, :, :1], self.conv(x)], dim=2) if x.shape[2] > 1 else x

    def merge(self, frames: list[Tensor], history: History) -> Tensor:
        """The frame made of the next two, or of the clip's first one alone. Empties the list."""
        if len(frames) == 1:
            history.remember(self.conv, frames[0])
            return frames.pop()
        stack = history.join(self.conv, *frames)
        frames.clear()
        return merge_frames(self.conv, stack)


class TemporalUp(nn.Module):
    """Twice the frames after the first of the clip, which passes as it is and is not seen later."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, 2 * width, (TIME_KERNEL, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: a clip. The two halves of the channels become alternating frames."""
        if x.shape[2] == 1:
            return x
        pairs = self.conv(zeros_before(x[:, :, 1:], TIME_KERNEL - 1)).unflatten(1, (2, -1))
        doubled = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # from [B, 2, C, F, H, W]
        return torch.cat([x[:, :, :1], doubled], dim=2)

    def split(self, stack: Tensor) -> list[Tensor]:
        """The two frames made of what `history.join` gives, each with memory of its own."""
        conv = self.conv
        assert conv.bias is not None
        halves = zip(conv.weight.chunk(2), conv.bias.chunk(2), strict=True)
        return [_merge(conv, weight, bias, stack) for weight, bias in halves]
