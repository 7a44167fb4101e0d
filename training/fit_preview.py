"""Fits how the demo's latents look to clips of its world, and puts the map beside its autoencoder.

    python -m training.fit_preview

Takes about a minute on two cores, and needs doing again only when the autoencoder is trained again.
For other models `wanfit` fits a map to plain colours by itself (`engine/preview.py`); one fitted to
what a model really shows is a little better, and is there at once. Prints how near previews of
clips of the held-out split come to the averaged clips, in both ways.

Dims: B clips, C channels, T latent frames, F pixel frames, H W sides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training import shapes
from wanfit.engine.models.vae import Vae
from wanfit.engine.preview import (
    Colours,
    average_colours,
    fit_colours,
    fit_to,
    preview,
    write_colours,
)
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.units import loaded_vae
from wanfit.service import DEMO_DIRECTORY
from wanfit.specs import DEMO

BATCHES, CLIPS = 10, 10
FRAMES, SIDE_PX = 17, 128


def batch(seed: int, split: shapes.Split) -> Tensor:
    """Clips of the demo's world, fp32 [B, 3, F, H, W] in [-1, 1]."""
    rows = shapes.sample_attributes(CLIPS, torch.Generator().manual_seed(seed), split)
    return shapes.render(rows, FRAMES, SIDE_PX, SIDE_PX)


def psnr_db(vae: Vae, colours: Colours, clips: Tensor) -> float:
    """Of previews of the middle of clips, against the clips, averaged per cell of the latents."""
    latents, wanted = vae.encode(clips), average_colours(clips, vae.spec)
    middle = latents.shape[2] // 2
    total = 0.0
    for i in range(len(clips)):
        seen = torch.from_numpy(preview(latents[i : i + 1, :, : middle + 1], colours)).float()
        target = (wanted[i, :, middle].permute(1, 2, 0) + 1) * 127.5
        total += (seen - target).square().mean().item()
    return -10 * math.log10(total / len(clips) / 255**2)


@torch.inference_mode()
def main() -> None:
    depot = Depot(torch.device("cpu"))
    vae = loaded_vae(open_model(DEMO_DIRECTORY, DEMO), depot, torch.float32)
    colours = fit_to(vae, (batch(seed, "train") for seed in range(BATCHES)))
    held_out = batch(BATCHES, "held_out")
    print(f"fitted to clips of shapes: {psnr_db(vae, colours, held_out):.1f} dB")
    print(f"fitted to gliding colours: {psnr_db(vae, fit_colours(vae), held_out):.1f} dB")
    write_colours(DEMO_DIRECTORY / "vae", colours)


if __name__ == "__main__":
    main()
