"""Whether a model runs on a machine at its default size, in a line: for lists of models."""

from __future__ import annotations

from dataclasses import dataclass

from wanfit.errors import WanfitError
from wanfit.plan.amounts import show_bytes
from wanfit.plan.machine import Machine
from wanfit.plan.plan import Precision
from wanfit.plan.planner import make_plan
from wanfit.request import VideoRequest, resolve
from wanfit.specs import ModelSpec


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a model runs here at its default size."""

    fits: bool
    words: str  # "24.1 GiB of GPU memory", or by how much it does not
    device: str | None
    device_peak_bytes: int | None
    host_peak_bytes: int | None

    @property
    def line(self) -> str:
        """For people."""
        return f"fits, {self.words}" if self.fits else f"no: {self.words}"


def verdict(spec: ModelSpec, machine: Machine, stored: Precision | None) -> Verdict:
    """The planner's answer for the model's default clip. `stored`: precision of a store."""
    request = resolve(
        VideoRequest(prompt="", model=spec.name),
        spec,
        image_size=(spec.sampling.width, spec.sampling.height) if spec.needs_image else None,
    )
    try:
        plan = make_plan(request, machine, with_image=spec.needs_image, weights_precision=stored)
    except WanfitError as error:
        return Verdict(False, error.message, None, None, None)
    peak = plan.device_peak_bytes if plan.device == "cuda" else plan.host_peak_bytes
    where = "of GPU memory" if plan.device == "cuda" else "of RAM, on the CPU"
    return Verdict(
        True,
        f"{show_bytes(peak)} {where}",
        plan.device,
        plan.device_peak_bytes if plan.device == "cuda" else None,
        plan.host_peak_bytes,
    )
