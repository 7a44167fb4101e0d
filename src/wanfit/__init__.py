"""wanfit: runs the Wan 2.2 video models on the GPU and memory you have.

    from wanfit import generate

    report = generate("a small red circle moves to the right on a blue background", output="a.mp4")

The public names are those of `__all__`. They are imported when first used, so that `import wanfit`
and `wanfit --help` stay fast and free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanfit.errors import BadRequest, NoRoom, WanfitError, WeightsError
    from wanfit.report import Report
    from wanfit.request import VideoRequest
    from wanfit.service import generate

__all__ = [
    "BadRequest",
    "NoRoom",
    "Report",
    "VideoRequest",
    "WanfitError",
    "WeightsError",
    "generate",
]

_HOMES = {
    "BadRequest": "wanfit.errors",
    "NoRoom": "wanfit.errors",
    "Report": "wanfit.report",
    "VideoRequest": "wanfit.request",
    "WanfitError": "wanfit.errors",
    "WeightsError": "wanfit.errors",
    "generate": "wanfit.service",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
