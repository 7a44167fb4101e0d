"""What an image adds to the denoising: I2V-A14B's extra channels, or TI2V's given first frame.

The two models resize differently, and so do we (official: image2video.py, textimage2video.py).

Dims: C latent channels, F pixel frames, T latent frames, H W sides in pixels or latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from wanfit.engine.models.vae import Vae
from wanfit.geometry import Geometry
from wanfit.specs import ModelSpec, Task


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """At most one of the two is set; text to video has neither."""

    channels: Tensor | None = None  # I2V: [1, 4 + C, T, H, W] fp32, joined to the noisy latents
    first_frame: Tensor | None = None  # TI2V: [1, C, 1, H, W] fp32, the clean latents of frame 0


def prepare_image(image: Image.Image, task: Task, width: int, height: int) -> Tensor:
    """The image as the VAE reads it: fp32 [3, H, W] on the CPU, about [-1, 1].

    I2V stretches the whole image by bicubic interpolation without antialiasing, whose overshoot
    stays. TI2V covers the clip's size by Lanczos on 8 bits and cuts the middle out.
    """
    image = image.convert("RGB")
    if task == "i2v":
        pixels = _to_tensor(image).unsqueeze(0)
        stretched = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False)
        return stretched.squeeze(0)
    return _to_tensor(_cover(image, width, height))


def condition_on(
    image: Tensor, task: Task, geometry: Geometry, vae: Vae, tile_px: int | None = None
) -> Condition:
    """The condition from a prepared image [3, H, W], on the device of the VAE.

    The image may lie on the host: the clip made of it goes to the device a few frames at a time.
    tile_px: side of the squares that the encoder sees at a time; None: whole frames.
    """
    frame = image[None, :, None]  # [1, 3, 1, H, W]
    if task == "ti2v":
        return Condition(first_frame=vae.encode(frame, tile_px=tile_px))
    latents = vae.encode(_grey_after(frame, geometry.num_frames), tile_px=tile_px)
    return Condition(channels=image_channels(latents, vae.spec.stride_frames))


def image_channels(latents: Tensor, stride_frames: int) -> Tensor:
    """I2V's channels [B, 4 + C, T, H, W] from the latents of clips that begin with an image.

    One channel for each pixel frame of a latent frame, 1 where the frame is given. The first latent
    frame stands for one pixel frame, counted four times.
    """
    given = latents.new_zeros(latents.shape[0], stride_frames, *latents.shape[2:])
    given[:, :, 0] = 1
    return torch.cat([given, latents], dim=1)


def _grey_after(frame: Tensor, num_frames: int) -> Tensor:
    """A clip [1, 3, F, H, W] of the frame and grey ones, on the frame's device.

    Grey is zero: mid grey in pixels, not black, and not zero latents. On the host numpy asks the
    kernel for its zeros, which takes no memory for pages that are only read.
    """
    shape = (*frame.shape[:2], num_frames, *frame.shape[3:])
    on_host = frame.device.type == "cpu"
    clip = torch.from_numpy(np.zeros(shape, np.float32)) if on_host else frame.new_zeros(shape)
    clip[:, :, :1] = frame
    return clip


def check_channels(spec: ModelSpec) -> None:
    """Holds that the transformer takes what `condition_on` and the noise make together."""
    latent = spec.vae.latent_channels
    extra = spec.vae.stride_frames + latent if spec.task == "i2v" else 0
    assert spec.dit.in_channels == latent + extra, (spec.name, spec.dit.in_channels, latent, extra)


def _to_tensor(image: Image.Image) -> Tensor:
    """fp32 [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels.float() / 255 - 0.5) / 0.5


def _cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest middle part of the image that has the clip's shape, at the clip's size."""
    scale = max(width / image.width, height / image.height)
    # round() takes halves to the even side, as official.
    covering = (round(image.width * scale), round(image.height * scale))
    resized = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return resized.crop((left, top, left + width, top + height))
