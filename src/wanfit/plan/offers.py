"""The same request on every card of the catalogue: who fits, how fast, at what price."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wanfit.errors import BadOption
from wanfit.plan.amounts import show_bytes
from wanfit.plan.cards import CARDS, Card, card_like
from wanfit.plan.case import Shortfall
from wanfit.plan.fit import fit
from wanfit.plan.machine import catalogue_machine
from wanfit.plan.plan import Plan, Precision
from wanfit.plan.planner import make_case
from wanfit.request import ResolvedRequest


@dataclass(frozen=True, slots=True)
class CardOffer:
    """What one card says to a request."""

    card: Card
    ram_bytes: int  # of the host that is assumed around it
    plan: Plan | None
    why_not: str | None
    cost: float | None  # of one clip, in the price list's currency


def offers_of(
    request: ResolvedRequest,
    *,
    with_image: bool,
    precision: Precision | Literal["auto"],
    vram_budget_bytes: int | None,
    ram_bytes: int | None,
    prices: Mapping[str, float],
) -> list[CardOffer]:
    """One offer per card. `prices`: card's name -> cost of an hour. RAM None: each card's usual."""
    offers = []
    for card in CARDS:
        machine = catalogue_machine(card, ram_bytes=ram_bytes)
        case = make_case(
            request,
            machine,
            with_image=with_image,
            weights_precision=None,
            precision=precision,
            vram_budget_bytes=vram_budget_bytes and min(vram_budget_bytes, card.vram_bytes),
            ram_budget_bytes=ram_bytes,
            device="cuda",
        )
        found = fit(case)
        plan = found if isinstance(found, Plan) else None
        hourly = prices.get(card.name)
        offers.append(
            CardOffer(
                card=card,
                ram_bytes=machine.ram_limit_bytes,
                plan=plan,
                why_not=_why(found) if isinstance(found, Shortfall) else None,
                cost=None if plan is None or hourly is None else plan.seconds / 3600 * hourly,
            )
        )
    return offers


def read_prices(path: Path) -> dict[str, float]:
    """Card's name -> cost of an hour, from JSON {"RTX 4090": 0.69} or CSV lines "RTX 4090,0.69".

    Names of cards that the catalogue does not have are left out. Raises BadOption for a file that
    cannot be read, a price that is none, or no name that is known.
    """
    try:
        text = path.read_text(encoding="utf-8")
        listed = _json_prices(text) if text.lstrip()[:1] == "{" else _csv_prices(text)
    except (OSError, ValueError) as error:
        raise BadOption(f"The price list {str(path)!r} cannot be read: {error}") from None
    known = {card.name: price for name, price in listed.items() if (card := card_like(name))}
    if not known:
        raise BadOption(
            f"The price list {str(path)!r} names no card of the catalogue",
            hint='Write {"RTX 4090": 0.69} or lines such as RTX 4090,0.69',
        )
    return known


def _json_prices(text: str) -> dict[str, float]:
    return {str(name): _price(price) for name, price in json.loads(text).items()}


def _csv_prices(text: str) -> dict[str, float]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if rows and len(rows[0]) > 1 and card_like(rows[0][0]) is None:
        rows = rows[1:] if not _is_number(rows[0][1]) else rows  # the names of the columns
    if any(len(row) < 2 for row in rows):
        raise ValueError("a line has no price")
    return {row[0]: _price(row[1]) for row in rows}


def _price(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no price")
    price = float(value)
    if not 0 <= price < 1e6:
        raise ValueError(f"{value!r} is no price")
    return price


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _why(short: Shortfall) -> str:
    missing = show_bytes(short.needed_bytes - short.budget_bytes)
    memory = "GPU" if short.memory == "GPU" else "RAM"
    return f"{memory} {missing} short, {short.stage}"
