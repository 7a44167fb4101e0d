"""What the autoencoder holds at true size, traced on meta tensors: bounds that must not rise.

`tests/plan/test_vae_bytes.py` holds the planner's sums to the same traces.
"""

from __future__ import annotations

import pytest
import torch

from tests.live_bytes import LiveBytes, allocated_bytes, to_meta
from wanfit.engine.models.causal import lay_out_weights
from wanfit.engine.models.vae import Vae
from wanfit.specs import VAE_21, VAE_22, VaeSpec

GIB = 1 << 30
FRAMES = 13  # by then all histories are full
VAES: dict[str, Vae] = {spec.generation: to_meta(Vae(spec)) for spec in (VAE_21, VAE_22)}
for vae in VAES.values():
    lay_out_weights(vae)  # else what is new counts as an activation


def latents_of(spec: VaeSpec, width: int, height: int, frames: int) -> torch.Tensor:
    stride = spec.stride_px
    shape = (1, spec.latent_channels, (frames + 3) // 4, height // stride, width // stride)
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("generation", "width", "height", "decode_gib", "encode_gib"),
    [
        # Before frames went through one at a time: 16.7 and 13.5, 7.2 and 5.9, 12.9 and 5.8.
        ("2.1", 1280, 720, 9.9, 6.65),
        ("2.1", 832, 480, 4.29, 2.88),
        ("2.2", 1280, 704, 8.1, 2.78),
    ],
)
def test_peaks_without_weights(
    generation: str, width: int, height: int, decode_gib: float, encode_gib: float
) -> None:
    vae = VAES[generation]
    with torch.inference_mode(), LiveBytes("meta") as live:
        for chunk in vae.decode(latents_of(vae.spec, width, height, FRAMES)):
            del chunk
    assert live.peak_bytes <= decode_gib * GIB, live.table()
    with torch.inference_mode(), LiveBytes("meta") as live:
        vae.encode(torch.zeros(()).expand(1, 3, FRAMES, height, width))
    assert live.peak_bytes <= encode_gib * GIB, live.table()


@pytest.mark.parametrize("generation", list(VAES))
def test_a_longer_clip_takes_no_more(generation: str) -> None:
    """But for its latents, twice: as they came and denormalised."""
    vae, peaks, sizes = VAES[generation], [], []
    for frames in (FRAMES, FRAMES + 16):
        latents = latents_of(vae.spec, 320, 192, frames)
        with torch.inference_mode(), LiveBytes("meta") as live:
            live.add(latents)
            for chunk in vae.decode(latents):
                del chunk
        peaks.append(live.peak_bytes)
        sizes.append(allocated_bytes(latents.nbytes))
    assert peaks[1] - peaks[0] == 2 * (sizes[1] - sizes[0])


@pytest.mark.parametrize("generation", list(VAES))
def test_stopping_in_the_middle_lets_go_of_everything(generation: str) -> None:
    vae = VAES[generation]
    with torch.inference_mode(), LiveBytes("meta") as live:
        frames = vae.decode(latents_of(vae.spec, 160, 96, FRAMES))
        next(frames)
        next(frames)
        assert live.current_bytes > 0
        del frames
        assert live.current_bytes == 0


def test_tiles_hold_the_device_down() -> None:
    """256 px are a fourteenth of a 720p picture, and take less than a tenth of its bytes."""
    vae = VAES["2.1"]
    with torch.inference_mode(), LiveBytes("meta") as live:
        steps = vae.decode_tiles(latents_of(vae.spec, 512, 256, FRAMES), 256)
        assert sum(step is not None for step in steps) == 1  # one row of tiles, one band
    assert live.peak_bytes < 0.8 * GIB, live.table()
