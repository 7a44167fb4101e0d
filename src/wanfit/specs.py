"""What each model is: network dimensions, strides, and the sampling that its authors use.

One frozen record per model, read by the networks, the geometry and (later) the planner alike, so
that a formula for bytes and the code that allocates them cannot disagree. Sources: "official" is
Wan-Video/Wan2.2 at 42bf4cf; "computed" is arithmetic on its tensors.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from wanfit.errors import UnknownModel

Task = Literal["t2v", "i2v", "ti2v"]
Solver = Literal["unipc", "dpm++", "euler"]
Expert = Literal["high_noise", "low_noise"]

NUM_TRAIN_TIMESTEPS = 1000  # official: wan/configs/shared_config.py
TEXT_TOKENS = 512  # official: shared_config.py text_len; shorter prompts are padded with zeros
ROPE_POSITIONS = 1024  # official: model.py, rope_params(1024, ...): positions per axis


@dataclass(frozen=True, slots=True)
class DitSpec:
    """Dimensions of one diffusion transformer (an A14B model has two of them)."""

    in_channels: int  # channels of the input, conditioning included
    out_channels: int  # channels of the velocity
    num_heads: int
    num_blocks: int
    ffn_width: int
    head_dim: int = 128
    text_width: int = 4096  # width of the text embeddings that it reads
    sinusoid_width: int = 256  # official: freq_dim
    patch: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows and columns per token
    eps: float = 1e-6

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class VaeSpec:
    """Dimensions and latent statistics of one causal video autoencoder."""

    generation: Literal["2.1", "2.2"]  # 2.2 adds parameter-free shortcuts around each stage
    latent_channels: int
    encoder_width: int  # official: dim
    decoder_width: int  # official: dec_dim
    pixel_patch: int  # side of the pixel square folded into channels before the encoder
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2  # per encoder stage; a decoder stage has one more
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # official: temperal_downsample

    @property
    def stride_px(self) -> int:
        """Pixels per latent row and column: 8 for VAE 2.1, 16 for VAE 2.2."""
        return self.pixel_patch << (len(self.width_multipliers) - 1)

    @property
    def stride_frames(self) -> int:
        """Pixel frames per latent frame after the first: 4 for every Wan VAE."""
        return 1 << sum(self.temporal_downsample)


@dataclass(frozen=True, slots=True)
class Umt5Spec:
    """Dimensions of the UMT5 text encoder."""

    vocab_size: int = 256_384
    width: int = 4096
    num_heads: int = 64
    head_dim: int = 64
    ffn_width: int = 10_240
    num_blocks: int = 24
    relative_buckets: int = 32
    relative_max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request gets when it says nothing. Dense models have two equal guidances."""

    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    shift: float
    guidance_high: float
    guidance_low: float
    negative_prompt: str
    solver: Solver = "unipc"  # official: generate.py --sample_solver


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything that is fixed about one model."""

    name: str
    summary: str
    task: Task
    dit: DitSpec
    vae: VaeSpec
    umt5: Umt5Spec
    sampling: Sampling
    boundary: float | None  # high-noise expert while timestep >= boundary * 1000; None: one expert
    presets: tuple[tuple[int, int], ...]  # (width, height) that the authors trained for

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The transformers of this model, in the order in which sampling uses them."""
        return ("high_noise",) if self.boundary is None else ("high_noise", "low_noise")

    @property
    def takes_image(self) -> bool:
        return self.task in ("i2v", "ti2v")

    @property
    def needs_image(self) -> bool:
        return self.task == "i2v"

    @property
    def grid_px(self) -> int:
        """Width and height are multiples of this: VAE stride times transformer patch."""
        return self.vae.stride_px * self.dit.patch[1]


# official: wan/modules/vae2_1.py, Wan2_1_VAE
_VAE21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_VAE21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# official: wan/modules/vae2_2.py, Wan2_2_VAE
_VAE22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_VAE22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

# official: shared_config.py, sample_neg_prompt; used by all three models when none is given
OFFICIAL_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"  # noqa: RUF001
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"  # noqa: RUF001
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)

VAE_21 = VaeSpec(
    generation="2.1",
    latent_channels=16,
    encoder_width=96,  # official: vae2_1.py, _video_vae
    decoder_width=96,
    pixel_patch=1,
    latents_mean=_VAE21_MEAN,
    latents_std=_VAE21_STD,
)
VAE_22 = VaeSpec(
    generation="2.2",
    latent_channels=48,
    encoder_width=160,  # official: vae2_2.py, Wan2_2_VAE c_dim
    decoder_width=256,  # official: vae2_2.py, WanVAE_ default dec_dim, never passed by the wrapper
    pixel_patch=2,
    latents_mean=_VAE22_MEAN,
    latents_std=_VAE22_STD,
)
UMT5_XXL = Umt5Spec()  # official: wan/modules/t5.py, umt5_xxl

TI2V_5B = ModelSpec(
    name="ti2v-5b",
    summary="Wan 2.2 TI2V-5B: text or image to video, 1280x704 at 24 fps",
    task="ti2v",
    dit=DitSpec(  # official: wan/configs/wan_ti2v_5B.py
        in_channels=48, out_channels=48, num_heads=24, num_blocks=30, ffn_width=14_336
    ),
    vae=VAE_22,
    umt5=UMT5_XXL,
    sampling=Sampling(  # official: wan_ti2v_5B.py; size from SUPPORTED_SIZES
        width=1280,
        height=704,
        num_frames=121,
        fps=24,
        num_inference_steps=50,
        shift=5.0,
        guidance_high=5.0,
        guidance_low=5.0,
        negative_prompt=OFFICIAL_NEGATIVE_PROMPT,
    ),
    boundary=None,
    presets=((1280, 704), (704, 1280)),
)

T2V_A14B = ModelSpec(
    name="t2v-a14b",
    summary="Wan 2.2 T2V-A14B: text to video, 1280x720 or 832x480 at 16 fps, two experts",
    task="t2v",
    dit=DitSpec(  # official: wan/configs/wan_t2v_A14B.py
        in_channels=16, out_channels=16, num_heads=40, num_blocks=40, ffn_width=13_824
    ),
    vae=VAE_21,
    umt5=UMT5_XXL,
    sampling=Sampling(  # official: wan_t2v_A14B.py; its guidance tuple (3.0, 4.0) is (low, high)
        width=1280,
        height=720,
        num_frames=81,
        fps=16,
        num_inference_steps=40,
        shift=12.0,
        guidance_high=4.0,
        guidance_low=3.0,
        negative_prompt=OFFICIAL_NEGATIVE_PROMPT,
    ),
    boundary=0.875,
    presets=((1280, 720), (720, 1280), (832, 480), (480, 832)),
)

I2V_A14B = ModelSpec(
    name="i2v-a14b",
    summary="Wan 2.2 I2V-A14B: image to video, 1280x720 or 832x480 at 16 fps, two experts",
    task="i2v",
    dit=DitSpec(  # official: wan/configs/wan_i2v_A14B.py; 36 = 16 noise + 4 mask + 16 image latent
        in_channels=36, out_channels=16, num_heads=40, num_blocks=40, ffn_width=13_824
    ),
    vae=VAE_21,
    umt5=UMT5_XXL,
    sampling=Sampling(  # official: wan_i2v_A14B.py
        width=1280,
        height=720,
        num_frames=81,
        fps=16,
        num_inference_steps=40,
        shift=5.0,
        guidance_high=3.5,
        guidance_low=3.5,
        negative_prompt=OFFICIAL_NEGATIVE_PROMPT,
    ),
    boundary=0.900,
    presets=((1280, 720), (720, 1280), (832, 480), (480, 832)),
)

# The demo: TI2V-5B's architecture, small enough to ship inside the package and to run on a laptop.
# Ours (training/README.md): every dimension is chosen for 40 MB of bf16 weights.
DEMO = ModelSpec(
    name="demo",
    summary="A small TI2V of the same architecture: coloured shapes that move, 128x128 at 16 fps",
    task="ti2v",
    dit=DitSpec(
        in_channels=48,
        out_channels=48,
        num_heads=4,
        head_dim=64,
        num_blocks=8,
        ffn_width=1024,
        text_width=192,
    ),
    vae=VaeSpec(
        generation="2.2",
        latent_channels=48,
        encoder_width=24,
        decoder_width=32,
        pixel_patch=2,
        latents_mean=(0.0,) * 48,  # training normalises: folded into the VAE's 1x1x1 convolutions
        latents_std=(1.0,) * 48,
        res_blocks=1,
    ),
    umt5=Umt5Spec(vocab_size=128, width=192, num_heads=4, head_dim=48, ffn_width=384, num_blocks=3),
    sampling=Sampling(
        width=128,
        height=128,
        num_frames=17,
        fps=16,
        num_inference_steps=20,
        shift=3.0,
        guidance_high=3.0,
        guidance_low=3.0,
        negative_prompt="",
    ),
    boundary=None,
    presets=((128, 128), (160, 96), (96, 160)),
)

# The A14B models' architecture in small: two experts, VAE 2.1, and for images 36 input channels.
# Ours (training/README.md): four experts and the VAE are 47 MB of bf16 weights. The text encoder
# is the demo's own, as one UMT5 serves all official models.
DEMO_T2V = ModelSpec(
    name="demo-t2v",
    summary="A small T2V of A14B's architecture, two experts: coloured shapes, 128x128 at 16 fps",
    task="t2v",
    dit=DitSpec(
        in_channels=16,
        out_channels=16,
        num_heads=3,
        head_dim=64,
        num_blocks=7,
        ffn_width=768,
        text_width=DEMO.umt5.width,
    ),
    vae=VaeSpec(
        generation="2.1",
        latent_channels=16,
        encoder_width=16,
        decoder_width=24,
        pixel_patch=1,
        latents_mean=(0.0,) * 16,  # training normalises, as for the demo
        latents_std=(1.0,) * 16,
        res_blocks=1,
    ),
    umt5=DEMO.umt5,
    # A14B's own shift of 12 is made for 81 frames of 720p; with 20 steps its last one would begin
    # at sigma 0.39. Shift 5, I2V-A14B's, gives each expert its share: 8 steps of 20 are high noise.
    sampling=replace(DEMO.sampling, shift=5.0),
    boundary=T2V_A14B.boundary,
    presets=DEMO.presets,
)

DEMO_I2V = replace(
    DEMO_T2V,
    name="demo-i2v",
    summary="A small I2V of A14B's architecture, two experts: coloured shapes, 128x128 at 16 fps",
    task="i2v",
    dit=replace(DEMO_T2V.dit, in_channels=36),  # 16 noise + 4 mask + 16 image latent
    boundary=I2V_A14B.boundary,
)

# Every model that can be asked for by name. demo-t2v and demo-i2v join them with their weights.
MODELS: tuple[ModelSpec, ...] = (DEMO, TI2V_5B, T2V_A14B, I2V_A14B)


def spec_named(name: str) -> ModelSpec:
    """The model of that name, in any case and with the official task names' spelling.

    Raises UnknownModel, naming the closest one.
    """
    by_name = {spec.name: spec for spec in MODELS}
    wanted = name.strip().lower()
    found = by_name.get(wanted)
    if found is None:
        longer = [known for known in by_name if known.startswith(wanted)]
        close = longer or difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.0)
        raise UnknownModel(
            f"There is no model {name!r}",
            hint=f"Did you mean {close[0]!r}? Known: {', '.join(by_name)}",
        )
    return found
