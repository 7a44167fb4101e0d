"""Peak bytes of each stage, part by part: formulas that follow the code that allocates them.

Each function gives named parts whose sum is the peak of its stage. Sizes of tensors follow the
code line by line; what no formula gives (CUDA's context, cuDNN's workspaces, the interpreter) is a
constant at the top, in one place, to be calibrated on a card.

Dims: L tokens, R rows (tokens at a time), D width, F ffn width, K head dim, G groups of tokens that
share a timestep, S text tokens, e bytes of the compute dtype; T H W latent frames and sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from wanfit.events import Stage
from wanfit.geometry import Geometry, geometry_of
from wanfit.plan import vae
from wanfit.plan.plan import Cuts, Precision
from wanfit.plan.weights import FP32_BYTES, LOW_BYTES
from wanfit.request import ResolvedRequest
from wanfit.specs import TEXT_TOKENS, DitSpec, Umt5Spec

# Calibrated on one H100 80GB HBM3 (driver 580.159, torch 2.11+cu130, cuDNN 9.19, expandable
# segments), 2026-11-24, by 46 random clips: python -m benchmarks.fit predicted.
# CUDA's context and what its libraries load (used on the card, not by torch): 806 to 817 MB.
CUDA_CONTEXT_BYTES = 820_000_000
# What torch's allocator holds beside our tensors: cuBLAS' workspaces (about 40 MB) and unfinished
# segments; and gaps, as a share of what comes and goes.
ALLOCATOR_BYTES = 70_000_000
DENOISE_GAPS = 0.06  # of "working": 10 to 120 MB in all
# Of the decoder's "activations": 0.08 to 0.19 and 0.41 to 0.44. The encoder leaves none.
DECODE_GAPS: Mapping[str, float] = {"2.1": 0.16, "2.2": 0.42}
# Interpreter, torch, CUDA's libraries and its context, resident: 1.63 to 1.73 GB once all have been
# used; 1.2 GB before cuDNN's first convolution.
HOST_BASE_CUDA_BYTES = 1_715_000_000
# What the stages add to it. Calibrated on the same card, 2026-11-25, by 52 random clips: python -m
# benchmarks.fit jobs. A transformer: 15 to 29 MB. An encoder on a clip (I2V), which stays: 20 MB.
# A decoder: 36 to 43 MB, and 0.10 to 0.13 GB.
HOST_DENOISE_CUDA_BYTES = 25_000_000
HOST_ENCODE_CUDA_BYTES = 20_000_000
HOST_DECODE_CUDA_BYTES: Mapping[str, int] = {"2.1": 40_000_000, "2.2": 128_000_000}
# Measured on 2026-11-23 on 2 cores (torch 2.13, CPU build): `wanfit generate` of the demo peaks at
# 418 MB of resident memory while decoding, 91 of them named below. The CUDA build has more.
HOST_BASE_CPU_BYTES = 340_000_000

# Frames that x264 holds: lookahead (40 at most presets), its threads' and its references.
ENCODER_FRAMES = 100
ENCODER_BYTES_PER_PX = 2.0  # of one such frame: 1.5 in YUV 4:2:0, and its motion data
# A touched row of the embedding table maps the 64 KiB around it (Linux, fault_around_bytes).
TOKEN_ROW_BYTES = 64 << 10
WIDENED_ROWS = 4096  # dit.py: output features at a time of a layer that is widened to fp32


@dataclass(frozen=True, slots=True)
class Shape:
    """What of one request decides its bytes."""

    request: ResolvedRequest
    geometry: Geometry
    precision: Precision
    with_image: bool
    guided: bool  # a second text, and a second velocity per step

    @property
    def compute_bytes(self) -> int:
        """e: of one number in matrix products; fp8 weights are widened to bf16."""
        return LOW_BYTES[self.precision]

    @property
    def num_groups(self) -> int:
        """G: latent frames have timesteps of their own where the first is given (TI2V)."""
        given = self.with_image and self.request.spec.task == "ti2v"
        return self.geometry.latent_frames if given else 1

    @property
    def num_texts(self) -> int:
        return 1 + self.guided

    @property
    def latent_bytes(self) -> int:
        """Of one fp32 tensor [C, T, H, W]."""
        return math.prod(self.geometry.latent_shape) * FP32_BYTES


def shape_of(request: ResolvedRequest, precision: Precision, *, with_image: bool) -> Shape:
    """The shape of a request; its size is legal, since `resolve` checked it."""
    geometry = geometry_of(request.spec, request.width, request.height, request.num_frames)
    guided = request.guidance_high != 1 or (
        request.spec.boundary is not None and request.guidance_low != 1
    )
    return Shape(request, geometry, precision, with_image, guided)


def text_activations(shape: Shape) -> int:
    """UMT5 on the longest texts, one after the other within each block. See umt5.py."""
    spec: Umt5Spec = shape.request.spec.umt5
    tokens, e = TEXT_TOKENS, shape.compute_bytes
    row, inner = spec.width * e, spec.num_heads * spec.head_dim * e
    # Each text's residual stream and int64 distances, and the first text's next stream.
    kept = (shape.num_texts + shape.guided) * tokens * row + shape.num_texts * tokens * tokens * 8
    # A bias per head and pair, as gathered and with the padding's; the normed input; q, k, v.
    attention = 2 * spec.num_heads * tokens * tokens * e + tokens * (row + 3 * inner)
    # The gate, the other half, and their product; the normed input.
    feed_forward = tokens * (3 * spec.ffn_width * e + row)
    # relative_buckets, before the first block: distances on their way, some int64, some fp32.
    buckets = 6 * tokens * tokens * 8
    return kept + max(attention, feed_forward, buckets)


def denoise_activations(shape: Shape, cuts: Cuts) -> Mapping[str, int]:
    """Everything of the denoise stage but weights, slots and what every stage has."""
    dit, e = shape.request.spec.dit, shape.compute_bytes
    tokens = shape.geometry.num_tokens
    return {
        "latents": _latents(shape),
        "conditioning": _conditioning(shape),
        "residual stream": tokens * dit.width * FP32_BYTES,  # Workspace.residual
        "q, k, v": 3 * tokens * dit.width * e,  # Workspace.q, k, v
        "rotary": tokens * dit.head_dim * FP32_BYTES,  # cos and sin, each [L, K / 2] fp32
        "working": _working(shape, cuts),
    }


def _latents(shape: Shape) -> int:
    """Tensors the size of the latents that live while the transformer runs."""
    spec = shape.request.spec
    one = shape.latent_bytes
    wide = one * spec.dit.in_channels // spec.vae.latent_channels
    # The noise, the latents, what the solver remembers (5); the text's velocity while the negative
    # prompt's is computed; the transformer's input as patches.
    total = (7 + shape.guided) * one + wide
    if spec.task == "i2v":  # the condition's channels, and the latents joined with them
        return total + (wide - one) + wide
    return total + (one // shape.geometry.latent_frames if shape.with_image else 0)


def _conditioning(shape: Shape) -> int:
    """What lives through a phase: the texts, raw and as the blocks read them, and the times."""
    dit, e = shape.request.spec.dit, shape.compute_bytes
    texts = shape.num_texts * TEXT_TOKENS * (dit.text_width + dit.width) * e
    # The embedded time [D] and the modulation [6, D], fp32: of every step, of a clean frame, and
    # where latent frames differ, of each of them.
    rows = shape.request.num_inference_steps + 1 + shape.num_groups
    return texts + rows * 7 * dit.width * FP32_BYTES


def _working(shape: Shape, cuts: Cuts) -> int:
    """The most that the transformer's steps hold at once beside the workspace. See dit.py."""
    dit, e = shape.request.spec.dit, shape.compute_bytes
    tokens, width = shape.geometry.num_tokens, dit.width
    span = span_rows(tokens, shape.num_groups, cuts.rows)
    widened = shape.precision == "fp8"  # weights in the compute dtype for the time of a phase
    square, wide = width * width * e * widened, width * dit.ffn_width * e * widened
    # project_qkv: normed q and k in fp32 (8) and the four halves of a rotation (8); in the compute
    # dtype its input, one product and rotated q.
    qkv = span * width * (16 + 3 * e) + 3 * square
    # Workspace.attend: what attention gives for some heads, and its log-sum-exp in fp32.
    attend = tokens * cuts.heads * (dit.head_dim * e + FP32_BYTES)
    # Block._text: keys as they come, in fp32, and normed in two steps; a widened weight at a time.
    wider = FP32_BYTES * (e < FP32_BYTES)  # a copy that fp32 does not need
    text = TEXT_TOKENS * width * (e + wider + 2 * FP32_BYTES) + 4 * square
    # cross_attend, with the text's keys and values: input rows, queries, and the like of them.
    cross = (span * (2 * e + wider + 2 * FP32_BYTES) + TEXT_TOKENS * 2 * e) * width + 3 * square
    # feed_forward: the hidden rows before and after GELU, and the input's.
    feed = span * (2 * dit.ffn_width + width) * e + 2 * wide
    # embed_times: a part of the projection in fp32, and its products before they are joined;
    # when the second expert does it, the first one's texts are still held.
    steps = shape.request.num_inference_steps + 1
    embed = (min(WIDENED_ROWS, 6 * width) * (wider > 0) + 6 * steps) * width * FP32_BYTES
    if shape.request.spec.boundary is not None:
        embed += shape.num_texts * TEXT_TOKENS * width * e
    return max(qkv, attend, text, cross, feed, embed)


def span_rows(num_tokens: int, num_groups: int, rows: int) -> int:
    """The longest span of `row_spans` in dit.py: nearly equal, whole groups or parts of one."""
    per_group = num_tokens // num_groups
    if per_group <= rows:
        count = _ceil(num_groups, rows // per_group)
        return _ceil(num_groups, count) * per_group
    return _ceil(per_group, _ceil(per_group, rows))


def decode_device(shape: Shape, tile_px: int | None) -> Mapping[str, int]:
    """The VAE's decoder, with the latents that it reads."""
    request = shape.request
    parts = vae.decode_bytes(
        request.spec.vae, request.width, request.height, request.num_frames, tile_px
    )
    gaps = DECODE_GAPS[request.spec.vae.generation] * parts["activations"]
    return {**parts, "gaps": int(gaps)}


def image_device(shape: Shape, tile_px: int | None) -> Mapping[str, int]:
    """The VAE's encoder on the first frame (TI2V) or on a clip that begins with it (I2V)."""
    request = shape.request
    num_frames = request.num_frames if request.spec.task == "i2v" else 1
    texts = shape.num_texts * TEXT_TOKENS * request.spec.dit.text_width * shape.compute_bytes
    parts = vae.encode_bytes(request.spec.vae, request.width, request.height, num_frames, tile_px)
    return {"text embeddings": texts, **parts}


def image_host(shape: Shape) -> Mapping[str, int]:
    """The picture, decoded and in fp32; for I2V again as the first frame of a clip.

    The clip's other frames are the kernel's zeros, which take nothing; but as many frames as the
    encoder sees at a time are laid side by side on their way to the device.
    """
    request = shape.request
    frame = 3 * request.width * request.height
    parts = {"picture": frame * (1 + 2 * FP32_BYTES)}
    if request.spec.task == "i2v":
        passing = min(request.num_frames, request.spec.vae.stride_frames)
        parts["frames"] = passing * frame * FP32_BYTES
    return parts


def libraries_host(shape: Shape, stage: Stage, device: str) -> int:
    """What the libraries of a GPU hold on the host for one stage, beside what all stages have."""
    if device == "cpu":
        return 0
    is_clip = shape.with_image and shape.request.spec.task == "i2v"
    encoder = HOST_ENCODE_CUDA_BYTES if is_clip else 0
    match stage:
        case "text":
            return 0
        case "image":
            return encoder
        case "denoise":
            return HOST_DENOISE_CUDA_BYTES + encoder
        case "decode":
            return HOST_DECODE_CUDA_BYTES[shape.request.spec.vae.generation] + encoder


def decode_host(shape: Shape, tile_px: int | None) -> Mapping[str, int]:
    """Frames on their way into the file, and the encoder."""
    request = shape.request
    px = request.width * request.height
    frames = vae.host_frames_bytes(
        request.spec.vae, request.width, request.height, request.num_frames, tile_px
    )
    return {
        "frames": frames,
        "video encoder": int(ENCODER_FRAMES * ENCODER_BYTES_PER_PX * px),
    }


def token_rows(shape: Shape, token_embed_bytes: int) -> int:
    """Pages of the embedding table that the texts touch in the mapping.

    A token stands for one character at least, and one more ends a text.
    """
    request = shape.request
    texts = (request.prompt, request.negative_prompt)[: shape.num_texts]
    tokens = sum(min(TEXT_TOKENS, len(text) + 1) for text in texts)
    return min(token_embed_bytes, tokens * TOKEN_ROW_BYTES)


def heads_at_a_time(dit: DitSpec, num_tokens: int) -> int:
    """The fewest heads that still fill a GPU; a divisor of all.

    524,288 query rows are 4,096 tiles of 128, some 30 for each multiprocessor of the largest cards,
    so the last, partly filled round costs little (ours).
    """
    divisors = (n for n in range(1, dit.num_heads + 1) if dit.num_heads % n == 0)
    return next((n for n in divisors if n * num_tokens >= 1 << 19), dit.num_heads)


def _ceil(value: int, by: int) -> int:
    return -(-value // by)
