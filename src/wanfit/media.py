"""Image in, clip out: reads the input image, writes mp4, gif, npy or PNG frames, draws the sheet.

Nothing from outside is trusted: the limits on an image are checked on its header, before a pixel
is decoded. Nothing half written is ever seen: a clip grows under a hidden name in its own directory
and takes its final name when it is complete and on disk. Frames are written as they come, so the
whole clip is never in memory (a gif keeps one byte per pixel, since its palettes come with it).
Left out: audio, other codecs, and reading clips. Nothing here imports torch; av, numpy and Pillow
are imported where they are used, because the command line must start in milliseconds.

Dims: F pixel frames, H W pixel rows and columns.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from wanfit.errors import BadImage, BadOutput

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    Pixels = npt.NDArray[np.uint8]  # [F, H, W, 3] or [H, W, 3], RGB

Format = Literal["mp4", "gif", "npy", "png"]

MAX_IMAGE_BYTES = 64 * 2**20  # ours: ten times a good photo; bounds what is read into memory
MAX_IMAGE_PX = 64_000_000  # ours: a 64 megapixel camera; decoded, 192 MB
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # of a gif or tiff, the first picture

SUFFIXES: Mapping[str, Format] = {".mp4": "mp4", ".gif": "gif", ".npy": "npy"}
FRAME_NAME = re.compile(r"frame_\d{5}\.png")
MP4_CRF = 17  # ours: commonly held to be visually lossless; the default, 23, softens flat colours
GIF_COLOURS = 256  # what the format holds per frame

SHEET_COLUMNS, SHEET_ROWS = 4, 2
SHEET_TILE_PX = 480  # longest side of one tile, so that a sheet of a 1280x704 clip fits a screen


# Images in


def read_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """The picture of a file or of its bytes: upright as its EXIF says, RGB, alpha dropped.

    Alpha is dropped and not blended, as official: image2video.py does with convert("RGB").
    Raises BadImage when it is missing, unreadable, truncated, or over MAX_IMAGE_BYTES or
    MAX_IMAGE_PX.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        _check_pixels("The image", source)
        return _upright_rgb(source)
    name = "The image" if isinstance(source, bytes) else f"The image {str(source)!r}"
    data = source if isinstance(source, bytes) else _image_bytes(name, Path(source))
    if len(data) > MAX_IMAGE_BYTES:
        raise _too_many_bytes(name, len(data))
    with warnings.catch_warnings():
        # Pillow warns about damage that it can live with; a person asked for one line, if any.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                _check_pixels(name, image)
                return _upright_rgb(image)
        except BadImage:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadImage(
                f"{name} has more pixels than the limit of {MAX_IMAGE_PX}", hint="Make it smaller"
            ) from error
        except Exception as error:  # decoders raise anything at all on damaged bytes
            raise BadImage(
                f"{name} cannot be read as a picture",
                hint=f"Give a whole file of one of {', '.join(IMAGE_FORMATS)}",
            ) from error


def _image_bytes(name: str, path: Path) -> bytes:
    """The bytes of a regular file no larger than the limit; a pipe or a device could be endless."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise BadImage(f"{name} is {kind}", hint="Give an image file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise _too_many_bytes(name, status.st_size)
        return path.read_bytes()
    except FileNotFoundError:
        raise BadImage(f"{name} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadImage(f"{name} cannot be opened: {_reason(error)}") from error


def _too_many_bytes(name: str, num_bytes: int) -> BadImage:
    return BadImage(
        f"{name} has {num_bytes} bytes, over the limit of {MAX_IMAGE_BYTES}",
        hint="Make it smaller",
    )


def _check_pixels(name: str, image: Image.Image) -> None:
    """Reads the size that the header states; no pixel is decoded yet."""
    num_px = image.width * image.height
    if num_px > MAX_IMAGE_PX:
        raise BadImage(
            f"{name} has {image.width}x{image.height} pixels, over the limit of {MAX_IMAGE_PX}",
            hint="Make it smaller",
        )


def _upright_rgb(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # convert() would clip 16-bit grey to white
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert("RGB")


# Where a clip goes


@dataclass(frozen=True, slots=True)
class Output:
    """A place that was writable when it was checked, and the format that goes there."""

    path: Path
    format: Format


def check_output(output: str | Path) -> Output:
    """Chooses the format and makes sure that the place can be written, before any work is done.

    `.mp4`, `.gif` and `.npy` are files, and one that exists will be replaced. A path without a
    suffix, or that ends in "/", is a directory of PNG frames: a new one, an empty one, or one that
    holds nothing but such frames, which will be replaced. Missing parents are made later.
    Raises BadOutput.
    """
    text = os.fspath(output)
    path = Path(text)
    known = SUFFIXES.get(path.suffix.lower())
    if any("\ud800" <= char <= "\udfff" for char in text):  # how Python spells stray bytes
        raise BadOutput(f"{text!r} is not valid UTF-8", hint="Give another name")
    with _write_errors(path):
        if known and not text.endswith("/"):
            _check_file(path)
            return Output(path, known)
        if path.suffix and not text.endswith("/") and not path.is_dir():
            raise BadOutput(
                f"No format is known by the suffix {path.suffix!r} of {text!r}",
                hint="Use .mp4, .gif or .npy, or a directory for PNG frames",
            )
        _check_frames_directory(path)
        return Output(path, "png")


def check_sheet(path: Path) -> Path:
    """The path, when a contact sheet can be written there as a PNG. Raises BadOutput."""
    if path.suffix.lower() != ".png":
        raise BadOutput(f"A contact sheet is a PNG, and {str(path)!r} does not end in .png")
    with _write_errors(path):
        _check_file(path)
    return path


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise BadOutput(f"{str(path)!r} is a directory", hint="Give another file name")
    _check_parent(path)


def _check_frames_directory(path: Path) -> None:
    name = repr(str(path))
    if path.name in ("", ".."):
        raise BadOutput(f"{name} names no new directory", hint="Give a name, as in frames/")
    if os.path.lexists(path):
        if not path.is_dir() or path.is_symlink():
            raise BadOutput(f"{name} is not a directory", hint="Use .mp4, .gif or .npy for a file")
        if path.is_mount():
            raise BadOutput(
                f"{name} is a mount point, which cannot be replaced",
                hint=f"Give a directory in it, as in {path / 'frames'}",
            )
        if not all(FRAME_NAME.fullmatch(entry.name) for entry in path.iterdir()):
            raise BadOutput(
                f"The directory {name} holds other things than the frames of a clip",
                hint=f"Give a file in it, as in {path / 'clip.mp4'}, or an empty directory",
            )
    _check_parent(path)


def _check_parent(path: Path) -> None:
    """Writes and drops a nameless file in the nearest directory that exists: the only sure test."""
    with suppress(FileNotFoundError):
        path.lstat()  # raises for a name that is too long, or whose parent is a file
    nearest = next(parent for parent in path.parents if os.path.lexists(parent))
    with tempfile.TemporaryFile(dir=nearest):
        pass


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into BadOutput."""
    try:
        yield
    except OSError as error:
        hint = "Make room, or write elsewhere" if error.errno == errno.ENOSPC else "Write elsewhere"
        raise BadOutput(f"Cannot write {str(path)!r}: {_reason(error)}", hint=hint) from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise BadOutput(f"{str(path)!r} is not a path: {error}") from error


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


# Clips out


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
        self._part: _Part | None = None
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
        with _write_errors(self._output.path):
            if self._encoder is None:
                self._part = _Part(self._output.path)
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
                with _write_errors(self._output.path):
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
            _sync(path)

    def abandon(self) -> None:
        pass


def _as_json(metadata: Mapping[str, Any]) -> str:
    return json.dumps(dict(metadata), ensure_ascii=False)


# From a hidden name to the final one


class _Part:
    """A file or directory that is being written, under a hidden name beside its final one."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._made = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        # 40 characters are at most 160 bytes: the name stays within the 255 of a file system
        self.path = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.part")

    def commit(self) -> None:
        """Gives it its final name, once its bytes are on disk."""
        _sync(self.path)
        if self.path.is_dir() and self._target.exists():
            self._replace_directory()
        else:
            os.replace(self.path, self._target)
        self._made.clear()
        with suppress(OSError):  # some network file systems have no sync of directories
            _sync(self._target.parent)

    def discard(self) -> None:
        """Removes what is left. Nothing is, after a commit."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        for parent in self._made:
            with suppress(OSError):  # not empty any more: someone else uses it
                parent.rmdir()

    def _replace_directory(self) -> None:
        """A directory with files in it cannot be replaced in one step: the old one steps aside."""
        aside = self.path.with_suffix(".old")
        self._target.rename(aside)
        try:
            self.path.rename(self._target)
        except BaseException:
            aside.rename(self._target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# The contact sheet


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

    def add(self, frames: Pixels) -> None:
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
        assert self._tiles, "a sheet shows at least one frame"
        with _write_errors(path):
            part = _Part(path)
            try:
                self._draw().save(part.path, format="PNG")
                part.commit()
            finally:
                part.discard()

    def _draw(self) -> Image.Image:
        from PIL import Image

        width, height = self._tiles[0].size
        columns = min(len(self._tiles), SHEET_COLUMNS)
        rows = -(-len(self._tiles) // columns)
        sheet = Image.new("RGB", (columns * width, rows * height))
        for place, tile in enumerate(self._tiles):
            row, column = divmod(place, columns)
            sheet.paste(tile, (column * width, row * height))
        return sheet
