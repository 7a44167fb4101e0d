"""The official scripts' memory flags: accepted in their spellings, and explained in the plan."""

from __future__ import annotations

import pytest

from wanfit.errors import BadOption
from wanfit.plan.cards import card_named
from wanfit.plan.machine import catalogue_machine
from wanfit.plan.planner import make_plan
from wanfit.request import MemoryFlags, VideoRequest, resolve

FLAGS = ("offload_model", "t5_cpu", "convert_model_dtype", "init_on_cpu")
MACHINE = catalogue_machine(card_named("rtx 4090"))


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(
    ("spelled", "value"),
    [(True, True), (False, False), ("True", True), ("False", False), ("no", False), (None, None)],
)
def test_flags_take_the_official_spellings(name: str, spelled: object, value: bool | None) -> None:
    request = resolve(VideoRequest.parse({"prompt": "a cat", name: spelled}))
    assert getattr(request.memory_flags, name) is value
    assert request.memory_flags.given() == ({} if value is None else {name: value})


@pytest.mark.parametrize("spelled", ["perhaps", 3, [True]])
def test_what_is_no_flag_is_refused(spelled: object) -> None:
    with pytest.raises(BadOption, match="t5_cpu"):
        VideoRequest.parse({"prompt": "a cat", "t5_cpu": spelled})


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", FLAGS)
def test_the_plan_says_in_one_line_what_became_of_a_flag(name: str, value: bool) -> None:
    wanted = {"prompt": "", "model": "t2v-a14b", "size": "832x480", name: value}
    plan = make_plan(resolve(VideoRequest.parse(wanted)), MACHINE)
    (line,) = [note for note in plan.notes if note.startswith(f"{name}={value}: ")]
    assert "\n" not in line


def test_flags_change_no_plan_but_its_notes() -> None:
    plain = resolve(VideoRequest.parse({"prompt": "", "model": "ti2v-5b"}))
    flagged = resolve(
        VideoRequest.parse({"prompt": "", "model": "ti2v-5b", "seed": plain.seed, "t5_cpu": True})
    )
    first, second = make_plan(plain, MACHINE), make_plan(flagged, MACHINE)
    assert (first.denoise, first.text, first.ring, first.cuts, first.stages) == (
        second.denoise, second.text, second.ring, second.cuts, second.stages,
    )  # fmt: skip
    assert plain.memory_flags == MemoryFlags()
    assert plain.describe() == flagged.describe()
