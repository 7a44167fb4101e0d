"""How many bytes each unit of a network has, from its spec alone.

The same sums as `engine.weights.layout.network_layouts` makes from the real networks (a test holds
that they are equal for every model and precision), so that the planner needs no torch. A unit's
tensors lie one after the other, each at a multiple of ALIGN_BYTES.

Dims: O output features, I input features, D width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Literal, NamedTuple

from wanfit.plan.plan import Precision
from wanfit.specs import DitSpec, Umt5Spec, VaeSpec

ALIGN_BYTES = 256  # what CUDA's allocator aligns to, and enough for every vectorised load
REST = "rest"  # the unit of all tensors in no other: small, and always on the device
FP8_BYTES, BF16_BYTES, FP32_BYTES = 1, 2, 4
LOW_BYTES: Mapping[Precision, int] = {"fp32": FP32_BYTES, "bf16": BF16_BYTES, "fp8": BF16_BYTES}
# The Dit's units that each job uses once per expert, since all timesteps go through them together.
ONCE_UNITS = ("text_embed", "time_embed", "time_project")
TOKEN_EMBED = "token_embed"  # of UMT5: never moved; the rows in use are gathered on the host

_TIME_KERNEL = 3  # vae.py: frames that a causal convolution sees
_Kind = Literal["low", "fp32", "fp8"]  # how a tensor is stored when the network is in low precision


class Tensor(NamedTuple):
    """One parameter: its shape, and which precision rule it follows."""

    shape: tuple[int, ...]
    kind: _Kind = "low"

    def num_bytes(self, precision: Precision) -> int:
        """Bytes with its fp8 scales (fp32, one per output row), each aligned."""
        count = math.prod(self.shape)
        if self.kind == "fp8" and precision == "fp8":
            return align(count * FP8_BYTES) + align(self.shape[0] * FP32_BYTES)
        return align(count * (FP32_BYTES if self.kind == "fp32" else LOW_BYTES[precision]))


def align(num_bytes: int, to: int = ALIGN_BYTES) -> int:
    """The next multiple of `to`."""
    return -(-num_bytes // to) * to


def block_names(num_blocks: int) -> tuple[str, ...]:
    """The units of a network's blocks, in the order in which a forward pass uses them."""
    return tuple(f"blocks.{index}" for index in range(num_blocks))


@cache
def dit_units(spec: DitSpec, precision: Precision) -> Mapping[str, int]:
    """Unit -> bytes of one transformer."""
    width = spec.width
    patch = math.prod(spec.patch)
    rest = [
        Tensor((width, spec.in_channels, *spec.patch)),  # patch_embed, weight and bias
        Tensor((width,)),
        Tensor((1, 2, width), "fp32"),  # head.modulation
        *_linear(width, patch * spec.out_channels),  # head.linear
    ]
    units = {
        REST: rest,
        "text_embed": [*_linear(spec.text_width, width), *_linear(width, width)],
        "time_embed": [
            *_linear(spec.sinusoid_width, width, "fp32"),
            *_linear(width, width, "fp32"),
        ],
        "time_project": [*_linear(width, 6 * width)],  # six vectors of modulation per block
    }
    block = _sum(dit_block(spec), precision)
    return {
        **{unit: _sum(tensors, precision) for unit, tensors in units.items()},
        **dict.fromkeys(block_names(spec.num_blocks), block),
    }


def dit_block(spec: DitSpec) -> Iterator[Tensor]:
    """The tensors of one block of the transformer."""
    width = spec.width
    yield Tensor((1, 6, width), "fp32")  # modulation
    for _ in ("self_attn", "cross_attn"):
        for _ in "qkvo":
            yield Tensor((width, width), "fp8")
            yield Tensor((width,))
        yield from (Tensor((width,)), Tensor((width,)))  # norm_q, norm_k
    yield from (Tensor((width,), "fp32"), Tensor((width,), "fp32"))  # cross_norm, weight and bias
    for out, inner in ((spec.ffn_width, width), (width, spec.ffn_width)):  # ffn.up, ffn.down
        yield from (Tensor((out, inner), "fp8"), Tensor((out,)))


@cache
def umt5_units(spec: Umt5Spec, precision: Precision) -> Mapping[str, int]:
    """Unit -> bytes of the text encoder, which stays bf16 when the precision is fp8."""
    inner = spec.num_heads * spec.head_dim
    block = [
        Tensor((spec.width,)),  # attn_norm
        *(Tensor((inner, spec.width)) for _ in "qkv"),
        Tensor((spec.width, inner)),  # o
        Tensor((spec.relative_buckets, spec.num_heads)),  # position_bias
        Tensor((spec.width,)),  # ffn_norm
        *(Tensor((spec.ffn_width, spec.width)) for _ in ("gate", "up")),
        Tensor((spec.width, spec.ffn_width)),  # down
    ]
    return {
        REST: _sum([Tensor((spec.width,))], precision),  # norm_out
        TOKEN_EMBED: _sum([Tensor((spec.vocab_size, spec.width))], precision),
        **dict.fromkeys(block_names(spec.num_blocks), _sum(block, precision)),
    }


@cache
def vae_bytes(spec: VaeSpec, precision: Precision = "fp32") -> int:
    """Bytes of the whole autoencoder, encoder and decoder, which is one unit."""
    moments = 2 * spec.latent_channels
    tensors = itertools.chain(
        _encoder(spec),
        _decoder(spec),
        _conv(moments, moments),  # to_moments
        _conv(spec.latent_channels, spec.latent_channels),  # from_latents
    )
    return _sum(tensors, precision)


def _encoder(spec: VaeSpec) -> Iterator[Tensor]:
    """As `Encoder` and `DownStage` in engine/models/vae.py."""
    widths = [spec.encoder_width * m for m in (1, *spec.width_multipliers)]
    last = len(spec.width_multipliers) - 1
    yield from _causal(3 * spec.pixel_patch**2, widths[0])
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        for j in range(spec.res_blocks):
            yield from _res_block(out if j else width, out)
        if i < last:
            yield from _conv(out, out, 3, 3)  # SpatialDown
            if spec.temporal_downsample[i]:
                yield from _conv(out, out, _TIME_KERNEL, 1, 1)  # TemporalDown
    yield from _mid(widths[-1])
    yield Tensor((widths[-1],))  # norm_out
    yield from _causal(widths[-1], 2 * spec.latent_channels)


def _decoder(spec: VaeSpec) -> Iterator[Tensor]:
    """As `Decoder` and `UpStage` in engine/models/vae.py."""
    multipliers = spec.width_multipliers[::-1]
    widths = [spec.decoder_width * m for m in (multipliers[0], *multipliers)]
    last = len(multipliers) - 1
    up_temporal = (*spec.temporal_downsample[::-1], False)
    halved = 2 if spec.generation == "2.1" else 1
    yield from _causal(spec.latent_channels, widths[0])
    yield from _mid(widths[0])
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        first = width // halved if i else width
        for j in range(spec.res_blocks + 1):
            yield from _res_block(out if j else first, out)
        if up_temporal[i]:
            yield from _conv(out, 2 * out, _TIME_KERNEL, 1, 1)  # TemporalUp
        if i < last:
            yield from _conv(out, out // halved, 3, 3)  # SpatialUp
    yield Tensor((widths[-1],))  # norm_out
    yield from _causal(widths[-1], 3 * spec.pixel_patch**2)


def _mid(width: int) -> Iterator[Tensor]:
    yield from _res_block(width, width)
    yield Tensor((width,))  # FrameAttention: norm, qkv, out
    yield from _conv(width, 3 * width, 1, 1)
    yield from _conv(width, width, 1, 1)
    yield from _res_block(width, width)


def _res_block(width: int, out: int) -> Iterator[Tensor]:
    yield Tensor((width,))
    yield from _causal(width, out)
    yield Tensor((out,))
    yield from _causal(out, out)
    if width != out:
        yield from _conv(width, out)  # shortcut


def _causal(width: int, out: int) -> Iterator[Tensor]:
    return _conv(width, out, _TIME_KERNEL, 3, 3)


def _conv(width: int, out: int, *kernel: int) -> Iterator[Tensor]:
    """Weight and bias; without a kernel, 1x1x1."""
    yield Tensor((out, width, *(kernel or (1, 1, 1))))
    yield Tensor((out,))


def _linear(inner: int, out: int, kind: _Kind = "low") -> Iterator[Tensor]:
    """Weight [O, I] and bias [O]."""
    yield Tensor((out, inner), kind)
    yield Tensor((out,), kind)


def _sum(tensors: Iterable[Tensor], precision: Precision) -> int:
    return sum(tensor.num_bytes(precision) for tensor in tensors)
