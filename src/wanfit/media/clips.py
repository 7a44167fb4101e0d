"""Frames to mp4, gif, npy or PNG files, as they come.

Dims: F pixel frames, H W pixel rows and columns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from wanfit.media.places import Output, Part, sync, write_errors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    Pixels = npt.NDArray[np.uint8]  # [F, H, W, 3] or [H, W, 3], RGB

MP4_CRF = 17  # ours: commonly held to be visually lossless; the default, 23, softens flat colours
GIF_COLOURS = 256  # what the format holds per frame


class VideoWriter:
    """Writes one clip, chunk by chunk. A context manager: the clip appears when the block ends.

    On any exception, KeyboardInterrupt and GeneratorExit included, nothing is left: neither the
    file nor directories made for it. `metadata` holds plain values; "prompt" becomes the title,
    and the whole is kept as JSON in the comment of mp4, gif and PNG (npy has no place for it).
    """

    def __init__(self, output: Output, *, fps: int, metadata: Mapping[str, Any]) -> None:
        self._output = output
        self._fps = fps
        self._metadata = metadata
        self._part: Part | None = None
        self._encoder: _Encoder | None = None
        self.busy_s = 0.0  # spent encoding and writing so far

    def __enter__(self) -> Self:
        return self

    def write(self, frames: Pixels) -> None:
        """Adds frames, uint8 [F, H, W, 3]. All chunks have one size. Raises BadOutput."""
        assert frames.dtype == "uint8", frames.dtype
        assert frames.ndim == 4, frames.shape
        assert frames.shape[3] == 3, frames.shape
        began_s = time.perf_counter()
        with write_errors(self._output.path):
            if self._encoder is None:
                self._part = Part(self._output.path)
                self._encoder = self._open(self._part.path, *frames.shape[1:3])
            for frame in frames:
                self._encoder.add(frame)
        self.busy_s += time.perf_counter() - began_s

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        began_s = time.perf_counter()
        try:
            if kind is None:
                assert self._encoder, "a clip has at least one frame"
                assert self._part, "the encoder writes to it"
                with write_errors(self._output.path):
                    self._encoder.finish()
                    self._part.commit()
        finally:
            if self._encoder:
                self._encoder.abandon()
            if self._part:
                self._part.discard()
            self.busy_s += time.perf_counter() - began_s

    def _open(self, part: Path, height: int, width: int) -> _Encoder:
        match self._output.format:
            case "mp4":
                return _Mp4(part, width, height, self._fps, self._metadata)
            case "gif":
                return _Gif(part, self._fps, self._metadata)
            case "npy":
                return _Npy(part, width, height)
            case "png":
                return _PngFrames(part, self._metadata)


class _Encoder(Protocol):
    """Takes frames [H, W, 3]. After `finish` the file is whole; `abandon` frees what is open."""

    def add(self, frame: Pixels) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...


class _Mp4:
    """H.264 that plays in a browser: yuv420p, BT.709 in limited range, index before the data."""

    def __init__(
        self, part: Path, width: int, height: int, fps: int, metadata: Mapping[str, Any]
    ) -> None:
        import av
        from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

        assert width % 2 == height % 2 == 0, "4:2:0 halves both sides; every model's grid is even"
        # "file:" keeps a colon in the name from being taken for a protocol.
        self._container = av.open(
            f"file:{part}", "w", format="mp4", options={"movflags": "+faststart"}
        )
        self._container.metadata["title"] = str(metadata.get("prompt", ""))
        self._container.metadata["comment"] = _as_json(metadata)
        self._stream = self._container.add_stream(
            "libx264", rate=fps, options={"crf": str(MP4_CRF), "preset": "medium"}
        )
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        codec = self._stream.codec_context
        codec.time_base = Fraction(1, fps)
        codec.color_range = ColorRange.MPEG
        codec.colorspace = Colorspace.ITU709
        codec.color_primaries = ColorPrimaries.BT709
        codec.color_trc = ColorTrc.BT709
        self._num_frames = 0

    def add(self, frame: Pixels) -> None:
        import av
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
        )
        picture.pts = self._num_frames
        picture.time_base = self._stream.codec_context.time_base
        self._num_frames += 1
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        with suppress(OSError):  # closing writes the index, which may be what failed
            self._container.close()


class _Gif:
    """Each frame with the 256 colours that suit it, not dithered: flat colours stay still."""

    def __init__(self, part: Path, fps: int, metadata: Mapping[str, Any]) -> None:
        self._path = part
        self._fps = fps
        self._comment = _as_json(metadata).encode()
        self._pictures: list[Image.Image] = []

    def add(self, frame: Pixels) -> None:
        from PIL import Image

        self._pictures.append(Image.fromarray(frame).quantize(GIF_COLOURS))

    def finish(self) -> None:
        first, *rest = self._pictures
        first.save(
            self._path,
            format="GIF",
            save_all=True,
            append_images=rest,
            duration=self._durations_ms(),
            loop=0,
            comment=self._comment,
        )

    def abandon(self) -> None:
        self._pictures.clear()

    def _durations_ms(self) -> list[int]:
        """A gif counts hundredths of a second: rounds the times, so that errors do not add up."""
        times_cs = [round(100 * k / self._fps) for k in range(len(self._pictures) + 1)]
        return [10 * (after - before) for before, after in pairwise(times_cs)]


class _Npy:
    """uint8 [F, H, W, 3], lossless. The header is written again when F is known."""

    def __init__(self, part: Path, width: int, height: int) -> None:
        self._file = part.open("xb")
        self._shape = height, width, 3
        self._num_frames = 0
        self._write_header()
        self._header_bytes = self._file.tell()

    def add(self, frame: Pixels) -> None:
        self._file.write(frame.tobytes())
        self._num_frames += 1

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes, "numpy pads the header for a growing axis 0"
        self._file.close()

    def abandon(self) -> None:
        with suppress(OSError):
            self._file.close()

    def _write_header(self) -> None:
        from numpy.lib import format as npy_format

        shape = self._num_frames, *self._shape
        npy_format.write_array_header_1_0(
            self._file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )


class _PngFrames:
    """A directory of frame_00000.png and so on, each with the settings as text."""

    def __init__(self, part: Path, metadata: Mapping[str, Any]) -> None:
        from PIL.PngImagePlugin import PngInfo

        part.mkdir()
        self._directory = part
        self._num_frames = 0
        self._info = PngInfo()
        self._info.add_itxt("Title", str(metadata.get("prompt", "")))
        self._info.add_itxt("Comment", _as_json(metadata))

    def add(self, frame: Pixels) -> None:
        from PIL import Image

        path = self._directory / f"frame_{self._num_frames:05d}.png"
        Image.fromarray(frame).save(path, pnginfo=self._info)
        self._num_frames += 1

    def finish(self) -> None:
        for path in self._directory.iterdir():
            sync(path)

    def abandon(self) -> None:
        pass


def _as_json(metadata: Mapping[str, Any]) -> str:
    return json.dumps(dict(metadata), ensure_ascii=False)
