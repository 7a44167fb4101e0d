"""Wan's causal video autoencoder, versions 2.1 (8x8x4, 16 channels) and 2.2 (16x16x4, 48 channels).

Every convolution over time looks only backwards, so a clip is encoded and decoded in a stream: one
frame goes through the whole network before the next one is touched, and a `History` keeps the last
frames that each convolution saw. Without a history a whole clip goes through in one pass, with the
same result: training does that. 2.2 is 2.1 with 2x2 pixels folded into channels at both ends and
parameter-free shortcuts around its stages.

The first frame is special where time is resampled: it has no partner, so it is passed by.

The stream is written as generators, in which a frame belongs to whoever holds it: a stage drops its
input as soon as its first block is done, and keeps nothing of what it has handed on.
`wanfit.plan.vae` counts the bytes of exactly this code; tests hold the two together.

Dims: B batch, C channels, F pixel frames, T latent frames, H W sides. A clip is [B, C, F, H, W], a
frame of the stream [B, C, H, W], channels last in memory (see `causal`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import cast

import torch
from torch import Tensor, nn

from wanfit.engine.models.causal import (
    CausalConv3d,
    History,
    TemporalDown,
    TemporalUp,
    lay_out_weights,
    merge_frames,
    merge_in_bands,
    to_frame,
)
from wanfit.engine.models.folding import AverageDown, DuplicateUp, fold_pixels, unfold_pixels
from wanfit.engine.models.tiles import Band, Strides, blend_tiles, join_bands
from wanfit.engine.models.vae_layers import (
    Mid,
    ResBlock,
    RmsNorm,
    SpatialDown,
    SpatialUp,
    activated,
    activated_stack,
    added,
)
from wanfit.plan.vae import HEAD_BANDS
from wanfit.specs import VaeSpec


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

        F is 4n + 1. The frames may lie on the host: they are brought to the network's device four
        at a time. With `tile_px` the encoder sees squares of about that side, blended as in
        `decode_tiles`.
        """
        num_frames, stride = frames.shape[2], self.spec.stride_px
        assert num_frames % self.spec.stride_frames == 1, frames.shape
        if tile_px is None:
            return torch.cat(list(self._encode(frames)), dim=2)
        latent_frames = (num_frames - 1) // self.spec.stride_frames + 1
        steps = blend_tiles(
            self._encode, frames, latent_frames, tile_px // stride, Strides(into=stride, out=1)
        )
        return join_bands(steps).to(self.to_moments.weight.device)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yields frames [B, 3, f, H, W] in [-1, 1], fp32: one frame, then four at a time.

        latents: normalised, [B, C, T, H, W].
        """
        raw = self.denormalise(latents).to(self.from_latents.weight.dtype)
        history = self.decoder.begin(latents.shape[0], *latents.shape[3:])
        for i, latent in enumerate(raw.split(1, dim=2)):
            yield self.pixels(latent, history, first=i == 0).float().clamp_(-1, 1)

    def decode_tiles(self, latents: Tensor, tile_px: int) -> Iterator[Band | None]:
        """Decodes squares of about `tile_px`, each through the whole clip, blended (see `tiles`).

        Yields once for each latent frame of each tile, and a band of finished rows after each row
        of tiles: its values are those of `decode` for all frames of the clip, on the CPU.

        What tiles cost in quality: a tile lacks what lies beyond its edges, which the attention in
        the middle of the network and some 12 latent cells of convolutions would have seen, so
        colours may differ slowly from tile to tile. Blending hides the seams, not the difference.
        Measured with the demo's weights on pictures of 256 px: tiles of 4 latent cells come to
        42 dB of the whole picture's decode, 8 cells to 51 dB, 12 cells to 58 dB.
        """
        num_frames = (latents.shape[2] - 1) * self.spec.stride_frames + 1
        stride = self.spec.stride_px
        return blend_tiles(
            self.decode, latents, num_frames, tile_px // stride, Strides(into=1, out=stride)
        )

    def mean(self, frames: Tensor, history: History | None, *, first: bool) -> Tensor:
        """Latents before normalisation, [B, C, T, H, W], of a clip, or of a chunk of it.

        The encoder gives a log-variance too, which nobody samples from (official: mu alone).
        """
        patch, channels = self.spec.pixel_patch, self.spec.latent_channels
        if history is None:
            moments: Tensor = self.to_moments(self.encoder(fold_pixels(frames, patch)))
            return moments[:, :channels]
        folded = (to_frame(fold_pixels(x, patch)) for x in frames.split(1, dim=2))
        streamed = self.encoder.stream(folded, history, first)
        means = [merge_frames(self.to_moments, x)[:, :channels].contiguous() for x in streamed]
        return torch.stack(means, dim=2)

    def pixels(self, latents: Tensor, history: History | None, *, first: bool) -> Tensor:
        """Frames [B, 3, F, H, W], not clamped, of a clip's latents, or of one latent frame.

        The latents are those before normalisation.
        """
        if history is None:
            folded = self.decoder(self.from_latents(latents))
            return unfold_pixels(folded, self.spec.pixel_patch)
        latent = merge_frames(self.from_latents, to_frame(latents))
        frames = self.decoder.stream([latent], history, first)
        del latent
        return torch.cat(list(map(self._picture, frames)), dim=2)

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

    def _picture(self, folded: Tensor) -> Tensor:
        """[B, 3, 1, H, W], contiguous, of what comes out of the decoder's stream."""
        return unfold_pixels(folded.unsqueeze(2), self.spec.pixel_patch).contiguous()

    def _encode(self, frames: Tensor) -> Iterator[Tensor]:
        """Normalised latent frames, one after the other."""
        weight = self.to_moments.weight
        every, patch = self.spec.stride_frames, self.spec.pixel_patch
        rows, columns = (side // patch for side in frames.shape[3:])
        history = self.encoder.begin(frames.shape[0], rows, columns)
        chunks = frames.split([1, *[every] * (frames.shape[2] // every)], dim=2)
        for i, chunk in enumerate(chunks):
            chunk = chunk.to(weight.device, weight.dtype)
            yield self.normalise(self.mean(chunk, history, first=i == 0))


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

    def forward(self, x: Tensor) -> Tensor:
        """A whole clip."""
        x = self.conv_in(x)
        for stage in self.stages:
            x = stage(x)
        return self._head(self.mid(x))

    def begin(self, batch: int, rows: int, columns: int) -> History:
        """Makes all ready for a stream of frames of that size."""
        lay_out_weights(self)
        history = History()
        history.reserve(self.conv_in, batch, rows, columns)
        for stage in cast("Iterable[DownStage]", self.stages):
            history.reserve(stage.res, batch, rows, columns)
            if stage.spatial is not None:
                rows, columns = rows // 2, columns // 2
            if stage.temporal is not None:
                history.reserve(stage.temporal, batch, rows, columns)
        for layer in (self.mid, self.conv_out):
            history.reserve(layer, batch, rows, columns)
        return history

    def stream(self, frames: Iterable[Tensor], history: History, first: bool) -> Iterator[Tensor]:
        """The next frames; `first`: they begin the clip."""
        through = repeat(history)
        stacks = map(history.join, repeat(self.conv_in), frames)
        frames = map(merge_frames, repeat(self.conv_in), stacks)
        for stage in cast("Iterable[DownStage]", self.stages):
            frames = stage.stream(frames, history, first)
        return map(self._head, map(self.mid, frames, through), through)

    def _head(self, x: Tensor, history: History | None = None) -> Tensor:
        if history is None:
            out: Tensor = self.conv_out(activated(self.norm_out, x))
            return out
        stack = activated_stack(self.norm_out, self.conv_out, x, history)
        return merge_frames(self.conv_out, stack)


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

    def forward(self, x: Tensor) -> Tensor:
        """A whole clip."""
        x = self.mid(self.conv_in(x))
        for stage in self.stages:
            x = stage(x)
        return self._head(x)

    def begin(self, batch: int, rows: int, columns: int) -> History:
        """Makes all ready for a stream of latents of that size."""
        lay_out_weights(self)
        history = History()
        for layer in (self.conv_in, self.mid):
            history.reserve(layer, batch, rows, columns)
        for stage in cast("Iterable[UpStage]", self.stages):
            history.reserve(stage, batch, rows, columns)
            if stage.spatial is not None:
                rows, columns = 2 * rows, 2 * columns
        history.reserve(self.conv_out, batch, rows, columns)
        return history

    def stream(self, latents: Iterable[Tensor], history: History, first: bool) -> Iterator[Tensor]:
        """The frames of the next latent frames; `first`: they begin the clip."""
        through = repeat(history)
        stacks = map(history.join, repeat(self.conv_in), latents)
        begun = map(merge_frames, repeat(self.conv_in), stacks)
        frames: Iterator[Tensor] = map(self.mid, begun, through)
        for stage in cast("Iterable[UpStage]", self.stages):
            frames = stage.stream(frames, history, first)
        return map(self._head, frames, through)

    def _head(self, x: Tensor, history: History | None = None) -> Tensor:
        if history is None:
            out: Tensor = self.conv_out(activated(self.norm_out, x))
            return out
        stack = activated_stack(self.norm_out, self.conv_out, x, history)
        return merge_in_bands(self.conv_out, stack, HEAD_BANDS)


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

    def forward(self, x: Tensor) -> Tensor:
        """A whole clip."""
        skip = None if self.shortcut is None else self.shortcut(x)
        for block in self.res:
            x = block(x)
        if self.spatial is not None:
            x = self.spatial(x)
        if self.temporal is not None:
            x = self.temporal(x)
        return x if skip is None else skip + x

    def stream(self, frames: Iterable[Tensor], history: History, first: bool) -> Iterator[Tensor]:
        """One frame for each that comes, or for two where time is halved."""
        frames = iter(frames)
        count = 1 if self.temporal is None or first else 2
        while group := list(itertools.islice(frames, count)):
            # The skip is made first: the blocks then need not leave their input alive.
            skips = [] if self.shortcut is None else [self.shortcut.merge(group)]
            small = []
            while group:
                x = group.pop(0)
                for block in self.res:
                    x = block(x, history)
                small.append(x if self.spatial is None else self.spatial(x))
                del x
            if self.temporal is not None:
                small = [self.temporal.merge(small, history)]
            yield added(skips.pop(), small.pop()) if skips else small.pop()


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

    def forward(self, x: Tensor) -> Tensor:
        """A whole clip."""
        entered = x
        for block in self.res:
            x = block(x)
        if self.temporal is not None:
            x = self.temporal(x)
        if self.spatial is not None:
            x = self.spatial(x)
        return x if self.shortcut is None else self.shortcut(x, entered)

    def stream(self, frames: Iterable[Tensor], history: History, first: bool) -> Iterator[Tensor]:
        """One frame for each that comes, or two where time is doubled."""
        for x in frames:
            skips = [] if self.shortcut is None else self.shortcut.frames(x, first)
            for block in self.res:
                x = block(x, history)
            halves = [x]
            if self.temporal is not None and not first:
                stack = history.join(self.temporal.conv, halves.pop())
                del x
                halves = self.temporal.split(stack)
                del stack
            else:
                del x
            while halves:
                yield self._up(halves.pop(0), skips.pop(0) if skips else None)

    def _up(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if self.spatial is not None:
            x = self.spatial.repeated(x)
            x = self.spatial.conv(x)
        if skip is None:
            return x
        blocks = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return added(blocks, skip).flatten(4, 5).flatten(2, 3)
