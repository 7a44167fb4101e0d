"""What goes wrong, as a caller of the endpoint reads it: a JSON string in RunPod's `error` field.

A string, because the platform reports a job with an object there as completed. Never a traceback,
and of paths of this machine their last part alone.
"""

from __future__ import annotations

import json
import re
from typing import Any

from wanfit.serve.problems import Problem

# An absolute path of two parts or more, not a part of an address or of a fraction.
_PATH = re.compile(r"(?<![\w:/.*])/(?:[^\s/'\",;:()]+/)+([^\s/'\",;:()]*)")


def error_output(problem: Problem, request_id: str, *, refresh: bool = False) -> dict[str, Any]:
    """What a handler returns for an error. refresh: the worker is not to be used any more."""
    said = {
        "code": problem.code,
        "message": without_paths(problem.message),
        "hint": without_paths(problem.hint),
        "request_id": request_id,
    }
    output: dict[str, Any] = {"error": json.dumps(said, ensure_ascii=False)}
    if refresh:
        output["refresh_worker"] = True
    return output


def without_paths(text: str) -> str:
    """The text with files named, and where they lie on this machine left out."""
    return _PATH.sub(r"\1", text)
