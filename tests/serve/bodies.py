"""Bodies as strangers send them: nearly right, wrong in one place, or noise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from wanfit.request import ALIASES, VideoRequest
from wanfit.serve.describe import IMAGE_FIELDS

JSON_PATHS = ("/run", "/v1/videos", "/v1/plan", "/v1/jobs", "/v2/any/run")
OTHER_FIELDS = (
    "size", "guidance", "seconds", "fps", "extra_body", "input_reference", "return_video", "action",
    "params", "priority", "webhook", "timeout_s", "loras", "__proto__", "prompt\x00",
)  # fmt: skip
NAMES = sorted({*VideoRequest.model_fields, *ALIASES, *IMAGE_FIELDS, *OTHER_FIELDS})
ODD_TEXT = (
    "", " ", "\x00", "\ud800", "\u202e", "a" * 20_000, "64x64", "-1x9", "99999999x99999999", "NaN",
    "1e400", "true", "{}", "[", "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1/",
    "http://[::ffff:7f00:1]/", "data:image/png;base64,AAAA", "data:,x", "demo", "t2v-a14b",
    "{{7*7}}", "' or 1=1 --", "%00", "\r\nX: y",
)  # fmt: skip
ODD_NUMBERS = (
    0, -1, 1, 5, 6, 64, 65, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("inf"),
    float("-inf"), float("nan"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sent:
    """One request."""

    path: str
    content: bytes
    content_type: str


def values() -> st.SearchStrategy[Any]:
    leaves = (
        st.none()
        | st.booleans()
        | st.sampled_from(ODD_NUMBERS)
        | st.sampled_from(ODD_TEXT)
        | st.integers()
        | st.floats()
        | st.text(max_size=30)
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
        ),
        max_leaves=5,
    )


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly a small clip that is in order, with some fields that are anything."""
    base: dict[str, Any] = {"prompt": "x", "size": "64x64", "num_frames": 5, "steps": 2}
    if draw(st.integers(0, 3)) == 0:
        base = {name: value for name, value in base.items() if draw(st.booleans())}
    names = st.sampled_from(NAMES) | st.text(max_size=10)
    count = draw(st.sampled_from([0, 0, 1, 1, 2, 3]))
    return base | draw(st.dictionaries(names, values(), min_size=count, max_size=count))


@st.composite
def bodies(draw: st.DrawFn) -> Sent:
    """A request to one of the routes that read a body."""
    path = draw(st.sampled_from(JSON_PATHS))
    kind = draw(st.sampled_from(["json", "json", "json", "form", "bytes"]))
    if kind == "bytes":
        types = ["application/json", "multipart/form-data; boundary=b", "", "text/html", "\u00e9"]
        return Sent(path, draw(st.binary(max_size=200)), draw(st.sampled_from(types)))
    given = draw(fields())
    if kind == "form":
        return Sent("/v1/videos", _form(given, draw(st.binary(max_size=50))), _FORM_TYPE)
    if path.endswith("/run"):
        envelope = st.dictionaries(st.sampled_from(["policy", "webhook", "s3Config"]), values())
        given = {"input": given, **(draw(envelope) if draw(st.integers(0, 3)) == 0 else {})}
        if draw(st.integers(0, 3)) == 0:
            given["input"] = {"action": draw(values()), "params": given["input"]}
    text = json.dumps(given)
    return Sent(path, text.encode("utf-8", "surrogatepass"), "application/json")


_FORM_TYPE = "multipart/form-data; boundary=wanfit"


def _form(given: dict[str, Any], picture: bytes) -> bytes:
    lines = b""
    for name, value in given.items():
        text = value if isinstance(value, str) else json.dumps(value)
        lines += _part(f'name="{name}"', text.encode("utf-8", "surrogatepass"))
    if len(picture) % 2:
        lines += _part('name="input_reference"; filename="../x.png"', picture)
    return lines + b"--wanfit--\r\n"


def _part(disposition: str, data: bytes) -> bytes:
    head = f"--wanfit\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
    return head.encode("utf-8", "surrogatepass") + data + b"\r\n"
