"""What a job is: as a face hands it in, as it is kept, as a worker holds it, as it is told about.

Plain frozen values, without a database. Times are Unix seconds and are for showing: nothing here
is decided by comparing two of them (`leases.py` says why).
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from wanfit.errors import BadOption, WanfitError
from wanfit.outputs import Kept

State = Literal["queued", "running", "completed", "failed", "cancelled", "expired"]
Face = Literal["runpod", "openai", "own"]
Order = Literal["asc", "desc"]
EventKind = Literal[
    "queued",  # accepted, or back in the queue; data: why, where it came back
    "started",  # data: attempt
    "stage",  # data: stage, steps (or null)
    "step",  # data: stage, step, steps
    "notice",  # data: message
    "preview",  # data: content_type, base64; only the newest of a job is kept
    "completed",
    "failed",  # data: code, message, hint
    "cancelled",
    "expired",
]

STATES: tuple[State, ...] = get_args(State)
FINAL_STATES: frozenset[State] = frozenset({"completed", "failed", "cancelled", "expired"})
ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")  # ours: safe in a URL, a header and a file name


def new_id(prefix: str = "") -> str:
    """An id that sorts by the millisecond in which it was drawn, and that nobody guesses."""
    return f"{prefix}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def check_id(job_id: str) -> str:
    """The id, where it is one that we keep. Raises BadOption."""
    if ID_PATTERN.fullmatch(job_id):
        return job_id
    raise BadOption(f"{job_id[:100]!r} is no job id", hint="1 to 80 of A-Z a-z 0-9 _ -")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed: an error that can be kept. Codes are those of `wanfit.errors`, and ours:

    worker_killed, worker_crashed, worker_hung: the GPU process ended under it too often.
    timed_out: an attempt took longer than `timeout_s`. attempts_exhausted: every attempt was lost.
    internal_error, gpu_error: a fault of wanfit, or of CUDA. output_lost: made, and not kept.
    """

    code: str
    message: str
    hint: str = ""
    plan: Mapping[str, Any] | None = None  # the memory plan, where the process died

    @classmethod
    def of(cls, error: WanfitError) -> Failure:
        return cls(error.code, error.message, error.hint)


@dataclass(frozen=True, slots=True)
class QueueLimit:
    """The most jobs that may wait, held in the transaction that accepts one. None: no limit."""

    queued: int | None = None
    queued_by_owner: int | None = None


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a face hands in, everything validated and planned at the door already."""

    face: Face
    owner: str  # the API key's id; "" without keys
    request: Mapping[str, Any]  # VideoRequest's fields, seed drawn: an attempt repeats exactly
    id: str | None = None  # a face may bring its own (RunPod's ids); None: drawn
    image: bytes | None = None  # the input image, checked and encoded anew as PNG
    priority: int = 0  # higher goes first
    idempotency_key: str | None = None  # the owner's; kept as a hash
    body_hash: str | None = None  # of what was asked: the same key with another one is refused
    dedupe_s: float | None = None  # a retry without a key: body_hash within so many seconds is it
    cache_key: str | None = None  # the owner's completed job with the same key answers at once
    deadline_s: float | None = None  # Unix time; past it a queued job becomes expired
    timeout_s: float | None = None  # of one attempt
    webhook: str | None = None
    expected_s: float = 0.0  # seconds by the plan
    plan: Mapping[str, Any] = field(default_factory=dict)  # plan_json
    extra: Mapping[str, Any] = field(default_factory=dict)  # what its face needs to answer with


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted job, as it is kept."""

    id: str
    face: Face
    owner: str
    request: Mapping[str, Any]
    has_image: bool
    priority: int
    state: State
    attempts: int  # begun so far
    cancel_requested: bool
    created_s: float
    started_s: float | None  # of the newest attempt
    ended_s: float | None
    deadline_s: float | None
    timeout_s: float | None
    percent: float  # of the newest attempt, by the plan's seconds; 100 when completed
    stage: str | None  # of wanfit.events.Stage, or "keep" while the files are put away
    step: int | None
    steps: int | None
    error: Failure | None
    result: Kept | None
    output_gone: bool  # completed, and its files were swept since
    cached: bool  # answered with the files of an earlier job
    report: Mapping[str, Any] | None  # Report.to_json()
    webhook: str | None
    expected_s: float
    plan: Mapping[str, Any]
    extra: Mapping[str, Any]

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's right to one attempt. A write that carries an older one is refused."""

    job: Job
    attempt: int
    lease: str  # drawn for this claim; letters and digits, good in a file name
    worker: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Where an attempt is."""

    percent: float
    stage: str | None = None
    step: int | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job; `seq` counts from 1 within the job, without reuse."""

    seq: int
    job_id: str
    at_s: float
    kind: EventKind
    percent: float
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Outlook:
    """Where a job stands in the queue, and when it should start and finish, by the plans."""

    position: int  # jobs before it; 0: next, or not waiting any more
    starts_s: float | None  # Unix time
    ends_s: float | None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of jobs; `has_more` says whether another follows after the last of them."""

    jobs: tuple[Job, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a webhook must hear; sent at least once, always with the same id."""

    id: str  # the webhook-id of Standard Webhooks
    job_id: str
    state: State  # the final state that it tells of
    url: str
    created_s: float
    attempts: int  # this one included
