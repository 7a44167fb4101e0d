"""What a RunPod client sends, read: `input` in its two shapes, and what stands beside it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wanfit.serve.bodies import Picture, only_picture
from wanfit.serve.describe import IMAGE_FIELDS
from wanfit.serve.door import Asked
from wanfit.serve.problems import Problem

EXECUTION_RANGE_MS, TTL_RANGE_MS = (5_000, 604_800_000), (10_000, 604_800_000)  # RunPod's


@dataclass(frozen=True, slots=True)
class Order:
    """One `input`, read."""

    fields: Mapping[str, Any]
    picture: Picture | None
    wants_base64: bool
    status_of: str | None  # the older shape may ask for a job instead of making one


def read_input(body: Mapping[str, Any]) -> Order:
    """What a body's `input` asks for, in either shape. Raises Problem, BadImage."""
    given = body.get("input")
    if not isinstance(given, dict) or not given:
        raise Problem(400, "bad_input", "The body has no object `input`", param="input")
    if "action" not in given:
        return _order(given, given.get("return_video"))
    action, params = given["action"], given.get("params", {})
    if not isinstance(params, dict):
        raise Problem(400, "bad_input", "`params` is not an object", param="params")
    unknown = sorted(set(given) - {"action", "params", "return_video", "request_id"})
    if unknown:
        raise Problem(400, "bad_option", f"There is no option {unknown[0][:60]!r} beside `action`")
    if action == "request":
        return _order(params, given.get("return_video", params.get("return_video")))
    if action == "status":
        asked = given.get("request_id", params.get("request_id"))
        if not isinstance(asked, str) or not asked:
            raise Problem(400, "bad_input", "`params` has no `request_id`", param="request_id")
        return Order({}, None, _flag(given.get("return_video")), asked)
    raise Problem(400, "bad_input", "`action` is neither 'request' nor 'status'", param="action")


def _order(fields: Mapping[str, Any], return_video: object) -> Order:
    pictures = {name: fields[name] for name in IMAGE_FIELDS if name in fields}
    rest = {
        name: value for name, value in fields.items()
        if name not in pictures and name != "return_video"
    }  # fmt: skip
    return Order(rest, only_picture(pictures), _flag(return_video), None)


def _flag(given: object) -> bool:
    if given in (None, False, "false", 0):
        return False
    if given in (True, "true", 1):
        return True
    raise Problem(
        400, "bad_option", "`return_video` is neither true nor false", param="return_video"
    )


def read_envelope(
    body: Mapping[str, Any], order: Order, job_id: str, *, takes_bucket: bool = False
) -> Asked:
    """What stands beside `input`. takes_bucket: whether the caller sees to `s3Config` itself.

    Raises Problem.
    """
    if body.get("s3Config") and not takes_bucket:
        raise Problem(
            400, "unsupported", "This server does not write to a client's bucket",
            hint="Leave s3Config out, and fetch the clip from its address", param="s3Config",
        )  # fmt: skip
    policy = body.get("policy") or {}
    if not isinstance(policy, dict):
        raise Problem(400, "bad_input", "`policy` is not an object", param="policy")
    webhook = body.get("webhook")
    if webhook is not None and not isinstance(webhook, str):
        raise Problem(400, "bad_input", "`webhook` is not an address", param="webhook")
    execution_ms = _milliseconds(policy, "executionTimeout", EXECUTION_RANGE_MS)
    ttl_ms = _milliseconds(policy, "ttl", TTL_RANGE_MS)
    return Asked(
        face="runpod",
        fields=order.fields,
        picture=order.picture,
        id=job_id,
        priority=-1 if _flag(policy.get("lowPriority")) else 0,
        deadline_s=None if ttl_ms is None else time.time() + ttl_ms / 1000,
        timeout_s=None if execution_ms is None else execution_ms / 1000,
        webhook=webhook or None,
        extra={"return_video": order.wants_base64},
    )


def _milliseconds(policy: Mapping[str, Any], name: str, allowed: tuple[int, int]) -> int | None:
    given = policy.get(name)
    if given is None:
        return None
    low, high = allowed
    if isinstance(given, bool) or not isinstance(given, int) or not low <= given <= high:
        raise Problem(
            400, "bad_option", f"`policy.{name}` is not a whole number from {low} to {high}",
            param=f"policy.{name}",
        )  # fmt: skip
    return given
