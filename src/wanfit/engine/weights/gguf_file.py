"""GGUF: the header, walked with every length checked before it is believed.

    "GGUF", version u32, number of tensors u64, number of keys u64
    keys: name, type u32, value          a string is a length u64 and UTF-8
    tensors: name, number of sides u32, sides u64 (the innermost first), type u32, offset u64
    padding to general.alignment (32), then the tensors' bytes, at offsets from there

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The numbers of types are those of the
gguf package. Its GGUFReader is not used: it believes lengths, and takes seconds for a vocabulary.
Big-endian files and arrays of arrays are left out: nobody has them here.
"""

from __future__ import annotations

import array
import math
import struct
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gguf.constants import (
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from wanfit.engine.weights.headers import (
    BLOCKS,
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    TensorEntry,
    block_of,
    check_disjoint,
    check_whole,
)
from wanfit.errors import WeightsBroken
from wanfit.plan.weights import align

VERSIONS = (2, 3)  # gguf-py, READER_SUPPORTED_VERSIONS
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # ComfyUI-GGUF, tools/convert.py: then the tensor's name
MAX_SIDES = 8  # ours: ggml has 4; a patch embedding that was put back by hand has 5

# GGUF's scalars: struct's letter for each, which is array's too but for BOOL.
_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip


def read_gguf(path: Path) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """(tensors, key-value pairs) of a GGUF file; shapes in torch's order.

    A pair's value is a number, a bool, a string, a list of strings, or an array.array.
    Raises WeightsBroken for a file that is truncated or malformed, and for a type of tensor that
    the gguf package cannot decode, naming both.
    """
    try:
        with _Walk(path) as walk:
            return _read(path, walk)
    except OSError as error:
        raise WeightsBroken(f"{path} cannot be read: {error.strerror}") from None


def _read(path: Path, walk: _Walk) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    walk.take(4)  # the magic, by which it was recognised
    version = walk.number("I")
    if version not in VERSIONS:
        raise WeightsBroken(
            f"{path} is GGUF of version {version}, and versions 2 and 3 are read",
            hint="A file of a big-endian machine looks like that too; get a common one",
        )
    num_tensors, num_keys = walk.number("Q"), walk.number("Q")
    walk.check_count(num_keys, 13, "keys")  # of length, type and a bool at least
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        name = walk.string()
        if name in metadata:
            raise WeightsBroken(f"{path} has a header that names {name!r} twice")
        metadata[name] = walk.value(walk.number("I"), name)
    walk.check_count(num_tensors, 24, "tensors")
    infos = [walk.tensor() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & alignment - 1:
        raise WeightsBroken(f"{path} has an alignment of {alignment!r}, which is no power of two")
    entries = _entries(path, infos, align(walk.position, alignment), alignment)
    return {name: _unfolded(entry, metadata) for name, entry in entries.items()}, metadata


def _unfolded(entry: TensorEntry, metadata: dict[str, Any]) -> TensorEntry:
    """With the shape before a converter folded it to ggml's four sides, where the file has that."""
    sides = metadata.get(f"{ORIGINAL_SHAPE}{entry.name}")
    if sides is None:
        return entry
    shape = tuple(sides) if isinstance(sides, array.array) else ()
    if any(side < 1 for side in shape) or math.prod(shape) != entry.num_values:
        raise WeightsBroken(
            f"{entry.file} has {entry.name} as {list(entry.shape)}, which cannot have been"
            f" {list(shape)}"
        )
    return replace(entry, shape=shape)


def _entries(
    path: Path, infos: list[tuple[str, tuple[int, ...], int, int]], begin: int, alignment: int
) -> dict[str, TensorEntry]:
    """The tensors, with the bytes of all of them in the file and apart from each other."""
    entries: dict[str, TensorEntry] = {}
    for name, shape, number, offset in infos:
        if name in entries:
            raise WeightsBroken(f"{path} has a header that names {name!r} twice")
        dtype = _dtype(path, name, number)
        entry = TensorEntry(path, name, dtype, shape, begin + offset)
        values, _ = block_of(dtype)
        row = shape[-1] if shape else 1
        if row % values or offset % alignment:
            raise WeightsBroken(
                f"{path} has {name} as {dtype} {list(shape)} at {offset}: rows have to be multiples"
                f" of {values} values, and offsets of {alignment} bytes"
            )
        entries[name] = entry
    if entries:  # without any, nothing is padded
        check_whole(path, check_disjoint(path, entries.values(), begin))
    return entries


def _dtype(path: Path, name: str, number: int) -> str:
    try:
        word = GGMLQuantizationType(number).name
    except ValueError:
        word = f"type {number}"
    if word not in BLOCKS and word not in DTYPE_BYTES:
        raise WeightsBroken(
            f"{path} stores {name} as GGUF's {word}, which is not known",
            hint="Use a common one, such as Q8_0, Q6_K, Q5_K_M or Q4_K_M",
        )
    return word


class _Walk:
    """Goes through a header, and never reads more than the file has or a header may have."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_bytes = path.stat().st_size
        self._stream = path.open("rb")
        self.position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Raises WeightsBroken when so many things of at least so many bytes cannot follow."""
        needed_bytes = self.position + count * least_bytes
        if needed_bytes > self._file_bytes:
            raise WeightsBroken(
                f"{self._path} is truncated or broken: {self._file_bytes} bytes, and its header"
                f" tells of {count} {what}, which end at {needed_bytes} at the earliest",
                hint="Download it again",
            )
        if needed_bytes > MAX_HEADER_BYTES:
            raise WeightsBroken(
                f"{self._path} has a header of over {MAX_HEADER_BYTES} bytes: {count} {what}"
            )

    def take(self, count: int, what: str = "bytes") -> bytes:
        self.check_count(count, 1, what)
        content = self._stream.read(count)
        if len(content) < count:
            raise WeightsBroken(f"{self._path} was cut while it was read")
        self.position += count
        return content

    def number(self, letter: str) -> Any:
        """One little-endian number, by struct's letter."""
        (found,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))
        return found

    def string(self) -> str:
        raw = self.take(self.number("Q"), "bytes of a string")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise WeightsBroken(
                f"{self._path} has a string that is not UTF-8: {raw[:40]!r}"
            ) from None

    def value(self, kind: int, name: str) -> Any:
        """The value of a key."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            return self._array(name)
        if kind not in _SCALARS:
            raise WeightsBroken(f"{self._path} has {name} of type {kind}, which GGUF has not")
        return self.number(_SCALARS[kind])

    def _array(self, name: str) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if kind == GGUFValueType.STRING:
            self.check_count(count, 8, f"strings of {name}")
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise WeightsBroken(f"{self._path} has {name}, an array of type {kind}: not read here")
        letter = "B" if kind == GGUFValueType.BOOL else _SCALARS[kind]
        values = array.array(letter)
        raw_bytes = count * struct.calcsize(f"<{letter}")
        self.check_count(raw_bytes, 1, f"bytes of {name}")
        values.frombytes(self.take(raw_bytes))
        return values

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape in torch's order, number of the type, offset) of the next tensor."""
        name = self.string()
        num_sides = self.number("I")
        if num_sides > MAX_SIDES:
            raise WeightsBroken(f"{self._path} has {name} with {num_sides} sides")
        sides = tuple(self.number("Q") for _ in range(num_sides))
        return name, sides[::-1], self.number("I"), self.number("Q")
