"""Which tensors lie in safetensors files and whether the files are whole, from headers alone.

A header is 8 bytes of length (little endian), then JSON: name -> dtype, shape, (start, end) of the
bytes after the header. So one small read per file tells everything but the values, and a 20 GB
download that broke off is found in milliseconds. Pickles (.bin, .pth) are never opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfit.errors import WeightsBroken, WeightsMissing

# safetensors' own limit; a real header has about 100 bytes per tensor
MAX_HEADER_BYTES = 100_000_000
# What we read, with its size. fp8 is read from a store only: it means nothing without our scales.
DTYPE_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
# What a directory in diffusers layout may hold; quantised files (fp8, int8) are another format.
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `num_bytes` in a row, from `offset` on."""

    file: Path
    name: str  # in the file
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    offset: int  # bytes from the file's begin

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def component_entries(folder: Path, stem: str) -> dict[str, TensorEntry]:
    """Every tensor of a component: of `stem.safetensors`, or of the shards that its index lists.

    Raises WeightsMissing naming the first absent file, WeightsBroken for a truncated or malformed
    one, and for a tensor that the index places in a shard that lacks it.
    """
    index_file = folder / f"{stem}.safetensors.index.json"
    if not index_file.is_file():
        single = folder / f"{stem}.safetensors"
        if not single.is_file():
            raise WeightsMissing(f"{single} is not there", hint=_missing_hint(folder))
        return file_entries(single)

    weight_map = _weight_map(index_file)
    entries: dict[str, TensorEntry] = {}
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise WeightsMissing(
            f"{folder / absent[0]} is not there, {len(absent)} of {len(shards)} shards missing",
            hint="Download it again",
        )
    for shard in shards:
        entries |= file_entries(folder / shard)
    lost = [name for name, shard in weight_map.items() if name not in entries]
    if lost:
        raise WeightsBroken(
            f"{folder / weight_map[lost[0]]} lacks {lost[0]}, which {index_file.name} places there"
        )
    return entries


def file_entries(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file. Raises WeightsBroken."""
    raw = read_header(file)
    header, header_end = parse_header(file, raw), len(raw)
    header.pop("__metadata__", None)
    entries: dict[str, TensorEntry] = {}
    data_bytes = 0
    for name, fields in header.items():
        try:
            dtype, shape = str(fields["dtype"]), tuple(int(side) for side in fields["shape"])
            start, end = (int(offset) for offset in fields["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise WeightsBroken(f"{file} has a malformed entry for {name}") from None
        if dtype not in PLAIN_DTYPES:
            raise WeightsBroken(
                f"{file} holds {name} as {dtype}, which is not read here",
                hint=f"Use files in one of {', '.join(PLAIN_DTYPES)}",
            )
        entry = TensorEntry(file, name, dtype, shape, header_end + start)
        if end - start != entry.num_bytes:
            raise WeightsBroken(
                f"{file} gives {name} {end - start} bytes, and its shape needs {entry.num_bytes}"
            )
        data_bytes = max(data_bytes, end)
        entries[name] = entry
    check_length(file, header_end + data_bytes)
    return entries


def check_length(file: Path, expected_bytes: int) -> None:
    """Raises WeightsBroken, with both numbers, when the file is shorter or longer."""
    _check_length(file, at_least=expected_bytes)
    file_bytes = file.stat().st_size
    if file_bytes > expected_bytes:
        raise WeightsBroken(
            f"{file} has {file_bytes} bytes, and its header tells of only {expected_bytes}"
        )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises WeightsMissing or WeightsBroken."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsMissing(f"{file} is not there") from None
    except OSError as error:
        raise WeightsBroken(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise WeightsBroken(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightsBroken(f"{file} does not hold a JSON object")
    return value


def read_header(file: Path) -> bytes:
    """The length and the JSON of a file's header, as they lie there. Raises WeightsBroken."""
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER_BYTES:
                raise WeightsBroken(f"{file} ({file_bytes} bytes) is not a safetensors file")
            _check_length(file, at_least=8 + length)
            return prefix + stream.read(length)
    except OSError as error:
        raise WeightsBroken(f"{file} cannot be read: {error.strerror}") from None


def parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    """The JSON of what `read_header` gave. Raises WeightsBroken."""
    try:
        header = json.loads(raw[8:])
    except ValueError:
        raise WeightsBroken(f"{file} has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise WeightsBroken(f"{file} has a header that is not a JSON object")
    return header


def _check_length(file: Path, *, at_least: int) -> None:
    file_bytes = file.stat().st_size
    if file_bytes < at_least:
        raise WeightsBroken(
            f"{file} is truncated: {file_bytes} bytes instead of {at_least}",
            hint="Download it again",
        )


def _weight_map(index_file: Path) -> dict[str, str]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsBroken(f"{index_file} has no weight_map")
    for shard in weight_map.values():
        # A name, not a path: an index must not reach outside its folder.
        if not isinstance(shard, str) or shard != Path(shard).name:
            raise WeightsBroken(f"{index_file} names a shard {shard!r}, which is not a file name")
    return weight_map


def _missing_hint(folder: Path) -> str:
    if not folder.is_dir():
        return f"The directory has no {folder.name}/ at all; download the rest of the model"
    pickles: Sequence[Path] = [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]
    if pickles:
        return f"{pickles[0].name} is a pickle, which is never read; get the safetensors"
    return "Download the model again"
