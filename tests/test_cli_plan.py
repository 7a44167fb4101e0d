"""`wanfit plan` as a person meets it: a real process, its words, its exit code, its haste."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import cpu_time
from wanfit.plan.cards import CARDS, card_named
from wanfit.plan.machine import catalogue_machine, machine_to_json

WANFIT = (sys.executable, "-c", "from wanfit.cli import main; main()")
THE_ISSUE = (
    "--gpu", "rtx5090", "--ram", "117GB", "--model", "t2v-a14b", "--size", "1280x720",
    "--frames", "81",
)  # fmt: skip
PATIENCE_S = 120  # for one process on a busy machine


def plan(*arguments: str, command: tuple[str, ...] = WANFIT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, "plan", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def planned(*arguments: str) -> dict[str, Any]:
    ended = plan(*arguments, "--json")
    assert ended.returncode == 0, ended
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


def test_the_question_of_the_issue_is_answered_yes_in_under_a_second() -> None:
    """The best of a few fresh processes, each of one thread: CPU time is what it takes."""

    def ask() -> None:
        ended = plan(*THE_ISSUE)
        assert ended.returncode == 0, ended
        assert "fits" in ended.stdout
        assert ended.stderr == ""

    times_s = [cpu_time.of_children_s(ask) for _ in range(3)]
    assert min(times_s) < 1.0, times_s


@pytest.mark.parametrize("arguments", [THE_ISSUE, ("--gpu", "all", "--model", "ti2v-5b"), ()])
def test_planning_imports_no_torch(arguments: tuple[str, ...]) -> None:
    """For a card, for all cards, and for this machine."""
    code = (
        "import sys; from wanfit.cli import run; code = run(sys.argv[1:]);"
        " assert 'torch' not in sys.modules and 'av' not in sys.modules; sys.exit(code)"
    )
    ended = plan(*arguments, command=(sys.executable, "-c", code))
    assert ended.returncode == 0, ended.stderr


def test_the_table_says_where_everything_lies() -> None:
    words = " ".join(plan(*THE_ISSUE).stdout.split())
    for said in (
        "text", "denoise", "decode", "slots", "residual stream", "registered", "ring", "budget",
        "compute", "umt5: 24 blocks, 24 mapped", "low_noise: 40 blocks, 40 registered",
    ):  # fmt: skip
        assert said in words


def test_json_adds_up() -> None:
    answer = planned(*THE_ISSUE)
    assert answer["fits"] is True
    assert answer["machine"]["gpu"] == "RTX 5090"
    assert answer["ram_budget_bytes"] == 117 * 10**9
    assert [stage["stage"] for stage in answer["stages"]] == ["text", "denoise", "decode"]
    for stage in answer["stages"]:
        for side in ("device", "host"):
            assert sum(stage[f"{side}_bytes"].values()) == stage[f"{side}_peak_bytes"]
    peaks = [stage["device_peak_bytes"] for stage in answer["stages"]]
    assert answer["device_peak_bytes"] == max(peaks) <= answer["vram_budget_bytes"]
    seconds = sum(stage["elapsed_s"] for stage in answer["stages"])
    assert answer["elapsed_s"] == pytest.approx(seconds, abs=0.01)


def test_what_does_not_fit_ends_with_3_and_what_would() -> None:
    ended = plan("--gpu", "rtx3060", "--vram", "4GiB", "--model", "t2v-a14b")
    assert ended.returncode == 3
    (line,) = ended.stderr.splitlines()
    assert "too little" in line
    assert "--frames" in line
    as_json = plan("--gpu", "rtx3060", "--vram", "4GiB", "--model", "t2v-a14b", "--json")
    assert as_json.returncode == 3
    assert json.loads(as_json.stdout)["error"]["code"] == "does_not_fit"


def test_a_suggestion_can_be_typed_as_it_stands() -> None:
    asked = ("--gpu", "rtx3060", "--vram", "4GiB", "--model", "t2v-a14b")
    hint = json.loads(plan(*asked, "--json").stdout)["error"]["hint"]
    flags = hint.removeprefix("These fit: ").split("; ")[0].split()
    assert flags[0] == "--frames"
    assert plan(*asked, *flags).returncode == 0


def test_every_card_with_prices(tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text('{"RTX 4090": 0.69}')
    asked = ("--gpu", "all", "--model", "t2v-a14b", "--size", "832x480", "--price", str(prices))
    cards = planned(*asked)["cards"]
    assert [card["card"] for card in cards] == [card.name for card in CARDS]
    (priced,) = (card for card in cards if card["cost"] is not None)
    assert priced["cost"] == pytest.approx(priced["elapsed_s"] * 0.69 / 3600, rel=1e-3)
    assert "RTX 4090" in plan(*asked).stdout


def test_where_no_card_fits_the_table_comes_with_exit_code_3() -> None:
    ended = plan("--gpu", "all", "--model", "t2v-a14b", "--vram", "2GiB")
    assert ended.returncode == 3
    assert " short, denoise" in ended.stdout


def test_a_machine_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    machine = catalogue_machine(card_named("l4"), ram_bytes=20 * 10**9)
    path.write_text(json.dumps(machine_to_json(machine)))
    answer = planned("--machine", str(path), "--model", "ti2v-5b", "--size", "1280x704")
    assert answer["machine"]["gpu"] == "L4"
    assert answer["ram_budget_bytes"] < 20 * 10**9


def test_this_machine_without_options() -> None:
    """The demo fits wherever the tests run."""
    answer = planned("--device", "cpu")
    assert answer["settings"]["model"] == "demo"
    assert answer["device"] == "cpu"
    assert answer["device_peak_bytes"] == 0


def test_an_image_adds_a_stage_and_gives_the_shape(tmp_path: Path) -> None:
    image = tmp_path / "tall.png"
    Image.new("RGB", (200, 400)).save(image)
    answer = planned("--gpu", "h100", "--model", "ti2v-5b", "--image", str(image))
    assert [stage["stage"] for stage in answer["stages"]][1] == "image"
    assert answer["settings"]["height"] > answer["settings"]["width"]


def test_i2v_can_be_planned_before_there_is_an_image() -> None:
    answer = planned("--gpu", "h100", "--model", "i2v-a14b", "--size", "832x480")
    assert [stage["stage"] for stage in answer["stages"]][1] == "image"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--gpu", "rtx5190"), "RTX 5090"),
        (("--vram", "lots"), "--vram"),
        (("--ram", "0"), "--ram"),
        (("--frames", "80"), "81"),
        (("--precision", "int4"), "fp8"),
        (("--device", "tpu"), "cuda"),
        (("--machine", "none.json"), "none.json"),
        (("--gpu", "l4", "--machine", "m.json"), "--machine"),
        (("--gpu", "all", "--price", "none.csv"), "none.csv"),
        (("--model", "wan9"), "Did you mean"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments: tuple[str, ...], named: str) -> None:
    ended = plan(*arguments)
    assert ended.returncode == 2, ended
    (line,) = ended.stderr.splitlines()
    assert named in line
    assert ended.stdout == ""
