"""The input image: read with limits, upright, RGB."""

from __future__ import annotations

import io
import stat
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanfit.errors import BadImage

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_BYTES = 64 * 2**20  # ours: ten times a good photo; bounds what is read into memory
MAX_IMAGE_PX = 64_000_000  # ours: a 64 megapixel camera; decoded, 192 MB
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # of a gif or tiff, the first picture


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a picture may be before it is decoded."""

    max_bytes: int
    max_px: int
    formats: tuple[str, ...]  # Pillow's names: no other decoder sees the bytes


OWN_LIMITS = ImageLimits(MAX_IMAGE_BYTES, MAX_IMAGE_PX, IMAGE_FORMATS)
# Of strangers. Ours: twice a good photo of 24 megapixels; decoded and turned upright, 2 x 120 MB.
# The formats are what browsers send, and the three decoders with the most eyes on them.
UPLOAD_LIMITS = ImageLimits(20 * 2**20, 40_000_000, ("PNG", "JPEG", "WEBP"))
# One at a time: memory stays bounded however many send pictures, and `warnings` knows no threads.
_decoding = threading.Lock()


def read_upload(data: bytes) -> Image.Image:
    """As `read_image`, of bytes that a stranger sent: fewer, and of formats that browsers send.

    One thread decodes at a time and others wait, so that memory stays bounded. Raises BadImage.
    """
    with _decoding:
        return _decoded("The image", data, UPLOAD_LIMITS)


def image_kind(head: bytes) -> str | None:
    """The format that a picture's first 12 bytes tell, of those that strangers may send."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return None


def read_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """The picture of a file or of its bytes: upright as its EXIF says, RGB, alpha dropped.

    Alpha is dropped and not blended, as official: image2video.py does with convert("RGB").
    Raises BadImage when it is missing, unreadable, truncated, or over MAX_IMAGE_BYTES or
    MAX_IMAGE_PX.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        _check_pixels("The image", source, OWN_LIMITS)
        return _upright_rgb(source)
    name = "The image" if isinstance(source, bytes) else f"The image {str(source)!r}"
    data = source if isinstance(source, bytes) else _image_bytes(name, Path(source))
    return _decoded(name, data, OWN_LIMITS)


def _decoded(name: str, data: bytes, limits: ImageLimits) -> Image.Image:
    from PIL import Image

    if len(data) > limits.max_bytes:
        raise _too_many_bytes(name, len(data), limits)
    with warnings.catch_warnings():
        # Pillow warns about damage that it can live with; a person asked for one line, if any.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=limits.formats) as image:
                _check_pixels(name, image, limits)
                return _upright_rgb(image)
        except BadImage:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadImage(
                f"{name} has more pixels than the limit of {limits.max_px}", hint="Make it smaller"
            ) from error
        except Exception as error:  # decoders raise anything at all on damaged bytes
            raise BadImage(
                f"{name} cannot be read as a picture",
                hint=f"Give a whole file of one of {', '.join(limits.formats)}",
            ) from error


def _image_bytes(name: str, path: Path) -> bytes:
    """The bytes of a regular file no larger than the limit; a pipe or a device could be endless."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise BadImage(f"{name} is {kind}", hint="Give an image file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise _too_many_bytes(name, status.st_size, OWN_LIMITS)
        return path.read_bytes()
    except FileNotFoundError:
        raise BadImage(f"{name} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise BadImage(f"{name} cannot be opened: {reason}") from error


def _too_many_bytes(name: str, num_bytes: int, limits: ImageLimits) -> BadImage:
    return BadImage(
        f"{name} has {num_bytes} bytes, over the limit of {limits.max_bytes}",
        hint="Make it smaller",
    )


def _check_pixels(name: str, image: Image.Image, limits: ImageLimits) -> None:
    """Reads the size that the header states; no pixel is decoded yet."""
    num_px = image.width * image.height
    if num_px > limits.max_px:
        raise BadImage(
            f"{name} has {image.width}x{image.height} pixels, over the limit of {limits.max_px}",
            hint="Make it smaller",
        )


def _upright_rgb(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # convert() would clip 16-bit grey to white
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert("RGB")
