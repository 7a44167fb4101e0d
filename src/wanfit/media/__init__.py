"""Images in, clips and contact sheets out.

Nothing from outside is trusted: the limits on an image are checked on its header, before a pixel
is decoded. Nothing half written is ever seen: a clip grows under a hidden name in its own directory
and takes its final name when it is complete and on disk. Frames are written as they come.
Left out: audio, other codecs, and reading clips. Nothing here imports torch; av, numpy and Pillow
are imported where they are used, because the command line must start in milliseconds.
"""

from wanfit.media.clips import VideoWriter
from wanfit.media.images import (
    IMAGE_FORMATS,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PX,
    UPLOAD_LIMITS,
    image_kind,
    read_image,
    read_upload,
)
from wanfit.media.places import Output, check_output, check_sheet
from wanfit.media.sheet import ContactSheet

__all__ = [
    "IMAGE_FORMATS",
    "MAX_IMAGE_BYTES",
    "MAX_IMAGE_PX",
    "UPLOAD_LIMITS",
    "ContactSheet",
    "Output",
    "VideoWriter",
    "check_output",
    "check_sheet",
    "image_kind",
    "read_image",
    "read_upload",
]
