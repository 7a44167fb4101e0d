"""Small clips that play, for the tests of stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wanfit.media import VideoWriter, check_output
from wanfit.outputs import Kept, OutputStore

WIDTH, HEIGHT, FRAMES, FPS = 64, 48, 9, 8


def write_clip(path: Path) -> None:
    """An mp4 that plays, its frames from black to white."""
    levels = np.linspace(0, 255, FRAMES).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (FRAMES, HEIGHT, WIDTH, 3))
    with VideoWriter(check_output(path), fps=FPS, metadata={"prompt": "x"}) as writer:
        writer.write(np.ascontiguousarray(frames))


def keep_one(store: OutputStore, job_id: str = "job", lease: str = "a") -> Kept:
    """A clip by way of a draft, as a worker does it."""
    draft = store.draft(job_id, lease)
    write_clip(draft)
    return store.keep(draft, job_id=job_id, attempt=1, lease=lease, metadata={"prompt": "a fox"})


def everything(directory: Path) -> set[str]:
    """Every file there, hidden ones too."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
