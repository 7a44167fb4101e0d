"""Which noise levels a network trains on: all of them, or one expert's own.

Dims: B clips, C channels, T latent frames, H W latent sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wanfit.specs import Expert, ModelSpec

# Of the levels of two experts, drawn as sampling visits them: the steps near pure noise, which
# decide what a clip shows, have next to none of a normal distribution's draws.
EVEN_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class NoiseRange:
    """Levels from `low` to `high`, drawn logit-normal (Esser et al. 2024), then shifted."""

    shift: float  # moves the levels towards noise, as sampling does
    low: float = 0.0
    high: float = 1.0
    even_share: float = 0.0  # drawn evenly before the shift instead

    def draw(
        self, count: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sigmas [B]."""
        chance, kind = torch.rand(2, count, device=device, generator=generator)
        first, last = self._unshifted(self.low), self._unshifted(self.high)
        # The part of a normal distribution between the two ends, by the inverse of its integral.
        below, above = _normal_integral(first), _normal_integral(last)
        peaked = torch.special.ndtri(below + (above - below) * chance).sigmoid()
        even = first + (last - first) * chance
        u = torch.where(kind < self.even_share, even, peaked)
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        return sigma.clamp(self.low, self.high)  # rounding

    def _unshifted(self, sigma: float) -> float:
        return sigma / (self.shift - (self.shift - 1) * sigma)


def noise_of(spec: ModelSpec, expert: Expert | None = None) -> NoiseRange:
    """The levels of one expert; None: of a network that stands for all experts."""
    shift = spec.sampling.shift
    if spec.boundary is None:
        return NoiseRange(shift)
    low = spec.boundary if expert == "high_noise" else 0.0
    high = spec.boundary if expert == "low_noise" else 1.0
    return NoiseRange(shift, low, high, EVEN_SHARE)


def noised(
    clean: Tensor, noise: Tensor, sigma: Tensor, from_image: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy latents [B, C, T, H, W] and the sigma of each latent frame [B, T].

    sigma: [B]. from_image: bool [B], where the first latent frame is given and stays clean.
    """
    levels = sigma[:, None].expand(-1, clean.shape[2]).clone()
    levels[:, 0] = levels[:, 0] * ~from_image
    s = levels[:, None, :, None, None]
    return (1 - s) * clean + s * noise, levels


def _normal_integral(u: float) -> float:
    """The share of a normal distribution's draws whose sigmoid is below u."""
    if u in (0.0, 1.0):
        return u
    return 0.5 * (1 + math.erf(math.log(u / (1 - u)) / math.sqrt(2)))
