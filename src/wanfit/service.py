"""The whole story of one clip: request, checks, plan, generation, file, report.

Whatever can be refused is refused first, in milliseconds: the request, the image, the place to
write, the absence of weights, a machine that is too small. Only then is torch imported and the
first weight read. The pipeline is a generator of events; this module drives it, so progress,
cancelling (any exception raised by `on_event`, or a signal) and measuring need nothing from the
engine. Left out: queues, which a later issue brings; `pull` downloads.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from wanfit.engine.weights import package
from wanfit.engine.weights.locate import Located, locate
from wanfit.errors import BadOption, DoesNotFit, OutOfMemory
from wanfit.events import Event, FramesReady, Notice, StageBegan, StepDone, WeightsMoved
from wanfit.media import ContactSheet, Output, VideoWriter, check_output, check_sheet, read_image
from wanfit.plan.amounts import parse_bytes, show_bytes
from wanfit.plan.bytes import CUDA_CONTEXT_BYTES
from wanfit.plan.command import read_precision
from wanfit.plan.machine import Machine, own_bytes, read_machine
from wanfit.plan.plan import Plan
from wanfit.plan.planner import make_plan
from wanfit.plan.rates import measure_disk, remember_rates
from wanfit.report import Report, Started
from wanfit.request import ResolvedRequest, VideoRequest, resolve
from wanfit.specs import ModelSpec, spec_named

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from wanfit.engine.meter import Meter
    from wanfit.engine.weights.depot import Depot

DEMO_DIRECTORY = package.DEMO_DIRECTORY
DEFAULT_DIRECTORY = Path("outputs")
# torch's allocator then grows and shrinks its blocks: 12 to 15 % less reserved while denoising than
# by default, 3 to 11 % less while decoding; cudaMallocAsync lies between (benchmarks/RESULTS.md).
ALLOCATOR_VARIABLE, ALLOCATOR = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
TIGHTER = 0.85  # ours: of the budget, for the one retry after memory ran out
LARGE_FILE_BYTES = 1 << 30  # ours: a smaller one is in no disk's steady state
SLUG_CHARS = 48  # ours: a file name that still fits a line

OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Planned:
    """A request with its weights found and its plan made; nothing was loaded."""

    plan: Plan
    weights: Located
    machine: Machine
    device: str
    replan: Callable[[int | None, str], Plan]  # for a VRAM budget and a device


@dataclass(frozen=True, slots=True)
class _Order(Planned):
    """Everything about one clip that was checked and planned without torch."""

    image: Image.Image | None
    output: Output
    sheet: Path | None
    previews: bool


def generate(  # noqa: PLR0913  each is one thing that a caller may say; a bag would hide them
    prompt: str | VideoRequest,
    *,
    output: str | Path | None = None,
    image: str | Path | bytes | Image.Image | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    vram: str | int | None = None,
    ram: str | int | None = None,
    spec: ModelSpec | None = None,
    on_event: OnEvent | None = None,
    contact_sheet: bool | str | Path = False,
    depot: Depot | None = None,
    previews: bool = False,
    **options: Any,
) -> Report:
    """Makes one clip and writes it to `output`.

    prompt: what to show; or a whole VideoRequest, which then excludes `options`.
    output: a .mp4, .gif or .npy file, or a directory for PNG frames; None: a new file in outputs/.
    image: the first frame, for models that take one: a path, the bytes of a file, or a picture.
    weights: a store, a model directory of any layout, or a file in one; None: the best that
    is on this machine (`weights.locate`).
    device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
    precision: "fp32", "bf16", "fp8" or "auto" (bf16 on CUDA, fp32 on the CPU, fp8 if stored so).
    vram, ram: the most bytes to hold, as a number or as "12GiB"; None: nearly all that is free.
    spec: stands for the model named in the request, for one that `specs.MODELS` does not list.
    on_event: called with every event as it comes; what it raises ends the generation.
    contact_sheet: a PNG of eight frames: True puts it beside the clip, a path puts it there.
    depot: what a warm process keeps of weight files between clips; None: nothing is kept.
    previews: whether `on_event` gets a Preview of every step too.
    options: the fields of VideoRequest and their aliases (model, size, frames, steps, seed, ...).

    Raises BadRequest or DoesNotFit before torch is imported (but for a CUDA device that torch does
    not see), WeightsError before the first step, OutOfMemory when a tighter plan failed too.
    Whatever is raised, no partial file is left.
    """
    began_s = time.perf_counter()
    request = _request(prompt, options)
    spec = spec or spec_named(request.model)
    picture = None if image is None else read_image(image)
    resolved = resolve(request, spec, image_size=picture.size if picture else None)
    place = check_output(default_output(resolved) if output is None else output)
    kept = depot.registered_bytes + depot.ring_bytes if depot else 0
    held = own_bytes() - kept

    def machine(weights: Path) -> Machine:
        return replace(read_machine(weights=weights), process_bytes=max(0, held))

    planned = plan_request(
        resolved,
        machine,
        with_image=picture is not None,
        weights=weights,
        device=device,
        precision=precision,
        vram=vram,
        ram=ram,
    )
    order = _Order(
        plan=planned.plan,
        weights=planned.weights,
        machine=planned.machine,
        device=planned.device,
        replan=planned.replan,
        image=picture,
        output=place,
        sheet=_sheet_path(contact_sheet, place),
        previews=previews,
    )
    if order.weights.notice:
        _tell(on_event, order.weights.notice)
    report = _run(order, on_event, depot, began_s)
    if report.plan.device == "cuda":
        _learn_rates(order.machine, order.weights)
    return report


def plan_request(
    resolved: ResolvedRequest,
    machine: Callable[[Path], Machine],
    *,
    with_image: bool,
    weights: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    vram: str | int | None = None,
    ram: str | int | None = None,
) -> Planned:
    """Finds the weights of a request and plans it, as `generate` does before it imports torch.

    machine: gives the one to plan for, once it is known where the weights lie. The other options
    are those of `generate`. Raises BadOption, WeightsError or DoesNotFit.
    """
    device = _known_device(device)
    wanted = read_precision(precision)
    model = locate(resolved.spec, weights, wanted)
    stored = model.precision
    if wanted == "fp8" != stored:
        raise BadOption(
            f"precision is fp8, and the weights in {str(model.path)!r} are not",
            hint="wanfit convert --precision fp8 makes a store of them that is",
        )
    place = machine(model.path)
    ram_bytes = _budget(ram, "ram")

    def plan_within(vram_bytes: int | None, device: str) -> Plan:
        return make_plan(
            resolved,
            place,
            with_image=with_image,
            weights_precision=stored,
            precision=wanted,
            vram_budget_bytes=vram_bytes,
            ram_budget_bytes=ram_bytes,
            device=cast("Literal['auto', 'cpu', 'cuda']", device.partition(":")[0]),
        )

    return Planned(
        plan=plan_within(_budget(vram, "vram"), device),
        weights=model,
        machine=place,
        device=device,
        replan=plan_within,
    )


def default_output(request: ResolvedRequest, directory: Path = DEFAULT_DIRECTORY) -> Path:
    """A path in `directory` that names the clip and is not taken: model-prompt-seed.mp4."""
    words = re.sub(r"[^\w]+", "-", request.prompt.lower()).strip("-")
    slug = words[:SLUG_CHARS].rstrip("-") or "clip"
    stem = f"{request.spec.name}-{slug}-{request.seed}"
    path = directory / f"{stem}.mp4"
    count = 2
    while path.exists():
        path = directory / f"{stem}-{count}.mp4"
        count += 1
    return path


def _request(prompt: str | VideoRequest, options: dict[str, Any]) -> VideoRequest:
    if isinstance(prompt, VideoRequest):
        if options:
            raise BadOption(f"A whole request excludes other options, and {min(options)} was given")
        return prompt
    return VideoRequest.parse({"prompt": prompt, **options})


def _sheet_path(contact_sheet: bool | str | Path, output: Output) -> Path | None:
    if contact_sheet is False:
        return None
    path = output.path.with_suffix(".png") if contact_sheet is True else Path(contact_sheet)
    return check_sheet(path)


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise BadOption(f"device is {device!r}, not one of auto, cpu, cuda, cuda:N")
    return device


def _budget(amount: str | int | None, option: str) -> int | None:
    return parse_bytes(amount, option=option) if isinstance(amount, str) else amount


def _run(order: _Order, on_event: OnEvent | None, depot: Depot | None, began_s: float) -> Report:
    """Generates and writes a checked order, once more with less memory if it ran out."""
    os.environ.setdefault(ALLOCATOR_VARIABLE, ALLOCATOR)
    from wanfit.engine import device as devices

    plan = order.plan
    if order.device == "auto" and plan.device == "cuda" and not devices.sees_cuda():
        plan = order.replan(None, "cpu")
        _tell(on_event, "This torch has no CUDA, so the GPU that is here is not used")
    device = devices.torch_device(plan.device if order.device == "auto" else order.device)
    held = depot or _new_depot(device)
    try:
        for retried in (False, True):
            try:
                return _attempt(order, plan, held, on_event, began_s, retried=retried)
            except Exception as error:
                if not devices.is_out_of_memory(error):
                    raise
                wrong = devices.what_is_held(device, held)
            # Out of the handler, the traceback and all that its frames held are gone.
            held.release()
            devices.empty_cache(device)
            if not retried:
                plan = _tighter(order, plan, wrong)
                _tell(on_event, f"Memory ran out ({wrong}); trying again within less")
        raise _out_of_memory(plan, wrong)
    finally:
        if depot is None:
            held.release()
        devices.empty_cache(device)


def _learn_rates(machine: Machine, weights: Located) -> None:
    """Measures what the planner had to assume of this machine, once: about a second in all."""
    from wanfit.engine.device import measure_link

    if machine.gpu_uuid is not None and machine.link_source != "measured":
        remember_rates(gpu_uuid=machine.gpu_uuid, link_bytes_per_s=measure_link())
    if machine.disk_source == "assumed":
        largest = weights.largest_file()
        if largest.stat().st_size >= LARGE_FILE_BYTES:
            remember_rates(place=weights.path, disk_bytes_per_s=measure_disk(largest))


def _tell(on_event: OnEvent | None, message: str) -> None:
    if on_event:
        on_event(Notice(message))


def _new_depot(device: torch.device) -> Depot:
    from wanfit.engine.weights.depot import Depot

    return Depot(device)


def _tighter(order: _Order, plan: Plan, wrong: str) -> Plan:
    try:
        return order.replan(int(plan.vram_budget_bytes * TIGHTER), plan.device)
    except DoesNotFit:
        raise _out_of_memory(plan, wrong) from None


def _out_of_memory(plan: Plan, wrong: str) -> OutOfMemory:
    return OutOfMemory(
        f"Memory ran out, though {show_bytes(plan.device_peak_bytes)} were planned of"
        f" {show_bytes(plan.vram_budget_bytes)}; held then: {wrong}",
        hint="Another program may have taken GPU memory; give a lower --vram",
    )


def _attempt(
    order: _Order,
    plan: Plan,
    depot: Depot,
    on_event: OnEvent | None,
    began_s: float,
    *,
    retried: bool,
) -> Report:
    import torch

    from wanfit.engine.device import device_name, limit_memory
    from wanfit.engine.meter import Meter, process_age_s
    from wanfit.engine.pipeline import generate_frames

    request, device = plan.request, depot.device
    age_s = process_age_s() - (time.perf_counter() - began_s)  # of the process, at the call
    limit_memory(device, plan.vram_budget_bytes - CUDA_CONTEXT_BYTES)
    files = order.weights.open()

    settings = request.describe()
    tags = {**settings, "precision": plan.precision, "wanfit": version()}
    tally = _Tally(Meter(device), ContactSheet(request.num_frames))
    if order.weights.notice:
        tally.notices.append(order.weights.notice)
    events = generate_frames(plan, files, order.image, depot, previews=order.previews)
    with (
        depot.use(files),
        VideoWriter(order.output, fps=request.fps, metadata=tags) as writer,
        closing(events),
    ):
        for event in events:
            tally.take(event, writer)
            if on_event:
                on_event(event)
        assert tally.num_frames == request.num_frames, (tally.num_frames, request.num_frames)
    if order.sheet:
        tally.sheet.write(order.sheet)

    def since_start(moment_s: float | None) -> float | None:
        return None if moment_s is None else age_s + moment_s - began_s

    return Report(
        output=order.output.path,
        output_bytes=_size_bytes(order.output.path),
        contact_sheet=order.sheet,
        num_frames=tally.num_frames,
        settings=settings,
        weights=order.weights.path,
        device=device_name(device),
        precision=plan.precision,
        stages=tally.meter.finish(),
        plan=plan,
        weights_moved=tuple(tally.moved),
        retried=retried,
        total_s=time.perf_counter() - began_s,
        first_step_s=tally.first_step_s and tally.first_step_s - began_s,
        started=Started(
            call_s=age_s,
            first_block_ready_s=since_start(tally.first_block_ready_s),
            denoising_s=since_start(tally.denoising_s),
        ),
        write_s=writer.busy_s,
        notices=(*tally.notices, *depot.notices),
        versions={
            "wanfit": version(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    )


class _Tally:
    """What adds up while the events of one clip go by; moments are of time.perf_counter()."""

    def __init__(self, meter: Meter, sheet: ContactSheet) -> None:
        self.meter = meter
        self.sheet = sheet
        self.num_frames = 0
        self.moved: list[WeightsMoved] = []
        self.notices: list[str] = []
        self.denoising_s: float | None = None
        self.first_step_s: float | None = None

    @property
    def first_block_ready_s(self) -> float | None:
        return next((moved.first_ready_s for moved in self.moved if moved.stage == "denoise"), None)

    def take(self, event: Event, writer: VideoWriter) -> None:
        match event:
            case StageBegan(stage=stage):
                self.meter.begin(stage)
                if stage == "denoise":
                    self.denoising_s = time.perf_counter()
            case StepDone(stage="denoise", step=1):
                self.first_step_s = time.perf_counter()
            case FramesReady(frames=frames):
                writer.write(frames)
                self.sheet.add(frames)
                self.num_frames += len(frames)
            case WeightsMoved():
                self.moved.append(event)
            case Notice(message=message):
                self.notices.append(message)


@cache  # a look-up leaves a few objects behind each time
def version() -> str:
    """The installed version; a source tree on the path that is not installed has none."""
    try:
        return metadata.version("wanfit")
    except metadata.PackageNotFoundError:
        return "not installed"


def _size_bytes(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)
