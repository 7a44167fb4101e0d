"""What RunPod's hub reads: that it names what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.serve.runpod_costs import table
from wanfit.plan.cards import CARDS
from wanfit.serve.runpod_input import read_input
from wanfit.specs import MODELS
from wanfit.worker.settings import (
    BUCKET_NAME_VARIABLE,
    BUCKET_VARIABLES,
    read_worker_settings,
)

ROOT = Path(__file__).parents[2]


def read(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((ROOT / ".runpod" / name).read_text())
    return value


def test_the_hubs_variables_are_ones_that_are_read() -> None:
    """By their defaults, and each with a change that does not pass unnoticed."""
    config = read("hub.json")["config"]
    entries = {entry["key"]: entry["input"] for entry in config["env"]}
    defaults = {name: str(entry.get("default", "")) for name, entry in entries.items()}
    assert read_worker_settings(defaults).server.model == "demo"
    names = [option["value"] for option in entries["WANFIT_MODEL"]["options"]]
    assert names == [spec.name for spec in MODELS]
    assert {*BUCKET_VARIABLES, BUCKET_NAME_VARIABLE} <= set(entries)
    for preset in config["presets"]:
        assert set(preset["defaults"]) <= set(entries)


def test_the_hubs_tests_are_jobs() -> None:
    found = read("tests.json")
    assert found["config"]["gpuTypeId"] in [card.runpod_id for card in CARDS]
    for one in found["tests"]:
        if one["input"] != {"action": "health"}:
            order = read_input({"input": one["input"]})
            assert order.fields["prompt"]


def test_the_costs_of_the_guide_are_the_planners() -> None:
    """`python -m benchmarks.serve.runpod_costs` writes the table anew."""
    assert table() in (ROOT / "docs" / "runpod.md").read_text()
