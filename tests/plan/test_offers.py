"""The catalogue's answer to one request, and price lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from wanfit.errors import BadOption
from wanfit.plan.cards import CARDS
from wanfit.plan.offers import offers_of, read_prices
from wanfit.request import VideoRequest, resolve

REQUEST = resolve(VideoRequest(prompt="", model="t2v-a14b"))


def test_every_card_answers_with_a_plan_or_a_reason() -> None:
    offers = offers_of(
        REQUEST,
        with_image=False,
        precision="auto",
        vram_budget_bytes=6 << 30,
        ram_bytes=None,
        prices={"RTX 4090": 0.72},
    )
    assert [offer.card for offer in offers] == list(CARDS)
    for offer in offers:
        assert (offer.plan is None) == (offer.why_not is not None)
        assert offer.why_not is None or " short, " in offer.why_not
        assert offer.cost is None or offer.card.name == "RTX 4090"


def test_cost_is_hours_times_price() -> None:
    (offer,) = (
        offer
        for offer in offers_of(
            REQUEST,
            with_image=False,
            precision="fp8",
            vram_budget_bytes=None,
            ram_bytes=None,
            prices={"RTX 4090": 0.72},
        )
        if offer.card.name == "RTX 4090"
    )
    assert offer.plan is not None
    assert offer.cost == pytest.approx(offer.plan.seconds * 0.72 / 3600)


@pytest.mark.parametrize(
    "text",
    [
        '{"RTX 4090": 0.69, "h100": 2.5, "MI300X": 1}',
        "RTX 4090,0.69\nh100,2.5\nMI300X,1\n",
        "card,per hour\nrtx4090,0.69\n\nNVIDIA H100 80GB HBM3,2.5\n",
        "MI300X,1\nrtx4090,0.69\nh100,2.5\n",
    ],
)
def test_price_lists(tmp_path: Path, text: str) -> None:
    """JSON or CSV, with or without names of columns; names as people and RunPod write them."""
    path = tmp_path / "prices"
    path.write_text(text)
    assert read_prices(path) == {"RTX 4090": 0.69, "H100 SXM": 2.5}


@pytest.mark.parametrize(
    "text",
    ["", "{}", "{", "[1]", '{"RTX 4090": "free"}', '{"RTX 4090": -1}', "RTX 4090\n", "MI300X,1",
     '{"RTX 4090": true}', "RTX 4090,nan", "RTX 4090,"],
)  # fmt: skip
def test_what_is_no_price_list_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices"
    path.write_text(text)
    with pytest.raises(BadOption, match="prices"):
        read_prices(path)
    with pytest.raises(BadOption):
        read_prices(tmp_path / "none")
