"""The planner's formulas for activations against the real code, traced on meta tensors.

Networks have one block (each uses the same buffers again) and true widths, sizes and cuts.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.live_bytes import LiveBytes
from wanfit.engine.condition import Condition
from wanfit.engine.denoise import TextPair, denoise
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.dit_rows import Workspace
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.weights.layout import TORCH_DTYPES, network_layouts, split_name
from wanfit.plan.bytes import (
    Shape,
    denoise_activations,
    heads_at_a_time,
    shape_of,
    text_activations,
)
from wanfit.plan.plan import Cuts, Precision
from wanfit.request import VideoRequest, resolve
from wanfit.specs import MODELS, TEXT_TOKENS, Expert, ModelSpec, spec_named

META = torch.device("meta")
OVER, UNDER = 0.01, 0.01  # issue 4 allows 5 % over; the rest of that is for what a GPU adds
SMALL_BYTES = 4 << 20  # nobody plans for less
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def shape(
    model: str, size: str, frames: int, precision: Precision, *, image: bool, guidance: float
) -> Shape:
    wanted = VideoRequest.parse(
        {"prompt": "", "model": model, "size": size, "num_frames": frames, "steps": 5,
         "shift": 12.0, "guidance": guidance}
    )  # fmt: skip
    pixels = tuple(int(side) for side in size.split("x"))
    request = resolve(wanted, image_size=(pixels[0], pixels[1]) if image else None)
    return shape_of(request, precision, with_image=image)


def meta_dit(spec: ModelSpec, precision: Precision) -> Dit:
    """One block of the transformer on the meta device, in the dtypes of the layout."""
    with META:
        dit = Dit(dataclasses.replace(spec.dit, num_blocks=1))
    for unit, layout in network_layouts(dit, precision).items():
        for place in layout.places:
            inner = place.name if unit == "rest" else f"{unit}.{place.name}"
            tensor = torch.empty(place.shape, dtype=TORCH_DTYPES[place.dtype], device=META)
            owner, _, name = inner.rpartition(".")
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            dit.get_submodule(owner).register_parameter(name, parameter)
    assert all(split_name(name) for name, _ in dit.named_parameters())
    return dit


def traced_denoise(made: Shape, cuts: Cuts) -> int:
    """The most bytes that the real denoise stage holds, weights aside."""
    request = made.request
    spec = dataclasses.replace(
        request.spec, dit=dataclasses.replace(request.spec.dit, num_blocks=1)
    )
    request = dataclasses.replace(request, spec=spec)
    dtype = DTYPES[made.precision]
    dits: dict[Expert, Dit] = {
        expert: meta_dit(request.spec, made.precision) for expert in spec.experts
    }
    with torch.inference_mode(), LiveBytes("meta") as live:
        texts = [
            torch.empty(1, TEXT_TOKENS, spec.dit.text_width, dtype=dtype, device=META)
            for _ in range(made.num_texts)
        ]
        text = TextPair(texts[0], texts[1] if made.guided else None)
        condition = Condition()
        channels, latent_frames, rows, columns = made.geometry.latent_shape
        if made.with_image and spec.task == "i2v":
            extra = spec.dit.in_channels - channels
            condition = Condition(
                channels=torch.empty(1, extra, latent_frames, rows, columns, device=META)
            )
        elif made.with_image:
            condition = Condition(
                first_frame=torch.empty(1, channels, 1, rows, columns, device=META)
            )
        noise = torch.empty(1, *made.geometry.latent_shape, device=META)
        work = Workspace(
            spec.dit,
            made.geometry.num_tokens,
            dtype=dtype,
            device=META,
            rows=cuts.rows,
            heads=cuts.heads,
        )
        for _ in denoise(request, noise, text, condition, dits, work):
            pass
    peak: int = live.peak_bytes
    return peak


SIZES = {
    "t2v-a14b": ("1280x720", "832x480", "480x832", "640x352", "256x144"),
    "i2v-a14b": ("1280x720", "832x480", "320x192"),
    "ti2v-5b": ("1280x704", "704x1280", "640x352", "320x192"),
}


@settings(max_examples=8)
@given(
    model=st.sampled_from(sorted(SIZES)),
    pick=st.integers(0, 4),
    latent_frames=st.integers(1, 5),
    precision=st.sampled_from(["bf16", "fp8", "fp32"]),
    rows=st.sampled_from([2048, 4096, 8192]),
    image=st.booleans(),
    guidance=st.sampled_from([1.0, 4.0]),
)
@example("t2v-a14b", 0, 7, "bf16", 8192, False, 4.0)
@example("t2v-a14b", 1, 9, "fp8", 8192, False, 4.0)
@example("i2v-a14b", 0, 4, "bf16", 2048, True, 4.0)
@example("ti2v-5b", 0, 31, "bf16", 8192, True, 4.0)
@example("ti2v-5b", 0, 7, "bf16", 4096, False, 4.0)
def test_denoise_activations_are_those_of_the_code(
    model: str,
    pick: int,
    latent_frames: int,
    precision: Precision,
    rows: int,
    image: bool,
    guidance: float,
) -> None:
    """The sum of the parts, with slots and resident weights aside."""
    sizes = SIZES[model]
    image = model == "i2v-a14b" or (image and model == "ti2v-5b")
    made = shape(
        model, sizes[pick % len(sizes)], 4 * latent_frames - 3, precision,
        image=image, guidance=guidance,
    )  # fmt: skip
    heads = heads_at_a_time(made.request.spec.dit, made.geometry.num_tokens)
    cuts = Cuts(rows, heads, None)
    predicted = sum(denoise_activations(made, cuts).values())
    real = traced_denoise(made, cuts)
    most = real * (1 + OVER) + SMALL_BYTES
    assert real * (1 - UNDER) <= predicted <= most, (predicted / real, real)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
def test_text_activations_are_those_of_the_code(
    spec: ModelSpec, precision: Precision, guidance: float
) -> None:
    """Two prompts of the most tokens, with the rows of the embedding gathered beforehand."""
    frames = spec.sampling.num_frames
    size = f"{spec.sampling.width}x{spec.sampling.height}"
    made = shape(spec.name, size, frames, precision, image=spec.needs_image, guidance=guidance)
    with META:
        umt5 = Umt5(dataclasses.replace(spec_named(spec.name).umt5, num_blocks=1, vocab_size=1))
        umt5 = umt5.to(DTYPES[precision])
    with torch.inference_mode(), LiveBytes("meta") as live:
        ids = [torch.zeros(1, TEXT_TOKENS, dtype=torch.int64, device=META)] * made.num_texts
        umt5.encode(ids)
    predicted = text_activations(made)
    assert live.peak_bytes * (1 - UNDER) <= predicted <= live.peak_bytes * (1 + OVER) + SMALL_BYTES
