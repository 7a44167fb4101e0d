"""The contact sheet: a clip at one look.

Dims: F pixel frames, H W pixel rows and columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wanfit.media.places import Part, write_errors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

SHEET_COLUMNS, SHEET_ROWS = 4, 2
SHEET_TILE_PX = 480  # longest side of one tile, so that a sheet of a 1280x704 clip fits a screen
SHEET_GAP_PX = 4  # between tiles, white: frames with one background would run together


class ContactSheet:
    """Frames sampled evenly from a clip, first and last included, on one picture of 4 x 2 tiles.

    Give it every chunk with `add`, in order; it keeps only the frames that it shows.
    """

    def __init__(self, num_frames: int) -> None:
        count = min(num_frames, SHEET_COLUMNS * SHEET_ROWS)
        last = num_frames - 1
        self._wanted = {round(k * last / max(1, count - 1)) for k in range(count)}
        self._tiles: list[Image.Image] = []
        self._seen = 0

    def add(self, frames: npt.NDArray[np.uint8]) -> None:
        """The next frames of the clip, uint8 [F, H, W, 3]."""
        from PIL import Image

        for index, frame in enumerate(frames, start=self._seen):
            if index in self._wanted:
                tile = Image.fromarray(frame)
                tile.thumbnail((SHEET_TILE_PX, SHEET_TILE_PX))
                self._tiles.append(tile)
        self._seen += len(frames)

    def write(self, path: Path) -> None:
        """Writes the sheet as a PNG, atomically. Raises BadOutput."""
        sheet = self.picture()
        with write_errors(path):
            part = Part(path)
            try:
                sheet.save(part.path, format="PNG")
                part.commit()
            finally:
                part.discard()

    def picture(self) -> Image.Image:
        """The sheet itself."""
        from PIL import Image

        assert self._tiles, "a sheet shows at least one frame"
        width, height = self._tiles[0].size
        columns = min(len(self._tiles), SHEET_COLUMNS)
        rows = -(-len(self._tiles) // columns)
        gap = SHEET_GAP_PX
        size = columns * (width + gap) + gap, rows * (height + gap) + gap
        sheet = Image.new("RGB", size, "white")
        for place, tile in enumerate(self._tiles):
            row, column = divmod(place, columns)
            sheet.paste(tile, (gap + column * (width + gap), gap + row * (height + gap)))
        return sheet
