"""Where finished clips are kept: a directory of this machine, or S3.

A clip is kept whole or not at all: the video with its thumbnail, its sheet of frames and its
metadata, each with length and checksum. Names are made here, from ids that we made; nothing that a
stranger sent becomes part of a path. Left out: who may read a clip (`serve` asks that), and which
clip is the result of a job (the job store says that: a late attempt may keep a clip, and in vain).
Nothing here imports torch; boto3 is imported where it is used.
"""

import logging
from pathlib import Path

from wanfit.errors import StoreGone
from wanfit.outputs.bucket import Bucket, Credentials, Place
from wanfit.outputs.local import LocalOutputs
from wanfit.outputs.store import (
    FILE_NAMES,
    Body,
    Kept,
    KeptFile,
    OutputStore,
    Retention,
    Stored,
    Swept,
    Variant,
    checked_id,
    key_of,
)

__all__ = [
    "FILE_NAMES",
    "Body",
    "Bucket",
    "Credentials",
    "Kept",
    "KeptFile",
    "LocalOutputs",
    "OutputStore",
    "Place",
    "Retention",
    "Stored",
    "Swept",
    "Variant",
    "checked_id",
    "key_of",
    "open_store",
]


def open_store(
    place: str,
    *,
    spool: Path,
    retention: Retention,
    s3_endpoint: str | None = None,
) -> OutputStore:
    """The store that a setting names: a directory, or s3://BUCKET/PREFIX by way of `spool`.

    Raises BadSetting for what cannot be, StoreRefused when the bucket does not take a file. One
    that does not answer now may answer soon: clips wait in `spool`, and the log says so.
    """
    if not place.startswith("s3:"):
        return LocalOutputs(Path(place).expanduser(), retention)
    from wanfit.outputs.s3 import S3Outputs

    bucket = Bucket(Place.parse(place, s3_endpoint))
    try:
        bucket.check()
    except StoreGone as error:
        logging.getLogger(__name__).error("%s", error)
    return S3Outputs(bucket, spool, retention)
