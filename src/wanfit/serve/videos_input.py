"""What OpenAI's client, or another, says to create a video, read into the fields of a clip.

The official client always sends a form, so numbers come as text, and what a user put into
`extra_body` comes as fields of their own; others send it as one JSON string, as an object, or as
`extra_body[name]`. All of it ends in one table of fields, where a name that nobody knows is an
error that says so. Names of Wan are diffusers' and SGLang's: `guidance_scale` is of the high-noise
expert (of both, where `guidance_scale_2` is not given), `guidance_scale_2` of the low-noise one.
vLLM-Omni has the two the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wanfit.errors import BadOption, WanfitError
from wanfit.request import ALIASES, VideoRequest
from wanfit.serve.bodies import Form, Picture, decode_base64, picture_of
from wanfit.serve.describe import IMAGE_FIELDS
from wanfit.serve.problems import Problem, problem_of
from wanfit.specs import ModelSpec, spec_named

MAX_SECONDS = 3600.0  # ours: beyond any model's frames; keeps absurd numbers out of arithmetic
SECONDS_DIGITS = 3
OWN_FIELDS = frozenset({*VideoRequest.model_fields, *ALIASES, "guidance", "size"})
KNOWN_FIELDS = OWN_FIELDS | {"seconds", "fps"}  # and what names a picture


@dataclass(frozen=True, slots=True)
class VideoOrder:
    """A body, read: nothing in it is validated but what OpenAI's names mean."""

    fields: Mapping[str, Any]  # of VideoRequest
    picture: Picture | None
    seconds: str | None  # as asked; None where the number of frames was


def read_order(form: Form, default_model: str) -> VideoOrder:
    """Raises Problem, with the name of the field."""
    fields = _merged(form)
    picture = _picture(fields, form.files)
    unknown = sorted(set(fields) - KNOWN_FIELDS)
    if unknown:
        raise Problem(
            400, "unknown_parameter", f"Unknown parameter: {unknown[0][:100]!r}",
            hint=f"Known are {', '.join(sorted(KNOWN_FIELDS))}", param=unknown[0][:100],
        )  # fmt: skip
    if "prompt" not in fields:
        raise Problem(400, "missing_parameter", "prompt is missing", param="prompt")
    spec = _spec(fields.get("model", fields.get("task", default_model)))
    _check_fps(fields.pop("fps", None), spec)
    seconds = fields.pop("seconds", None)
    if {"num_frames", "frame_num", "frames"} & set(fields):
        seconds = None
    elif seconds is not None:
        fields["num_frames"] = frames_of(seconds, spec)
    return VideoOrder(fields, picture, None if seconds is None else str(seconds))


def frames_of(seconds: object, spec: ModelSpec) -> int:
    """The legal number of frames that is nearest to so many seconds. Raises Problem."""
    try:
        length_s = float(seconds) if isinstance(seconds, str | int | float) else float("nan")
    except ValueError:
        length_s = float("nan")
    if isinstance(seconds, bool) or not 0 < length_s <= MAX_SECONDS:
        raise Problem(
            400, "bad_option", f"seconds is {str(seconds)[:60]!r}, not a number of seconds",
            param="seconds",
        )  # fmt: skip
    stride = spec.vae.stride_frames
    return max(1, round((length_s * spec.sampling.fps - 1) / stride) * stride + 1)


def seconds_text(num_frames: int, fps: float) -> str:
    """A length as OpenAI writes one: text, without needless zeros."""
    return f"{round(num_frames / fps, SECONDS_DIGITS):g}"


def param_of(error: WanfitError, fields: Mapping[str, Any]) -> str | None:
    """Which field an error is about: the one that its message begins with or quotes."""
    known = sorted({*fields, *VideoRequest.model_fields, "size"}, key=len, reverse=True)
    words = error.message.replace("'", " ").replace(":", " ").split()
    found = next((word for word in words[:5] if word in known), None)
    if found in ("width", "height") and found not in fields:
        return "size"
    return found or {
        "unknown_model": "model", "bad_image": "input_reference", "bad_size": "size",
        "bad_frame_count": "num_frames", "bad_url": "input_reference",
        "url_failed": "input_reference",
    }.get(error.code)  # fmt: skip


def _merged(form: Form) -> dict[str, Any]:
    """The fields with those of `extra_body` among them; a name that both have is refused."""
    fields = {name: value for name, value in form.fields.items() if value is not None}
    extra = fields.pop("extra_body", None)
    if isinstance(extra, str):
        try:
            extra = json.loads(extra)
        except (ValueError, RecursionError):
            raise Problem(
                400, "bad_option", "extra_body is not a JSON object", param="extra_body"
            ) from None
    if extra is None:
        return fields
    if not isinstance(extra, dict):
        raise Problem(400, "bad_option", "extra_body is not an object", param="extra_body")
    for name, value in extra.items():
        if name in fields:
            raise Problem(
                400, "bad_option", f"{name[:100]} is given twice, once in extra_body",
                param=name[:100],
            )  # fmt: skip
        if value is not None:
            fields[name] = value
    return fields


def _picture(fields: dict[str, Any], files: Mapping[str, bytes]) -> Picture | None:
    """The first frame, taken out of the fields: a file, an address, a data URL, or base64."""
    unknown = sorted(set(files) - {"input_reference", *IMAGE_FIELDS})
    if unknown:
        raise Problem(
            400, "unknown_parameter", f"Unknown parameter: {unknown[0][:100]!r}",
            hint="A file is sent as input_reference", param=unknown[0][:100],
        )  # fmt: skip
    names = [name for name in ("input_reference", *IMAGE_FIELDS) if name in fields]
    if len(names) + len(files) > 1:
        raise Problem(
            400, "bad_image", f"{' and '.join([*names, *files])} both name an image",
            hint="Give one", param="input_reference",
        )  # fmt: skip
    if files:
        return Picture(data=next(iter(files.values())))
    if not names:
        return None
    name = names[0]
    given = fields.pop(name)
    if isinstance(given, str) and given.lstrip().startswith("{"):  # an object in a form
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise Problem(400, "bad_image", f"{name} is not JSON", param=name) from None
    if isinstance(given, Mapping):
        if "file_id" in given or "image_url" not in given:
            raise Problem(
                400, "unsupported", f"{name} names no image_url",
                hint="This server keeps no files; send the picture, or its address", param=name,
            )  # fmt: skip
        given = given["image_url"]
    try:
        if name.endswith("_base64"):
            return Picture(data=decode_base64(given, name))
        return picture_of(given, name)
    except WanfitError as error:
        raise problem_of(error, param=name) from None


def _spec(name: object) -> ModelSpec:
    if not isinstance(name, str) or len(name) > 100:
        raise Problem(400, "bad_option", "model is not a name", param="model")
    try:
        return spec_named(name)
    except WanfitError as error:
        raise problem_of(error, param="model") from None


def _check_fps(given: object, spec: ModelSpec) -> None:
    """A model is trained at one rate; another would be the same frames, faster or slower."""
    if given is None:
        return
    fps = spec.sampling.fps
    try:
        same = not isinstance(given, bool) and float(given) == fps  # type: ignore[arg-type]
    except (TypeError, ValueError):
        same = False
    if not same:
        error = BadOption(
            f"fps is {str(given)[:40]!r}, and {spec.name} makes {fps} frames a second",
            hint="Leave fps out, and make the clip faster or slower afterwards",
        )
        raise problem_of(error, param="fps")
