"""A quick look at a model in training: batches of held-out prompts, sampled and analysed.

`benchmarks/demo_quality.py` is the measurement, one clip at a time through the whole engine; this
one is for the log of a training run. Euler steps, captions and combinations never trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from training import shapes
from training.analyser import ClipScore, analyse, expected, score
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.schedule import make_schedule
from wanfit.geometry import geometry_of
from wanfit.specs import DEMO, TEXT_TOKENS

STEPS = 20
SHIFT = 3.0


@torch.no_grad()
def evaluate(
    dit: Dit, umt5: Umt5, vae: Vae, device: torch.device, count: int = 128
) -> Iterator[str]:
    """Yields a line for each kind of prompt and guidance."""

    def embed(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return embed_text(umt5, ids, mask)

    for guidance in (1.0, 3.0, 5.0):
        yield _line(f"one object, guidance {guidance}", dit, vae, embed, device, count, guidance, 0)
    yield _line("two objects, guidance 3.0", dit, vae, embed, device, count, 3.0, 1)
    yield _line("from image, guidance 3.0", dit, vae, embed, device, count, 3.0, 0, from_image=True)


Embedder = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def embed_text(umt5: Umt5, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Text embeddings [B, S + 1, D] and the bias [S + 1] for the transformer.

    The networks were made for 512 rows, zero where there is no token. All zero rows weigh the same
    in the attention, so one of them with a bias of ln(count) stands for those beyond S: the result
    is the same to rounding (tests/training/test_train_dit.py).
    """
    rows = umt5(ids, mask) * mask[..., None]
    rows = nn.functional.pad(rows, (0, 0, 0, 1))
    bias = torch.zeros(rows.shape[1], device=ids.device)
    bias[-1] = math.log(TEXT_TOKENS - ids.shape[1])
    return rows, bias


def _line(
    title: str,
    dit: Dit,
    vae: Vae,
    embed: Embedder,
    device: torch.device,
    count: int,
    guidance: float,
    two_objects: float,
    from_image: bool = False,
) -> str:
    generator = torch.Generator(device).manual_seed(1234)
    rows = shapes.sample_attributes(count, generator, "held_out", two_objects)
    wording = shapes.sample_wording(rows, generator, "held_out")
    texts = [
        embed(*shapes.tokenise_batch(rows, wording)),
        embed(*shapes.empty_captions(count, device)),
    ]
    first = None
    if from_image:
        images = shapes.render(rows)[:, :, :1]
        first = vae.moments(images, None, first=True).chunk(2, dim=1)[0]
    latents = sample(dit, texts, generator, count, guidance, first)
    scores = []
    for part, part_rows, part_wording in zip(
        latents.split(16), rows.split(16), wording.split(16), strict=True
    ):
        frames = vae.pixels(part, None, first=True).clamp(-1, 1).float().cpu()
        named = shapes.sizes_named(part_wording).cpu()
        for clip, row, said in zip(frames, part_rows.cpu(), named, strict=True):
            asked = expected(row)
            scores.append(score(analyse(clip), asked, tuple(said.tolist())))
    return f"{title}: {summary(scores)}"


def sample(
    dit: Dit,
    texts: list[tuple[Tensor, Tensor]],
    generator: torch.Generator,
    count: int,
    guidance: float,
    first: Tensor | None,
) -> Tensor:
    """Latents [B, C, T, H, W] of default-sized clips; `texts` are those of cond and uncond."""
    device = generator.device
    geometry = geometry_of(DEMO, *DEMO.presets[0], DEMO.sampling.num_frames)
    schedule = make_schedule("euler", STEPS, SHIFT)
    x = torch.randn(count, *geometry.latent_shape, generator=generator, device=device)
    for sigma, following in zip(schedule.sigmas, schedule.sigmas[1:], strict=False):
        times = torch.full((count, x.shape[2]), 1000 * sigma, device=device)
        if first is not None:
            x[:, :, :1], times[:, 0] = first, 0
        with torch.autocast(device.type, dtype=torch.bfloat16):
            cond, uncond = (dit(x, times, *text) for text in texts)
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
