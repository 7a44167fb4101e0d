"""Wan's causal video autoencoder, versions 2.1 (8x8x4, 16 channels) and 2.2 (16x16x4, 48 channels).

Every convolution over time looks only backwards, so a clip is encoded and decoded in chunks: the
first frame alone, then four frames (one latent frame) at a time, with the last frames that each
convolution saw kept in a `History`. Without a history a whole clip goes through in one pass, with
the same result: training does that. 2.2 is 2.1 with 2x2 pixels folded into channels at both ends
and parameter-free shortcuts around its stages.

The first frame is special where time is resampled: it has no partner, so it is passed by.

Dims: B batch, C channels, F pixel frames, T latent frames, H W sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanfit.engine.models.tiles import blend_tiles
from wanfit.specs import VaeSpec

TIME_KERNEL = 3  # frames that a convolution over time sees: its own and two before it


class History:
    """The last input frames of each convolution over time, between one chunk and the next."""

    def __init__(self) -> None:
        self._tails: dict[nn.Module, Tensor] = {}

    def precede(self, layer: nn.Module, x: Tensor, frames: int) -> Tensor:
        """x [B, C, F, H, W] with the `frames` frames before it, which at the start are zeros."""
        tail = self._tails.get(layer)
        before = zeros_before(x, frames) if tail is None else torch.cat([tail, x], dim=2)
        self._tails[layer] = before[:, :, -frames:].clone()
        return before


def zeros_before(x: Tensor, frames: int) -> Tensor:
    """x [B, C, F, H, W] with `frames` frames of zeros in front."""
    return F.pad(x, (0, 0, 0, 0, frames, 0))


class Vae(nn.Module):
    """The autoencoder. Parameter names are ours; `weights.keys` maps them to the files' names."""

    FP32_PARAMETERS: tuple[str, ...] = ()

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.spec = spec
        moments = 2 * spec.latent_channels
        self.encoder = Encoder(spec)
        self.to_moments = nn.Conv3d(moments, moments, 1)  # official: conv1
        self.from_latents = nn.Conv3d(spec.latent_channels, spec.latent_channels, 1)  # conv2
        self.decoder = Decoder(spec)

    def encode(self, frames: Tensor, *, tile_px: int | None = None) -> Tensor:
        """Normalised latents [B, C, T, H, W] in fp32 of frames [B, 3, F, H, W] in [-1, 1].

        F is 4n + 1. With `tile_px` the encoder sees squares of about that side, blended.
        """
        assert frames.shape[2] % self.spec.stride_frames == 1, frames.shape
        if tile_px is None:
            return self._encode(frames)
        stride = self.spec.stride_px
        return blend_tiles(
            self._encode, frames, tile=tile_px // stride, in_stride=stride, out_stride=1
        )

    def decode(self, latents: Tensor, *, tile_px: int | None = None) -> Iterator[Tensor]:
        """Yields frames [B, 3, f, H, W] in [-1, 1], fp32: one frame, then four at a time.

        latents: normalised, [B, C, T, H, W]. With `tile_px` the decoder sees squares of about that
        side, one after the other through the whole clip, so that frames come only at the end.
        """
        if tile_px is None:
            yield from self._decode(latents)
            return
        stride = self.spec.stride_px
        frames = blend_tiles(
            lambda part: torch.cat([chunk.cpu() for chunk in self._decode(part)], dim=2),
            latents,
            tile=tile_px // stride,
            in_stride=1,
            out_stride=stride,
        )
        yield frames[:, :, :1]
        yield from frames[:, :, 1:].split(self.spec.stride_frames, dim=2)

    def mean(self, frames: Tensor, history: History | None, *, first: bool) -> Tensor:
        """Latents before normalisation, [B, C, T, H, W], of frames or a chunk.

        The encoder gives a log-variance too, which nobody samples from (official: mu alone).
        """
        x: Tensor = self.encoder(fold_pixels(frames, self.spec.pixel_patch), history, first)
        mean: Tensor = self.to_moments(x).chunk(2, dim=1)[0]
        return mean

    def pixels(self, latents: Tensor, history: History | None, *, first: bool) -> Tensor:
        """Frames [B, 3, f, H, W], not clamped, of latents before normalisation, or a chunk."""
        x: Tensor = self.decoder(self.from_latents(latents), history, first)
        return unfold_pixels(x, self.spec.pixel_patch)

    def normalise(self, mean: Tensor) -> Tensor:
        """The encoder's mean, brought to the statistics that the transformer was trained on."""
        center, inverse = self._statistics(mean.device)
        return (mean.float() - center) * inverse

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        center, inverse = self._statistics(latents.device)
        return latents.float() / inverse + center

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and 1 / std per latent channel, fp32 [C, 1, 1, 1]. The reciprocal is official."""
        center = torch.tensor(self.spec.latents_mean, device=device)
        inverse = 1.0 / torch.tensor(self.spec.latents_std, device=device)
        return center.view(-1, 1, 1, 1), inverse.view(-1, 1, 1, 1)

    def _encode(self, frames: Tensor) -> Tensor:
        history = History()
        dtype = self.to_moments.weight.dtype
        chunks = [frames[:, :, :1], *frames[:, :, 1:].split(self.spec.stride_frames, dim=2)]
        means = [
            self.mean(chunk.to(dtype), history, first=i == 0)
            for i, chunk in enumerate(chunks)
            if chunk.shape[2]
        ]
        return self.normalise(torch.cat(means, dim=2))

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        history = History()
        raw = self.denormalise(latents).to(self.from_latents.weight.dtype)
        for i, latent in enumerate(raw.split(1, dim=2)):
            yield self.pixels(latent, history, first=i == 0).float().clamp(-1, 1)


class Encoder(nn.Module):
    """Folded pixels to moments."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        widths = [spec.encoder_width * m for m in (1, *spec.width_multipliers)]
        last = len(spec.width_multipliers) - 1
        self.conv_in = CausalConv3d(3 * spec.pixel_patch**2, widths[0])
        self.stages = nn.ModuleList(
            DownStage(
                spec,
                width,
                out,
                spatial=i < last,
                temporal=i < last and spec.temporal_downsample[i],
            )
            for i, (width, out) in enumerate(itertools.pairwise(widths))
        )
        self.mid = Mid(widths[-1])
        self.norm_out = RmsNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * spec.latent_channels)

    def forward(self, x: Tensor, history: History | None, first: bool) -> Tensor:
        x = self.conv_in(x, history)
        for stage in self.stages:
            x = stage(x, history, first)
        x = self.mid(x, history)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)), history)
        return out


class Decoder(nn.Module):
    """Latents to folded pixels."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        multipliers = spec.width_multipliers[::-1]
        widths = [spec.decoder_width * m for m in (multipliers[0], *multipliers)]
        last = len(multipliers) - 1
        up_temporal = (*spec.temporal_downsample[::-1], False)
        # In 2.1 the upsampling of a stage halves the width for the next one.
        halved = 2 if spec.generation == "2.1" else 1
        self.conv_in = CausalConv3d(spec.latent_channels, widths[0])
        self.mid = Mid(widths[0])
        self.stages = nn.ModuleList(
            UpStage(
                spec,
                width // halved if i else width,
                out,
                up_width=out // halved if i < last else None,
                temporal=up_temporal[i],
            )
            for i, (width, out) in enumerate(itertools.pairwise(widths))
        )
        self.norm_out = RmsNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3 * spec.pixel_patch**2)

    def forward(self, x: Tensor, history: History | None, first: bool) -> Tensor:
        x = self.mid(self.conv_in(x, history), history)
        for stage in self.stages:
            x = stage(x, history, first)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)), history)
        return out


class DownStage(nn.Module):
    """Residual blocks, then half the sides (but in the last stage), perhaps half the frames."""

    def __init__(
        self, spec: VaeSpec, width: int, out: int, *, spatial: bool, temporal: bool
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(width if i == 0 else out, out) for i in range(spec.res_blocks)
        )
        self.spatial = SpatialDown(out) if spatial else None
        self.temporal = TemporalDown(out) if temporal else None
        self.shortcut = (
            AverageDown(out, 2 if temporal else 1, 2 if spatial else 1)
            if spec.generation == "2.2"
            else None
        )

    def forward(self, x: Tensor, history: History | None, first: bool) -> Tensor:
        skip = None if self.shortcut is None else self.shortcut(x)
        for block in self.res:
            x = block(x, history)
        if self.spatial is not None:
            x = self.spatial(x)
        if self.temporal is not None:
            x = self.temporal(x, history, first)
        return x if skip is None else x + skip


class UpStage(nn.Module):
    """Residual blocks, then perhaps twice the frames, then twice the sides (but in the last)."""

    def __init__(
        self, spec: VaeSpec, width: int, out: int, *, up_width: int | None, temporal: bool
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(width if i == 0 else out, out) for i in range(spec.res_blocks + 1)
        )
        self.temporal = TemporalUp(out) if temporal else None
        self.spatial = None if up_width is None else SpatialUp(out, up_width)
        # 2.2's last stage has no shortcut, although its width changes.
        self.shortcut = (
            DuplicateUp(out, 2 if temporal else 1)
            if spec.generation == "2.2" and up_width is not None
            else None
        )

    def forward(self, x: Tensor, history: History | None, first: bool) -> Tensor:
        skip = None if self.shortcut is None else self.shortcut(x, first)
        for block in self.res:
            x = block(x, history)
        if self.temporal is not None:
            x = self.temporal(x, history, first)
        if self.spatial is not None:
            x = self.spatial(x)
        return x if skip is None else x + skip


class Mid(nn.Module):
    """Two residual blocks with attention within each frame between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.res_in = ResBlock(width, width)
        self.attn = FrameAttention(width)
        self.res_out = ResBlock(width, width)

    def forward(self, x: Tensor, history: History | None) -> Tensor:
        out: Tensor = self.res_out(self.attn(self.res_in(x, history)), history)
        return out


class ResBlock(nn.Module):
    """Twice norm, SiLU and convolution, added to the input (a 1x1x1 of it if widths differ)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = RmsNorm(width), CausalConv3d(width, out)
        self.norm2, self.conv2 = RmsNorm(out), CausalConv3d(out, out)
        self.shortcut = nn.Conv3d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, history: History | None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), history)
        y = self.conv2(F.silu(self.norm2(y)), history)
        out: Tensor = self.shortcut(x) + y
        return out


class CausalConv3d(nn.Conv3d):
    """A 3x3x3 convolution that sees each frame and the two before it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, TIME_KERNEL, padding=(0, 1, 1))

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """x: [B, C, F, H, W]; without a history x is a whole clip, with zeros before it."""
        before = TIME_KERNEL - 1
        x = zeros_before(x, before) if history is None else history.precede(self, x, before)
        return super().forward(x)


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
        # Repetition is exact in any dtype; the official code goes through fp32 to the same values.
        return per_frame(
            lambda y: self.conv(F.interpolate(y, scale_factor=2.0, mode="nearest-exact")), x
        )


class TemporalDown(nn.Module):
    """Half the frames after the first of the clip, which passes as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, (TIME_KERNEL, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, history: History | None, first: bool) -> Tensor:
        """x: [B, C, F, H, W], F even but in the chunk with the first frame."""
        if not first:
            assert history is not None
            halved: Tensor = self.conv(history.precede(self, x, 1))
            return halved
        if history is not None:
            history.precede(self, x, 1)
        return torch.cat([x[:, :, :1], self.conv(x)], dim=2) if x.shape[2] > 1 else x


class TemporalUp(nn.Module):
    """Twice the frames after the first of the clip, which passes as it is and is not seen later."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, 2 * width, (TIME_KERNEL, 1, 1))

    def forward(self, x: Tensor, history: History | None, first: bool) -> Tensor:
        """x: [B, C, F, H, W]. The two halves of the channels become alternating frames."""
        if first and x.shape[2] == 1:
            return x
        rest = x[:, :, 1:] if first else x
        before = TIME_KERNEL - 1
        padded = (
            zeros_before(rest, before) if history is None else history.precede(self, rest, before)
        )
        pairs = self.conv(padded).unflatten(1, (2, -1))  # [B, 2, C, F, H, W]
        doubled = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat([x[:, :, :1], doubled], dim=2) if first else doubled


class FrameAttention(nn.Module):
    """One-head attention between the positions of a frame, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RmsNorm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + per_frame(self._attend, x)

    def _attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)  # [BF, 1, HW, 3C]
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        out: Tensor = self.out(y.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))
        return out


class RmsNorm(nn.Module):
    """x / |x| * sqrt(C) * weight over the channel axis (1). |x| is at least 1e-12, as official."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))  # official: gamma

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight.view(-1, *[1] * (x.ndim - 2)) * self.weight.shape[0] ** 0.5
        return F.normalize(x.float(), dim=1).to(x.dtype) * weight


class AverageDown(nn.Module):
    """2.2's shortcut around a DownStage: means of blocks of pixels and groups of channels.

    A block of `frames` x `side` x `side` values is laid out as channels, time slowest, and each of
    the `out` channels is the mean of its share. A clip's odd first frame gets a zero partner in
    front. official: vae2_2.py, AvgDown3D.
    """

    def __init__(self, out: int, frames: int, side: int) -> None:
        super().__init__()
        self.out, self.frames, self.side = out, frames, side

    def forward(self, x: Tensor) -> Tensor:
        x = zeros_before(x, -x.shape[2] % self.frames)
        for axis, factor in ((2, self.frames), (4, self.side), (6, self.side)):
            x = x.unflatten(axis, (-1, factor))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        means: Tensor = x.unflatten(1, (self.out, -1)).mean(dim=2)
        return means


class DuplicateUp(nn.Module):
    """2.2's shortcut around an UpStage: each value repeated over a block of pixels.

    The inverse layout of AverageDown; a clip's first frame is not doubled in time. official:
    vae2_2.py, DupUp3D.
    """

    def __init__(self, out: int, frames: int) -> None:
        super().__init__()
        self.out, self.frames = out, frames

    def forward(self, x: Tensor, first: bool) -> Tensor:
        repeats = self.out * self.frames * 4 // x.shape[1]
        x = x.repeat_interleave(repeats, dim=1).unflatten(1, (self.out, self.frames, 2, 2))
        # [B, C, f, 2, 2, F, H, W] -> [B, C, F, f, H, 2, W, 2]
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, self.frames - 1 :] if first else x


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A two-dimensional layer on every frame of x [B, C, F, H, W]."""
    y = layer(x.transpose(1, 2).flatten(0, 1))
    frames: Tensor = y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    return frames


def fold_pixels(x: Tensor, patch: int) -> Tensor:
    """[B, 3, F, H, W] to [B, 3 p p, F, H / p, W / p]; channel (c p + column) p + row, official."""
    if patch == 1:
        return x
    x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unfold_pixels(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold_pixels`."""
    if patch == 1:
        return x
    x = x.unflatten(1, (3, patch, patch))  # [B, 3, column, row, F, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
