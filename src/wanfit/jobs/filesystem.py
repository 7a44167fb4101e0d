"""Whether a directory lies on this machine's own disk: SQLite's WAL is unsafe anywhere else.

WAL needs memory that all processes share and locks that hold; a network file system gives neither
(sqlite.org/wal.html, "All processes using a database must be on the same host computer").
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

# f_type of statfs(2): linux/magic.h, and the headers of those that live outside the kernel.
NETWORK_MAGIC: Mapping[int, str] = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB",
    0xFF534D42: "CIFS",
    0x01021997: "9p",
    0x0BD00BD0: "Lustre",
    0x00C36400: "Ceph",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0xAAD7AAEA: "PanFS",
    0x5346414F: "AFS",
    0x6B414653: "kAFS",
    0x73757245: "Coda",
    0x564C: "NCP",
    0x7461636F: "OCFS2",
    0x01161970: "GFS2",
    0x65735543: "FUSE control",
    0x786F4256: "VirtualBox shared folder",
    0xBACBACBC: "VMware shared folder",
}
FUSE_MAGIC = 0x65735546  # which file system it is, only the mount table says; virtiofs has it too
LOCAL_FUSE = ("fuseblk", "fuse.fuse-overlayfs", "fuse.lxcfs")  # on a block device, or a view of one


def network_kind(directory: Path) -> str | None:
    """The kind of network file system that a directory lies on; None: a disk of this machine."""
    magic = _magic(directory)
    if magic == FUSE_MAGIC:
        kind = _mounted_as(directory)
        return None if kind in LOCAL_FUSE else f"FUSE ({kind or 'unknown'})"
    return NETWORK_MAGIC.get(magic)


def _magic(directory: Path) -> int:
    """f_type of struct statfs, which every Linux has first, as one word."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(512)  # the struct has 120 bytes
    if libc.statfs(os.fsencode(directory), buffer) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF


def _mounted_as(directory: Path) -> str | None:
    """The type in the mount table of the device that the directory is on."""
    number = os.stat(directory).st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
        for line in table:
            fields = line.split()
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    return None
