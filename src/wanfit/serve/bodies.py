"""What came in a body, whatever its form: JSON, or the fields of a form. Nothing is believed.

A form has text alone, so values are read as the field's type asks by whoever validates them; what
is nested comes as `name[inner]` or as JSON in a field. Left out: what the fields mean.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from wanfit.errors import BadImage
from wanfit.media import UPLOAD_LIMITS
from wanfit.serve.problems import Problem

MAX_FORM_FIELDS = 100
MAX_FIELD_BYTES = 1 << 20  # of text; the longest prompt has a hundredth of it
LARGE_BYTES = 1 << 20  # ours: parsing more takes milliseconds, which belong into a thread
_NUL = re.compile(r"(?<!\\)(\\\\)*\\u0000")  # as JSON writes it, and not a backslash with "u0000"
_BRACKETS = re.compile(r"([A-Za-z0-9_]{1,64})\[([A-Za-z0-9_]{1,64})\]")
_DATA_URL = re.compile(r"data:[\w.+-]{0,60}/?[\w.+-]{0,60}(;[\w=.+-]{1,60}){0,4};base64,", re.ASCII)


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of a body, and the file that came with it."""

    fields: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)

    def digest(self) -> str:
        """Of what was asked, however it was written: a client that sends it again draws another
        boundary for its form."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        return digest_of([self.fields, files])


def digest_of(value: object) -> str:
    """Of plain values, whatever the order of their fields."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object of a body. Raises Problem. An empty body is an empty object."""
    return await _parsed(await request.body())


async def read_form(request: Request) -> Form:
    """The fields of a body in JSON, multipart or URL encoding. Raises Problem."""
    kind, _, options = request.headers.get("content-type", "").lower().partition(";")
    kind = kind.strip()
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        if kind not in ("", "application/json", "text/plain"):
            raise Problem(415, "unsupported_type", f"A body of type {kind[:60]!r} is not read")
        return Form(await _parsed(await request.body()))
    if "charset" in options and not re.search(r"charset=\"?utf-?8", options):
        raise Problem(415, "unsupported_charset", "A form is read in UTF-8 only")
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(
            max_files=4, max_fields=MAX_FORM_FIELDS, max_part_size=MAX_FIELD_BYTES
        ) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name in files or name in fields:
                        raise _twice(name)
                    files[name] = await value.read()
                else:
                    _put(fields, name, value)
    except Problem:
        raise
    except Exception as error:
        # The parser raises errors of its own and, for what it did not foresee, others; each is the
        # body's fault, since nothing else was read.
        why = getattr(error, "detail", None) or "it is malformed"
        raise Problem(400, "bad_form", f"The form cannot be read: {why}") from error
    check_text(fields)
    return Form(fields, files)


async def _parsed(body: bytes) -> dict[str, Any]:
    if len(body) > LARGE_BYTES:
        return await asyncio.to_thread(parse_object, body)
    return parse_object(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object of text that can be kept. Raises Problem."""
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        why = str(error)[:200] if isinstance(error, json.JSONDecodeError) else "it is malformed"
        raise Problem(400, "bad_json", f"The body is not JSON: {why}") from None
    if not isinstance(value, dict):
        raise Problem(400, "bad_json", "The body is not a JSON object")
    check_text(value)
    return value


def check_text(value: object) -> None:
    """Refuses text that no database keeps and no reply can carry: NUL, and halves of pairs."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        raise Problem(400, "bad_text", "The body has text or numbers that are not legal") from None
    if _NUL.search(text):
        raise Problem(400, "bad_text", "The body has a NUL character")


def _put(fields: dict[str, Any], name: str, value: str) -> None:
    """A field of a form; `name[inner]` goes into an object."""
    found = _BRACKETS.fullmatch(name)
    if found is None:
        if name in fields:
            raise _twice(name)
        fields[name] = value
        return
    outer = fields.setdefault(found[1], {})
    if not isinstance(outer, dict) or found[2] in outer:
        raise _twice(name)
    outer[found[2]] = value


def _twice(name: str) -> Problem:
    return Problem(400, "bad_form", f"The field {name[:60]!r} comes twice", param=name[:60])


@dataclass(frozen=True, slots=True)
class Picture:
    """An input image as it was given: its bytes, or where to get them."""

    data: bytes | None = None
    url: str | None = None


def picture_of(text: object, what: str) -> Picture:
    """From an address, a data URL or plain base64. Raises BadImage."""
    if not isinstance(text, str) or not text.strip():
        raise BadImage(f"{what} is not text", hint="Give an address, a data URL or base64")
    text = text.strip()
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://", text):
        return Picture(url=text)
    return Picture(data=decode_base64(text, what))


def decode_base64(text: object, what: str) -> bytes:
    """The bytes of base64 or of a data URL. Raises BadImage."""
    if not isinstance(text, str):
        raise BadImage(f"{what} is not text", hint="Give base64, or a data URL")
    text = text.strip()
    if text[:5].lower() == "data:":
        found = _DATA_URL.match(text)
        if found is None:
            raise BadImage(f"{what} is a data URL without base64", hint="data:image/png;base64,...")
        text = text[found.end() :]
    if len(text) * 3 // 4 > UPLOAD_LIMITS.max_bytes + 2:
        raise BadImage(
            f"{what} has {len(text) * 3 // 4} bytes, over the limit of {UPLOAD_LIMITS.max_bytes}",
            hint="Make it smaller",
        )
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadImage(f"{what} is not base64", hint="Give base64, or a data URL") from None


def only_picture(given: Mapping[str, Any]) -> Picture | None:
    """The one picture among fields that may have one under several names.

    `image_url` and `image_base64`, both with `reference_` too, and `image`, which is either.
    """
    found = {name: value for name, value in given.items() if value not in (None, "")}
    if len(found) > 1:
        raise BadImage(f"{' and '.join(sorted(found))} both name an image", hint="Give one")
    for name, value in found.items():
        if name.endswith("_base64"):
            return Picture(decode_base64(value, name))
        return picture_of(value, name)
    return None
