from __future__ import annotations

import pytest

from wanfit.errors import BadOption
from wanfit.plan.cards import CARDS, card_like, card_named


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("rtx5090", "RTX 5090"),
        ("5090", "RTX 5090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("RTX-4090", "RTX 4090"),
        ("rtx 4060 ti", "RTX 4060 Ti 16GB"),
        ("4070 Ti Super", "RTX 4070 Ti SUPER"),
        ("a100", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("h100", "H100 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("6000 ada", "RTX 6000 Ada"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("l40s", "L40S"),
        ("Nvidia L40", "L40"),
        ("RTX 3060", "RTX 3060"),
    ],
)
def test_cards_are_found_however_spelled(spelled: str, name: str) -> None:
    """By habit, as the driver says it, and as RunPod says it."""
    assert card_named(spelled).name == name


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_names_and_has_sane_figures(card: object) -> None:
    from wanfit.plan.cards import Card

    assert isinstance(card, Card)
    assert card_named(card.name) is card
    if card.runpod_id:
        assert card_named(card.runpod_id) is card
    assert 8 << 30 < card.vram_bytes < 200 << 30
    assert 20e12 < card.bf16_flops < 3e15
    assert card.fp8_flops is None or 1.9 < card.fp8_flops / card.bf16_flops < 2.1
    assert (card.fp8_flops is None) == (card.capability < (8, 9))
    assert 10e9 < card.link_bytes_per_s < 60e9


@pytest.mark.parametrize(("wrong", "close"), [("rtx5190", "RTX 5090"), ("h1000", "H100")])
def test_an_unknown_card_names_the_closest(wrong: str, close: str) -> None:
    with pytest.raises(BadOption, match=rf"Did you mean '{close}"):
        card_named(wrong)
    assert card_like(wrong) is None


@pytest.mark.parametrize("nothing", ["", "nvidia", "  "])
def test_no_name_is_no_card(nothing: str) -> None:
    with pytest.raises(BadOption):
        card_named(nothing)
