"""Which bytes of which file make up a unit, and how one piece of it is read.

In our store a unit is one run of bytes. In a model directory every tensor is a piece of its own,
and one whose dtype differs from the unit's is converted on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wanfit.engine.weights.depot import DIRECT_BYTES, Depot, MappedFile, RingBuffer
from wanfit.engine.weights.headers import PLAIN_DTYPES, TensorEntry
from wanfit.engine.weights.layout import TORCH_DTYPES, UnitLayout, join_name
from wanfit.engine.weights.scales import storage_words
from wanfit.errors import WeightsBroken, WeightsMismatch
from wanfit.plan.weights import align


class Piece(NamedTuple):
    """Bytes [start, start + file_bytes) of a file, which become num_bytes of a unit."""

    file: Path
    start: int
    file_bytes: int
    at: int  # in the unit
    num_bytes: int
    file_dtype: str
    dtype: str

    @property
    def is_raw(self) -> bool:
        """Whether the bytes are taken as they are."""
        return self.file_dtype == self.dtype


def pieces_of(unit: str, layout: UnitLayout, entries: Mapping[str, TensorEntry]) -> list[Piece]:
    """The fewest pieces that fill the unit; neighbours in file and unit are one.

    Raises WeightsMismatch where the file's dtype cannot become the unit's.
    """
    pieces: list[Piece] = []
    for place in layout.places:
        name = join_name(unit, place.name)
        entry = entries.get(name)
        if entry is None or not _can_become(entry, place.dtype):
            raise _mismatch(name, entry, place.dtype)
        piece = Piece(
            entry.file, entry.offset, entry.num_bytes, place.offset, place.num_bytes,
            entry.dtype, place.dtype,
        )  # fmt: skip
        last = pieces[-1] if pieces else None
        if last and _continues(last, piece):
            gap = piece.at - last.at
            pieces[-1] = last._replace(
                file_bytes=gap + piece.file_bytes, num_bytes=gap + piece.num_bytes
            )
        else:
            pieces.append(piece)
    return pieces


def _can_become(entry: TensorEntry, dtype: str) -> bool:
    """Whether a cast is all that it takes: from plain to plain, or none for a store's fp8."""
    return (entry.is_plain and dtype in PLAIN_DTYPES) or (
        entry.dtype == dtype and entry.scale is None
    )


def _mismatch(name: str, entry: TensorEntry | None, dtype: str) -> WeightsMismatch:
    stored = "another precision" if entry is None else storage_words([entry])
    message = f"{name} is stored as {stored}, and {dtype} is needed"
    if entry is None or entry.is_plain or (entry.dtype == "F8_E4M3" and entry.scale is None):
        hint = "Choose the precision of the files, or convert them (wanfit convert)"
    else:
        hint = "Quantised files run once they are converted (wanfit convert)"
    return WeightsMismatch(message, hint=hint)


def _continues(last: Piece, piece: Piece) -> bool:
    """Whether `piece` lies as far behind `last` in the file as in the unit, and both are raw."""
    together = last.is_raw and piece.is_raw and last.file == piece.file
    return together and piece.start - last.start == piece.at - last.at


def split(piece: Piece, most_bytes: int) -> Iterator[Piece]:
    """The piece in parts of at most `most_bytes` in the unit."""
    ratio = piece.file_bytes / piece.num_bytes  # of element sizes: a power of two
    for begin in range(0, piece.num_bytes, most_bytes):
        num_bytes = min(most_bytes, piece.num_bytes - begin)
        yield piece._replace(
            start=piece.start + int(begin * ratio),
            file_bytes=int(num_bytes * ratio),
            at=piece.at + begin,
            num_bytes=num_bytes,
        )


@torch.inference_mode()  # as whoever made the buffer; a mode belongs to a thread
def read_into(buffer: RingBuffer, piece: Piece, file: MappedFile, *, direct: int | None) -> Tensor:
    """Waits for the buffer, fills it, and gives its part that holds the piece, uint8 [num_bytes].

    direct: a descriptor that reads around the page cache; None: through it. Raises WeightsBroken
    when the file cannot be read.
    """
    buffer.wait()
    if not piece.is_raw:
        part = buffer.tensor[: piece.num_bytes]
        part.copy_(converted(piece, file))
        return part
    lead, wanted, descriptor = 0, piece.file_bytes, file.descriptor
    if direct is not None:
        lead, descriptor = piece.start % DIRECT_BYTES, direct
        wanted = align(lead + piece.file_bytes, DIRECT_BYTES)
    done = 0
    try:
        while done < lead + piece.file_bytes:
            part_of = buffer.memory[done:wanted]
            got = os.preadv(descriptor, [part_of], piece.start - lead + done)
            if got == 0:
                raise WeightsBroken(
                    f"{piece.file} ends at {piece.start - lead + done} bytes, and"
                    f" {piece.start + piece.file_bytes} are needed",
                    hint="It was cut while in use; get it again",
                )
            done += got
    except OSError as error:
        raise WeightsBroken(f"{piece.file} cannot be read: {error.strerror}") from None
    return buffer.tensor[lead : lead + piece.num_bytes]


def converted(piece: Piece, file: MappedFile) -> Tensor:
    """The piece as the unit has it, uint8 [num_bytes]: a view of the mapping if it is raw."""
    raw = file.bytes[piece.start : piece.start + piece.file_bytes]
    if piece.is_raw:
        return raw
    file_dtype = TORCH_DTYPES[piece.file_dtype]
    if raw.storage_offset() % file_dtype.itemsize:
        raw = raw.clone()  # a file that does not align its tensors
    return raw.view(file_dtype).to(TORCH_DTYPES[piece.dtype]).view(torch.uint8)


def read_unit(depot: Depot, layout: UnitLayout, pieces: list[Piece]) -> Tensor:
    """A whole small unit on the host, uint8 [layout.num_bytes]."""
    flat = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for piece in pieces:
        flat[piece.at : piece.at + piece.num_bytes] = converted(piece, depot.file(piece.file))
    return flat
