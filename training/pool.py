"""Latents of drawn clips, encoded ahead of the steps that train on them.

A pool of clips is encoded once and a part of it replaced all the time; captions are worded anew at
each visit. For a model that is given an image by channels (I2V), a part of the clips has the
latents of its first frame too.

Dims: B clips, C channels, T latent frames, H W latent sides, S text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training import shapes
from wanfit.engine.condition import image_channels
from wanfit.engine.models.vae import Vae
from wanfit.geometry import geometry_of
from wanfit.specs import ModelSpec

EMPTY_CAPTIONS = 0.1  # share of captions dropped, for classifier-free guidance
FRESH_CLIPS = 64  # drawn anew and encoded at a time
WITH_IMAGE = 0.5  # share of an I2V pool's clips whose first frame is encoded too


@dataclass(frozen=True, slots=True)
class View:
    """One kind of clip in the pool."""

    frames: int
    height: int  # px
    width: int  # px
    clips: int  # in the pool
    batch: int
    share: float  # of the steps

    def latent_shape(self, spec: ModelSpec) -> tuple[int, int, int, int]:
        return geometry_of(spec, self.width, self.height, self.frames).latent_shape


@dataclass(frozen=True, slots=True)
class Drawn:
    """A batch from a pool."""

    latents: Tensor  # [B, C, T, H, W]
    ids: Tensor  # [B, S]
    mask: Tensor  # [B, S]
    channels: Tensor | None  # [B, 4 + C, T, H, W] of I2V, zeros where no image is given


class Pool:
    """Latents and attributes of one view's clips, a part of them always being replaced."""

    def __init__(self, spec: ModelSpec, view: View, vae: Vae, generator: torch.Generator) -> None:
        self.view, self.vae, self.generator = view, vae, generator
        device, shape = generator.device, view.latent_shape(spec)
        self.latents = torch.empty(view.clips, *shape, device=device, dtype=torch.bfloat16)
        self.rows = torch.empty(view.clips, len(shapes.COLUMNS), device=device, dtype=torch.int16)
        with_image = int(WITH_IMAGE * view.clips) if spec.task == "i2v" else 0
        self.images = torch.empty(with_image, *shape, device=device, dtype=torch.bfloat16)
        self.next = 0
        for _ in range(0, view.clips, FRESH_CLIPS):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Replaces the oldest clips of the pool."""
        first = self.next
        last = min(first + FRESH_CLIPS, self.view.clips)
        rows = shapes.sample_attributes(last - first, self.generator)
        frames = shapes.render(rows, self.view.frames, self.view.height, self.view.width)
        frames = frames.contiguous(memory_format=torch.channels_last_3d)
        pictured = min(last, len(self.images)) - first
        with torch.autocast(frames.device.type, dtype=torch.bfloat16):
            self.latents[first:last] = self.vae.mean(frames, None, first=True)
            if pictured > 0:
                self.images[first : first + pictured] = image_latents(
                    self.vae, frames[:pictured, :, :1], self.view.frames
                )
        self.rows[first:last] = rows
        self.next = last % self.view.clips

    def draw(self, image_share: float = 0.0) -> Drawn:
        """A batch, some captions empty; `image_share` of an I2V pool's clips come with an image."""
        device, batch = self.latents.device, self.view.batch
        pick = torch.randint(self.view.clips, (batch,), generator=self.generator, device=device)
        channels = None
        if len(self.images):
            given = torch.rand(batch, generator=self.generator, device=device) < image_share
            pick = torch.where(given, pick % len(self.images), pick)
            images = self.images[pick % len(self.images)]
            channels = image_channels(images, self.vae.spec.stride_frames)
            channels = channels * given[:, None, None, None, None]
        rows = self.rows[pick]
        ids, mask = shapes.tokenise_batch(rows, shapes.sample_wording(rows, self.generator))
        empty = torch.rand(batch, 1, generator=self.generator, device=device) < EMPTY_CAPTIONS
        return Drawn(self.latents[pick], *emptied(ids, mask, empty), channels)


def image_latents(vae: Vae, first: Tensor, frames: int) -> Tensor:
    """What I2V's encoder makes of first frames [B, 3, 1, H, W] px and grey ones after them."""
    return vae.mean(F.pad(first, (0, 0, 0, 0, 0, frames - 1)), None, first=True)


def emptied(ids: Tensor, mask: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """ids and mask [B, S] with the empty caption where `empty`, bool [B, 1]."""
    no_ids, no_mask = shapes.empty_captions(len(ids), ids.device)
    return torch.where(empty, no_ids, ids), torch.where(empty, no_mask, mask)
