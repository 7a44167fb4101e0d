"""The environment of a worker: that of the server, and what RunPod's users know.

`BUCKET_ENDPOINT_URL`, `BUCKET_ACCESS_KEY_ID` and `BUCKET_SECRET_ACCESS_KEY` are RunPod's own names:
all of them or none. Left out: the SDK's variables, which it reads itself.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from wanfit.errors import BadSetting
from wanfit.outputs import Credentials, Place
from wanfit.settings import Settings, read_settings

BUCKET_VARIABLES = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")
BUCKET_NAME_VARIABLE = "BUCKET_NAME"  # ours: where the address of the bucket does not have it
CONCURRENCY_VARIABLE = "WANFIT_CONCURRENCY"
MAX_CONCURRENCY = 16  # ours: one is made at a time, and the others wait in a worker that may end
URL_S = 604_800.0  # RunPod's rp_upload, and the most that a signature of S3 allows: a week
KEEP_S = 86_400.0  # ours: RunPod forgets a result after 30 minutes, and may ask again before

_IN_HOST = re.compile(r"(?P<bucket>[a-z0-9][a-z0-9.-]*?)\.(?P<rest>s3[.-].+)")
_REGION = re.compile(r"(?:^|\.)s3(?:api)?[.-](?P<region>[a-z0-9-]+)\.")


@dataclass(frozen=True, slots=True)
class BucketSettings:
    """A bucket, and whom it lets in."""

    place: Place
    credentials: Credentials


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Everything about a worker that is not about one job."""

    server: Settings  # data, limits and engine, as the server has them
    bucket: BucketSettings | None
    concurrency: int = 1  # jobs held at once; they are made one after the other


def read_worker_settings(environment: Mapping[str, str] | None = None) -> WorkerSettings:
    """The settings of an environment, by default this process's. Raises BadSetting."""
    environment = os.environ if environment is None else environment
    settings = read_settings(environment)
    defaults: Mapping[str, object] = {
        "WANFIT_DATA": {"data": settings.data.with_name("worker")},
        "WANFIT_URL_SECONDS": {"url_s": URL_S},
        "WANFIT_KEEP_DAYS": {"keep_s": KEEP_S},
    }
    for variable, values in defaults.items():
        if not environment.get(variable, "").strip():
            settings = replace(settings, **values)  # type: ignore[arg-type]
    data = Path(settings.data).expanduser().absolute()
    bucket = _bucket_of_environment(environment)
    if bucket is not None and settings.outputs is not None:
        raise BadSetting(
            "WANFIT_OUTPUTS and BUCKET_ENDPOINT_URL both say where clips are kept",
            hint="Set one of them",
        )
    return WorkerSettings(replace(settings, data=data), bucket, _concurrency(environment))


def bucket_at(endpoint: str, bucket: str | None, key_id: str, secret: str) -> BucketSettings:
    """A bucket by its address, which may have its name as S3's own addresses do.

    Raises BadSetting.
    """
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host:
        raise BadSetting(f"The bucket's address {endpoint[:200]!r} is not http(s)://HOST")
    path = [name for name in parts.path.split("/") if name]
    inner = _IN_HOST.fullmatch(host)
    if inner is not None and (bucket is None or bucket == inner["bucket"]):
        bucket, host = inner["bucket"], inner["rest"]
    elif bucket is not None and host.startswith(f"{bucket}."):
        host = host.removeprefix(f"{bucket}.")
    elif bucket is None and path:
        bucket = path.pop(0)
    if bucket is None:
        bucket = time.strftime("%m-%y")  # what RunPod's rp_upload takes without a name
    port = "" if parts.port is None else f":{parts.port}"
    region = _REGION.search(host)
    name = "[" + host + "]" if ":" in host else host
    place = Place.parse(f"s3://{'/'.join([bucket, *path])}", f"{parts.scheme}://{name}{port}")
    return BucketSettings(place, Credentials(key_id, secret, region and region["region"]))


def _bucket_of_environment(environment: Mapping[str, str]) -> BucketSettings | None:
    given = {name: environment.get(name, "").strip() for name in BUCKET_VARIABLES}
    bucket = environment.get(BUCKET_NAME_VARIABLE, "").strip() or None
    missing = [name for name, value in given.items() if not value]
    if len(missing) == len(BUCKET_VARIABLES) and bucket is None:
        return None
    if missing:
        raise BadSetting(
            f"The bucket is set up by half: {' and '.join(missing)} missing",
            hint=f"Set {', '.join(BUCKET_VARIABLES)} and perhaps {BUCKET_NAME_VARIABLE}, or none",
        )
    endpoint, key_id, secret = given.values()
    return bucket_at(endpoint, bucket, key_id, secret)


def _concurrency(environment: Mapping[str, str]) -> int:
    text = environment.get(CONCURRENCY_VARIABLE, "").strip() or "1"
    if not text.isdecimal() or not 1 <= int(text) <= MAX_CONCURRENCY:
        raise BadSetting(
            f"{CONCURRENCY_VARIABLE} is {text[:100]!r}, not a whole number from 1 to"
            f" {MAX_CONCURRENCY}"
        )
    return int(text)
