"""What `wanfit plan` does with its options: a request, a machine, and the answer in print or JSON.

Beside the command line itself, so that other edges can take the same words (`read_budget` is
what `--vram` and `--ram` mean everywhere).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from wanfit.errors import BadOption
from wanfit.plan import show
from wanfit.plan.amounts import parse_bytes, show_bytes
from wanfit.plan.cards import card_named
from wanfit.plan.machine import (
    Machine,
    catalogue_machine,
    machine_to_json,
    read_machine,
    read_machine_file,
)
from wanfit.plan.offers import CardOffer, offers_of, read_prices
from wanfit.plan.plan import Plan, Precision
from wanfit.plan.planner import make_plan
from wanfit.request import ResolvedRequest, VideoRequest, resolve

if TYPE_CHECKING:
    from rich.console import Console

PIPE_COLUMNS = 120  # ours: wide enough for the table of all cards
Wanted = Precision | Literal["auto"]
OnDevice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of one call, checked."""

    request: ResolvedRequest
    with_image: bool
    precision: Wanted
    device: OnDevice
    vram_bytes: int | None  # None: as much as there is
    ram_bytes: int | None


def ask(
    model: str,
    image_size: tuple[int, int] | None,
    options: Mapping[str, Any],
    *,
    precision: str = "auto",
    device: str = "auto",
    vram: str | None = None,
    ram: str | None = None,
) -> Asked:
    """Checks a command's options. Raises BadRequest for the first that is wrong."""
    given = VideoRequest.parse({"prompt": "", "model": model, **options})
    request = resolve(given, image_size=image_size or _stand_in(given))
    return Asked(
        request=request,
        with_image=image_size is not None or request.spec.needs_image,
        precision=read_precision(precision),
        device=_read_device(device),
        vram_bytes=read_budget(vram, "--vram"),
        ram_bytes=read_budget(ram, "--ram"),
    )


def read_budget(text: str | None, option: str) -> int | None:
    """Bytes of an option such as "12GiB"; None where it was not given. Raises BadOption."""
    return None if text is None else parse_bytes(text, option=option)


def read_precision(text: str) -> Wanted:
    """The precision of that name, or "auto". Raises BadOption."""
    for known in ("auto", *get_args(Precision)):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise BadOption(f"precision is {text!r}, not one of auto, {', '.join(get_args(Precision))}")


def machine_for(asked: Asked, gpu: str | None, file: str | None) -> Machine:
    """The machine to plan for: of the catalogue, of a file, or this one.

    Raises BadOption for an unknown card, a file that cannot be read, or both together.
    """
    if gpu is not None and file is not None:
        raise BadOption("--gpu and --machine both name the machine, and one of them has to go")
    if gpu is not None:
        return catalogue_machine(card_named(gpu), ram_bytes=asked.ram_bytes)
    return read_machine() if file is None else read_machine_file(Path(file))


def plan_one(asked: Asked, machine: Machine) -> Plan:
    """The plan for one machine. Raises DoesNotFit."""
    return make_plan(
        asked.request,
        machine,
        with_image=asked.with_image,
        precision=asked.precision,
        vram_budget_bytes=asked.vram_bytes,
        ram_budget_bytes=asked.ram_bytes,
        device=asked.device,
    )


def plan_all(asked: Asked, price_file: str | None) -> list[CardOffer]:
    """One offer for each card of the catalogue."""
    return offers_of(
        asked.request,
        with_image=asked.with_image,
        precision=asked.precision,
        vram_budget_bytes=asked.vram_bytes,
        ram_bytes=asked.ram_bytes,
        prices={} if price_file is None else read_prices(Path(price_file)),
    )


def plan_json(plan: Plan, machine: Machine) -> dict[str, Any]:
    """The plan and its machine as plain values."""
    return {**show.plan_json(plan), "machine": machine_to_json(machine)}


def offers_json(offers: list[CardOffer]) -> dict[str, Any]:
    """Every card's offer as plain values."""
    return {"cards": show.offers_json(offers)}


def print_plan(plan: Plan, machine: Machine) -> None:
    """The plan for people, on stdout."""
    console = _console()
    name = machine.gpu or f"{machine.num_cores} CPU cores"
    if plan.device == "cpu":
        name = f"{machine.num_cores} CPU cores"
    console.print(show.plan_title(plan, f"{name} with {_ram_of(plan)} of RAM"))
    console.print(show.plan_table(plan))
    for line in show.plan_lines(plan):
        console.print(line, soft_wrap=True)


def print_offers(asked: Asked, offers: list[CardOffer], *, priced: bool) -> None:
    """Every card's offer for people, on stdout."""
    request = asked.request
    console = _console()
    console.print(
        f"{request.spec.name} {request.width}x{request.height}, {request.num_frames} frames,"
        f" {request.num_inference_steps} steps; times are estimates"
    )
    console.print(show.offers_table(offers, priced=priced))


def _console() -> Console:
    """stdout; a file or a pipe, which has no width, gets one at which no row is wrapped."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    return console


def _ram_of(plan: Plan) -> str:
    return show_bytes(plan.ram_budget_bytes)


def _stand_in(request: VideoRequest) -> tuple[int, int] | None:
    """The size of an image that the model needs and nobody named yet: the clip's own."""
    from wanfit.specs import spec_named

    spec = spec_named(request.model)
    return (spec.sampling.width, spec.sampling.height) if spec.needs_image else None


def _read_device(text: str) -> OnDevice:
    for known in get_args(OnDevice):
        if text == known or (known == "cuda" and text.startswith("cuda:")):
            return known  # type: ignore[no-any-return]
    raise BadOption(f"device is {text!r}, not one of {', '.join(get_args(OnDevice))}")
