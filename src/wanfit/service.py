"""The whole story of one clip: request, checks, generation, file, report.

Whatever can be refused is refused first, in milliseconds: the request, the image, the place to
write, the absence of weights. Only then is torch imported and the first weight read. The pipeline
is a generator of events; this module drives it, so progress, cancelling (any exception raised by
`on_event`, or a signal) and measuring need nothing from the engine.
Left out: planning memory, queues, downloads; later issues bring them.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfit.errors import BadOption, WeightsMissing
from wanfit.events import Event, FramesReady, Notice, StageBegan, StepDone
from wanfit.media import ContactSheet, Output, VideoWriter, check_output, check_sheet, read_image
from wanfit.request import ResolvedRequest, VideoRequest, resolve
from wanfit.specs import DEMO, ModelSpec, spec_named

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from wanfit.engine.meter import Meter, StageUse

DEMO_DIRECTORY = Path(__file__).parent / "demo"  # ships in the package; model_index.json is in it
DEFAULT_DIRECTORY = Path("outputs")
PRECISIONS = ("auto", "fp32", "bf16")
SLUG_CHARS = 48  # ours: a file name that still fits a line

OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What was made, with which settings, and what it cost."""

    output: Path
    output_bytes: int  # of the file, or of all PNG frames together
    contact_sheet: Path | None
    num_frames: int
    settings: dict[str, Any]  # ResolvedRequest.describe()
    weights: Path
    device: str
    precision: str
    stages: tuple[StageUse, ...]
    total_s: float  # from the call to the file on disk, importing torch included
    first_step_s: float | None  # from the call to the end of the first denoising step
    write_s: float  # of the decode stage, spent encoding and writing the file
    notices: tuple[str, ...]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; every measured key ends in its unit."""
        fields = asdict(self)
        fields["output"] = str(self.output)
        fields["weights"] = str(self.weights)
        fields["contact_sheet"] = str(self.contact_sheet) if self.contact_sheet else None
        for name in ("total_s", "first_step_s", "write_s"):
            fields[name] = _milliseconds(fields[name])
        for stage in fields["stages"]:
            stage["elapsed_s"] = _milliseconds(stage["elapsed_s"])
        return fields


@dataclass(frozen=True, slots=True)
class _Order:
    """Everything about one clip that was checked without torch."""

    request: ResolvedRequest
    image: Image.Image | None
    output: Output
    sheet: Path | None
    device: str
    precision: str
    weights: Path


def generate(  # noqa: PLR0913  each is one thing that a caller may say; a bag would hide them
    prompt: str | VideoRequest,
    *,
    output: str | Path | None = None,
    image: str | Path | bytes | Image.Image | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    spec: ModelSpec | None = None,
    on_event: OnEvent | None = None,
    contact_sheet: bool | str | Path = False,
    **options: Any,
) -> Report:
    """Makes one clip and writes it to `output`.

    prompt: what to show; or a whole VideoRequest, which then excludes `options`.
    output: a .mp4, .gif or .npy file, or a directory for PNG frames; None: a new file in outputs/.
    image: the first frame, for models that take one: a path, the bytes of a file, or a picture.
    weights: a model directory in diffusers layout; None: the one that ships with the package.
    device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
    precision: "fp32", "bf16" or "auto" (bf16 on CUDA, fp32 on the CPU).
    spec: stands for the model named in the request, for one that `specs.MODELS` does not list.
    on_event: called with every event as it comes; what it raises ends the generation.
    contact_sheet: a PNG of eight frames: True puts it beside the clip, a path puts it there.
    options: the fields of VideoRequest and their aliases (model, size, frames, steps, seed, ...).

    Raises BadRequest before torch is imported (but for a CUDA device that is not there),
    WeightsError before the first step. Whatever is raised, no partial file is left.
    """
    began_s = time.perf_counter()
    request = _request(prompt, options)
    spec = spec or spec_named(request.model)
    picture = None if image is None else read_image(image)
    resolved = resolve(request, spec, image_size=picture.size if picture else None)
    place = check_output(default_output(resolved) if output is None else output)
    order = _Order(
        request=resolved,
        image=picture,
        output=place,
        sheet=_sheet_path(contact_sheet, place),
        device=_known_device(device),
        precision=_known_precision(precision),
        weights=_weights_directory(spec, weights),
    )
    return _run(order, on_event, began_s)


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


def weights_here(spec: ModelSpec) -> Path | None:
    """The model directory that serves `spec` without being named; None when there is none."""
    if spec == DEMO and (DEMO_DIRECTORY / "model_index.json").is_file():
        return DEMO_DIRECTORY
    return None


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


def _weights_directory(spec: ModelSpec, weights: str | Path | None) -> Path:
    """A directory that has a model_index.json; what it holds is the engine's to check."""
    directory = weights_here(spec) if weights is None else Path(weights)
    hint = "Give a model directory in diffusers layout (--weights DIR)"
    if directory is None:
        raise WeightsMissing(f"The weights of {spec.name} are not here", hint=hint)
    if not directory.is_dir():
        raise WeightsMissing(f"There is no weights directory {str(directory)!r}", hint=hint)
    if not (directory / "model_index.json").is_file():
        raise WeightsMissing(f"{str(directory)!r} has no model_index.json", hint=hint)
    return directory


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise BadOption(f"device is {device!r}, not one of auto, cpu, cuda, cuda:N")
    return device


def _known_precision(precision: str) -> str:
    if precision not in PRECISIONS:
        raise BadOption(f"precision is {precision!r}, not one of {', '.join(PRECISIONS)}")
    return precision


def _run(order: _Order, on_event: OnEvent | None, began_s: float) -> Report:
    """Generates and writes a checked order. From here on torch is imported."""
    import torch

    from wanfit.engine.meter import Meter
    from wanfit.engine.pipeline import generate_frames
    from wanfit.engine.weights.directory import open_directory

    request = order.request
    device = _torch_device(order.device)
    precision = order.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = open_directory(order.weights, request.spec)

    settings = request.describe()
    tags = {**settings, "precision": precision, "wanfit": version()}
    tally = _Tally(began_s, Meter(device), ContactSheet(request.num_frames))
    events = generate_frames(request, weights, order.image, device, dtype)
    with VideoWriter(order.output, fps=request.fps, metadata=tags) as writer, closing(events):
        for event in events:
            tally.take(event, writer)
            if on_event:
                on_event(event)
        assert tally.num_frames == request.num_frames, (tally.num_frames, request.num_frames)
    if order.sheet:
        tally.sheet.write(order.sheet)
    return Report(
        output=order.output.path,
        output_bytes=_size_bytes(order.output.path),
        contact_sheet=order.sheet,
        num_frames=tally.num_frames,
        settings=settings,
        weights=order.weights,
        device=_device_name(device),
        precision=precision,
        stages=tally.meter.finish(),
        total_s=time.perf_counter() - began_s,
        first_step_s=tally.first_step_s,
        write_s=writer.busy_s,
        notices=tuple(tally.notices),
        versions={
            "wanfit": version(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    )


class _Tally:
    """What adds up while the events of one clip go by."""

    def __init__(self, began_s: float, meter: Meter, sheet: ContactSheet) -> None:
        self.meter = meter
        self.sheet = sheet
        self.num_frames = 0
        self.first_step_s: float | None = None
        self.notices: list[str] = []
        self._began_s = began_s

    def take(self, event: Event, writer: VideoWriter) -> None:
        match event:
            case StageBegan(stage=stage):
                self.meter.begin(stage)
            case StepDone(stage="denoise", step=1):
                self.first_step_s = time.perf_counter() - self._began_s
            case FramesReady(frames=frames):
                writer.write(frames)
                self.sheet.add(frames)
                self.num_frames += len(frames)
            case Notice(message=message):
                self.notices.append(message)


def _torch_device(device: str) -> torch.device:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return chosen
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = chosen.index or 0
    if index >= count:
        raise BadOption(
            f"device is {device!r}, and torch {torch.__version__} sees {count} CUDA devices",
            hint="Use --device cpu, or install a CUDA build of torch and its driver",
        )
    return torch.device("cuda", index)


def _device_name(device: torch.device) -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


def version() -> str:
    """The installed version; a source tree on the path that is not installed has none."""
    try:
        return metadata.version("wanfit")
    except metadata.PackageNotFoundError:
        return "not installed"


def _size_bytes(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
