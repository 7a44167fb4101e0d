"""Addresses of clips: of this server, signed and short-lived, or of S3.

A player or a browser's <video> sends no API key, and a key in an address would end up in logs. So a
link carries its end and a signature over what it opens, and opens nothing else. The secret lies
beside the jobs, so links survive a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

from wanfit.errors import BadSetting
from wanfit.jobs.job import Job
from wanfit.outputs import FILE_NAMES, OutputStore, Variant
from wanfit.serve.problems import Problem
from wanfit.settings import Settings
from wanfit.webhooks import Secret

SECRET_BYTES = 32


class Links:
    """Makes and checks links."""

    def __init__(self, secret: bytes, outputs: OutputStore, good_s: float) -> None:
        self._secret = secret
        self._outputs = outputs
        self._good_s = good_s

    def to(self, job: Job, base_url: str, variant: Variant = "video") -> str | None:
        """An address that gives a file of a completed job to anybody for a while."""
        if job.result is None or job.output_gone:
            return None
        name = file_name(job, variant)
        signed = self._outputs.url(job.result.key, round(self._good_s), variant, name)
        if signed is not None:
            return signed
        end_s = round(time.time() + self._good_s)
        sign = self._sign(job.id, variant, end_s)
        return f"{base_url}/v1/files/{job.id}/{variant}?end={end_s}&sign={sign}"

    def check(self, job_id: str, variant: str, end: str, sign: str) -> None:
        """Raises Problem for a link that is not ours, or is over."""
        end_s = int(end) if end.isascii() and end.isdecimal() and len(end) < 15 else 0
        expected = self._sign(job_id, variant, end_s)
        if not hmac.compare_digest(expected.encode(), sign.encode("utf-8", "replace")):
            raise Problem(403, "bad_signature", "This link was not made by this server")
        if time.time() > end_s:
            raise Problem(403, "link_expired", "This link is over", hint="Ask for the job again")

    def _sign(self, job_id: str, variant: str, end_s: int) -> str:
        text = f"{job_id}\n{variant}\n{end_s}".encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()


def read_secret(path: Path) -> bytes:
    """The secret of a data directory, made at its first use. Raises BadSetting."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with open(descriptor, "wb") as file:
                file.write(secrets.token_bytes(SECRET_BYTES))
        secret = path.read_bytes()
    except OSError as error:
        raise BadSetting(f"{str(path)!r} cannot be used: {error.strerror}") from error
    if len(secret) != SECRET_BYTES:
        raise BadSetting(f"{str(path)!r} is damaged", hint="Delete it; links made before end then")
    return secret


def webhook_secret(settings: Settings) -> Secret:
    """The one that was set, or one that is drawn once and kept beside the jobs."""
    if settings.webhook_secret is not None:
        return Secret.parse(settings.webhook_secret)
    return Secret(read_secret(settings.data / "webhook-secret"))


def file_name(job: Job, variant: Variant) -> str:
    """What a browser calls the file: made of the job's id alone."""
    return f"{job.id}{Path(FILE_NAMES[variant]).suffix}"
