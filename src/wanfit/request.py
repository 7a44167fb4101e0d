"""What was asked, and the same with every default filled in.

One request for the command line, HTTP and RunPod, with the spellings that people have in scripts.
The input image is not a field: the edges read it (from a file, an upload, a URL) and pass it on.
"""

from __future__ import annotations

import re
import reprlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from wanfit.errors import BadImage, BadOption
from wanfit.geometry import geometry_of, size_for_image
from wanfit.specs import ModelSpec, Solver, spec_named

MAX_PROMPT_CHARS = 10_000  # ours: 512 tokens are read; this only bounds the work of tokenizing
MAX_SHOWN_CHARS = 160  # ours: of what was given, in a message of one line
MAX_STEPS = 1000  # one step per training timestep; more cannot differ
SHIFT_RANGE = (0.01, 100.0)  # ours: from where almost all steps see low noise, to high noise
SEED_LIMIT = 2**63  # official: generate.py draws from [0, sys.maxsize]

# Names from scripts for the official code, diffusers and ComfyUI -> ours.
ALIASES: Mapping[str, str] = {
    "task": "model",
    "frame_num": "num_frames",
    "frames": "num_frames",
    "sample_steps": "num_inference_steps",
    "steps": "num_inference_steps",
    "sample_shift": "shift",
    "sample_solver": "solver",
    "sample_guide_scale": "guidance",
    "guidance_scale": "guidance",
    "cfg": "guidance",
    "base_seed": "seed",
    "boundary_ratio": "boundary",
    "flow_shift": "shift",
    "guidance_scale_2": "guidance_low",  # diffusers: the first is of high noise, this of low
}

_SIZE = re.compile(r"\s*(\d{1,6})\s*[xX*]\s*(\d{1,6})\s*")


def _flag(given: object) -> object:
    """The official spellings of true and false; anything else is for pydantic to judge.

    official: wan/utils/utils.py, str2bool.
    """
    if not isinstance(given, str):
        return given
    word = given.strip().lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    return False if word in ("no", "false", "f", "n", "0") else given


# Which counts are legal is for geometry.py to say; this bound keeps absurd ones out of messages.
Count = Annotated[int | None, Field(ge=-(10**9), le=10**9)]
Guidance = Annotated[float | None, Field(ge=0, le=100)]
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
Flag = Annotated[bool | None, BeforeValidator(_flag)]
T = TypeVar("T")


class VideoRequest(BaseModel):
    """One clip, as asked; None means "the model's default". Unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: Text
    model: Annotated[str, Field(max_length=100)] = "demo"
    negative_prompt: Text | None = None
    width: Count = None  # px
    height: Count = None  # px
    num_frames: Count = None
    num_inference_steps: Annotated[int | None, Field(ge=1, le=MAX_STEPS)] = None
    shift: Annotated[float | None, Field(ge=SHIFT_RANGE[0], le=SHIFT_RANGE[1])] = None
    guidance_high: Guidance = None
    guidance_low: Guidance = None
    boundary: Annotated[float | None, Field(ge=0, le=1)] = None  # of a model with two experts
    solver: Solver | None = None
    seed: Annotated[int | None, Field(ge=-1, lt=SEED_LIMIT)] = None  # None, -1: drawn at random
    # Memory flags of the official scripts: hints to the planner, which says what it made of them.
    offload_model: Flag = None
    t5_cpu: Flag = None
    convert_model_dtype: Flag = None
    init_on_cpu: Flag = None

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, data: Any) -> Any:
        """Renames aliases, splits `size`, and lets `guidance` set both experts."""
        if not isinstance(data, Mapping):
            return data
        fields: dict[str, Any] = {}
        for name, value in data.items():
            target = ALIASES.get(name, name)
            if target in fields:
                raise ValueError(f"{name} is given twice, once under another name")
            fields[target] = value
        guidance = fields.pop("guidance", None)
        if guidance is not None:
            for name in ("guidance_high", "guidance_low"):
                if fields.get(name) is None:
                    fields[name] = guidance
        size = fields.pop("size", None)
        if size is not None:
            if fields.get("width") is not None or fields.get("height") is not None:
                raise ValueError("size excludes width and height")
            fields["width"], fields["height"] = parse_size(size)
        return fields

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> VideoRequest:
        """Validates untrusted fields. Raises BadOption, one line for the first thing wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise BadOption(_first_problem(error)) from None


@dataclass(frozen=True, slots=True)
class MemoryFlags:
    """What was said with the official scripts' memory flags; None: nothing."""

    offload_model: bool | None = None
    t5_cpu: bool | None = None
    convert_model_dtype: bool | None = None
    init_on_cpu: bool | None = None

    def given(self) -> dict[str, bool]:
        """Those that were said, by name."""
        named = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ResolvedRequest:
    """A request with every default filled in; its size and frame count are legal for `spec`."""

    spec: ModelSpec
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    shift: float
    guidance_high: float
    guidance_low: float
    boundary: float | None  # where the low-noise expert takes over; None: one expert
    solver: Solver
    seed: int
    memory_flags: MemoryFlags = MemoryFlags()

    def describe(self) -> dict[str, Any]:
        """Plain values for reports and file metadata; the model by its name.

        Without the memory flags: they change no frame, and the plan's notes tell of them.
        """
        left_out = ("spec", "memory_flags")
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in left_out}
        return {"model": self.spec.name, **fields}


def resolve(
    request: VideoRequest,
    spec: ModelSpec | None = None,
    *,
    image_size: tuple[int, int] | None = None,
) -> ResolvedRequest:
    """Fills in the model's defaults. Without a size, the clip takes the shape of the image.

    `spec` stands for the model named in the request, for one that `specs.MODELS` does not list.
    `image_size` is the input image's (width, height) in px, None when there is no image.
    Raises UnknownModel, BadImage, BadSize, BadFrameCount or BadOption.
    """
    spec = spec or spec_named(request.model)
    if image_size is None and spec.needs_image:
        raise BadImage(f"{spec.name} needs an image and got none", hint="Add one (--image FILE)")
    if image_size is not None and not spec.takes_image:
        raise BadImage(
            f"{spec.name} takes no image and got one",
            hint="Leave the image out, or use a model that takes one (wanfit models)",
        )
    defaults = spec.sampling
    width, height = _size(request, spec, image_size)
    num_frames = _given(request.num_frames, defaults.num_frames)
    geometry_of(spec, width, height, num_frames)  # raises for illegal ones
    seed = request.seed
    return ResolvedRequest(
        spec=spec,
        prompt=request.prompt,
        negative_prompt=_given(request.negative_prompt, defaults.negative_prompt),
        width=width,
        height=height,
        num_frames=num_frames,
        fps=defaults.fps,
        num_inference_steps=_given(request.num_inference_steps, defaults.num_inference_steps),
        shift=_given(request.shift, defaults.shift),
        guidance_high=_given(request.guidance_high, defaults.guidance_high),
        guidance_low=_given(request.guidance_low, defaults.guidance_low),
        boundary=_boundary(request, spec),
        solver=_given(request.solver, defaults.solver),
        seed=secrets.randbelow(SEED_LIMIT) if seed is None or seed < 0 else seed,
        memory_flags=MemoryFlags(
            offload_model=request.offload_model,
            t5_cpu=request.t5_cpu,
            convert_model_dtype=request.convert_model_dtype,
            init_on_cpu=request.init_on_cpu,
        ),
    )


def parse_size(size: object) -> tuple[int, int]:
    """(width, height) from "1280x704" or the official "1280*704". Raises ValueError."""
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise ValueError(f"size {_shown(size)} is not WIDTHxHEIGHT, as in 1280x704")
    return int(found[1]), int(found[2])


def _size(
    request: VideoRequest, spec: ModelSpec, image_size: tuple[int, int] | None
) -> tuple[int, int]:
    """(width, height): as given, else after the image, else the model's default."""
    if (request.width is None) != (request.height is None):
        raise BadOption("width and height go together, and one is missing")
    if request.width is not None and request.height is not None:
        return request.width, request.height
    width, height = spec.sampling.width, spec.sampling.height
    if image_size is None:
        return width, height
    return size_for_image(spec, *image_size, area_px=width * height)


def _boundary(request: VideoRequest, spec: ModelSpec) -> float | None:
    """As given or the model's; a model with one transformer has nothing to switch to."""
    if request.boundary is not None and spec.boundary is None:
        raise BadOption(
            f"boundary is {request.boundary}, and {spec.name} has one expert, so none",
            hint="Leave it out",
        )
    return _given(request.boundary, spec.boundary)


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _first_problem(error: ValidationError) -> str:
    """One line from pydantic's list: the field, what is wrong, and what was given."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    given = _shown(problem["input"])
    match problem["type"]:
        case "extra_forbidden":
            return f"There is no option {_shown(where)}"
        case "missing":
            return f"{where} is missing"
        case "literal_error":
            return f"{where} is {given}, not one of {', '.join(get_args(Solver))}"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}, got {given}" if where else reason


def _shown(value: object) -> str:
    """A short repr on one line of what a stranger sent: however long, deep or huge."""
    try:
        return reprlib.repr(value)[:MAX_SHOWN_CHARS]
    except ValueError:  # Python does not print integers of more than 4300 digits
        return "a number of thousands of digits"
