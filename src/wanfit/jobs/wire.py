"""What the server and its GPU process say to each other: one JSON object in each line.

Two pipes of their own, since libraries print on stdout and stderr as they like. The server sends
orders, the GPU process news. Neither imports the other, and this file imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

EXIT_BROKEN = 70  # of the GPU process; sysexits.h, EX_SOFTWARE: it has said "broken"
EXIT_ORPHAN = 75  # sysexits.h, EX_TEMPFAIL: the server is gone

NewsKind = Literal[
    "ready",  # warm, and waits for an order; device: its name
    "stage",  # stage, steps (or null)
    "step",  # stage, step, steps
    "notice",  # message
    "preview",  # content_type, base64
    "finished",  # report: the clip lies where the order said
    "failed",  # code, message, hint: an error that is the request's or the machine's
    "no_room",  # message: the disk is full
    "cancelled",  # nothing is left of the attempt
    "broken",  # code, message: an error that nobody expected; the process ends after it
]


@dataclass(frozen=True, slots=True)
class Engine:
    """How one GPU process runs: the options of `service.generate` that are the server's to say."""

    device: str = "auto"
    precision: str = "auto"
    vram: str | int | None = None
    ram: str | int | None = None
    weights: Mapping[str, str] | None = None  # by model; another one is looked for on this machine


@dataclass(frozen=True, slots=True)
class Order:
    """One attempt: make this clip, and write it there."""

    attempt_id: str  # of job and lease; every piece of news says it again
    request: Mapping[str, Any]
    image_base64: str | None
    output: str
    engine: Engine

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Order:
        return cls(**{**fields, "engine": Engine(**fields["engine"])})


@dataclass(frozen=True, slots=True)
class News:
    """Something that the GPU process tells; attempt_id is "" where it is of none."""

    kind: NewsKind
    attempt_id: str
    data: Mapping[str, Any]


def as_line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def write_all(stream: IO[bytes], line: bytes) -> None:
    """All of it, to a stream without a buffer."""
    left = memoryview(line)
    while left:
        left = left[stream.write(left) :]


def read_lines(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Every message until the other side closes; a line that it died in is left out."""
    for line in stream:
        if line.endswith(b"\n"):
            yield json.loads(line)
