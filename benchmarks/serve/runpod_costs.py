"""What a clip costs on each of RunPod's cards: the table of docs/runpod.md, from the planner.

    python -m benchmarks.serve.runpod_costs [PRICES]      prints Markdown

PRICES: a list as `wanfit plan --price` takes it; without it, RunPod's published flex prices in
runpod_flex_prices.csv. Seconds are the planner's estimates of one clip in a warm worker: the start
of a worker and its idle timeout are billed beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from wanfit.plan.command import ask
from wanfit.plan.offers import CardOffer, offers_of, read_prices

PRICES = Path(__file__).with_name("runpod_flex_prices.csv")
CLIPS = (
    ("ti2v-5b", {"size": "1280x704", "num_frames": 25, "num_inference_steps": 20}),
    ("ti2v-5b", {"size": "1280x704", "num_frames": 121, "num_inference_steps": 50}),
    ("t2v-a14b", {"size": "832x480", "num_frames": 81, "num_inference_steps": 40}),
    ("t2v-a14b", {"size": "1280x720", "num_frames": 81, "num_inference_steps": 40}),
)


def table(prices: Path = PRICES) -> str:
    """The rows in Markdown: a card with a price in each, dearest last."""
    listed = read_prices(prices)
    columns = [_offers(model, options, listed) for model, options in CLIPS]
    heads = [
        f"{model}, {options['size']}, {options['num_frames']} frames,"
        f" {options['num_inference_steps']} steps"
        for model, options in CLIPS
    ]
    lines = [
        f"| card | USD per hour | {' | '.join(heads)} |",
        f"| --- | --- | {' | '.join('---' for _ in heads)} |",
    ]
    for name in sorted(listed, key=lambda name: (listed[name], name)):
        cells = [_cell(column[name]) for column in columns]
        lines.append(f"| {name} | {listed[name]:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _offers(
    model: str, options: dict[str, object], prices: dict[str, float]
) -> dict[str, CardOffer]:
    asked = ask(model, None, options)
    offers = offers_of(
        asked.request, with_image=asked.with_image, precision="auto", vram_budget_bytes=None,
        ram_bytes=None, prices=prices,
    )  # fmt: skip
    return {offer.card.name: offer for offer in offers}


def _cell(offer: CardOffer) -> str:
    if offer.plan is None or offer.cost is None:
        return offer.why_not or "no"
    seconds = offer.plan.seconds
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{offer.cost:.3f} USD, {time}"


if __name__ == "__main__":
    print(table(*map(Path, sys.argv[1:2])))
