"""Files of torch.save (.pth, .pt, .bin): where their tensors lie, without executing the pickle.

Since 1.6 torch writes a zip archive with stored (not compressed) members:

    NAME/data.pkl       the pickle of the object; tensors refer to storages by number
    NAME/data/N         the bytes of storage N
    NAME/byteorder      "little"; absent in old files
    NAME/version, ...   not needed

https://github.com/pytorch/pytorch/blob/main/torch/serialization.py (_save). A tensor is a call of
torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...), and a storage
("storage", class, number, device, number of values). So each tensor becomes bytes of the file.

Left out: compressed archives, the bare pickles of torch before 1.6, TorchScript, tensors that do
not lie in one run (transposed views), and objects of any class.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from wanfit.engine.weights.headers import DTYPE_BYTES, TensorEntry
from wanfit.engine.weights.pickles import BadPickle, Call, Global, Persistent, read_pickle
from wanfit.errors import WeightsBroken

# Ours. A dictionary of 1095 tensors takes 150 kB of pickle and 100 kB of directory.
MAX_PICKLE_BYTES = 16_000_000
MAX_DIRECTORY_BYTES = 16_000_000
_MAX_DEPTH = 4  # ours: of dictionaries around the one with the tensors

_TENSOR = frozenset({"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"})
_TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v3"  # for dtypes without a storage class: fp8
_PARAMETER = "torch._utils._rebuild_parameter"
_MAY_CALL = _TENSOR | {_TENSOR_OF_DTYPE, _PARAMETER}
# torch/storage.py: the classes of storages by dtype.
_STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL", "torch.storage.UntypedStorage": "U8",
    "torch.UntypedStorage": "U8",
}  # fmt: skip
_DTYPES: Mapping[str, str] = {
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float64": "F64",
    "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int8": "I8",
    "torch.uint8": "U8", "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64",
}  # fmt: skip
_LOCAL_HEADER_BYTES = 30  # of a zip member, before its name and extra field
_BAD_ZIP = (
    zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, UnicodeDecodeError,
    ValueError,
)  # fmt: skip


class _Member(NamedTuple):
    """The bytes of a zip member, in the file."""

    offset: int
    num_bytes: int


def read_pth(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of the state dict in the file; wrappers ({"state_dict": ...}) are looked into.

    Raises WeightsBroken for an archive that is truncated, malformed or compressed, for a pickle
    that calls anything but what makes tensors (nothing is executed), and for what is no
    dictionary of tensors, each naming what is wrong.
    """
    try:
        with path.open("rb") as stream:
            members = _members(path, stream)
            names = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
            if len(names) != 1:
                raise WeightsBroken(
                    f"{path} has {len(names)} members called data.pkl, and torch writes one"
                )
            root = names[0].removesuffix("data.pkl")
            order = _content(path, stream, members.get(f"{root}byteorder"))
            if order not in (b"", b"little"):
                raise WeightsBroken(f"{path} has the byte order {order[:20]!r}, and not little")
            content = _content(path, stream, members[names[0]])
    except OSError as error:
        raise WeightsBroken(f"{path} cannot be read: {error.strerror}") from None
    try:
        found = read_pickle(content, _MAY_CALL)
    except BadPickle as error:
        raise WeightsBroken(
            f"{path} is refused, and nothing of it was executed: {error}",
            hint="Use the file as its makers published it, or its safetensors",
        ) from None
    state = _state_dict(path, found)
    storages = {
        name.removeprefix(f"{root}data/"): member
        for name, member in members.items()
        if name.startswith(f"{root}data/")
    }
    return {name: _entry(path, name, value, storages) for name, value in state.items()}


def _members(path: Path, stream: io.BufferedReader) -> dict[str, _Member]:
    """Name -> its bytes: stored members that lie in the file, apart from each other."""
    try:
        with zipfile.ZipFile(_Bounded(stream)) as archive:
            infos = archive.infolist()
    except _BAD_ZIP as error:
        raise WeightsBroken(
            f"{path} is truncated, or no archive of torch: {str(error)[:80]}",
            hint="Download it again",
        ) from None
    file_bytes = path.stat().st_size
    members: dict[str, _Member] = {}
    end, last = 0, "its begin"
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise WeightsBroken(
                f"{path} has {info.filename} compressed ({info.compress_size} to"
                f" {info.file_size} bytes), which torch never does"
            )
        if info.flag_bits & 0x1:
            raise WeightsBroken(f"{path} has {info.filename} encrypted")
        if info.filename in members:
            raise WeightsBroken(f"{path} has two members called {info.filename}")
        if info.header_offset < end:
            raise WeightsBroken(f"{path} has members that overlap: {last} and {info.filename}")
        offset = _data_offset(path, stream, info)
        end, last = offset + info.file_size, info.filename
        if end > file_bytes:
            raise WeightsBroken(
                f"{path} is truncated: {file_bytes} bytes, and {info.filename} ends at {end}"
            )
        members[info.filename] = _Member(offset, info.file_size)
    return members


def _data_offset(path: Path, stream: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its own header, whose lengths the directory lacks."""
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or not header.startswith(b"PK\x03\x04"):
        raise WeightsBroken(f"{path} has no member where its directory has {info.filename}")
    name_bytes = int.from_bytes(header[26:28], "little")
    extra_bytes = int.from_bytes(header[28:30], "little")
    return info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes


def _content(path: Path, stream: io.BufferedReader, member: _Member | None) -> bytes:
    """A small member; nothing where there is none."""
    if member is None:
        return b""
    if member.num_bytes > MAX_PICKLE_BYTES:
        raise WeightsBroken(
            f"{path} has a pickle of {member.num_bytes} bytes, and {MAX_PICKLE_BYTES} are read"
        )
    stream.seek(member.offset)
    return stream.read(member.num_bytes)


def _state_dict(path: Path, found: Any) -> dict[str, Call]:
    """The dictionary of tensors in what the pickle described."""
    around: list[str] = []
    while isinstance(found, dict) and not any(_is_tensor(value) for value in found.values()):
        inner = [key for key, value in found.items() if isinstance(value, dict) and value]
        if not inner or len(around) == _MAX_DEPTH:
            break
        if len(inner) > 1:
            raise WeightsBroken(
                f"{path} holds several dictionaries: {', '.join(str(k)[:40] for k in inner[:5])}",
                hint="Save the one with the weights as a file of its own",
            )
        around.append(str(inner[0]))
        found = found[inner[0]]
    if not isinstance(found, dict) or not found:
        raise WeightsBroken(f"{path} holds {type(found).__name__}, and no dictionary of tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not _is_tensor(value):
            kind = value.name if isinstance(value, Call | Global) else type(value).__name__
            raise WeightsBroken(f"{path} holds {str(name)[:80]}, which is no tensor but {kind}")
    return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Call)


def _entry(path: Path, name: str, value: Call, storages: Mapping[str, _Member]) -> TensorEntry:
    """Where a tensor lies. Raises WeightsBroken."""
    try:
        return _placed(path, name, value, storages)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise WeightsBroken(f"{path} describes {name} in a way that torch does not") from None


def _placed(path: Path, name: str, value: Call, storages: Mapping[str, _Member]) -> TensorEntry:
    if value.name == _PARAMETER:
        value = value.arguments[0]
    if not isinstance(value, Call) or value.name == _PARAMETER:
        raise ValueError(name)
    storage, first, size, stride = value.arguments[:4]
    if not isinstance(storage, Persistent):
        raise ValueError(name)
    _, kind, number, _, _ = storage.id
    if not isinstance(number, str):
        raise ValueError(name)
    dtype = _dtype(path, name, kind)
    if value.name == _TENSOR_OF_DTYPE:
        dtype = _dtype(path, name, value.arguments[6])
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in (first, *size, *stride)) or len(
        size
    ) != len(stride):
        raise ValueError(name)
    if not _is_contiguous(size, stride):
        raise WeightsBroken(
            f"{path} has {name} {list(size)} as a view with strides {list(stride)}, which is not"
            " in one run",
            hint="Save it again with .contiguous()",
        )
    member = storages[number]
    begin_bytes, num_bytes = first * DTYPE_BYTES[dtype], math.prod(size) * DTYPE_BYTES[dtype]
    if begin_bytes + num_bytes > member.num_bytes:
        raise WeightsBroken(
            f"{path} has {name} up to {begin_bytes + num_bytes} bytes of a storage of"
            f" {member.num_bytes}"
        )
    return TensorEntry(path, name, dtype, tuple(size), member.offset + begin_bytes)


def _dtype(path: Path, name: str, kind: Any) -> str:
    word = kind.name if isinstance(kind, Global) else type(kind).__name__
    dtype = _STORAGES.get(word) or _DTYPES.get(word)
    if dtype is None:
        raise WeightsBroken(f"{path} stores {name} as {word}, which is not known")
    return dtype


def _is_contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether values lie one after the other; sides of 1 may have any stride."""
    wanted = 1
    for side, step in zip(reversed(size), reversed(stride), strict=True):
        if side != 1 and step != wanted:
            return math.prod(size) == 0
        wanted *= side
    return True


class _Bounded:
    """A file that refuses large reads: zipfile reads a directory as long as the archive says."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def read(self, count: int = -1) -> bytes:
        content = b""
        if count <= MAX_DIRECTORY_BYTES:
            content = self._stream.read(MAX_DIRECTORY_BYTES + 1 if count < 0 else count)
        if max(count, len(content)) > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory has over {MAX_DIRECTORY_BYTES} bytes")
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def seekable(self) -> bool:
        return True
