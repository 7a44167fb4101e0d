"""The story of one clip: text -> image -> denoise -> decode.

A generator of events. Progress, cancellation, metering and writing belong to the caller: it may
stop asking at any event, and everything is let go. Each network is loaded for its stage and
released after it, so the largest one, not their sum, is what has to fit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import torch
from PIL import Image

from wanfit.engine.condition import Condition, check_channels, condition_on, prepare_image
from wanfit.engine.decode import decode
from wanfit.engine.denoise import TextPair, denoise, draw_noise, needs_uncond
from wanfit.engine.encode import encode_text
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.tokenizer import TextTokenizer, TokenizedText
from wanfit.events import Event, Notice, StageBegan
from wanfit.geometry import Geometry, geometry_of
from wanfit.request import ResolvedRequest
from wanfit.specs import TEXT_TOKENS, Expert

# official: vae2_1.py and vae2_2.py run in fp32 beside a bf16 transformer; bf16 costs visible detail
VAE_DTYPE = torch.float32


class Weights(Protocol):
    """Where networks come from. `ModelDirectory` is the one that there is."""

    def tokenizer(self) -> TextTokenizer: ...

    def load_umt5(self, device: torch.device, dtype: torch.dtype) -> Umt5: ...

    def load_dit(self, expert: Expert, device: torch.device, dtype: torch.dtype) -> Dit: ...

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> Vae: ...


# Around a generator torch turns the mode on while it runs and off at every yield, so the caller
# is never in it.
@torch.inference_mode()
def generate_frames(
    request: ResolvedRequest,
    weights: Weights,
    image: Image.Image | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Generator[Event, None, None]:
    """Yields the events of one clip, its frames among them (see `wanfit.events`).

    `image` goes with `request`: `resolve` checked that the model takes or needs one. `dtype` is
    that of the text encoder and the transformer. Raises WeightsError for files that break.
    """
    check_channels(request.spec)
    geometry = geometry_of(request.spec, request.width, request.height, request.num_frames)

    yield StageBegan("text", steps=None)
    texts = _tokenize(request, weights)
    yield from _notices(texts)
    text = _encode(texts, weights, device, dtype)

    condition = Condition()
    if image is not None:
        yield StageBegan("image", steps=None)
        condition = _condition(image, request, geometry, weights, device)

    yield StageBegan("denoise", steps=request.num_inference_steps)

    def load_dit(expert: Expert) -> Dit:
        _return_memory(device)  # of the network before, which nobody holds any more
        return weights.load_dit(expert, device, dtype)

    noise = draw_noise(geometry, request.seed).to(device)
    latents = yield from denoise(request, noise, text, condition, load_dit)
    _return_memory(device)

    yield StageBegan("decode", steps=geometry.latent_frames)
    yield from decode(weights.load_vae(device, VAE_DTYPE), latents)
    _return_memory(device)


def _tokenize(request: ResolvedRequest, weights: Weights) -> tuple[TokenizedText, ...]:
    """The prompt, and the negative prompt where it has a use."""
    prompts = (request.prompt, request.negative_prompt)
    tokenizer = weights.tokenizer()
    return tuple(tokenizer.encode(prompt) for prompt in prompts[: 1 + needs_uncond(request)])


def _notices(texts: Sequence[TokenizedText]) -> Iterator[Notice]:
    words = tuple(dict.fromkeys(word for text in texts for word in text.unknown_words))
    if words:
        yield Notice(f"The model does not know: {', '.join(words)}")
    dropped = max(text.num_dropped for text in texts)
    if dropped:
        yield Notice(f"The model reads {TEXT_TOKENS} tokens; the last {dropped} are left out")


def _encode(
    texts: Sequence[TokenizedText], weights: Weights, device: torch.device, dtype: torch.dtype
) -> TextPair:
    umt5 = weights.load_umt5(device, dtype)
    cond, *uncond = (encode_text(umt5, text, device) for text in texts)
    return TextPair(cond, uncond[0] if uncond else None)


def _condition(
    image: Image.Image,
    request: ResolvedRequest,
    geometry: Geometry,
    weights: Weights,
    device: torch.device,
) -> Condition:
    pixels = prepare_image(image, request.spec.task, request.width, request.height).to(device)
    _return_memory(device)
    return condition_on(pixels, request.spec.task, geometry, weights.load_vae(device, VAE_DTYPE))


def _return_memory(device: torch.device) -> None:
    """Gives a released network's memory back to the device: torch would keep it for itself."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
