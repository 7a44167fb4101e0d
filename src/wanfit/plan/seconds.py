"""How long each stage takes: FLOPs over rates, bytes over the link, whichever is longer.

Efficiencies were measured on one H100 SXM (torch 2.11, eager, 2026-11-23, benchmarks.fit forward):
A14B 1280x720x81 in 12.75 s and 832x480x81 in 3.51 s, TI2V-5B 1280x704 in 1.130 s (121 frames) and
0.174 s (25), which these constants give within 2 %. Other cards are scaled by their catalogue
figures: an estimate, and the plan says so.

Dims: L tokens, D width, F ffn width, S text tokens.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from wanfit.plan import vae
from wanfit.plan.bytes import Shape
from wanfit.plan.machine import Machine
from wanfit.plan.plan import Limit, Ring
from wanfit.plan.weights import dit_units
from wanfit.specs import NUM_TRAIN_TIMESTEPS, TEXT_TOKENS, DitSpec, Expert, Umt5Spec, VaeSpec

# Shares of a card's dense bf16 rate that eager bf16 code reaches; measured, see above.
LINEAR_SHARE = 0.765  # the feed-forward's two products on 8,192 rows: 757 of 989 TFLOP/s
ATTENTION_SHARE = 0.58  # SDPA (cuDNN) on 75,600 tokens, 8 or 40 heads at a time: 568 to 586
ELEMENTWISE_BYTES = 465  # of device memory moved per token, channel and block; the remainder
# The VAE runs in fp32 (TF32 units: half the bf16 rate). To be calibrated; from 4.76 s (2.1) and
# 6.2 s (2.2) that diffusers' decode took in bf16.
CONV_SHARE = 0.10
FP32_SHARE = 0.25  # of the bf16 rate, where matrix products are fp32 on a GPU (TF32 is off there)
# Ours: gives the demo's 3 s per clip on the 2 cores of benchmarks/RESULTS.md. Cores differ widely.
CPU_FLOPS_PER_CORE = 30e9
CPU_MEMORY_BYTES_PER_S = 10e9
# Measured on one H200: the ring from page cache beside a busy GPU, 12.4 GB/s with 4 readers.
READER_BYTES_PER_S = 3.1e9
HIDDEN_SHARE = 0.9  # ours: copies hide when they take at most this part of the compute


@dataclass(frozen=True, slots=True)
class Rates:
    """What one machine reaches, in FLOP or bytes per second."""

    linear: float
    attention: float
    conv: float
    memory: float
    link: float  # into the slots
    ring: float  # mapped bytes into pinned buffers
    disk_bound: bool  # the ring reads from the disk rather than from the page cache


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one forward of one expert asks for."""

    streamed: int  # all that is not resident
    mapped: int  # of those, through the ring


def rates_of(machine: Machine, shape: Shape, device: str, ring: Ring) -> Rates:
    """The rates of a machine, for a device ("cuda" or "cpu") and a ring."""
    readers = max(1, ring.num_readers)
    ring_rate = min(
        readers * READER_BYTES_PER_S,
        machine.disk_bytes_per_s if ring.direct else math.inf,
    )
    if device == "cpu":
        flops = machine.num_cores * CPU_FLOPS_PER_CORE
        memory = CPU_MEMORY_BYTES_PER_S
        return Rates(flops, flops, flops, memory, memory, ring_rate, ring.direct)
    share = FP32_SHARE if shape.precision == "fp32" else 1.0
    return Rates(
        linear=machine.bf16_flops * LINEAR_SHARE * share,
        attention=machine.bf16_flops * ATTENTION_SHARE * share,
        conv=machine.bf16_flops * CONV_SHARE,
        memory=machine.memory_bytes_per_s,
        link=machine.link_bytes_per_s,
        ring=ring_rate,
        disk_bound=ring.direct,
    )


def forward_compute_s(shape: Shape, rates: Rates) -> float:
    """One forward of one expert, its weights being there."""
    dit, tokens = shape.request.spec.dit, shape.geometry.num_tokens
    linear, attention = dit_flops(dit, tokens)
    elementwise = ELEMENTWISE_BYTES * tokens * dit.width * dit.num_blocks
    if shape.precision == "fp8":  # each weight is read, and written and read again widened
        elementwise += 5 * sum(dit_units(dit, "fp8").values())
    return linear / rates.linear + attention / rates.attention + elementwise / rates.memory


def dit_flops(dit: DitSpec, tokens: int) -> tuple[float, float]:
    """FLOPs of one forward: (of linear layers, of attention). A multiply and an add count as 2."""
    width = dit.width
    # Per token: self attention's q, k, v, o; cross attention's q and o; up and down.
    per_token = 6 * width * width + 2 * width * dit.ffn_width
    per_text_token = 2 * width * width  # cross attention's k and v
    linear = 2 * (tokens * per_token + TEXT_TOKENS * per_text_token)
    # Scores and their product with the values: 2 each, per pair and channel.
    attention = 4 * tokens * (tokens + TEXT_TOKENS) * width
    return float(dit.num_blocks * linear), float(dit.num_blocks * attention)


def forward_s(compute_s: float, traffic: Traffic, rates: Rates) -> tuple[float, Limit]:
    """Seconds of a forward whose copies run beside it, and what limits it."""
    costs: dict[Limit, float] = {
        "compute": compute_s,
        "link": traffic.streamed / rates.link,
        "disk" if rates.disk_bound else "host": traffic.mapped / rates.ring,
    }
    slowest = max(costs, key=lambda limit: costs[limit])
    return costs[slowest], slowest


def hides(compute_s: float, traffic: Traffic, rates: Rates) -> bool:
    """Whether the copies of a forward disappear behind its compute, with some room to err."""
    return forward_s(compute_s * HIDDEN_SHARE, traffic, rates)[1] == "compute"


def forwards_of(shape: Shape) -> dict[Expert, int]:
    """How many forwards each expert makes: its steps, twice where guidance needs both texts.

    The steps are those of `engine.schedule.make_schedule` (a test holds it): even from the first
    sigma, shifted; the high-noise expert has those at or above the boundary.
    """
    request = shape.request
    steps, boundary = request.num_inference_steps, request.boundary
    high = steps
    if boundary is not None:
        first = 0.9990000128746033 if request.solver == "unipc" else 1.0
        sigmas = (first - i * (first / steps) for i in range(steps))
        times = (
            NUM_TRAIN_TIMESTEPS * min(1.0, request.shift * s / (1 + (request.shift - 1) * s))
            for s in sigmas
        )
        if request.solver != "euler":
            times = (float(math.trunc(time)) for time in times)
        high = sum(time >= boundary * NUM_TRAIN_TIMESTEPS for time in times)
    counts: dict[Expert, int] = {"high_noise": high * (1 + (request.guidance_high != 1))}
    if boundary is not None:
        counts["low_noise"] = (steps - high) * (1 + (request.guidance_low != 1))
    return counts


def text_compute_s(shape: Shape, rates: Rates) -> float:
    """UMT5 on every text."""
    spec: Umt5Spec = shape.request.spec.umt5
    inner = spec.num_heads * spec.head_dim
    per_token = 4 * spec.width * inner + 3 * spec.width * spec.ffn_width
    flops = 2 * spec.num_blocks * TEXT_TOKENS * per_token
    return shape.num_texts * flops / rates.linear


def decode_s(shape: Shape, tile_px: int | None, rates: Rates) -> float:
    """The VAE's decoder over the whole clip."""
    spec = shape.request.spec.vae
    pixels = _pixels(shape, tile_px) * shape.request.num_frames
    return pixels * decode_flops_per_pixel(spec) / rates.conv


def encode_s(shape: Shape, tile_px: int | None, rates: Rates) -> float:
    """The VAE's encoder over the first frame, or over a clip that begins with it."""
    spec = shape.request.spec
    pixels = _pixels(shape, tile_px) * (shape.request.num_frames if spec.task == "i2v" else 1)
    return pixels * encode_flops_per_pixel(spec.vae) / rates.conv


def _pixels(shape: Shape, tile_px: int | None) -> float:
    """Of one frame that the network sees: where tiles overlap, as often as they do."""
    request = shape.request
    share = vae.tiled_share(request.spec.vae, request.width, request.height, tile_px)
    return request.width * request.height * share


def decode_flops_per_pixel(spec: VaeSpec) -> float:
    """Of the convolutions of the decoder, per pixel and frame of the clip."""
    multipliers = spec.width_multipliers[::-1]
    widths = [spec.decoder_width * m for m in (multipliers[0], *multipliers)]
    times = [2 if doubles else 1 for doubles in (*spec.temporal_downsample[::-1], False)]
    return _res_flops(spec, widths, [math.prod(times[i:]) for i in range(len(times))], extra=1)


def encode_flops_per_pixel(spec: VaeSpec) -> float:
    """Likewise of the encoder."""
    widths = [spec.encoder_width * m for m in (1, *spec.width_multipliers)]
    times = [2 if halves else 1 for halves in (*spec.temporal_downsample, False)]
    shrink = [math.prod(times[:i]) for i in range(len(times))]
    return _res_flops(spec, widths[::-1], shrink[::-1], extra=0)


def _res_flops(spec: VaeSpec, widths: list[int], fewer_frames: list[int], extra: int) -> float:
    """Residual blocks from the coarsest stage to the finest: two 3x3x3 convolutions each."""
    total = 0.0
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        side = spec.pixel_patch << (len(widths) - 2 - i)  # pixels per position of this stage
        blocks = spec.res_blocks + extra
        per_position = 2 * 27 * (width * out + (2 * blocks - 1) * out * out)
        total += per_position / (side * side * fewer_frames[i])
    return total
