"""The transformer against diffusers' WanTransformer3DModel, with the same random weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tests.engine.tiny_models import (
    random_tensor,
    randomise,
    reference_dit,
    relative_error,
    tiny_dit,
)
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.dit_rows import (
    EAGER,
    RowKernels,
    Workspace,
    compiled_kernels,
    row_spans,
)
from wanfit.engine.ops.linear import Linear, quantise
from wanfit.specs import DitSpec

SPECS = {
    "like ti2v": tiny_dit(6),
    "like t2v, 3 heads": tiny_dit(4, heads=3),
    "like i2v, 12 channels in, 4 out": tiny_dit(4, image_channels=8),
    "head dim 24": DitSpec(
        in_channels=4,
        out_channels=4,
        num_heads=2,
        num_blocks=2,
        ffn_width=56,
        head_dim=24,
        text_width=24,
        sinusoid_width=16,
    ),
}
# [T, H, W] of the latents: one frame, odd grids of tokens, and sides that differ
GRIDS = [(1, 2, 2), (2, 6, 10), (3, 10, 6), (5, 14, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_velocity_equals_that_of_diffusers(spec: DitSpec, grid: tuple[int, int, int]) -> None:
    """One timestep for the clip, a batch of two with texts and times of their own."""
    dit = randomise(Dit(spec), seed=1)
    latents, text = _inputs(spec, grid)
    timestep = torch.tensor([999.0, 37.0])
    with torch.inference_mode():
        expected = _reference_velocity(reference_dit(dit), latents, timestep, text)
        assert relative_error(dit(latents, timestep, text), expected) < 1e-5


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_timestep_per_frame_equals_diffusers_timestep_per_token(
    grid: tuple[int, int, int],
) -> None:
    """TI2V's given first frame has timestep 0; in the second clip every frame has its own."""
    spec = SPECS["like ti2v"]
    dit = randomise(Dit(spec), seed=2)
    latents, text = _inputs(spec, grid)
    frames, height, width = grid
    timestep = torch.stack([torch.full((frames,), 640.0), 100.0 * torch.arange(frames)])
    timestep[:, 0] = 0
    per_token = timestep.repeat_interleave(height // 2 * width // 2, dim=1)
    with torch.inference_mode():
        expected = _reference_velocity(reference_dit(dit), latents, per_token, text)
        assert relative_error(dit(latents, timestep, text), expected) < 1e-5


def test_one_time_per_frame_and_one_per_clip_are_the_same_function() -> None:
    dit = randomise(Dit(SPECS["like ti2v"]), seed=3)
    latents, text = _inputs(dit.spec, (3, 4, 6))
    timestep = torch.tensor([500.0, 20.0])
    with torch.inference_mode():
        per_clip = dit(latents, timestep, text)
        per_frame = dit(latents, timestep[:, None].expand(2, 3), text)
    assert relative_error(per_frame, per_clip) < 1e-6


def test_a_text_bias_lets_one_row_stand_for_many() -> None:
    """log(n) added to the logits of one zero row equals n zero rows."""
    dit = randomise(Dit(SPECS["like ti2v"]), seed=4)
    latents, text = _inputs(dit.spec, (2, 4, 4))
    padded = torch.cat([text, text.new_zeros(2, 9, text.shape[2])], dim=1)
    short = padded[:, : text.shape[1] + 1]
    bias = torch.zeros(short.shape[1])
    bias[-1] = torch.log(torch.tensor(9.0))
    timestep = torch.tensor([500.0, 20.0])
    with torch.inference_mode():
        assert (
            relative_error(dit(latents, timestep, short, bias), dit(latents, timestep, padded))
            < 1e-5
        )


@pytest.mark.parametrize("rows", [1, 7, 24, 1000])
@pytest.mark.parametrize("per_frame", [False, True], ids=["one time", "a time per frame"])
def test_little_memory_gives_what_whole_tensors_give(rows: int, per_frame: bool) -> None:
    """`velocity` against `forward`, however rows and heads are cut."""
    dit = randomise(Dit(tiny_dit(heads=4)), seed=6)
    latents, text = (x[:1] for x in _inputs(dit.spec, (3, 4, 6)))
    timestep = torch.tensor([[0.0, 640.0, 640.0]]) if per_frame else torch.tensor([[640.0]])
    with torch.inference_mode():
        expected = dit(latents, timestep, text)
        moment, texts = dit.embed_times(timestep), dit.embed_texts([text])
        for heads in (1, 2, 4):
            work = _work(dit, latents, rows=rows, heads=heads)
            velocity = dit.velocity(latents, moment, texts[0], work)
            assert relative_error(velocity, expected) < 1e-6
            # The buffers are used again for the next forward, and hold nothing back.
            assert torch.equal(dit.velocity(latents, moment, texts[0], work), velocity)


@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 100))
def test_spans_cover_every_token_once(num_groups: int, per_group: int, rows: int) -> None:
    """None is longer than asked, and each is in one group or made of whole ones."""
    num_tokens = num_groups * per_group
    covered: list[int] = []
    for span in row_spans(num_tokens, num_groups, rows):
        tokens = range(num_tokens)[span.tokens]
        groups = range(num_groups)[span.groups]
        covered += tokens
        assert 0 < len(tokens) <= rows
        assert len(groups) == span.num_groups
        assert {token // per_group for token in tokens} == set(groups)
        assert span.num_groups == 1 or len(tokens) == span.num_groups * per_group
    assert covered == list(range(num_tokens))


def test_fp8_weights_cost_little_and_are_used_as_they_are() -> None:
    """Against the same network with the weights that fp8 and scales stand for: rounding alone.

    And the signal-to-noise ratio of a weight is that of e4m3's 3 bits of mantissa: above 30 dB.
    """
    dit, widened = (randomise(Dit(tiny_dit()), seed=7) for _ in range(2))
    for block, exact in zip(dit.blocks, widened.blocks, strict=True):
        for name, layer in block.named_modules():
            if isinstance(layer, Linear):
                weight, scale = quantise(layer.weight)
                back = weight.float() * scale
                noise = (back - layer.weight).square().mean()
                assert 10 * torch.log10(layer.weight.square().mean() / noise) > 30
                layer.weight = nn.Parameter(weight, requires_grad=False)
                layer.scale = nn.Parameter(scale, requires_grad=False)
                twin = exact.get_submodule(name)
                assert isinstance(twin, Linear)
                twin.weight.copy_(back)
    latents, text = (x[:1] for x in _inputs(dit.spec, (3, 4, 6)))
    with torch.inference_mode():
        expected = widened(latents, torch.tensor([500.0]), text)
        assert relative_error(dit(latents, torch.tensor([500.0]), text), expected) < 1e-6
        moment, texts = dit.embed_times(torch.tensor([[500.0]])), dit.embed_texts([text])
        work = _work(dit, latents, rows=10, heads=1)
        assert relative_error(dit.velocity(latents, moment, texts[0], work), expected) < 1e-6


def test_each_row_function_is_compiled_once_for_all_blocks_and_networks() -> None:
    """Two networks of three blocks: four compilations, and the result of the eager functions.

    The compiler's own back end needs a C++ compiler; how often it is called does not.
    """
    counter = CompileCounter()
    kernels = compiled_kernels(backend=counter)
    for seed in (8, 9):
        dit = randomise(Dit(tiny_dit()), seed=seed)
        latents, text = (x[:1] for x in _inputs(dit.spec, (2, 4, 6)))
        with torch.inference_mode():
            moment, texts = dit.embed_times(torch.tensor([[500.0]])), dit.embed_texts([text])
            expected = dit.velocity(latents, moment, texts[0], _work(dit, latents, 6, 2))
            work = _work(dit, latents, 6, 2, kernels=kernels)
            assert relative_error(dit.velocity(latents, moment, texts[0], work), expected) < 1e-6
    assert counter.frame_count == 4


def _work(
    dit: Dit, latents: Tensor, rows: int, heads: int, kernels: RowKernels = EAGER
) -> Workspace:
    num_tokens = latents[0, 0].numel() // math.prod(dit.spec.patch)
    return Workspace(
        dit.spec,
        num_tokens,
        dtype=torch.float32,
        device=latents.device,
        rows=rows,
        heads=heads,
        kernels=kernels,
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_bf16_is_as_near_to_the_truth_as_diffusers_in_bf16(spec: DitSpec) -> None:
    """Our error against fp64 is at most twice that of diffusers with its parts kept in fp32."""
    dit = randomise(Dit(spec), seed=5)
    # Weights that bf16 holds exactly: the errors compared are those of the arithmetic.
    for parameter in dit.parameters():
        parameter.copy_(parameter.bfloat16().float())
    latents, text = (x.bfloat16().float() for x in _inputs(spec, (3, 6, 10)))
    timestep = torch.tensor([979.0, 37.0])
    with torch.inference_mode():
        truth = _reference_velocity(
            reference_dit(dit, dtype=torch.float64), latents.double(), timestep, text.double()
        )
        theirs = _reference_velocity(
            reference_dit(dit, dtype=torch.bfloat16), latents.bfloat16(), timestep, text.bfloat16()
        )
        ours = _to_bf16(dit)(latents, timestep, text.bfloat16())
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth)


def test_the_time_path_and_the_modulation_stay_in_fp32() -> None:
    kept = {
        name for name, p in _to_bf16(Dit(tiny_dit())).named_parameters() if p.dtype == torch.float32
    }
    assert {"time_embed.up.weight", "blocks.0.modulation", "blocks.2.cross_norm.bias"} <= kept
    assert "blocks.0.ffn.up.weight" not in kept


def _inputs(spec: DitSpec, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Latents [2, C, T, H, W] and text [2, 12, D] whose second text ends in padding."""
    latents = random_tensor(2, spec.in_channels, *grid, seed=10)
    text = random_tensor(2, 12, spec.text_width, seed=11)
    text[1, 5:] = 0
    return latents, text


def _reference_velocity(reference: Any, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    velocity: Tensor = reference(latents, timestep, text, return_dict=False)[0]
    return velocity


def _to_bf16(dit: Dit) -> Dit:
    for name, parameter in dit.named_parameters():
        if not any(part in name for part in Dit.FP32_PARAMETERS):
            parameter.data = parameter.data.bfloat16()
    return dit
