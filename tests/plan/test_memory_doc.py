"""docs/memory.md keeps its word: its figures are those of the specs and of the planner."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wanfit.geometry import geometry_of
from wanfit.plan.cards import card_named
from wanfit.plan.machine import catalogue_machine
from wanfit.plan.plan import Precision
from wanfit.plan.planner import make_plan
from wanfit.plan.weights import dit_units, umt5_units, vae_bytes
from wanfit.request import VideoRequest, resolve
from wanfit.specs import T2V_A14B, TI2V_5B, VAE_21, VAE_22

TEXT = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
GB = 10**9
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp8")


def row(begin: str) -> str:
    (line,) = re.findall(rf"^\| {re.escape(begin)}.*$", TEXT, re.MULTILINE)
    return str(line)


def test_the_table_of_weights() -> None:
    a14b = [dit_units(T2V_A14B.dit, precision) for precision in PRECISIONS]
    small = [dit_units(TI2V_5B.dit, precision) for precision in PRECISIONS]
    for units in a14b:
        assert f"{sum(units.values()) / GB:.2f} GB" in row("one A14B expert")
    block = [units["blocks.0"] / GB for units in a14b]
    assert f"{block[0]:.2f} GB | {block[1]:.3f} GB | {block[2]:.3f} GB" in row("one of its 40")
    for units in small:
        assert f"{sum(units.values()) / GB:.2f} GB" in row("TI2V-5B's transformer")
    for precision in PRECISIONS[:2]:
        size = sum(umt5_units(T2V_A14B.umt5, precision).values())
        assert f"{size / GB:.2f} GB" in row("UMT5")
    for spec in (VAE_21, VAE_22):
        assert f"{vae_bytes(spec) / GB:.2f} GB" in row("VAE of")


def test_the_sums_of_the_official_script() -> None:
    """It turns every parameter into bf16; ours keeps some in fp32."""
    umt5 = sum(umt5_units(T2V_A14B.umt5, "bf16").values()) / GB
    fp32, bf16 = (sum(dit_units(T2V_A14B.dit, p).values()) / GB for p in PRECISIONS[:2])
    assert f"{umt5 + 2 * fp32:.1f} GB" in TEXT
    assert f"= {umt5 + fp32 / 2 + fp32:.0f} GB while loading" in TEXT
    assert f"= {umt5 + 2 * fp32 / 2:.1f} GB afterwards" in TEXT
    assert f"= {2 * bf16 + umt5 + vae_bytes(VAE_21) / GB:.1f} GB: there is" in TEXT


def test_the_tokens_and_their_modulation() -> None:
    tokens = geometry_of(T2V_A14B, 1280, 720, 81).num_tokens
    width = T2V_A14B.dit.width
    assert f"{tokens:,} tokens of width {width:,}" in TEXT
    assert f"= {tokens * 6 * width * 4 / GB:.2f} GB" in TEXT


@pytest.mark.parametrize(
    ("begin", "names"),
    [
        ("slots", ["slots"]),
        ("residual stream, fp32", ["residual stream"]),
        ("queries, keys, values", ["q, k, v"]),
        ("work on at most", ["working"]),
        ("latents, texts, rotary", ["latents", "conditioning", "rotary"]),
        ("CUDA itself", ["CUDA context", "allocator", "gaps"]),
    ],
)
def test_the_table_of_the_denoise_stage(begin: str, names: list[str]) -> None:
    """Each row within its rounding."""
    request = resolve(VideoRequest(prompt="", model="t2v-a14b"))
    plan = make_plan(request, catalogue_machine(card_named("rtx5090")))
    (parts,) = (stage.device_bytes for stage in plan.stages if stage.stage == "denoise")
    said = re.search(r"\| ([\d.]+) GiB \|$", row(begin))
    assert said
    assert sum(parts[name] for name in names) / 2**30 == pytest.approx(float(said[1]), abs=0.051)
    assert f"About {sum(parts.values()) / 2**30:.1f} GiB in all" in TEXT
