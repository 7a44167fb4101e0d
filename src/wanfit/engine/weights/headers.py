"""Where a tensor lies, and what the headers of safetensors files say, read without any tensor.

A header is 8 bytes of length (little endian), then JSON: name -> dtype, shape, (start, end) of the
bytes after the header. So one small read per file tells everything but the values, and a 20 GB
download that broke off is found in milliseconds.
https://huggingface.co/docs/safetensors/index#format

Nothing in a header is believed before it is checked: lengths, offsets, shapes, names of shards.
Left out: other containers (`weights.container` opens those).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfit.errors import WeightsBroken, WeightsMissing

# safetensors' own limit; a real header has about 100 bytes per tensor. Our limit for the other
# containers' headers and for JSON files too.
MAX_HEADER_BYTES = 100_000_000
# Plain numbers by safetensors' words, with their size.
# https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs (Dtype)
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
# What runs as it lies in a file; all others have to be decoded first (`weights.decode`).
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
# GGUF's blocks: (values, bytes). gguf-py, gguf/constants.py, GGML_QUANT_SIZES: those that
# gguf/quants.py can decode.
BLOCKS: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "TQ1_0": (256, 54), "TQ2_0": (256, 66), "IQ1_S": (256, 50),
    "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "MXFP4": (32, 17), "NVFP4": (64, 36),
}  # fmt: skip

_DOWNLOAD_AGAIN = "Download it again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `num_bytes` in a row, from `offset` on.

    dtype: a word of DTYPE_BYTES, or GGUF's name of a block type (BLOCKS).
    shape: as torch has it, the innermost side last, whatever the file's order.
    scale: what a quantised value is multiplied by, of shape (), (1,), (O,) or (O, 1), where O is
    the first side of `shape`; None where nothing is to be done.
    """

    file: Path
    name: str  # in the file
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the file's begin
    scale: TensorEntry | None = None

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file; `block_of` raises KeyError for a dtype that is in no table."""
        values, size_bytes = block_of(self.dtype)
        return -(-self.num_values // values) * size_bytes

    @property
    def is_plain(self) -> bool:
        """Whether the bytes are the values, in a dtype that runs."""
        return self.dtype in PLAIN_DTYPES and self.scale is None


def block_of(dtype: str) -> tuple[int, int]:
    """(values, bytes) of the least run that can be read of a tensor of this dtype."""
    size_bytes = DTYPE_BYTES.get(dtype)
    return BLOCKS[dtype] if size_bytes is None else (1, size_bytes)


def component_file(folder: Path, stem: str) -> Path:
    """The file of a component: `stem.safetensors`, or the index of its shards.

    Raises WeightsMissing.
    """
    index_file = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if index_file.is_file():
        return index_file
    if not single.is_file():
        raise WeightsMissing(f"{single} is not there", hint=_missing_hint(folder))
    return single


def index_entries(index_file: Path) -> dict[str, TensorEntry]:
    """Every tensor of the shards that an index lists, which lie beside it.

    Raises WeightsMissing naming the first absent shard; WeightsBroken for a malformed index or
    shard, a tensor that is not where the index has it, and one that lies in two shards.
    """
    weight_map = read_weight_map(index_file)
    folder = index_file.parent
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise WeightsMissing(
            f"{folder / absent[0]} is not there, {len(absent)} of {len(shards)} shards missing",
            hint=_DOWNLOAD_AGAIN,
        )
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in file_entries(folder / shard).items():
            if name in entries:
                raise WeightsBroken(
                    f"{name} lies in both {entries[name].file} and {entry.file.name}"
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file.name != shard:
            raise WeightsBroken(
                f"{folder / shard} lacks {name}, which {index_file.name} places there",
                hint=_DOWNLOAD_AGAIN,
            )
    return entries


def read_weight_map(index_file: Path) -> dict[str, str]:
    """Tensor -> name of its shard, of an index as diffusers and transformers write it.

    Raises WeightsBroken, also for a shard that is a path: an index must not reach out of its
    folder.
    """
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsBroken(f"{index_file} has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not is_file_name(shard):
            raise WeightsBroken(f"{index_file} names a shard {shard!r}, which is not a file name")
    return weight_map


def is_file_name(name: str) -> bool:
    """Whether this names a file in a folder, and cannot name one anywhere else."""
    return bool(name) and name not in (".", "..") and "\0" not in name and name == Path(name).name


def file_entries(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file. Raises WeightsBroken."""
    entries, _ = read_safetensors(file)
    return entries


def read_safetensors(file: Path) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """(tensors, __metadata__) of one safetensors file.

    Raises WeightsBroken for a file that is truncated, too long or malformed, a dtype that is in
    no table, and tensors that overlap or whose bytes are not as many as their shape needs.
    """
    raw = read_header(file)
    header, header_end = parse_header(file, raw), len(raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise WeightsBroken(f"{file} has a header whose __metadata__ is not an object")
    entries = {name: _entry(file, name, fields, header_end) for name, fields in header.items()}
    end = check_disjoint(file, entries.values(), header_end)
    check_length(file, end)
    return entries, metadata


def _entry(file: Path, name: str, fields: Any, header_end: int) -> TensorEntry:
    try:
        dtype, shape = fields["dtype"], tuple(fields["shape"])
        start, end = fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise WeightsBroken(f"{file} has a malformed entry for {name}") from None
    numbers = (*shape, start, end)
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in numbers):
        raise WeightsBroken(f"{file} has a malformed entry for {name}")
    if dtype not in DTYPE_BYTES:
        raise WeightsBroken(
            f"{file} holds {name} as {dtype}, which is not known",
            hint=f"Use files in one of {', '.join(DTYPE_BYTES)}",
        )
    entry = TensorEntry(file, name, dtype, shape, header_end + start)
    if end - start != entry.num_bytes:
        raise WeightsBroken(
            f"{file} gives {name} {end - start} bytes, and its shape needs {entry.num_bytes}"
        )
    return entry


def check_disjoint(file: Path, entries: Iterable[TensorEntry], begin: int) -> int:
    """The end of the last tensor's bytes, or `begin` without any.

    Raises WeightsBroken when two tensors share bytes, which no program writes on purpose.
    """
    end, last = begin, ""
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
        if entry.num_bytes and entry.offset < end:
            raise WeightsBroken(
                f"{file} has tensors that overlap: {last or begin} and {entry.name}"
            )
        if entry.num_bytes:
            end, last = entry.offset + entry.num_bytes, entry.name
    return end


def check_length(file: Path, expected_bytes: int) -> None:
    """Raises WeightsBroken, with both numbers, when the file is shorter or longer."""
    check_whole(file, expected_bytes)
    file_bytes = file.stat().st_size
    if file_bytes > expected_bytes:
        raise WeightsBroken(
            f"{file} has {file_bytes} bytes, and its header tells of only {expected_bytes}"
        )


def check_whole(file: Path, at_least_bytes: int) -> None:
    """Raises WeightsBroken, with both numbers, when the file is shorter."""
    file_bytes = file.stat().st_size
    if file_bytes < at_least_bytes:
        raise WeightsBroken(
            f"{file} is truncated: {file_bytes} bytes instead of {at_least_bytes}",
            hint=_DOWNLOAD_AGAIN,
        )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises WeightsMissing or WeightsBroken."""
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            raise WeightsBroken(f"{file} has {file.stat().st_size} bytes, too many for JSON")
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsMissing(f"{file} is not there") from None
    except OSError as error:
        raise WeightsBroken(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise WeightsBroken(f"{file} is not JSON: {error}") from None
    except RecursionError:
        raise WeightsBroken(f"{file} holds JSON that is nested too deep") from None
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
            check_whole(file, 8 + length)
            return prefix + stream.read(length)
    except OSError as error:
        raise WeightsBroken(f"{file} cannot be read: {error.strerror}") from None


def parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    """The JSON of what `read_header` gave. Raises WeightsBroken, also for a name that is twice."""

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found, seen = dict(pairs), set[str]()
        if len(found) < len(pairs):
            for name, _ in pairs:
                if name in seen:
                    raise WeightsBroken(f"{file} has a header that names {name!r} twice")
                seen.add(name)
        return found

    try:
        header = json.loads(raw[8:], object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise WeightsBroken(f"{file} has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise WeightsBroken(f"{file} has a header that is not a JSON object")
    return header


def _missing_hint(folder: Path) -> str:
    if not folder.is_dir():
        return f"The directory has no {folder.name}/ at all; download the rest of the model"
    pickles: Sequence[Path] = [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]
    if pickles:
        return f"{pickles[0].name} is a pickle, which is never read here; get the safetensors"
    return "Download the model again"
