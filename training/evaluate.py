"""A quick look at a model in training: batches of held-out prompts, sampled and analysed.

`benchmarks/demo_quality.py` is the measurement, one clip at a time through the whole engine; this
one is for the log of a training run. Euler steps, captions and combinations never trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from training import shapes
from training.analyser import ClipScore, analyse, expected, score
from training.pool import image_latents
from wanfit.engine.condition import image_channels
from wanfit.engine.denoise import expert_at
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.schedule import make_schedule
from wanfit.geometry import geometry_of
from wanfit.specs import TEXT_TOKENS, Expert, ModelSpec


@dataclass(frozen=True, slots=True)
class Trial:
    """One kind of prompt and guidance."""

    title: str
    guidance: float = 3.0
    two_objects: float = 0.0
    from_image: bool = False


FROM_TEXT = (
    Trial("one object, guidance 1", guidance=1.0),
    Trial("one object, guidance 3"),
    Trial("one object, guidance 5", guidance=5.0),
    Trial("two objects, guidance 3", two_objects=1.0),
)
FROM_IMAGE = (Trial("from an image, guidance 3", from_image=True),)
ALL_TRIALS = (*FROM_TEXT, *FROM_IMAGE)


@dataclass(frozen=True, slots=True)
class Networks:
    """A model in training."""

    spec: ModelSpec
    dits: Mapping[Expert, Dit]
    umt5: Umt5
    vae: Vae


@torch.no_grad()
def evaluate(networks: Networks, trial: Trial, count: int) -> str:
    """A line about `count` clips of one kind."""
    spec, vae = networks.spec, networks.vae
    device = vae.to_moments.weight.device
    generator = torch.Generator(device).manual_seed(1234)
    rows = shapes.sample_attributes(count, generator, "held_out", trial.two_objects)
    wording = shapes.sample_wording(rows, generator, "held_out")
    texts = [
        embed_text(networks.umt5, *tokens)
        for tokens in (
            shapes.tokenise_batch(rows, wording),
            shapes.empty_captions(count, device),
        )
    ]
    given = None
    if trial.from_image:
        width, height = spec.presets[0]
        images = shapes.render(rows, spec.sampling.num_frames, height, width)[:, :, :1]
        given = condition(networks, images)
    latents = sample(networks, texts, generator, trial.guidance, given)
    return f"{trial.title}: {summary(judge(vae, latents, rows, wording))}"


def condition(networks: Networks, images: Tensor) -> Tensor:
    """What first frames [B, 3, 1, H, W] px become: TI2V's latent frame, or I2V's channels."""
    spec, vae = networks.spec, networks.vae
    if spec.task == "ti2v":
        return vae.mean(images, None, first=True)
    frames = spec.sampling.num_frames
    parts = [image_latents(vae, part, frames) for part in images.split(16)]
    return image_channels(torch.cat(parts), spec.vae.stride_frames)


def judge(vae: Vae, latents: Tensor, rows: Tensor, wording: Tensor) -> list[ClipScore]:
    """Decodes and scores clips against what was asked for."""
    scores = []
    named = shapes.sizes_named(wording).cpu()
    asked = [expected(row) for row in rows.cpu()]
    clips = torch.cat([vae.pixels(part, None, first=True).cpu() for part in latents.split(16)])
    for clip, want, said in zip(clips.clamp(-1, 1), asked, named, strict=True):
        scores.append(score(analyse(clip), want, tuple(said.tolist())))
    return scores


def embed_text(umt5: Umt5, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Text embeddings [B, S + 1, D] and the bias [S + 1] for the transformer.

    The networks were made for 512 rows, zero where there is no token. All zero rows weigh the same
    in the attention, so one of them with a bias of ln(count) stands for those beyond S: the result
    is the same to rounding (tests/training/test_train.py).
    """
    rows = umt5(ids, mask) * mask[..., None]
    rows = nn.functional.pad(rows, (0, 0, 0, 1))
    bias = torch.zeros(rows.shape[1], device=ids.device)
    bias[-1:].fill_(math.log(TEXT_TOKENS - ids.shape[1]))
    return rows, bias


def sample(
    networks: Networks,
    texts: Sequence[tuple[Tensor, Tensor]],
    generator: torch.Generator,
    guidance: float,
    given: Tensor | None,
) -> Tensor:
    """Latents [B, C, T, H, W] of default-sized clips; `texts` are those of cond and uncond.

    given: what `condition` makes of an image.
    """
    spec, device, count = networks.spec, generator.device, len(texts[0][0])
    geometry = geometry_of(spec, *spec.presets[0], spec.sampling.num_frames)
    schedule = make_schedule("euler", spec.sampling.num_inference_steps, spec.sampling.shift)
    x = torch.randn(count, *geometry.latent_shape, generator=generator, device=device)
    first = given if spec.task == "ti2v" else None
    channels = given if spec.task == "i2v" else None
    for sigma, following in pairwise(schedule.sigmas):
        dit = networks.dits[expert_at(spec.boundary, 1000 * sigma)]
        times = torch.full((count,), 1000 * sigma, device=device)
        if first is not None:
            x[:, :, :1] = first
            times = times[:, None].repeat(1, x.shape[2])
            times[:, 0] = 0
        read = x if channels is None else torch.cat([x, channels], dim=1)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            cond, uncond = (dit(read, times, *text) for text in texts)
        x = x + (following - sigma) * (uncond + guidance * (cond - uncond))
    if first is not None:
        x[:, :, :1] = first
    return x


def summary(scores: list[ClipScore]) -> str:
    """Shares in percent, over clips or objects."""
    objects = [o for s in scores for o in s.objects]
    sizes = [o.size for o in objects if o.size is not None]
    motions = [o.motion for o in objects if o.motion is not None]
    shares = {
        "background": [s.background for s in scores],
        "colour": [o.color for o in objects],
        "shape": [o.shape for o in objects],
        "size": sizes,
        "motion": motions,
        "exchanged": [s.exchanged for s in scores],
        "all right": [s.background and all(o.right for o in s.objects) for s in scores],
    }
    return ", ".join(f"{k} {100 * sum(v) / max(1, len(v)):.1f}" for k, v in shares.items())
