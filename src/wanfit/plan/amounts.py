"""Amounts of memory as people write and read them."""

from __future__ import annotations

import re

from wanfit.errors import BadOption

# GNU coreutils' convention: GB counts in thousands, GiB and a lone G in 1024s.
_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})\s*")
_MOST_BYTES = 1 << 50  # ours: beyond any machine; keeps absurd numbers out of sums


def parse_bytes(text: str, *, option: str = "size") -> int:
    """Bytes of "12GiB", "12GB", "12G" (GiB), "512M" or a plain number. Raises BadOption."""
    found = _AMOUNT.fullmatch(text)
    factor = _UNITS.get(found[2].upper()) if found else None
    num_bytes = int(float(found[1]) * factor) if found and factor else 0
    if not 0 < num_bytes <= _MOST_BYTES:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise BadOption(f"{option} is {shown!r}, not an amount of memory such as 12GiB or 117GB")
    return num_bytes


def show_bytes(num_bytes: int) -> str:
    """As people read it: "12.3 GiB", "640 MiB", "12 KiB"."""
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):.1f} GiB"
    if num_bytes >= 1 << 20:
        return f"{num_bytes / (1 << 20):.0f} MiB"
    return f"{-(-num_bytes // 1024)} KiB"
