"""Rates that were measured on this machine, remembered between processes.

A JSON file under $XDG_CACHE_HOME: the link's rate by the GPU's UUID, the disk's by mount point.
Losing it costs a measurement, so a broken or unwritable file is no error.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

MEASURE_BYTES = 256 << 20  # of the disk; enough to outlast a drive's own buffers
MEASURE_S = 1.0  # but no longer than this
_PIECE_BYTES = 16 << 20  # measured on one H200's host: these reach the disk's rate
_READERS = 4  # likewise: 0.9 GB/s with one thread, 1.8 with four
_Rates = dict[str, dict[str, float]]


def known_link(gpu_uuid: str) -> float | None:
    """Bytes per second from pinned memory to that GPU, if it was measured."""
    return _load().get("link_bytes_per_s", {}).get(gpu_uuid)


def known_disk(place: Path) -> float | None:
    """Bytes per second of direct reads from the file system that holds `place`, if measured."""
    return _load().get("disk_bytes_per_s", {}).get(str(_mount_of(place)))


def remember_rates(
    *,
    gpu_uuid: str | None = None,
    link_bytes_per_s: float | None = None,
    place: Path | None = None,
    disk_bytes_per_s: float | None = None,
) -> None:
    """Keeps a measured rate for the processes to come. Does nothing where nothing can be kept."""
    rates = _load()
    if gpu_uuid is not None and link_bytes_per_s is not None:
        rates.setdefault("link_bytes_per_s", {})[gpu_uuid] = link_bytes_per_s
    if place is not None and disk_bytes_per_s is not None:
        rates.setdefault("disk_bytes_per_s", {})[str(_mount_of(place))] = disk_bytes_per_s
    path = _cache_file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(rates, indent=2))
        fresh.replace(path)


def measure_disk(
    file: Path, *, max_bytes: int = MEASURE_BYTES, max_s: float = MEASURE_S
) -> float | None:
    """Bytes per second of reading a large file around the page cache, in about a second at most.

    None where the file system takes no direct reads (O_DIRECT), or the file holds no whole piece.
    """
    num_pieces = min(file.stat().st_size, max_bytes) // _PIECE_BYTES
    if not num_pieces:
        return None
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    began_s = time.perf_counter()

    def read(numbers: Iterator[int]) -> int:
        done = 0
        with mmap.mmap(-1, _PIECE_BYTES) as buffer:  # anonymous memory: aligned to a page
            for number in numbers:
                if time.perf_counter() - began_s > max_s:
                    break
                done += os.preadv(descriptor, [buffer], number * _PIECE_BYTES)
        return done

    try:
        with ThreadPoolExecutor(_READERS) as pool:
            shares = [iter(range(first, num_pieces, _READERS)) for first in range(_READERS)]
            num_bytes = sum(pool.map(read, shares))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return num_bytes / (time.perf_counter() - began_s) or None


def _load() -> _Rates:
    """What is kept; only numbers above 0, whatever the file says."""
    try:
        kept = json.loads(_cache_file().read_text())
        return {
            str(kind): {
                str(key): float(rate)
                for key, rate in rates.items()
                if isinstance(rate, int | float) and rate > 0
            }
            for kind, rates in kept.items()
        }
    except (OSError, ValueError, AttributeError):
        return {}


def _cache_file() -> Path:
    """XDG base directory specification: $XDG_CACHE_HOME, or ~/.cache where it is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "wanfit" / "machine.json"


def _mount_of(place: Path) -> Path:
    """The mount point of the file system that holds `place`, or of its nearest parent that is."""
    path = place.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    device = path.stat().st_dev
    while path != path.parent and path.parent.stat().st_dev == device:
        path = path.parent
    return path
