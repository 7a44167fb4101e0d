"""Thumbnail and sheet of a clip, made from the file itself: whoever has one knows that it plays.

Dims: F pixel frames, H W pixel rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wanfit.media import ContactSheet

THUMBNAIL_PX = 512  # ours: longest side; a list of clips shows it at half of that on a sharp screen
THUMBNAIL_QUALITY = 80  # ours: Pillow's default for webp
SHEET_QUALITY = 85  # ours: a sheet of 4 x 2 frames has then about 200 kB


@dataclass(frozen=True, slots=True)
class Clip:
    """What a whole file turned out to hold."""

    width: int
    height: int
    num_frames: int
    fps: float


def draw_pictures(video: Path, thumbnail: Path, sheet: Path) -> Clip:
    """Decodes every frame of `video`; writes its middle frame as webp and its sheet as JPEG.

    Raises av.FFmpegError for a file that does not play. The count of frames is the header's, and
    frames beyond it or short of it are an assertion: we wrote the file.
    """
    import av
    import numpy as np
    from PIL import Image

    with av.open(f"file:{video}", format="mp4") as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        expected = stream.frames
        contact = ContactSheet(expected)
        count = 0
        for frame in container.decode(stream):
            pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
            contact.add(pixels[None])
            if count == expected // 2:
                middle = Image.fromarray(pixels)
            count += 1
        assert count == expected > 0, (count, expected)
        clip = Clip(stream.width, stream.height, count, float(stream.average_rate or 0))
    middle.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    middle.save(thumbnail, format="WEBP", quality=THUMBNAIL_QUALITY)
    contact.picture().save(sheet, format="JPEG", quality=SHEET_QUALITY)
    return clip
