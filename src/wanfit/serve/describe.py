"""What our OpenAPI says of bodies and answers, for routes that read their bodies themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from wanfit.request import ALIASES, VideoRequest
from wanfit.serve.problems import Face

IMAGE_FIELDS = (
    "image", "image_url", "image_base64", "reference_image_url", "reference_image_base64",
)  # fmt: skip
ANY_ERROR = (400, 401, 403, 404, 408, 413, 415, 421, 422, 429, 500, 503)
_TEXT = {"type": "string"}
_ERRORS: Mapping[Face, dict[str, Any]] = {
    "own": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message", "hint", "request_id"],
                "properties": dict.fromkeys(("code", "message", "hint", "request_id"), _TEXT),
            }
        },
    },
    "openai": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "code": _TEXT,
                    "param": {"type": ["string", "null"]},
                },
            }
        },
    },
    "runpod": {
        "type": "object",
        "required": ["status", "error"],
        "properties": {"status": {"const": "FAILED"}, "error": _TEXT},
    },
}


def errors(face: Face, statuses: Iterable[int] = ANY_ERROR) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route."""
    return {
        status: {
            "description": "An error",
            "content": {"application/json": {"schema": _ERRORS[face]}},
        }
        for status in statuses
    }


def file_answers(face: Face) -> dict[int | str, dict[str, Any]]:
    """The answers of a route that sends a file, whole or in part."""
    kinds: dict[str, Any] = {"video/mp4": {}, "image/webp": {}, "image/jpeg": {}}
    return errors(face, (*ANY_ERROR, 410, 416)) | {
        200: {"description": "The bytes", "content": kinds},
        206: {"description": "A range of them", "content": kinds},
        304: {"description": "The client has it"},
    }


def answer(schema: Mapping[str, Any], status: int = 200) -> dict[int | str, dict[str, Any]]:
    """The good answer of a route, in JSON."""
    return {
        status: {"description": "Done", "content": {"application/json": {"schema": dict(schema)}}}
    }


def thing(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An object with these fields, and perhaps more."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def video_fields(*, images: bool = True) -> dict[str, Any]:
    """The schema of what a clip may be asked by: our names, and those of other people's scripts."""
    schema = VideoRequest.model_json_schema()
    properties = dict(schema["properties"])
    del properties["prompt"]["title"]
    for alias, name in ALIASES.items():
        like: dict[str, Any] = properties.get(name) or properties["guidance_high"]
        properties[alias] = {**like, "description": f"Another name of {name}"}
    properties["guidance"] = {**properties["guidance_high"], "description": "Of both experts"}
    properties["size"] = {**_TEXT, "description": "WIDTHxHEIGHT", "pattern": r"^\d+[xX*]\d+$"}
    if images:
        for name in IMAGE_FIELDS:
            properties[name] = {
                **_TEXT, "description": "The first frame: an address, a data URL or base64",
            }  # fmt: skip
    return {"type": "object", "required": ["prompt"], "properties": properties}


def json_body(schema: Mapping[str, Any], *, required: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a route that reads JSON."""
    return {
        "requestBody": {
            "required": required,
            "content": {"application/json": {"schema": dict(schema)}},
        }
    }
