"""Weight files as their programs write them; tensors without values become holes."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from wanfit.engine.weights.configs import Json

Files = dict[str, Tensor]  # by a file's names
# (data, or None for a hole; its type; its shape)
GgufTensor = tuple[np.ndarray[Any, Any] | None, gguf.GGMLQuantizationType, tuple[int, ...]]

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.int64: "I64", torch.int32: "I32",
}  # fmt: skip

NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # sentencepiece_model.proto, SentencePiece.Type
# (piece, score, type), ids in order, as google/umt5-xxl begins; 16 of the 20 rows of TINY_UMT5.
TINY_PIECES: tuple[tuple[str, float, int], ...] = (
    ("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN),
    *(
        (piece, -1.0 - i / 4, NORMAL)
        for i, piece in enumerate(
            ("▁", "▁red", "▁cir", "cle", "s", "▁a", "▁star", "▁moves", "▁left", "e", "d", "a")
        )
    ),
)  # fmt: skip


def save_safetensors(file: Path, tensors: Files, metadata: Mapping[str, str] | None = None) -> None:
    """As safetensors' own writer does, but tensors on the meta device become holes."""
    header: Json = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        start = stream.tell()
        for name, tensor in tensors.items():
            if not tensor.is_meta:
                stream.seek(start + header[name]["data_offsets"][0])
                stream.write(_bytes_of(tensor))
        stream.truncate(start + end)


def save_sharded(folder: Path, stem: str, tensors: Files, num_shards: int) -> None:
    """`stem-0000k-of-0000n.safetensors` and their index, as save_pretrained writes them."""
    names = list(tensors)
    per_shard = -(-len(names) // num_shards)
    weight_map: dict[str, str] = {}
    for k in range(num_shards):
        shard = f"{stem}-{k + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in names[k * per_shard : (k + 1) * per_shard]}
        save_safetensors(folder / shard, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    _save_index(folder / f"{stem}.safetensors.index.json", weight_map, tensors)


def save_by_block(folder: Path, tensors: Files) -> None:
    """LightX2V's converter with -b: one file for each block, and one for the rest."""
    weight_map: dict[str, str] = {}
    for name in tensors:
        parts = name.split(".")
        file = f"block_{parts[1]}" if parts[0] == "blocks" else "non_block"
        weight_map[name] = f"{file}.safetensors"
    for file in dict.fromkeys(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_safetensors(folder / file, part)
    _save_index(folder / "diffusion_pytorch_model.safetensors.index.json", weight_map, tensors)


def save_pth(file: Path, tensors: Files) -> None:
    """torch.save of a plain dictionary; tensors on the meta device become holes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not any(tensor.is_meta for tensor in tensors.values()):
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, file)
        return
    _save_hollow_pth(file, tensors)


class _Storage(NamedTuple):
    """Stands for a storage in the pickle of a hollow file."""

    key: str
    type: Any
    num_elements: int


# torch's storages by dtype; fp8 has none: its tensors lie in an untyped one, of bytes.
_TYPES: Mapping[torch.dtype, Any] = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
    torch.int8: torch.CharStorage,
}


class _HollowTensor:
    """Pickles as a tensor of that storage does (torch/_tensor.py, _reduce_ex_internal)."""

    def __init__(self, storage: _Storage, tensor: Tensor) -> None:
        self.storage, self.shape, self.dtype = storage, tuple(tensor.shape), tensor.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        stride = tuple(int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape)))
        arguments: tuple[Any, ...] = (self.storage, 0, self.shape, stride, False, OrderedDict())
        if self.dtype in _TYPES:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, self.dtype)


class _HollowPickler(pickle.Pickler):
    def persistent_id(self, thing: object) -> Any:
        if not isinstance(thing, _Storage):
            return None
        return ("storage", thing.type, thing.key, "cpu", thing.num_elements)


def _save_hollow_pth(file: Path, tensors: Files) -> None:
    """A zip file as torch writes it, whose storages are stored without being written."""
    storages = {
        name: _Storage(str(i), _TYPES.get(tensor.dtype, torch.UntypedStorage), tensor.numel())
        for i, (name, tensor) in enumerate(tensors.items())
    }
    content = io.BytesIO()
    _HollowPickler(content, protocol=2).dump(
        {name: _HollowTensor(storages[name], t) for name, t in tensors.items()}
    )
    writer: Any = torch._C.PyTorchFileWriter(str(file))
    writer.write_record("data.pkl", content.getvalue(), len(content.getvalue()))
    writer.write_record(".format_version", "1", 1)
    writer.write_record("byteorder", "little", len("little"))
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        writer.write_record_metadata(f"data/{storages[name].key}", num_bytes)
    writer.write_end_of_file()


def save_gguf(
    file: Path, tensors: Mapping[str, GgufTensor], arch: str | None, *, vocabulary: bool = False
) -> None:
    """A GGUF file; tensors without data become holes. arch None: no general.architecture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(None, arch or "pig")
    if arch is None:
        writer.kv_data[0].pop("general.architecture")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
    if vocabulary:
        _add_vocabulary(writer)
    for name, (_, kind, shape) in tensors.items():
        count = int(np.prod(shape))
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = count // block * block_bytes
        byte_shape = (*shape[:-1], shape[-1] // block * block_bytes) if block > 1 else shape
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
        if kind.name == "BF16":
            byte_shape = (*shape[:-1], shape[-1] * 2)
        writer.add_tensor_info(name, byte_shape, np.dtype(dtype), num_bytes, raw_dtype=kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as stream:
        align = writer.data_alignment
        at = stream.seek(0, 2)
        at += -at % align
        for data, kind, shape in tensors.values():
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if data is not None:
                stream.seek(at)
                stream.write(data.tobytes())
            at += int(np.prod(shape)) // block * block_bytes
            at += -at % align
        stream.truncate(at)


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """As llama.cpp's converter writes the vocabulary of UMT5."""
    writer.add_tokenizer_model("t5")
    writer.add_token_list([piece.encode() for piece, _, _ in TINY_PIECES])
    writer.add_token_scores([score for _, score, _ in TINY_PIECES])
    writer.add_token_types([kind for _, _, kind in TINY_PIECES])
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)


def tiny_spiece(pieces: tuple[tuple[str, float, int], ...] = TINY_PIECES) -> bytes:
    """A serialized sentencepiece ModelProto: a unigram model with the identity normaliser."""
    proto = b""
    for piece, score, kind in pieces:
        message = _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18"
        proto += _field(1, message + bytes([kind]))
    # trainer_spec: model_type UNIGRAM; ids of unk, bos, eos, pad
    trainer = bytes([3 << 3, 1])
    for number, value in ((40, 3), (41, 2), (42, 1), (43, 0)):
        trainer += _varint(number << 3) + _varint(value)
    normalizer = _field(1, b"identity") + bytes([3 << 3, 1, 4 << 3, 1, 5 << 3, 1])
    return proto + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def write_json(file: Path, content: Json) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def _save_index(file: Path, weight_map: Mapping[str, str], tensors: Files) -> None:
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(file, {"metadata": {"total_size": total}, "weight_map": dict(weight_map)})


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
