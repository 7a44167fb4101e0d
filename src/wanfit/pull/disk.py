"""Whether what is to be written has room: in two places, which may lie on one disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that something will take at a path, which need not exist yet."""

    path: Path
    what: str
    num_bytes: int

    @property
    def folder(self) -> Path:
        """The nearest directory that exists."""
        return next(path for path in (self.path, *self.path.parents) if path.is_dir())


def has_room(*needs: Need) -> bool:
    """Whether all of them have."""
    return not lacking(*needs)


def lacking(*needs: Need) -> str:
    """What is too small for what, with both numbers; nothing when all have room."""
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(device_of(need.folder), []).append(need)
    for together in disks.values():
        num_bytes = sum(need.num_bytes for need in together)
        free_bytes = free_bytes_of(together[0].folder)
        if num_bytes > free_bytes:
            parts = [
                f"the {need.what} needs {need.num_bytes / 1e9:.2f} GB in {need.path}"
                for need in together
            ]
            whole = f", {num_bytes / 1e9:.2f} GB together" if len(together) > 1 else ""
            text = (
                f"{' and '.join(parts)}{whole} ({num_bytes} bytes), and the disk there has"
                f" {free_bytes / 1e9:.2f} GB free ({free_bytes} bytes)"
            )
            return text[0].upper() + text[1:]
    return ""


def device_of(folder: Path) -> int:
    """The number of the file system that a directory is on."""
    return folder.stat().st_dev


def free_bytes_of(folder: Path) -> int:
    """What this user may still write there."""
    return shutil.disk_usage(folder).free
