"""One bucket of S3, or of a store that speaks like it: files up, bytes down, errors of ours.

boto3 speaks; what it raises becomes StoreGone where waiting may help, StoreRefused where only a
person can, NotKept for what is not there. Nothing is tried again here: `s3` knows how long.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanfit.errors import BadSetting, NotKept, StoreGone, StoreRefused

CONNECT_S, READ_S = 5.0, 30.0  # ours: to notice that a store is gone; no whole transfer is cut off
PART_BYTES = 16 << 20  # ours: 10,000 parts, which is S3's limit, then reach 160 GB
PARTS_AT_ONCE = 4  # ours: so 64 MiB of a file at most are in memory
READ_BYTES = 1 << 20  # ours: of what is read at once
DELETED_AT_ONCE = 1000  # S3's limit
DEFAULT_REGION = "us-east-1"  # what stores other than Amazon's take for want of regions
BUSY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
BUSY_CODES = frozenset({"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "InternalError"})
MISSING_CODES = frozenset({"404", "NoSuchKey", "NotFound"})

_PLACE = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")
_PREFIX = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


@dataclass(frozen=True, slots=True)
class Place:
    """Where in which bucket."""

    bucket: str
    prefix: str  # "" or "a/b/"
    endpoint_url: str | None  # None: Amazon's

    @classmethod
    def parse(cls, text: str, endpoint_url: str | None) -> Place:
        """From "s3://BUCKET/PREFIX". Raises BadSetting."""
        found = _PLACE.fullmatch(text)
        prefix = (found[2] or "").strip("/") if found else ""
        if found is None or (prefix and not _PREFIX.fullmatch(prefix)):
            raise BadSetting(f"{text[:200]!r} is not s3://BUCKET or s3://BUCKET/PREFIX")
        return cls(found[1], f"{prefix}/" if prefix else "", endpoint_url)

    def __str__(self) -> str:
        where = self.endpoint_url or "Amazon S3"
        return f"the bucket {self.bucket!r} at {where}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Whom a bucket lets in. Without them: those of the environment (AWS_ACCESS_KEY_ID, ...)."""

    key_id: str
    secret: str = field(repr=False)
    region: str | None = None


@dataclass(frozen=True, slots=True)
class Object:
    """One object, by its name without the prefix."""

    name: str
    num_bytes: int
    modified_s: float  # Unix time


class Bucket:
    """Raises BadSetting when the environment has no credentials, or half of them."""

    def __init__(self, place: Place, given: Credentials | None = None) -> None:
        import boto3  # type: ignore[import-untyped]
        from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped]
        from botocore.config import Config  # type: ignore[import-untyped]
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

        self.place = place
        try:
            session = boto3.Session(**({} if given is None else {
                "aws_access_key_id": given.key_id,
                "aws_secret_access_key": given.secret,
                "region_name": given.region,
            }))  # fmt: skip
            credentials = session.get_credentials()
            self._client = session.client(
                "s3",
                endpoint_url=place.endpoint_url,
                region_name=session.region_name or DEFAULT_REGION,
                config=Config(
                    signature_version="s3v4",
                    connect_timeout=CONNECT_S,
                    read_timeout=READ_S,
                    retries={"total_max_attempts": 1},  # `s3` tries again
                    # Checksums that Amazon added in 2025, which others do not know.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
            raise BadSetting(f"S3 is set up by half: {error}", hint=_CREDENTIALS) from None
        if credentials is None:
            raise BadSetting(
                f"Clips are kept in {place}, and there are no credentials for it",
                hint=_CREDENTIALS,
            )
        self._transfer = TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            max_concurrency=PARTS_AT_ONCE,
        )

    def check(self) -> None:
        """Writes and deletes a small object. Raises StoreFailed when that does not work."""
        name = {"Bucket": self.place.bucket, "Key": f"{self.place.prefix}.wanfit-probe"}
        with self._errors("a probe"):
            self._client.put_object(**name, Body=b"")
            self._client.delete_object(**name)

    def upload(self, path: Path, name: str, content_type: str, tags: Mapping[str, str]) -> None:
        """Sends a file in parts, read as they go. Raises StoreFailed, FileNotFoundError."""
        with self._errors(name):
            self._client.upload_file(
                str(path),
                self.place.bucket,
                self.place.prefix + name,
                ExtraArgs={"ContentType": content_type, "Metadata": dict(tags)},
                Config=self._transfer,
            )

    def size(self, name: str) -> int:
        """Bytes of an object. Raises StoreFailed."""
        with self._errors(name):
            head = self._client.head_object(Bucket=self.place.bucket, Key=self.place.prefix + name)
        return int(head["ContentLength"])

    def read(self, name: str, start: int, stop: int) -> tuple[Iterator[bytes], Any]:
        """Bytes [start, stop) piece by piece, and what to close. Raises StoreFailed, then too."""
        with self._errors(name):
            answer = self._client.get_object(
                Bucket=self.place.bucket,
                Key=self.place.prefix + name,
                Range=f"bytes={start}-{stop - 1}",
            )
        body = answer["Body"]
        return self._pieces(name, body), body

    def _pieces(self, name: str, body: Any) -> Iterator[bytes]:
        with self._errors(name):
            yield from body.iter_chunks(READ_BYTES)

    def signed_url(self, name: str, expires_s: int, content_type: str, save_as: str | None) -> str:
        """An address that gives an object to anybody for so long; nobody is asked."""
        wanted = {"ResponseContentType": content_type}
        if save_as is not None:
            safe = re.sub(r"[^A-Za-z0-9._-]+", "-", save_as)[:100]
            wanted["ResponseContentDisposition"] = f'attachment; filename="{safe}"'
        url: str = self._client.generate_presigned_url(
            "get_object",
            Params={"Bucket": self.place.bucket, "Key": self.place.prefix + name, **wanted},
            ExpiresIn=expires_s,
        )
        return url

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; one that is not there is no error. Raises StoreFailed."""
        keys = [{"Key": self.place.prefix + name} for name in names]
        for start in range(0, len(keys), DELETED_AT_ONCE):
            batch = keys[start : start + DELETED_AT_ONCE]
            with self._errors("files"):
                answer = self._client.delete_objects(
                    Bucket=self.place.bucket, Delete={"Objects": batch, "Quiet": True}
                )
            for failure in answer.get("Errors", ()):
                if failure.get("Code") not in MISSING_CODES:
                    raise StoreRefused(
                        f"{self.place} does not delete: {failure.get('Code')}", hint=_POLICY
                    )

    def objects(self, under: str = "") -> Iterator[Object]:
        """All objects whose names begin so. Raises StoreFailed."""
        prefix = self.place.prefix
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.place.bucket, Prefix=prefix + under
        )
        with self._errors("the list of files"):
            for page in pages:
                for entry in page.get("Contents", ()):
                    name = entry["Key"].removeprefix(prefix)
                    yield Object(name, entry["Size"], entry["LastModified"].timestamp())

    def abort_uploads(self, before_s: float) -> None:
        """Gives up uploads that nobody has finished: they cost room and no list shows them.

        A store that does not let us see them is left with them. Raises StoreGone.
        """
        with suppress(StoreRefused, NotKept), self._errors("unfinished uploads"):
            answer = self._client.list_multipart_uploads(
                Bucket=self.place.bucket, Prefix=self.place.prefix
            )
            for upload in answer.get("Uploads", ()):
                if upload["Initiated"].timestamp() < before_s:
                    self._client.abort_multipart_upload(
                        Bucket=self.place.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns what boto3 raises into ours. Nothing of its text but codes: it has addresses."""
        from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
        )

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            # boto3 wraps what an upload meets, and keeps it as context only.
            inner = error.__context__ if isinstance(error, Boto3Error) else error
            if isinstance(inner, FileNotFoundError):
                raise inner from None
            if isinstance(inner, ClientError):
                raise self._refused(inner, what) from None
            if isinstance(inner, NoCredentialsError):
                text = f"There are no credentials for {self.place}"
                raise StoreRefused(text, hint=_CREDENTIALS) from None
            raise StoreGone(
                f"{self.place} does not answer ({type(inner).__name__})", hint=_GONE
            ) from None

    def _refused(self, error: Any, what: str) -> NotKept | StoreGone | StoreRefused:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(error.response.get("Error", {}).get("Code", ""))[:100]
        if status in BUSY_STATUSES or code in BUSY_CODES:
            return StoreGone(f"{self.place} is out of order ({code or status})", hint=_GONE)
        if code in MISSING_CODES and status == 404:
            return NotKept(f"{self.place} has no {what}", hint="It was deleted")
        return StoreRefused(f"{self.place} refuses {what} ({code or status})", hint=_POLICY)


_CREDENTIALS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_POLICY = "Check the bucket's name and what these credentials may do there"
_GONE = "Clips stay on this machine until it answers"
