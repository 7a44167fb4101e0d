"""The environment of the server, read once at the edge: variables to Settings.

A table says what each variable is for, how it is read and what holds without it; the manual's table
is tested against this one. What is illegal raises BadSetting, which names the variable. Left out:
the options of a clip, which are in the request, and the variables of S3's own client
(AWS_ACCESS_KEY_ID and so on), which it reads itself.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanfit.errors import BadOption, BadSetting
from wanfit.plan.amounts import parse_bytes

PREFIX = "WANFIT_"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one API key may do; without keys, what everybody may do together."""

    requests_per_s: float = 1000.0  # of any kind; ours: twice what one busy client needs
    jobs_per_minute: float = 600.0  # ours: ten a second, more than any GPU makes
    max_queued: int = 1000  # jobs that wait
    max_work: int | None = None  # of one job: pixels of a frame x frames x steps


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything about a server that is not about one job. Secrets are left out of its repr."""

    host: str = "127.0.0.1"
    port: int = 8000
    data: Path = Path("~/.local/share/wanfit/serve")
    database: str | None = None  # None: in `data`
    outputs: str | None = None  # None: in `data`
    s3_endpoint: str | None = None
    keep_s: float | None = None
    keep_bytes: int | None = None
    min_free_bytes: int = 1 << 30
    api_key: str | None = field(default=None, repr=False)
    limits: Limits = Limits()
    max_queued: int = 10_000  # of everybody
    max_body_bytes: int = 32 << 20  # RunPod takes 20 MB for /runsync; a base64 picture grows by 4/3
    body_s: float = 60.0
    public_url: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_targets: tuple[str, ...] = ()
    url_s: float = 3600.0
    model: str = "demo"
    device: str = "auto"
    precision: str = "auto"
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    job_s: float | None = None
    grace_s: float = 30.0
    cache: bool = False
    webhook_secret: str | None = field(default=None, repr=False)
    log_prompts: bool = False

    @property
    def database_url(self) -> str:
        """Where the jobs are: a path, or what the variable says."""
        return self.database or str(self.data / "jobs.sqlite3")

    @property
    def outputs_place(self) -> str:
        """A directory, or s3://bucket/prefix."""
        return self.outputs or str(self.data / "outputs")

    @property
    def keys_file(self) -> Path:
        """Where `wanfit keys` keeps the hashes of API keys."""
        return self.data / "keys.json"

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable of the environment: `WANFIT_` and the name in capitals."""

    name: str
    meaning: str
    read: Callable[[str], Any]
    fields: tuple[str, ...] = ()  # path in Settings; (): the name in small letters

    @property
    def path(self) -> tuple[str, ...]:
        return self.fields or (self.name.lower(),)


def _text(text: str) -> str:
    return text


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _flag(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false"):
        raise ValueError("not 0 or 1")
    return text.lower() in ("1", "true")


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _amount(text: str) -> int:
    try:
        return parse_bytes(text)
    except BadOption:
        raise ValueError("not an amount such as 12GiB or 500MB") from None


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"not a whole number from {low} to {high}")
        return int(text)

    return read


def _number(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise ValueError(f"not a number from {low:g} to {high:g}")
        return number

    return read


def _days(text: str) -> float:
    return _number(0.01, 36_500)(text) * 86_400


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError("not an address that begins with http:// or https://")
    return text.rstrip("/")


_MANY = 10**9

VARIABLES: tuple[Variable, ...] = (
    Variable("HOST", "The address to listen on. Any but a loopback one asks for an API key", _text),
    Variable("PORT", "The port; 0 takes a free one", _whole(0, 65_535)),
    Variable("DATA", "The directory of database, clips and keys", _path),
    Variable("DATABASE", "A file for SQLite, or postgresql://...", _text),
    Variable("OUTPUTS", "Where clips are kept: a directory, or s3://bucket/prefix", _text),
    Variable("S3_ENDPOINT", "The address of an S3 that is not Amazon's", _url),
    Variable("KEEP_DAYS", "After so many days a clip is deleted", _days, ("keep_s",)),
    Variable("KEEP_BYTES", "The oldest clips are deleted beyond so many bytes", _amount),
    Variable(
        "MIN_FREE",
        "So much of the disk stays free: the oldest clips go, then jobs wait",
        _amount,
        ("min_free_bytes",),
    ),
    Variable("API_KEY", "A key beside those of `wanfit keys`", _text),
    Variable(
        "REQUESTS_PER_SECOND",
        "Of one key",
        _number(0.01, _MANY),
        ("limits", "requests_per_s"),
    ),
    Variable(
        "JOBS_PER_MINUTE",
        "Of one key",
        _number(0.01, _MANY),
        ("limits", "jobs_per_minute"),
    ),
    Variable(
        "QUEUED_PER_KEY",
        "Jobs of one key that may wait",
        _whole(1, _MANY),
        ("limits", "max_queued"),
    ),
    Variable(
        "MAX_WORK",
        "The largest job: width x height x frames x steps",
        _whole(1, 10**15),
        ("limits", "max_work"),
    ),
    Variable("MAX_QUEUED", "Jobs of everybody that may wait", _whole(1, _MANY)),
    Variable("MAX_BODY", "The most bytes of a request", _amount, ("max_body_bytes",)),
    Variable(
        "BODY_SECONDS",
        "The time that a request's body may take",
        _number(0.1, 3600),
        ("body_s",),
    ),
    Variable("PUBLIC_URL", "The address that clients use, for links to clips", _url),
    Variable("ALLOWED_HOSTS", "More names that the Host header may have, with commas", _words),
    Variable("CORS_ORIGINS", "Origins whose pages may use the server, with commas", _words),
    Variable(
        "ALLOWED_TARGETS",
        "host:port of this network that URLs and webhooks may lead to, with commas",
        _words,
    ),
    Variable("URL_SECONDS", "How long a link to a clip is good", _number(1, 604_800), ("url_s",)),
    Variable("MODEL", "The model of a request that names none", _text),
    Variable("DEVICE", "auto, cpu, cuda or cuda:N", _text),
    Variable("PRECISION", "auto, fp32, bf16 or fp8", _text),
    Variable("VRAM", "The most GPU memory to hold", _amount, ("vram_bytes",)),
    Variable("RAM", "The most RAM to hold", _amount, ("ram_bytes",)),
    Variable(
        "JOB_SECONDS",
        "The most that one attempt at a job may take",
        _number(1, _MANY),
        ("job_s",),
    ),
    Variable(
        "GRACE_SECONDS",
        "At SIGTERM a running job has so long to finish; then it is queued again",
        _number(0, 86_400),
        ("grace_s",),
    ),
    Variable("CACHE", "1: the same request with the same seed gives the same clip at once", _flag),
    Variable("WEBHOOK_SECRET", "whsec_...: what webhooks are signed with", _text),
    Variable("LOG_PROMPTS", "1: prompts are written to the log", _flag),
)


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of an environment, by default this process's. Raises BadSetting.

    An empty variable is one that is not set.
    """
    environment = os.environ if environment is None else environment
    data_home = environment.get("XDG_DATA_HOME") or "~/.local/share"
    values: dict[str, Any] = {"data": Path(data_home).expanduser() / "wanfit" / "serve"}
    limits: dict[str, Any] = {}
    for variable in VARIABLES:
        name = PREFIX + variable.name
        text = environment.get(name, "").strip()
        if not text:
            continue
        try:
            value = variable.read(text)
        except ValueError as error:
            shown = "its value" if "KEY" in name or "SECRET" in name else repr(text[:100])
            raise BadSetting(f"{name} is {shown}, {error}", hint=variable.meaning) from None
        *parents, last = variable.path
        (limits if parents else values)[last] = value
    return Settings(**values, limits=Limits(**limits))
