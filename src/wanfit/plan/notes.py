"""What a person should know of a plan, one line each."""

from __future__ import annotations

from collections.abc import Iterator

from wanfit.plan.amounts import show_bytes
from wanfit.plan.case import Case, active_experts
from wanfit.plan.plan import Plan
from wanfit.plan.weights import TOKEN_EMBED, dit_units, umt5_units, vae_bytes


def notes_of(plan: Plan, case: Case) -> tuple[str, ...]:
    """The lines of `Plan.notes`: what is estimated, what is read when, what flags did."""
    return (
        *_about_machine(plan, case),
        *_about_weights(plan, case),
        *_about_vae(plan),
        *_about_flags(plan),
    )


def _about_machine(plan: Plan, case: Case) -> Iterator[str]:
    machine = case.machine
    if plan.device == "cpu":
        yield f"Seconds on {machine.num_cores} CPU cores are rough estimates"
        return
    others = machine.vram_total_bytes - machine.vram_free_bytes
    if others > machine.vram_total_bytes // 20:
        yield f"{show_bytes(others)} of the GPU are held by others"
    yield (
        f"Seconds are estimates for {machine.gpu}: compute {machine.compute_source},"
        f" link {machine.link_source}, disk {machine.disk_source}"
    )


def _about_weights(plan: Plan, case: Case) -> Iterator[str]:
    spec = plan.request.spec
    if case.stored == "fp32" and plan.precision != "fp32":
        yield (
            "The weights on disk are fp32 and are narrowed at every use:"
            " wanfit convert makes them half as large, and CUDA can then copy from the file"
        )
    if plan.precision == "fp8" and case.stored not in (None, "fp8"):
        yield "fp8 needs weights converted to it: wanfit convert --precision fp8"
    umt5 = sum(umt5_units(spec.umt5, plan.precision).values())
    umt5 -= umt5_units(spec.umt5, plan.precision)[TOKEN_EMBED]
    dits = sum(dit_units(spec.dit, plan.precision).values()) * len(active_experts(case))
    moved = int((umt5 + dits) * case.file_bytes_per_byte) + vae_bytes(spec.vae)
    yield (
        "Weights that are not in the page cache are read from disk once at first:"
        f" up to {show_bytes(moved)}, {moved / case.machine.disk_bytes_per_s:.0f} s"
    )
    mapped = _mapped_bytes(plan)
    if mapped and not plan.ring.direct:
        yield (
            f"Mapped blocks live in the page cache: up to {show_bytes(mapped)} of RAM that the"
            " plan does not count, since the kernel can take it back"
        )
    if plan.ring.direct:
        yield "RAM cannot hold what streams, so the disk is read again at every step"


def _mapped_bytes(plan: Plan) -> int:
    """Of the blocks that stream through the ring at every forward."""
    units = dit_units(plan.request.spec.dit, plan.precision)
    return sum(
        size
        for placement in plan.denoise.placements.values()
        for unit, size in units.items()
        if unit.startswith("blocks.") and placement.of(unit) == "mapped"
    )


def _about_vae(plan: Plan) -> Iterator[str]:
    if plan.cuts.vae_tile_px is not None:
        yield f"The VAE works in tiles of {plan.cuts.vae_tile_px} px, blended at a quarter overlap"
    if plan.device == "cuda":
        yield "The VAE is planned without cuDNN workspace, as measured with cuDNN 9.19"


def _about_flags(plan: Plan) -> Iterator[str]:
    """What became of the official scripts' memory flags. docs/memory.md says more."""
    flags = plan.request.memory_flags
    for name, value in flags.given().items():
        yield f"{name}={value}: {_answer(plan, name, value)}"


def _answer(plan: Plan, name: str, value: bool) -> str:
    on_gpu = plan.device == "cuda"
    if name == "t5_cpu":
        text = plan.stages[0]
        if not on_gpu:
            return "everything runs on the CPU here"
        return (
            f"the text encoder passes through the GPU block by block, in {text.seconds:.1f} s"
            f" and {show_bytes(sum(text.device_bytes.values()))}, whatever the flag says"
        )
    if name == "convert_model_dtype":
        agrees = value == (plan.precision != "fp32")
        return f"weights run in {plan.precision}" + (
            "" if agrees else "; --precision decides, not this flag"
        )
    if name == "init_on_cpu":
        return "no network is built anywhere first: blocks come from the file as they are used"
    blocks = plan.request.spec.dit.num_blocks
    resident = len(plan.denoise.placements["high_noise"].resident) - 1  # less the rest
    where = "on the GPU" if on_gpu else "in memory"
    return f"{resident} of {blocks} blocks of each transformer stay {where}, as the budget allows"
