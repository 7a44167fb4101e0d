"""How a finished clip gets to the caller: by an address in a bucket, or in the answer itself.

    the job's own s3Config -> the endpoint's bucket -> base64, where it fits -> an error that says
                                                                               what to set

The clip is kept before any of it, so whatever fails here, asking with the same job id gives it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanfit.errors import BadSetting
from wanfit.fetch import Guard
from wanfit.jobs.job import Job
from wanfit.outputs import Bucket, OutputStore
from wanfit.serve.links import file_name
from wanfit.serve.problems import Problem
from wanfit.serve.runpod_view import MAX_BASE64_BYTES, read_base64
from wanfit.worker.settings import BUCKET_VARIABLES, BucketSettings, bucket_at

UPLOAD_S = 120.0  # ours: for a bucket that is away; the clip waits for it on this machine
LOOK_S = 0.1  # ours: an upload takes seconds
CONFIG_FIELDS = ("endpointUrl", "bucketName", "accessId", "accessSecret")  # RunPod's s3Config


def job_bucket(body: Mapping[str, Any], guard: Guard) -> Bucket | None:
    """The bucket that a job brings along, tried with a probe: before the work, not after it.

    Raises Problem, BadUrl, StoreFailed.
    """
    config = body.get("s3Config")
    if not config:
        return None
    if not isinstance(config, dict):
        raise Problem(400, "bad_input", "`s3Config` is not an object", param="s3Config")
    values = [config.get(name) for name in CONFIG_FIELDS]
    missing = [
        name
        for name, value in zip(CONFIG_FIELDS, values, strict=True)
        if not isinstance(value, str) or not value.strip()
    ]
    if missing:
        raise Problem(
            400, "bad_input", f"`s3Config` is without {', '.join(missing)}",
            hint=f"Give {', '.join(CONFIG_FIELDS)}, or leave s3Config out", param="s3Config",
        )  # fmt: skip
    endpoint, name, key_id, secret = (str(value).strip() for value in values)
    guard.check(endpoint)
    try:
        found = bucket_at(endpoint, name, key_id, secret)
        bucket = Bucket(found.place, found.credentials)
    except BadSetting as error:  # the caller's setting, not the operator's
        raise Problem(400, "bad_input", error.message, param="s3Config") from None
    bucket.check()
    return bucket


def checked(settings: BucketSettings) -> BucketSettings:
    """The endpoint's own bucket, which takes a file now. Raises BadSetting, StoreFailed."""
    Bucket(settings.place, settings.credentials).check()
    return settings


def deliver(
    job: Job, outputs: OutputStore, url_s: float, bucket: Bucket | None, *, has_bucket: bool
) -> dict[str, str]:
    """`video_url` or `video_base64` of a completed job. has_bucket: `outputs` is one.

    It may take as long as an upload. Raises Problem, NotKept, StoreFailed.
    """
    result = job.result
    assert result is not None
    name = file_name(job, "video")
    if bucket is not None:
        with _file(outputs, result.key) as path:
            bucket.upload(path, name, result.content_type, {"sha256": result.sha256})
        return {"video_url": bucket.signed_url(name, int(url_s), result.content_type, name)}
    if has_bucket:
        url = _uploaded(outputs, result.key, url_s, name)
        if url is not None:
            return {"video_url": url}
    if result.num_bytes <= MAX_BASE64_BYTES:
        return {"video_base64": read_base64(outputs, result)}
    if has_bucket:
        raise Problem(
            503, "store_gone",
            f"The clip of {result.num_bytes} bytes was made, and its bucket did not take it in"
            f" {UPLOAD_S:g} s",
            hint="The clip is kept by its worker; the worker's log says what the bucket answers",
        )  # fmt: skip
    raise Problem(
        413, "output_too_large",
        f"The clip has {result.num_bytes} bytes, and an answer of RunPod holds"
        f" {MAX_BASE64_BYTES} of a video",
        hint=f"Set {', '.join(BUCKET_VARIABLES)} on the endpoint, or send s3Config with the job."
        " The clip is kept by its worker, and the same job id gives it",
    )  # fmt: skip


def _uploaded(outputs: OutputStore, key: str, url_s: float, name: str) -> str | None:
    until_s = time.monotonic() + UPLOAD_S
    while (url := outputs.url(key, int(url_s), "video", name)) is None:
        if time.monotonic() > until_s:
            return None
        time.sleep(LOOK_S)
    return url


@contextmanager
def _file(outputs: OutputStore, key: str) -> Iterator[Path]:
    """The clip as a file: its own, or for the time being a copy that was never whole in memory."""
    path = outputs.path(key)
    if path is not None:
        yield path
        return
    folder = Path(tempfile.mkdtemp(prefix="wanfit-"))
    try:
        copy = folder / "clip.mp4"
        with copy.open("wb") as file:
            file.writelines(outputs.open(key).pieces)
        yield copy
    finally:
        shutil.rmtree(folder, ignore_errors=True)
