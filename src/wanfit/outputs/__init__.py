"""Where finished clips are kept: a directory of this machine, or S3.

A clip is kept whole or not at all: the video with its thumbnail, its sheet of frames and its
metadata, each with length and checksum. Names are made here, from ids that we made; nothing that a
stranger sent becomes part of a path. Left out: who may read a clip (`serve` asks that), and which
clip is the result of a job (the job store says that: a late attempt may keep a clip, and in vain).
Nothing here imports torch; boto3 is imported where it is used.
"""

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
    "Kept",
    "KeptFile",
    "LocalOutputs",
    "OutputStore",
    "Retention",
    "Stored",
    "Swept",
    "Variant",
    "checked_id",
    "key_of",
]
