"""One thing that was looked at, and the looking: each function gives a Check and raises nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wanfit.doctor.torch_build import TorchBuild
from wanfit.errors import WanfitError
from wanfit.plan.amounts import show_bytes
from wanfit.plan.machine import Machine, begin_nvml

Status = Literal["ok", "note", "bad"]  # bad: the work cannot be done


@dataclass(frozen=True, slots=True)
class Check:
    """What was found, and what to change."""

    name: str
    status: Status
    found: str
    change: str = ""

    def to_json(self) -> dict[str, str]:
        return {
            "name": self.name, "status": self.status, "found": self.found, "change": self.change,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver: its version, and the newest CUDA that it runs, as (13, 0)."""

    version: str
    cuda: tuple[int, int]


def read_driver() -> Driver | None:
    """None: there is none, or it does not answer."""
    import pynvml  # type: ignore[import-untyped]

    try:
        begin_nvml()
        number = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        return Driver(
            str(pynvml.nvmlSystemGetDriverVersion()), (number // 1000, number % 1000 // 10)
        )
    except pynvml.NVMLError:
        return None


def check_gpu(machine: Machine, driver: Driver | None, *, needed: bool) -> Check:
    if machine.gpu is not None and machine.capability is not None:
        major, minor = machine.capability
        return Check(
            "GPU", "ok",
            f"{machine.gpu}, {show_bytes(machine.vram_total_bytes)}, of which"
            f" {show_bytes(machine.vram_free_bytes)} are free, compute capability {major}.{minor}",
        )  # fmt: skip
    why = "no NVIDIA driver answers" if driver is None else "the driver shows no GPU"
    if not needed:
        return Check("GPU", "note", f"none: {why}; clips are made on the CPU")
    return Check(
        "GPU", "bad", f"none: {why}",
        "Choose a GPU for the endpoint (docker run: --gpus all), or set WANFIT_DEVICE=cpu",
    )  # fmt: skip


def check_driver(driver: Driver, cuda: tuple[int, int] | None) -> Check:
    """cuda: of torch's build; None: there is nothing to compare."""
    newest = f"{driver.cuda[0]}.{driver.cuda[1]}"
    found = f"{driver.version}, for CUDA up to {newest}"
    # CUDA's minor version compatibility: a driver runs every CUDA of its own major version.
    if cuda is not None and driver.cuda[0] < cuda[0]:
        return Check(
            "driver", "bad", f"{found}, and torch is built for CUDA {cuda[0]}.{cuda[1]}",
            f"Allow only machines with CUDA {cuda[0]}.0 or later (RunPod: allowedCudaVersions),"
            " or install a torch that is built for an older one",
        )  # fmt: skip
    return Check("driver", "ok", found)


def check_torch(build: TorchBuild, machine: Machine) -> Check:
    """Whether torch's build has code for the card, and sees it."""
    if build.error:
        return Check("torch", "bad", build.error, "Install wanfit anew, with its torch")
    if machine.capability is None:
        return Check("torch", "ok", build.line)
    if build.cuda is None:
        return Check(
            "torch", "bad", f"{build.line}, which has no CUDA",
            "Install the torch that is built for CUDA; scripts/install_torch.py does",
        )  # fmt: skip
    major, minor = machine.capability
    if not build.has_code_for(machine.capability):
        return Check(
            "torch", "bad",
            f"{build.line}, built for {', '.join(build.architectures)}, and the card is"
            f" sm_{major}{minor}",
            "Install a torch that is built for this card, or choose another card",
        )  # fmt: skip
    if not build.sees_cuda:
        return Check(
            "torch", "bad", f"{build.line}, and it cannot use the card: {build.cuda_error}",
            "Restart the machine, or choose another one: driver and card do not go together",
        )  # fmt: skip
    return Check("torch", "ok", f"{build.line}, built for sm_{major}{minor}")


def check_ram(machine: Machine) -> Check:
    """RAM as this process may use it; whether it is enough is said for each model."""
    limited = machine.ram_limit_bytes < machine.ram_total_bytes
    limit = ", by its control group" if limited else ""
    return Check(
        "RAM", "ok",
        f"{show_bytes(machine.ram_available_bytes)} of"
        f" {show_bytes(machine.ram_limit_bytes)} are free{limit}",
    )  # fmt: skip


def check_disk(place: Path, margin_bytes: int) -> Check:
    """place: where clips and jobs go; the nearest directory that is there counts."""
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        free_bytes = shutil.disk_usage(place).free
    except OSError as error:
        return Check("disk", "bad", f"{place}: {error.strerror}", "Set WANFIT_DATA to a directory")
    found = f"{show_bytes(free_bytes)} are free at {place}"
    if free_bytes < margin_bytes:
        return Check(
            "disk", "bad", f"{found}, less than the margin of {show_bytes(margin_bytes)}",
            "Give the container a larger disk, or lower WANFIT_MIN_FREE",
        )  # fmt: skip
    return Check("disk", "ok", found)


def bad_setting(error: WanfitError) -> Check:
    return Check("settings", "bad", error.message, error.hint)


def as_json(checks: tuple[Check, ...]) -> list[dict[str, Any]]:
    return [check.to_json() for check in checks]
