"""The model records: consistent within themselves, equal to the official values, found by name."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest
from diffusers import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st

from wanfit.errors import UnknownModel
from wanfit.geometry import geometry_of
from wanfit.specs import (
    DEMO,
    I2V_A14B,
    MODELS,
    OFFICIAL_NEGATIVE_PROMPT,
    T2V_A14B,
    TI2V_5B,
    UMT5_XXL,
    VAE_21,
    VAE_22,
    DitSpec,
    ModelSpec,
    Solver,
    VaeSpec,
    spec_named,
)

every_model = pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)


@every_model
def test_the_networks_of_a_model_fit_each_other(spec: ModelSpec) -> None:
    channels = spec.vae.latent_channels
    mask_and_image = 4 + channels if spec.task == "i2v" else 0
    assert spec.dit.in_channels == channels + mask_and_image
    assert spec.dit.out_channels == channels
    assert spec.dit.text_width == spec.umt5.width
    assert len(spec.vae.latents_mean) == len(spec.vae.latents_std) == channels
    assert min(spec.vae.latents_std) > 0
    assert spec.vae.stride_frames == 4
    assert spec.vae.stride_px == {"2.1": 8, "2.2": 16}[spec.vae.generation]


@every_model
def test_the_defaults_and_presets_of_a_model_are_legal_for_it(spec: ModelSpec) -> None:
    sampling = spec.sampling
    assert (sampling.width, sampling.height) in spec.presets
    for width, height in spec.presets:
        geometry_of(spec, width, height, sampling.num_frames)
    assert sampling.solver in get_args(Solver)


@every_model
def test_a_model_has_two_experts_exactly_when_it_has_a_boundary(spec: ModelSpec) -> None:
    names = ("high_noise", "low_noise")
    assert spec.experts == (names[:1] if spec.boundary is None else names)
    if spec.boundary is None:
        assert spec.sampling.guidance_high == spec.sampling.guidance_low


@every_model
def test_which_models_take_an_image_and_which_need_one(spec: ModelSpec) -> None:
    takes_needs = {"t2v": (False, False), "i2v": (True, True), "ti2v": (True, False)}
    assert (spec.takes_image, spec.needs_image) == takes_needs[spec.task]


@pytest.mark.parametrize(
    ("spec", "official"),
    [
        # frames, fps, steps, shift, guidance high, low, boundary, grid (fact sheet A 4 and 1.1)
        (TI2V_5B, (121, 24, 50, 5.0, 5.0, 5.0, None, 32)),
        (T2V_A14B, (81, 16, 40, 12.0, 4.0, 3.0, 0.875, 16)),
        (I2V_A14B, (81, 16, 40, 5.0, 3.5, 3.5, 0.900, 16)),
    ],
    ids=lambda value: value.name if isinstance(value, ModelSpec) else None,
)
def test_sampling_defaults_are_the_official_ones(
    spec: ModelSpec, official: tuple[float | None, ...]
) -> None:
    asked = spec.sampling
    assert (
        asked.num_frames,
        asked.fps,
        asked.num_inference_steps,
        asked.shift,
        asked.guidance_high,
        asked.guidance_low,
        spec.boundary,
        spec.grid_px,
    ) == official
    assert asked.solver == "unipc"
    assert asked.negative_prompt == OFFICIAL_NEGATIVE_PROMPT


@pytest.mark.parametrize(
    ("dit", "width"), [(TI2V_5B.dit, 3072), (T2V_A14B.dit, 5120), (I2V_A14B.dit, 5120)]
)
def test_the_official_transformers_have_the_official_width(dit: DitSpec, width: int) -> None:
    assert (dit.width, dit.head_dim, dit.text_width) == (width, 128, UMT5_XXL.width)


def test_negative_prompt_is_the_official_string() -> None:
    """137 characters, 28 phrases between full-width commas, nothing after (fact sheet A 4)."""
    phrases = OFFICIAL_NEGATIVE_PROMPT.split("\N{FULLWIDTH COMMA}")
    assert len(OFFICIAL_NEGATIVE_PROMPT) == 137
    assert len(phrases) == 28
    assert (phrases[0], phrases[-1]) == ("色调艳丽", "倒着走")


def test_vae_21_statistics_are_those_of_diffusers() -> None:
    parameters = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert list(VAE_21.latents_mean) == list(parameters["latents_mean"].default)
    assert list(VAE_21.latents_std) == list(parameters["latents_std"].default)


@pytest.mark.parametrize(
    ("vae", "mean_sum", "std_sum"), [(VAE_21, -0.2126, 286.1255), (VAE_22, -7.6248, 790.8891)]
)
def test_vae_statistics_are_the_official_numbers_in_the_official_order(
    vae: VaeSpec, mean_sum: float, std_sum: float
) -> None:
    """computed: sums over the lists in the official vae2_1.py and vae2_2.py, each number times its
    place, so that a slip of a digit and two numbers exchanged both show."""
    assert sum_by_place(vae.latents_mean) == pytest.approx(mean_sum, abs=1e-9)
    assert sum_by_place(vae.latents_std) == pytest.approx(std_sum, abs=1e-9)


def sum_by_place(numbers: tuple[float, ...]) -> float:
    return sum(place * number for place, number in enumerate(numbers, start=1))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("ti2v-5B", TI2V_5B),
        ("t2v-A14B", T2V_A14B),
        ("i2v-A14B", I2V_A14B),
        (" Demo ", DEMO),
    ],
)
def test_official_task_names_find_their_model(name: str, spec: ModelSpec) -> None:
    assert spec_named(name) is spec


@pytest.mark.parametrize(
    ("typed", "closest"),
    [
        ("t2v", "t2v-a14b"),  # not ti2v-5b, though that has fewer letters to change
        ("I2V", "i2v-a14b"),
        ("ti2v5b", "ti2v-5b"),
        ("wan2.2-i2v-a14b", "i2v-a14b"),
        ("demo2", "demo"),
    ],
)
def test_an_unknown_model_suggests_the_closest(typed: str, closest: str) -> None:
    with pytest.raises(UnknownModel, match=f"Did you mean '{closest}'") as caught:
        spec_named(typed)
    assert typed in caught.value.message


@given(st.text(max_size=100))
def test_any_text_is_a_model_or_an_unknown_model_that_lists_all(name: str) -> None:
    try:
        assert spec_named(name).name == name.strip().lower()
    except UnknownModel as error:
        listed = error.hint.partition("Known: ")[2]
    else:
        return
    assert listed == ", ".join(spec.name for spec in MODELS)
