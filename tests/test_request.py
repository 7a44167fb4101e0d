"""Requests: aliases, limits, defaults, and a typed error for whatever a stranger sends."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wanfit.errors import BadFrameCount, BadImage, BadOption, BadRequest, BadSize, UnknownModel
from wanfit.request import (
    ALIASES,
    MAX_PROMPT_CHARS,
    MAX_STEPS,
    SEED_LIMIT,
    SHIFT_RANGE,
    VideoRequest,
    parse_size,
    resolve,
)
from wanfit.specs import DEMO, MODELS, T2V_A14B, TI2V_5B, ModelSpec, Solver

# --- whatever a stranger sends -------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
option_names = st.sampled_from([*VideoRequest.model_fields, *ALIASES, "size", "guidance"])
# Values that are often nearly right, so that the deeper checks are reached as well.
likely_values = st.sampled_from(
    [
        "a cat",
        "demo",
        "128x128",
        "1280*704",
        "x",
        "1x",
        "17",
        "unipc",
        "euler",
        17,
        128,
        3.5,
        -1,
        True,
    ]
)


@given(st.dictionaries(option_names | st.text(), likely_values | json_values, max_size=8))
@example({})
@example({"prompt": "a", "size": "12x13x14"})
@example({"prompt": "a", "seed": 10**5000})
@example({"prompt": "a", "width": 10**5000, "height": 128})
@example({"prompt": "a", "solver": {"a": ["\n"]}})
@example({"prompt": "a", "\n": "a name of two lines"})
@example({"prompt": "\ud800"})
@example({"prompt": "a", "shift": float("nan")})
def test_any_json_object_is_a_request_or_a_bad_option_of_one_line(fields: dict[str, Any]) -> None:
    try:
        VideoRequest.parse(fields)
    except BadOption as error:
        text = str(error)
    else:
        return
    assert len(text.splitlines()) == 1
    assert len(text) < 300


def test_a_value_nested_without_end_is_a_bad_option() -> None:
    nested: list[Any] = []
    for _ in range(900):
        nested = [nested]
    for name in ("prompt", "size", "seed", "solver", "unheard_of"):
        with pytest.raises(BadOption):
            VideoRequest.parse({"prompt": "a", name: nested})


@given(
    fields=st.fixed_dictionaries(
        {"prompt": st.text(max_size=20), "model": st.sampled_from([spec.name for spec in MODELS])},
        optional={
            "width": st.integers(-64, 40_000),
            "height": st.integers(-64, 40_000),
            "num_frames": st.integers(-64, 6000),
            "seed": st.integers(-1, SEED_LIMIT - 1),
        },
    ),
    image_size=st.none() | st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
)
def test_any_request_resolves_to_a_legal_one_or_to_a_typed_error(
    fields: dict[str, Any], image_size: tuple[int, int] | None
) -> None:
    """And what resolves resolves again to itself, so nothing is rounded behind anyone's back."""
    try:
        resolved = resolve(VideoRequest.parse(fields), image_size=image_size)
    except BadRequest:
        return
    settings = resolved.describe()
    assert settings.pop("fps") == resolved.spec.sampling.fps  # the model's, not an option
    assert resolve(VideoRequest.parse(settings), image_size=image_size) == resolved


# --- names and spellings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "value"),
    [
        ("task", "ti2v-5B"),
        ("frame_num", 33),
        ("frames", 33),
        ("sample_steps", 7),
        ("steps", 7),
        ("sample_shift", 2.5),
        ("sample_solver", "euler"),
        ("base_seed", 11),
        ("boundary_ratio", 0.5),
        ("flow_shift", 2.5),
        ("guidance_scale_2", 2.0),
    ],
)
def test_an_alias_means_the_same_as_the_name(alias: str, value: object) -> None:
    name = ALIASES[alias]
    by_alias = VideoRequest.parse({"prompt": "a", alias: value})
    assert by_alias == VideoRequest.parse({"prompt": "a", name: value})
    assert getattr(by_alias, name) == value


def test_every_alias_stands_for_an_option() -> None:
    assert set(ALIASES.values()) <= {*VideoRequest.model_fields, "guidance"}
    assert not set(ALIASES) & set(VideoRequest.model_fields)


@pytest.mark.parametrize("name", ["guidance", "guidance_scale", "cfg", "sample_guide_scale"])
def test_one_guidance_sets_both_experts(name: str) -> None:
    request = VideoRequest.parse({"prompt": "a", name: 2.5})
    assert (request.guidance_high, request.guidance_low) == (2.5, 2.5)


def test_a_guidance_of_one_expert_leads_over_that_of_both() -> None:
    request = VideoRequest.parse({"prompt": "a", "guidance": 2.5, "guidance_low": 1.0})
    assert (request.guidance_high, request.guidance_low) == (2.5, 1.0)


@pytest.mark.parametrize("size", ["1280x704", "1280*704", " 1280 X 704 "])
def test_sizes_are_width_then_height_in_both_spellings(size: str) -> None:
    assert parse_size(size) == (1280, 704)
    request = VideoRequest.parse({"prompt": "a", "size": size})
    assert (request.width, request.height) == (1280, 704)


@pytest.mark.parametrize(
    "size", ["", "1280", "1280x", "x704", "1280x704x3", "-8x8", "8.0x8", "axb", [1280, 704], 1280]
)
def test_other_spellings_of_a_size_are_refused_with_an_example(size: object) -> None:
    with pytest.raises(BadOption, match="as in 1280x704"):
        VideoRequest.parse({"prompt": "a", "size": size})


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "prompt is missing"),
        ({"prompt": None}, "prompt: Input should be a valid string"),
        ({"prompt": "x" * (MAX_PROMPT_CHARS + 1)}, "prompt: String should have at most 10000"),
        ({"prompt": "a", "framez": 17}, "There is no option 'framez'"),
        ({"prompt": "a", "solver": "heun"}, "solver is 'heun', not one of unipc, dpm++, euler"),
        ({"prompt": "a", "steps": 0}, "num_inference_steps: Input should be greater"),
        ({"prompt": "a", "steps": MAX_STEPS + 1}, "num_inference_steps: Input should be less"),
        ({"prompt": "a", "steps": 2.5}, "num_inference_steps: Input should be a valid integer"),
        ({"prompt": "a", "shift": 0}, "shift: Input should be greater"),
        ({"prompt": "a", "shift": 101}, "shift: Input should be less"),
        ({"prompt": "a", "shift": float("inf")}, "shift: Input should be a finite number"),
        ({"prompt": "a", "guidance_high": -1}, "guidance_high: Input should be greater"),
        ({"prompt": "a", "seed": SEED_LIMIT}, "seed: Input should be less"),
        ({"prompt": "a", "seed": -2}, "seed: Input should be greater"),
        ({"prompt": "a", "frames": 17, "num_frames": 17}, "num_frames is given twice"),
        ({"prompt": "a", "size": "8x8", "width": 8}, "size excludes width and height"),
    ],
)
def test_a_bad_option_is_named_with_what_is_wrong(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadOption) as caught:
        VideoRequest.parse(fields)
    assert str(caught.value).startswith(problem)


def test_limits_themselves_are_allowed() -> None:
    for shift in SHIFT_RANGE:
        assert VideoRequest.parse({"prompt": "a", "shift": shift}).shift == shift
    widest = {"prompt": "x" * MAX_PROMPT_CHARS, "steps": MAX_STEPS, "seed": SEED_LIMIT - 1}
    assert VideoRequest.parse(widest).seed == SEED_LIMIT - 1


# --- what stands when nothing is said ------------------------------------------------------------


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
def test_a_bare_prompt_gets_the_defaults_of_its_model(spec: ModelSpec) -> None:
    """For a model that needs an image, one whose shape is that of the default size."""
    sampling = spec.sampling
    image_size = (sampling.width, sampling.height) if spec.needs_image else None
    request = VideoRequest.parse({"prompt": "a cat", "model": spec.name})
    settings = resolve(request, image_size=image_size).describe()

    assert settings.pop("model") == spec.name
    assert settings.pop("prompt") == "a cat"
    assert 0 <= settings.pop("seed") < SEED_LIMIT
    assert settings.pop("boundary") == spec.boundary
    assert settings == {name: getattr(sampling, name) for name in settings}
    assert set(settings) == set(sampling.__slots__)  # every default is used


def test_the_model_is_demo_when_none_is_named() -> None:
    assert resolve(VideoRequest.parse({"prompt": "a"})).spec is DEMO


def test_what_is_given_leads_over_the_defaults() -> None:
    given = {
        "prompt": "a",
        "negative_prompt": "",
        "model": "t2v-a14b",
        "width": 832,
        "height": 480,
        "num_frames": 5,
        "num_inference_steps": 4,
        "shift": 5.0,
        "guidance_high": 0.0,
        "guidance_low": 1.0,
        "boundary": 0.5,
        "solver": "euler",
        "seed": 0,
    }
    assert resolve(VideoRequest.parse(given)).describe() == {**given, "fps": 16}


def test_the_boundary_is_the_model_s_unless_given() -> None:
    asked = {"prompt": "a", "model": "t2v-a14b"}
    assert resolve(VideoRequest.parse(asked)).boundary == T2V_A14B.boundary
    assert resolve(VideoRequest.parse({**asked, "boundary_ratio": 0.5})).boundary == 0.5
    assert resolve(VideoRequest.parse({"prompt": "a"})).boundary is None


def test_a_model_with_one_expert_refuses_a_boundary() -> None:
    with pytest.raises(BadOption, match="demo has one expert"):
        resolve(VideoRequest.parse({"prompt": "a", "boundary": 0.5}))


@pytest.mark.parametrize("seed", [None, -1])
def test_a_seed_that_is_not_given_is_drawn_anew(seed: int | None) -> None:
    request = VideoRequest.parse({"prompt": "a", "seed": seed})
    assert resolve(request).seed != resolve(request).seed  # equal once in 2^63


def test_a_spec_that_no_list_knows_can_stand_for_the_model() -> None:
    resolved = resolve(VideoRequest.parse({"prompt": "a", "model": "my own"}), TI2V_5B)
    assert resolved.spec is TI2V_5B
    assert resolved.num_frames == TI2V_5B.sampling.num_frames


def test_describe_is_plain_json() -> None:
    settings = resolve(VideoRequest.parse({"prompt": "a"})).describe()
    assert json.loads(json.dumps(settings)) == settings


def test_every_solver_can_be_asked_for() -> None:
    for solver in get_args(Solver):
        assert resolve(VideoRequest.parse({"prompt": "a", "solver": solver})).solver == solver


# --- images and sizes ----------------------------------------------------------------------------


def test_an_image_that_is_missing_or_not_wanted_is_refused() -> None:
    with pytest.raises(BadImage, match="i2v-a14b needs an image"):
        resolve(VideoRequest.parse({"prompt": "a", "model": "i2v-a14b"}))
    with pytest.raises(BadImage, match="t2v-a14b takes no image"):
        resolve(VideoRequest.parse({"prompt": "a", "model": "t2v-a14b"}), image_size=(64, 64))


def test_without_a_size_the_clip_takes_the_shape_of_its_image() -> None:
    portrait = (720, 1280)
    request = VideoRequest.parse({"prompt": "a", "model": "i2v-a14b"})
    resolved = resolve(request, image_size=portrait)
    assert (resolved.width, resolved.height) == portrait


def test_a_size_that_is_given_leads_over_the_image() -> None:
    request = VideoRequest.parse({"prompt": "a", "model": "i2v-a14b", "size": "832x480"})
    resolved = resolve(request, image_size=(720, 1280))
    assert (resolved.width, resolved.height) == (832, 480)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"width": 128}, BadOption),
        ({"size": "1280x720", "model": "ti2v-5b"}, BadSize),  # 720 is not a multiple of 32
        ({"frames": 80}, BadFrameCount),
        ({"model": "t2v"}, UnknownModel),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    fields: dict[str, Any], error: type[BadRequest]
) -> None:
    request = VideoRequest.parse({"prompt": "a", **fields})
    with pytest.raises(error):
        resolve(request)


def test_asking_needs_no_torch() -> None:
    """In a fresh process: `wanfit --help` and every refusal stay fast."""
    check = "import sys, wanfit.request; assert not {'torch', 'av', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
