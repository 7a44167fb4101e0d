"""What the VAE takes on the device and on the host, and where its tiles lie.

The device's peak is found by going once through the decoder (or encoder) as the code in
engine/models/{vae,causal,folding}.py does, layer by layer and frame by frame, with a ledger of what
is alive in place of tensors. Two chunks are enough: from then on every chunk is the same. Tests
hold the sums to the bytes of the real code at many sizes.

All activations are fp32. Dims: C channels, H W sides in cells of the layer at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from wanfit.plan.weights import vae_bytes
from wanfit.specs import VaeSpec

# cuDNN's workspace for a convolution in fp32 whose tensors and weight lie channels last: none, but
# as much as its input where output channels are few (measured: 3 and 12). Were they not channels
# last, it would be input and output, which cuDNN then brings into that order. Calibrated on one
# H100, cuDNN 9.19, torch 2.11+cu130, 2026-11-23, by 12 shapes in fp32 (max_memory_allocated around
# one call). It depends on cuDNN's version: others saw three times the memory for Conv3d from
# 9.10.2 on, which we do not use.
FEW_OUTPUTS = 16
# So the last convolution of the decoder runs in as many bands of rows.
HEAD_BANDS = 8

_FP32 = 4
_ALIGN = 512  # torch's CUDA allocator rounds every tensor up to this
_KERNEL = 3  # causal.TIME_KERNEL
_STEADY_CHUNKS = 2  # the first chunk, and one that is like all that follow
_MIN_TILE_PX = 128  # below this a tile is mostly overlap


class Span(NamedTuple):
    """One tile along one axis, in cells."""

    start: int
    stop: int
    overlap: int  # over how many cells it is blended with a neighbour


def tile_spans(size: int, tile: int) -> list[Span]:
    """The fewest tiles that cover `size` cells, evenly spread.

    Neighbours overlap by at least a quarter of a tile, as in diffusers (autoencoder_kl_wan.py:
    tiles of 256 px every 192).
    """
    assert tile > 1, tile
    overlap = max(1, tile // 4)
    if size <= tile:
        return [Span(0, size, overlap)]
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [Span(start, start + tile, overlap) for start in starts]


def num_tiles(spec: VaeSpec, width_px: int, height_px: int, tile_px: int | None) -> int:
    """How many tiles a picture is cut into; 1 without tiles."""
    if tile_px is None:
        return 1
    stride = spec.stride_px
    sides = (width_px // stride, height_px // stride)
    return math.prod(len(tile_spans(side, tile_px // stride)) for side in sides)


def tiled_share(spec: VaeSpec, width_px: int, height_px: int, tile_px: int | None) -> float:
    """Pixels that go through the network, for each pixel of the picture: 1 without tiles."""
    width, height = _tile_cells(spec, width_px, height_px, tile_px)
    pixels = width * height * spec.stride_px**2
    return num_tiles(spec, width_px, height_px, tile_px) * pixels / (width_px * height_px)


def tile_sizes(spec: VaeSpec, width_px: int, height_px: int) -> tuple[int, ...]:
    """The tile sides worth trying, in px, largest first. A smaller one takes less memory.

    Multiples of the stride from 128 px up, but only those that run fewer pixels in all than every
    smaller one: tiles are spread evenly, so a slightly larger tile often only overlaps more.
    """
    stride = spec.stride_px
    first = -(-_MIN_TILE_PX // stride) * stride
    good: list[int] = []
    least = math.inf
    for tile_px in range(first, max(width_px, height_px), stride):
        share = tiled_share(spec, width_px, height_px, tile_px)
        if share < least:
            least = share
            good.append(tile_px)
    return tuple(reversed(good))


def decode_bytes(
    spec: VaeSpec,
    width_px: int,
    height_px: int,
    num_frames: int,
    tile_px: int | None,
) -> Mapping[str, int]:
    """Device bytes of decoding one clip at its peak: the parts add up to it.

    weights: the whole network in fp32. latents: the clip's, as given and denormalised. history:
    the input frames that convolutions over time keep. activations: all else that is alive.
    workspace: cuDNN's at the peak, see FEW_OUTPUTS.
    """
    columns, rows = _tile_cells(spec, width_px, height_px, tile_px)
    times = (num_frames - 1) // spec.stride_frames + 1
    whole = width_px * height_px // spec.stride_px**2
    # The latents as they came, whole, and denormalised, of the tile at hand.
    latents = times * spec.latent_channels * (whole + columns * rows) * _FP32
    peak = _decode_peak(spec, columns, rows, min(times, _STEADY_CHUNKS))
    return {"weights": vae_bytes(spec), "latents": latents, **peak.parts()}


def encode_bytes(
    spec: VaeSpec,
    width_px: int,
    height_px: int,
    num_frames: int,
    tile_px: int | None,
) -> Mapping[str, int]:
    """Device bytes of encoding one clip at its peak, in the parts of `decode_bytes`.

    The clip itself lies on the host: four frames at a time are brought over.
    """
    columns, rows = _tile_cells(spec, width_px, height_px, tile_px)
    times = (num_frames - 1) // spec.stride_frames + 1
    # Whole frames stay until the last is done; those of a tile go to the host one by one.
    kept = times if tile_px is None else 1
    latents = kept * spec.latent_channels * columns * rows * _FP32
    peak = _encode_peak(spec, columns, rows, min(times, _STEADY_CHUNKS))
    return {"weights": vae_bytes(spec), "latents": latents, **peak.parts()}


def host_frames_bytes(
    spec: VaeSpec, width_px: int, height_px: int, num_frames: int, tile_px: int | None
) -> int:
    """Host bytes of decoded frames: a few chunks, or with tiles the clip and one band of sums."""
    frame = 3 * width_px * height_px  # uint8
    chunk = min(num_frames, spec.stride_frames)
    if tile_px is None:
        return 2 * chunk * frame  # one that the caller still holds, and the next
    columns, rows = _tile_cells(spec, width_px, height_px, tile_px)
    tile = 3 * columns * rows * spec.stride_px**2
    band = 3 * width_px * rows * spec.stride_px
    sums = num_frames * band * _FP32
    # Either the chunk that is being added, or a frame of the band on its way to uint8.
    passing = max(chunk * tile * _FP32, band * (_FP32 + 1))
    return num_frames * frame + sums + passing


def _tile_cells(
    spec: VaeSpec, width_px: int, height_px: int, tile_px: int | None
) -> tuple[int, int]:
    """(columns, rows) of latents that go through the network at a time."""
    stride = spec.stride_px
    width, height = width_px // stride, height_px // stride
    if tile_px is None:
        return width, height
    return min(width, tile_px // stride), min(height, tile_px // stride)


@dataclass(slots=True)
class _Peak:
    history: int = 0
    activations: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return self.history + self.activations + self.workspace

    def parts(self) -> Mapping[str, int]:
        return {
            "history": self.history,
            "activations": self.activations,
            "workspace": self.workspace,
        }


@dataclass(slots=True)
class _Ledger:
    """What is alive while the network runs.

    `held` counts the activations that somebody up the stack holds. History is reserved as a whole
    before the first chunk, so it is the same at every moment: it is gathered by layer.
    """

    held: int = 0
    looking: bool = True
    _peak: _Peak = field(default_factory=_Peak)
    _history: dict[str, int] = field(default_factory=dict)

    def see(self, *new: int, workspace: int = 0) -> None:
        """A moment at which `new` is alive beside all that is held."""
        now = _Peak(0, self.held + sum(new), workspace)
        if self.looking and now.total > self._peak.total:
            self._peak = now

    def remember(self, layer: str, frame: int, before: int = _KERNEL - 1) -> None:
        """History's buffers for one convolution over time."""
        self._history[layer] = before * frame

    def beside_laid_out(self, width: int) -> _Peak:
        """The peak. For tiny pictures it is before them: causal.lay_out_weights has the largest
        weight, 3x3x3 of the largest width, twice."""
        history, weight = sum(self._history.values()), _frame(_KERNEL**3, width, width)
        now = _Peak(history, self._peak.activations, self._peak.workspace)
        return now if now.total >= weight else _Peak(history, weight - history, 0)


def _workspace(stack: int, out_channels: int) -> int:
    return stack if out_channels < FEW_OUTPUTS else 0


def _frame(channels: int, rows: int, columns: int) -> int:
    """Bytes of one frame [1, C, 1, H, W], as the allocator rounds it."""
    return -(-channels * rows * columns * _FP32 // _ALIGN) * _ALIGN


class _Shape(NamedTuple):
    rows: int
    columns: int

    def of(self, channels: int) -> int:
        return _frame(channels, *self)

    def scaled(self, up: int = 1, down: int = 1) -> _Shape:
        return _Shape(self.rows * up // down, self.columns * up // down)


def _res_block(ledger: _Ledger, name: str, at: _Shape, width: int, out: int) -> None:
    """ResBlock: the input is alive from begin to end, since the sum needs it."""
    x, y = at.of(width), at.of(out)
    for step, channels in enumerate((width, out)):
        frame, stack = at.of(channels), at.of(_KERNEL * channels)
        ledger.remember(f"{name}.{step}", frame)
        # The norm, into its place in the stack, beside what it reads; then the convolution.
        ledger.see(x, frame if step else 0, stack, at.of(1))
        ledger.see(x, stack, y, workspace=_workspace(stack, out))
    if width != out:  # the shortcut's 1x1x1 convolution
        ledger.see(x, y, y, workspace=_workspace(x, out))


def _mid(ledger: _Ledger, at: _Shape, width: int) -> None:
    """Mid: its input is held all the time; FrameAttention makes the norm, q k v, the mean."""
    x, qkv = at.of(width), at.of(3 * width)
    _res_block(ledger, "mid.in", at, width, width)
    ledger.held += x
    ledger.see(x, x, qkv, workspace=_workspace(x, 3 * width))
    ledger.see(x, qkv, x)
    ledger.see(x, x, x, workspace=_workspace(x, width))
    _res_block(ledger, "mid.out", at, width, width)
    ledger.held -= x


def _conv_in(ledger: _Ledger, at: _Shape, width: int, out: int) -> None:
    """The frame goes into the stack and is let go."""
    x, stack = at.of(width), at.of(_KERNEL * width)
    ledger.remember("conv_in", x)
    ledger.see(x, stack)
    ledger.see(stack, at.of(out), workspace=_workspace(stack, out))


def _head(ledger: _Ledger, at: _Shape, width: int, out: int, bands: int = 1) -> None:
    """norm_out, SiLU, conv_out: the input is held until the end."""
    x, stack = at.of(width), at.of(_KERNEL * width)
    ledger.remember("head", x)
    ledger.see(x, stack, at.of(1))
    if bands == 1:
        ledger.see(x, stack, at.of(out), workspace=_workspace(stack, out))
        return
    # A band in the middle, with a row of each neighbour, beside the whole output.
    band = _Shape(min(at.rows, -(-at.rows // bands) + 2), at.columns)
    workspace = _workspace(band.of(_KERNEL * width), out)
    ledger.see(x, stack, at.of(out), band.of(out), workspace=workspace)


@lru_cache(maxsize=4096)
def _decode_peak(spec: VaeSpec, columns: int, rows: int, chunks: int) -> _Peak:
    """The peak of `Vae.decode` on latents of columns x rows x chunks, less weights and latents."""
    ledger = _Ledger()
    top = spec.decoder_width * spec.width_multipliers[-1]
    at = _Shape(rows, columns)
    for chunk in range(_STEADY_CHUNKS):
        ledger.looking = chunk < chunks
        _conv_in(ledger, at, spec.latent_channels, top)
        _mid(ledger, at, top)
        done = _Pixels(ledger, _Shape(rows, columns).scaled(up=spec.stride_px))
        _up(ledger, spec, 0, at, top, first=chunk == 0, done=done.add)
        done.finish()
    return ledger.beside_laid_out(top)


@dataclass(slots=True)
class _Pixels:
    """The list of finished frames in Vae.pixels."""

    ledger: _Ledger
    picture: _Shape
    count: int = 0

    def add(self) -> None:
        frame = self.picture.of(3)
        self.ledger.see(frame, frame)  # what came out of the network, and its copy in pixels
        self.ledger.held += frame
        self.count += 1

    def finish(self) -> None:
        frames = self.count * self.picture.of(3)
        self.ledger.see(frames)  # joined, beside the list
        self.ledger.held -= frames


def _up(
    ledger: _Ledger,
    spec: VaeSpec,
    index: int,
    at: _Shape,
    width: int,
    *,
    first: bool,
    done: Callable[[], None],
) -> None:
    """UpStage.stream for one frame, and all that comes after it until the frame is done."""
    multipliers = spec.width_multipliers[::-1]
    if index == len(multipliers):
        _head(ledger, at, width, 3 * spec.pixel_patch**2, HEAD_BANDS)
        done()
        return
    out = spec.decoder_width * multipliers[index]
    last = index == len(multipliers) - 1
    doubles = not last and spec.temporal_downsample[::-1][index] and not first
    x, y = at.of(width), at.of(out)
    # 2.2's shortcut reads the stage's input at its end, so that it is held beside the blocks.
    skipped = x if spec.generation == "2.2" and not last else 0
    for block in range(spec.res_blocks + 1):
        # The first block's own input is the same memory.
        ledger.held += skipped if block else 0
        _res_block(ledger, f"up{index}.{block}", at, out if block else width, out)
        ledger.held -= skipped if block else 0
    if last:
        _up(ledger, spec, index + 1, at, out, first=first, done=done)
        return
    stack = at.of(_KERNEL * out)
    if not last and spec.temporal_downsample[::-1][index]:
        ledger.remember(f"up{index}.time", y)
    if doubles:
        ledger.see(y, stack, skipped)
        ledger.see(stack, y, y, skipped, workspace=_workspace(stack, out))
    after = at.scaled(up=2)
    raised_width = out // 2 if spec.generation == "2.1" else out
    upsampled, raised = after.of(out), after.of(raised_width)
    for remaining in (y, 0) if doubles else (0,):
        ledger.see(remaining, skipped, y, upsampled)
        workspace = _workspace(upsampled, raised_width)
        ledger.see(remaining, skipped, upsampled, raised, workspace=workspace)
        beside = remaining + skipped if remaining else 0
        ledger.held += beside
        _up(ledger, spec, index + 1, after, raised_width, first=first, done=done)
        ledger.held -= beside


@lru_cache(maxsize=4096)
def _encode_peak(spec: VaeSpec, columns: int, rows: int, chunks: int) -> _Peak:
    """The peak of `Vae.encode` on a clip of that many latents, less weights and latents."""
    ledger = _Ledger()
    folded = _Shape(rows, columns).scaled(up=spec.stride_px // spec.pixel_patch)
    picture = _Shape(rows, columns).scaled(up=spec.stride_px)
    end = spec.encoder_width * spec.width_multipliers[-1]
    for chunk in range(_STEADY_CHUNKS):
        ledger.looking = chunk < chunks
        num_frames = spec.stride_frames if chunk else 1
        ledger.held += num_frames * picture.of(3)  # brought over from the host
        stream = _folded_frames(ledger, spec, num_frames, folded)
        for index in range(len(spec.width_multipliers)):
            stream = _down(ledger, spec, index, folded, stream, first=chunk == 0)
        at = _Shape(rows, columns)
        for _ in stream:
            _mid(ledger, at, end)
            _head(ledger, at, end, 2 * spec.latent_channels)
        ledger.held -= num_frames * picture.of(3)
    return ledger.beside_laid_out(end)


def _folded_frames(ledger: _Ledger, spec: VaeSpec, count: int, folded: _Shape) -> Iterator[None]:
    for _ in range(count):
        _conv_in(ledger, folded, 3 * spec.pixel_patch**2, spec.encoder_width)
        yield


def _down(
    ledger: _Ledger,
    spec: VaeSpec,
    index: int,
    folded: _Shape,
    stream: Iterator[None],
    *,
    first: bool,
) -> Iterator[None]:
    """DownStage.stream. What it yields is held by whoever asks for it."""
    last = index == len(spec.width_multipliers) - 1
    width, out = (spec.encoder_width * (1, *spec.width_multipliers)[i] for i in (index, index + 1))
    halves = not last and spec.temporal_downsample[index]
    count = 2 if halves and not first else 1
    at = folded.scaled(down=1 << index)
    after = at if last else at.scaled(down=2)
    x, y, small = at.of(width), at.of(out), after.of(out)
    while True:
        for _ in range(count):
            if next(stream, StopIteration) is StopIteration:
                return
            ledger.held += x
        skip = 0
        if spec.generation == "2.2":
            skip = small
            # AverageDown: the frames joined, or the first with its zero partner, and a copy of
            # them in the order of the averages; in the last stage there is nothing to move.
            pair = (2 if halves else 1) * x
            ledger.see(pair if halves else 0, 0 if last else pair, skip)
            ledger.held += skip
        for _ in range(count):
            ledger.held -= x
            for block in range(spec.res_blocks):
                _res_block(ledger, f"down{index}.{block}", at, out if block else width, out)
            if not last:
                padded = _frame(out, at.rows + 1, at.columns + 1)
                ledger.see(y, padded, small, workspace=_workspace(padded, out))
            ledger.held += small
        ledger.held -= count * small + skip
        if halves:
            ledger.remember(f"down{index}.time", small, before=1)
        if count == 2:
            stack = after.of(_KERNEL * out)
            ledger.see(2 * small, stack, skip)
            ledger.see(stack, small, skip, workspace=_workspace(stack, out))
        yield
