"""The official networks' modules, as attributes alone: what they call their parameters.

Written after Wan-Video/Wan2.2 at 42bf4cf, wan/modules/{model,t5,vae2_1,vae2_2}.py: the same
attribute names, containers and layers, without a forward pass. `state_dict()` of one, made on the
meta device, is the key list of the official files.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch import empty as empty_tensor

from wanfit.specs import DitSpec, Umt5Spec, VaeSpec


class OfficialDit(nn.Module):
    """WanModel."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        dim = spec.width
        self.patch_embedding = nn.Conv3d(spec.in_channels, dim, spec.patch, stride=spec.patch)
        self.text_embedding = _mlp(spec.text_width, dim, dim)
        self.time_embedding = _mlp(spec.sinusoid_width, dim, dim)
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(_DitBlock(dim, spec.ffn_width) for _ in range(spec.num_blocks))
        patch_frames, patch_rows, patch_columns = spec.patch
        self.head = _Head(dim, patch_frames * patch_rows * patch_columns * spec.out_channels)


class _DitBlock(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attn = _DitAttention(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.cross_attn = _DitAttention(dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.ffn = _mlp(dim, ffn_dim, dim)
        self.modulation = nn.Parameter(empty_tensor(1, 6, dim))


class _DitAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = _Weight(dim), _Weight(dim)


class _Head(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(empty_tensor(1, 2, dim))


class OfficialUmt5(nn.Module):
    """T5Encoder with shared_pos=False."""

    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(spec.vocab_size, spec.width)
        self.blocks = nn.ModuleList(_T5Block(spec) for _ in range(spec.num_blocks))
        self.norm = _Weight(spec.width)


class _T5Block(nn.Module):
    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.norm1 = _Weight(spec.width)
        self.attn = nn.Module()
        attention = spec.num_heads * spec.head_dim
        for name in "qkv":
            self.attn.register_module(name, _bare(spec.width, attention))
        self.attn.o = _bare(attention, spec.width)
        self.norm2 = _Weight(spec.width)
        self.ffn = nn.Module()
        self.ffn.gate = nn.Sequential(_bare(spec.width, spec.ffn_width), nn.GELU())
        self.ffn.fc1 = _bare(spec.width, spec.ffn_width)
        self.ffn.fc2 = _bare(spec.ffn_width, spec.width)
        self.pos_embedding = nn.Module()
        self.pos_embedding.embedding = nn.Embedding(spec.relative_buckets, spec.num_heads)


class OfficialVae(nn.Module):
    """WanVAE_ of vae2_1.py, or of vae2_2.py."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.encoder = _Encoder(spec)
        self.conv1 = nn.Conv3d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)
        self.conv2 = nn.Conv3d(spec.latent_channels, spec.latent_channels, 1)
        self.decoder = _Decoder(spec)


class _Encoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        dims = [spec.encoder_width * m for m in (1, *spec.width_multipliers)]
        last = len(spec.width_multipliers) - 1
        self.conv1 = _conv3(3 * spec.pixel_patch**2, dims[0])
        stages = []
        for i in range(len(spec.width_multipliers)):
            layers: list[nn.Module] = [
                _Residual(dims[i] if j == 0 else dims[i + 1], dims[i + 1])
                for j in range(spec.res_blocks)
            ]
            if i < last:
                layers.append(_Down(dims[i + 1], temporal=spec.temporal_downsample[i]))
            stages.append(layers)
        self.downsamples = _stages(stages, "downsamples", spec)
        self.middle = _middle(dims[-1])
        self.head = _out(dims[-1], 2 * spec.latent_channels)


class _Decoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        multipliers = spec.width_multipliers
        dims = [spec.decoder_width * m for m in (multipliers[-1], *multipliers[::-1])]
        temporal = spec.temporal_downsample[::-1]
        last = len(multipliers) - 1
        self.conv1 = _conv3(spec.latent_channels, dims[0])
        self.middle = _middle(dims[0])
        stages = []
        for i in range(len(multipliers)):
            in_dim, out_dim = dims[i], dims[i + 1]
            if spec.generation == "2.1" and i > 0:
                in_dim //= 2  # vae2_1.py: the upsampling before halved the channels
            layers: list[nn.Module] = [
                _Residual(in_dim if j == 0 else out_dim, out_dim)
                for j in range(spec.res_blocks + 1)
            ]
            if i < last:
                halved = out_dim // 2 if spec.generation == "2.1" else out_dim
                layers.append(_Up(out_dim, halved, temporal=temporal[i]))
            stages.append(layers)
        self.upsamples = _stages(stages, "upsamples", spec)
        self.head = _out(dims[-1], 3 * spec.pixel_patch**2)


class _Residual(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _Gamma(in_dim, 1, 1, 1), nn.SiLU(), _conv3(in_dim, out_dim),
            _Gamma(out_dim, 1, 1, 1), nn.SiLU(), nn.Dropout(), _conv3(out_dim, out_dim),
        )  # fmt: skip
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()


class _Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = _Gamma(dim, 1, 1)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)


class _Down(nn.Module):
    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if temporal:
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1))


class _Up(nn.Module):
    def __init__(self, dim: int, out_dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(dim, out_dim, 3))
        if temporal:
            self.time_conv = nn.Conv3d(dim, dim * 2, (3, 1, 1))


def _stages(stages: list[list[nn.Module]], name: str, spec: VaeSpec) -> nn.Sequential:
    """vae2_1.py has one list of layers; vae2_2.py a block for each stage, with a list of its own"""
    if spec.generation == "2.1":
        return nn.Sequential(*(layer for layers in stages for layer in layers))
    blocks = []
    for layers in stages:
        block = nn.Module()
        block.register_module(name, nn.Sequential(*layers))
        blocks.append(block)
    return nn.Sequential(*blocks)


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(_Residual(dim, dim), _Attention(dim), _Residual(dim, dim))


def _out(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(_Gamma(dim, 1, 1, 1), nn.SiLU(), _conv3(dim, out))


def _conv3(in_dim: int, out_dim: int) -> nn.Conv3d:
    return nn.Conv3d(in_dim, out_dim, 3)


def _mlp(in_dim: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, out))


def _bare(in_dim: int, out: int) -> nn.Linear:
    return nn.Linear(in_dim, out, bias=False)


class _Weight(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight: Tensor = nn.Parameter(empty_tensor(dim))


class _Gamma(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma: Tensor = nn.Parameter(empty_tensor(*shape))
