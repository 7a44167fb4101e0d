"""What a weight file holds, whatever its container: opened by content, never by the file's name.

Four things people have: a safetensors file, the index.json of a sharded one, a file of torch.save
(.pth, a zip archive with a pickle that is never executed), and GGUF. All become a `Container`:
names, dtypes, shapes and places of tensors. Nothing here imports torch, or reads a tensor but for
the markers of quantised layouts, which hold a few bytes of JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wanfit.engine.weights.headers import (
    MAX_HEADER_BYTES,
    TensorEntry,
    index_entries,
    read_safetensors,
)
from wanfit.engine.weights.scales import folded, storage_words
from wanfit.errors import WeightsBroken, WeightsMissing

ContainerKind = Literal["safetensors", "pth", "gguf"]

_HEAD_BYTES = 512
_GGUF_MAGIC = b"GGUF"
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")  # the second: of an archive without members
_PICKLE_MAGICS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


@dataclass(frozen=True, slots=True)
class Container:
    """What one weight file, or the shards of one index, hold, by their headers."""

    path: Path  # the file, or the index.json
    kind: ContainerKind
    files: tuple[Path, ...]  # that hold the tensors
    entries: Mapping[str, TensorEntry]  # by the file's own names; scales and markers too
    metadata: Mapping[str, Any]  # safetensors' __metadata__, GGUF's key-value pairs

    @property
    def num_bytes(self) -> int:
        """Of the files that hold the tensors, on disk."""
        return sum(file.stat().st_size for file in self.files)


def open_container(path: Path) -> Container:
    """What lies at `path`: a weight file, or the index.json of a sharded one.

    Told apart by the first bytes. Raises WeightsMissing where no file is (or a shard of an index),
    WeightsBroken for a file that is truncated, malformed or of none of these kinds, and for one
    with code in it, which is not executed.
    """
    head = _head(path)
    if head.startswith(_GGUF_MAGIC):
        from wanfit.engine.weights.gguf_file import read_gguf

        entries, metadata = read_gguf(path)
        return Container(path, "gguf", (path,), entries, metadata)
    if head.startswith(_ZIP_MAGICS):
        from wanfit.engine.weights.pth import read_pth

        return Container(path, "pth", (path,), read_pth(path), {})
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        entries, metadata = read_safetensors(path)
        return Container(path, "safetensors", (path,), entries, metadata)
    if head.lstrip().startswith(b"{"):
        return _open_index(path)
    raise WeightsBroken(f"{path} is not a weight file", hint=_what_it_is(path, head))


def weights_of(container: Container) -> dict[str, TensorEntry]:
    """The weights alone, by the file's own names: each with its scale, where it has one.

    Understands ComfyUI's old layout (scale_weight, scaled_fp8) and new one (weight_scale with
    comfy_quant or _quantization_metadata), Kijai's and LightX2V's (`weights.scales`). Scales,
    markers and scales of activations are not in the result. Raises WeightsBroken for a quantised
    layout that is not decoded, naming it, and for a scale that fits no weight.
    """
    return folded(container.path, container.entries, container.metadata)


def storage_of(entries: Mapping[str, TensorEntry]) -> str:
    """How the weights are stored, for people: "bf16", "fp8 scaled + fp16", "Q4_K + Q6_K".

    entries: as `weights_of` gives them, or some of them. Storages that hold under 2 % of the
    values are left out; the one with the most values comes first.
    """
    return storage_words(entries.values())


def _open_index(path: Path) -> Container:
    entries = index_entries(path)
    files = tuple(sorted({entry.file for entry in entries.values()}))
    return Container(path, "safetensors", files, entries, {})


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_HEAD_BYTES)
    except FileNotFoundError:
        raise WeightsMissing(f"{path} is not there") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsBroken(f"{path} cannot be read: {reason}") from None


def _what_it_is(path: Path, head: bytes) -> str:
    """The hint for a file of no kind that is read."""
    text = head.lstrip().lower()
    if not head:
        return "It is empty; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "It is a pointer of Git LFS; fetch the file itself (git lfs pull)"
    if text.startswith((b"<!doctype html", b"<html")):
        return "It is a web page; download the file itself"
    if head.startswith(_PICKLE_MAGICS):
        return (
            "It is a bare pickle, torch's format before 1.6, which is not read; save it again"
            " with a newer torch, or get the safetensors"
        )
    return f"Its first bytes are {head[:8]!r}: none of safetensors, torch's zip, GGUF, index.json"
