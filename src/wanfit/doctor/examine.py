"""The whole examination: checks in the order of their cost, models, versions."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from wanfit.doctor.checks import (
    Check,
    as_json,
    check_disk,
    check_driver,
    check_gpu,
    check_ram,
    check_torch,
    read_driver,
)
from wanfit.doctor.torch_build import ask_torch
from wanfit.engine.weights.search import Findings, Found, command_for, search
from wanfit.errors import WanfitError
from wanfit.plan.machine import Machine, read_machine
from wanfit.plan.verdict import Verdict, verdict
from wanfit.settings import Settings
from wanfit.specs import DEMO, MODELS, ModelSpec, spec_named

PACKAGES = ("wanfit", "torch", "runpod")


@dataclass(frozen=True, slots=True)
class ModelHere:
    """The best that is here of one model, and whether it runs."""

    spec: ModelSpec
    found: Found | None
    answer: Verdict

    @property
    def is_usable(self) -> bool:
        found = self.found
        return found is not None and found.is_complete and found.runs_as_it_is

    @property
    def state(self) -> str:
        """In a word or a line."""
        if self.found is None:
            return "not here"
        if not self.found.is_complete:
            return f"incomplete: no {', '.join(self.found.missing)}"
        return "here" if self.is_usable else "quantised: wanfit convert makes a store of it"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found."""

    checks: tuple[Check, ...]
    models: tuple[ModelHere, ...]
    machine: Machine
    searched: tuple[tuple[Path, bool], ...]  # places, and whether they are there

    @property
    def is_fit(self) -> bool:
        return not any(check.status == "bad" for check in self.checks)

    def to_json(self, *, with_paths: bool = True) -> dict[str, Any]:
        """with_paths: for who owns the machine; without, for whoever may send it jobs."""
        checks = self.checks if with_paths else tuple(
            Check(check.name, check.status, check.found.split(" at /")[0], check.change)
            for check in self.checks
        )  # fmt: skip
        return {
            "ok": self.is_fit,
            "checks": as_json(checks),
            "models": [_model_json(one, with_paths=with_paths) for one in self.models],
            "machine": {
                "gpu": self.machine.gpu,
                "vram_total_bytes": self.machine.vram_total_bytes,
                "vram_free_bytes": self.machine.vram_free_bytes,
                "ram_limit_bytes": self.machine.ram_limit_bytes,
                "ram_available_bytes": self.machine.ram_available_bytes,
                "cores": self.machine.num_cores,
            },
            "versions": _versions(),
            **({"searched": {str(path): there for path, there in self.searched}}
               if with_paths else {}),
        }  # fmt: skip


def examine(settings: Settings, *, for_worker: bool, with_torch: bool = True) -> Diagnosis:
    """Looks at this machine. Raises nothing.

    for_worker: what a worker needs is asked for: a GPU unless the settings say cpu, and the model
    of the settings, whole and fitting. with_torch: torch is asked too, where all else is well.
    """
    driver = read_driver()
    findings = search()
    machine = read_machine()
    needs_gpu = for_worker and settings.device != "cpu"
    models = tuple(_model_here(spec, findings) for spec in MODELS)
    checks = [check_gpu(machine, driver, needed=needs_gpu), check_ram(machine)]
    checks.append(check_disk(settings.data, settings.min_free_bytes))
    if for_worker:
        checks.append(_check_model(settings, models, findings))
    is_well = not any(check.status == "bad" for check in checks)
    build = ask_torch() if with_torch and is_well else None
    used = machine if settings.device != "cpu" else replace(machine, gpu=None, capability=None)
    if driver is not None:
        checks.append(check_driver(driver, build.cuda if build and used.gpu else None))
    if build is not None:
        checks.append(check_torch(build, used))
    searched = tuple((one.place.path, one.exists) for one in findings.places)
    return Diagnosis(tuple(checks), models, machine, searched)


def _model_here(spec: ModelSpec, findings: Findings) -> ModelHere:
    found = findings.best(spec, "auto")
    machine = read_machine(weights=found.path) if found else read_machine()
    return ModelHere(spec, found, verdict(spec, machine, found.precision if found else None))


def _check_model(settings: Settings, models: tuple[ModelHere, ...], findings: Findings) -> Check:
    """The model of requests that name none: here, and within the memory of this machine."""
    try:
        spec = spec_named(settings.model)
    except WanfitError as error:
        return Check("model", "bad", error.message, error.hint or "Set WANFIT_MODEL")
    here = next(one for one in models if one.spec == spec)
    if not here.is_usable:
        return _missing(here, findings)
    found = here.found
    assert found is not None
    where = f"{spec.name}, {found.storage}, at {found.path}"
    if not here.answer.fits:
        return Check(
            "model", "bad", f"{spec.name} does not fit: {here.answer.words}",
            "Choose a card or a machine with more of it (wanfit plan --gpu all lists them), or"
            " ask for smaller clips and set WANFIT_MODEL to what fits",
        )  # fmt: skip
    return Check("model", "ok", f"{where}: {here.answer.line}")


def _missing(here: ModelHere, findings: Findings) -> Check:
    spec, found = here.spec, here.found
    if found is not None and found.is_complete:
        return Check("model", "bad", f"{spec.name} is quantised here", command_for(found))
    volumes = [one.place.path for one in findings.places if one.place.source == "RunPod"]
    has_volume = any(one.exists for one in findings.places if one.place.path in volumes)
    attach = "" if has_volume else "Attach a network volume that has it, or choose it as the"
    attach = attach and f"{attach} endpoint's cached model; or "
    pull = "" if spec == DEMO else f"set WANFIT_PULL={spec.name} to download it at the start"
    looked = ", ".join(str(one.place.path) for one in findings.places)
    return Check(
        "model", "bad", f"{spec.name} is {here.state}; looked in {looked}",
        (attach + pull)[:1].upper() + (attach + pull)[1:],
    )  # fmt: skip


def _model_json(one: ModelHere, *, with_paths: bool) -> dict[str, Any]:
    found = one.found
    path: dict[str, Literal[""] | str | None] = (
        {"path": None if found is None else str(found.path)} if with_paths else {}
    )
    return {
        "model": one.spec.name,
        "usable": one.is_usable,
        "state": one.state,
        "storage": None if found is None else found.storage,
        "bytes": None if found is None else found.num_bytes,
        "fits": one.answer.fits,
        "verdict": one.answer.line,
        "device": one.answer.device,
        **path,
    }


def _versions() -> dict[str, str | None]:
    """Of the packages that matter, read without importing them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
