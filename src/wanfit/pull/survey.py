"""The headers of a repository's weight files, fetched before the files.

What is laid out is a model directory: small files are there, weight files are holes with their
headers in place and their true length, so that everything that checks a model checks this one, and
a wrong repository, an unknown key or too small a disk is found before the first gigabyte.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from wanfit.engine.weights.headers import MAX_HEADER_BYTES
from wanfit.errors import WeightsBroken
from wanfit.pull.cache import HubCache
from wanfit.pull.hub import RemoteFile, Repository
from wanfit.pull.layout import WEIGHT_SUFFIXES
from wanfit.pull.transfer import read_range, read_ranges

_HEAD_BYTES = 64 << 10  # ours: holds the header of a shard of an A14B expert (27 kB)
_TAIL_BYTES = 1 << 20  # ours: holds a zip file's directory (UMT5's 242 tensors: 25 kB)
_MEMBER_BYTES = 1 << 10  # ours: of a zip member before its content: 30, its name, torch's padding
_RECORD_BYTES = 16 << 20  # ours: the largest member that is not a tensor; data.pkl has 30 kB
_GAP_BYTES = 64 << 10  # ours: what is cheaper to fetch along than to ask for anew


def lay_out(
    repository: Repository, cache: HubCache, files: Mapping[str, RemoteFile], tree: Path
) -> None:
    """Fills `tree` with the files: links to those that are here, holes with headers for others.

    Small files are brought. `tree` must lie where holes cost nothing. Raises DownloadFailed,
    WeightsBroken for a file that is neither safetensors nor a zip.
    """
    for name, file in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found = cache.find(file)
        if found is None and not name.endswith(WEIGHT_SUFFIXES):
            found = cache.bring(file)
        if found is None:
            _lay_hole(repository, file, path)
        else:
            path.symlink_to(found.absolute())


def put_in_place(path: Path, whole: Path) -> None:
    """Replaces a hole by a link to the file itself."""
    link = path.with_name(f"{path.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(whole.absolute())
    os.replace(link, path)


def _lay_hole(repository: Repository, file: RemoteFile, path: Path) -> None:
    head = read_range(repository, file, 0, min(_HEAD_BYTES, file.num_bytes))
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.ftruncate(handle, file.num_bytes)
        os.pwrite(handle, head, 0)
        if head.startswith(b"PK\x03\x04"):
            _fetch_zip_headers(repository, file, path, handle)
        else:
            end = 8 + int.from_bytes(head[:8], "little")
            if len(head) < 8 or end > min(file.num_bytes, MAX_HEADER_BYTES):
                raise WeightsBroken(f"{file.name} of {repository.name} is no weight file")
            if end > len(head):
                os.pwrite(handle, read_range(repository, file, len(head), end), len(head))
    finally:
        os.close(handle)


def _fetch_zip_headers(repository: Repository, file: RemoteFile, path: Path, handle: int) -> None:
    """The directory at the end, each member's own header, and whole what is not a tensor."""
    start = max(file.num_bytes - _TAIL_BYTES, 0)
    os.pwrite(handle, read_range(repository, file, start, file.num_bytes), start)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise WeightsBroken(f"{file.name} of {repository.name}: {error}") from None
    spans = []
    for member in members:
        length = _MEMBER_BYTES + len(member.filename.encode())
        if "/data/" not in member.filename:
            length += min(member.compress_size, _RECORD_BYTES)
        spans.append((member.header_offset, min(member.header_offset + length, file.num_bytes)))
    ranges = [(file, begin, end) for begin, end in _merged(spans) if begin < end]
    for (_, begin, _), content in zip(ranges, read_ranges(repository, ranges), strict=True):
        os.pwrite(handle, content, begin)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans in order, those that nearly touch made one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin - merged[-1][1] <= _GAP_BYTES:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
