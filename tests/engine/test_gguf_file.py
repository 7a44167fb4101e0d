"""GGUF headers: as the gguf package writes and reads them, and none that lies is believed."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import _type_traits

from tests.checkpoints import GgufTensor, save_gguf
from wanfit.engine.weights.container import Container, open_container, storage_of, weights_of
from wanfit.engine.weights.gguf_file import read_gguf
from wanfit.engine.weights.headers import BLOCKS, DTYPE_BYTES, block_of
from wanfit.errors import WeightsBroken

STRING, ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY


def header(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    begin = struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_keys)
    return begin + b"".join(keys) + b"".join(tensors)


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(
    name: bytes, sides: Sequence[int] = (32,), kind: int = Kind.F32, offset: int = 0
) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(sides))
        + struct.pack(f"<{len(sides)}Q", *sides)
        + struct.pack("<IQ", kind, offset)
    )


def opened(file: Path, content: bytes, data_bytes: int = 1024) -> Container:
    file.write_bytes(content + bytes(-len(content) % 32) + bytes(data_bytes))
    return open_container(file)


class TestWhatThePackageWrites:
    @pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, *_type_traits], ids=lambda k: k.name)
    def test_every_type_that_it_decodes(self, kind: Any, tmp_path: Path) -> None:
        """Types, shapes and places are those of GGUFReader; the data is where they say."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = np.random.default_rng(0).integers(0, 256, 6 * block_bytes, dtype=np.uint8)
        first = np.arange(5, dtype=np.float32)
        tensors: dict[str, GgufTensor] = {
            "first": (first, Kind.F32, (5,)),
            "a.weight": (raw, kind, (3, 2 * block)),
            "five.sides": (np.ones(12, np.float32), Kind.F32, (3, 1, 2, 1, 2)),
        }
        save_gguf(tmp_path / "no.suffix", tensors, "wan")
        container = open_container(tmp_path / "no.suffix")
        assert container.kind == "gguf"
        content = (tmp_path / "no.suffix").read_bytes()
        found = container.entries["a.weight"]
        assert (found.dtype, found.shape) == (kind.name, (3, 2 * block))
        assert content[found.offset : found.offset + found.num_bytes] == raw.tobytes()
        assert container.entries["five.sides"].shape == (3, 1, 2, 1, 2)
        for theirs in gguf.GGUFReader(tmp_path / "no.suffix").tensors:
            ours = container.entries[theirs.name]
            assert (ours.dtype, ours.offset) == (theirs.tensor_type.name, theirs.data_offset)
            assert list(ours.shape) == theirs.shape.tolist()[::-1]
            assert ours.num_bytes == theirs.n_bytes

    def test_the_tables_are_the_packages(self) -> None:
        """All types that gguf.quants decodes, each with its block."""
        assert set(BLOCKS) == {kind.name for kind in _type_traits} - {"BF16"}
        for kind, size in gguf.GGML_QUANT_SIZES.items():
            if kind.name in BLOCKS or kind.name in DTYPE_BYTES:
                assert block_of(kind.name) == size

    def test_key_value_pairs(self, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "x", "t5encoder")
        tokens = ["<pad>", "\N{LOWER ONE EIGHTH BLOCK}käse", "", "<0x0A>"]
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0, -1.5, -2.0, 3.0])
        writer.add_token_types([3, 1, 1, 6])
        writer.add_add_space_prefix(True)
        writer.add_eos_token_id(1)
        writer.add_float64("a.double", 0.1)
        writer.add_int64("a.long", -(1 << 40))
        writer.add_array("orig_shape", [3, 1, 2])
        writer.add_array("flags", [True, False])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        metadata = open_container(tmp_path / "x").metadata
        assert metadata["general.architecture"] == "t5encoder"
        assert metadata["tokenizer.ggml.tokens"] == tokens
        assert list(metadata["tokenizer.ggml.scores"]) == [0.0, -1.5, -2.0, 3.0]
        assert list(metadata["tokenizer.ggml.token_type"]) == [3, 1, 1, 6]
        assert metadata["tokenizer.ggml.add_space_prefix"] is True
        assert metadata["tokenizer.ggml.eos_token_id"] == 1
        assert (metadata["a.double"], metadata["a.long"]) == (0.1, -(1 << 40))
        assert list(metadata["orig_shape"]) == [3, 1, 2]
        assert list(metadata["flags"]) == [1, 0]

    def test_a_large_vocabulary_is_read_at_once(self, tmp_path: Path) -> None:
        """UMT5's size: 0.3 s, where GGUFReader takes seconds."""
        writer = gguf.GGUFWriter(tmp_path / "x", "t5encoder")
        writer.add_token_list([f"piece{i}".encode() for i in range(256_384)])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        began_s = time.process_time()
        metadata = open_container(tmp_path / "x").metadata
        assert time.process_time() - began_s < 2
        assert metadata["tokenizer.ggml.tokens"][-1] == "piece256383"

    def test_another_alignment(self, tmp_path: Path) -> None:
        keys = [key(b"general.alignment", gguf.GGUFValueType.UINT32, struct.pack("<I", 1024))]
        content = header(keys, [tensor(b"a", offset=1024)])
        (tmp_path / "x").write_bytes(content.ljust(1024, b"\0") + bytes(1024 + 128))
        assert open_container(tmp_path / "x").entries["a"].offset == 2048

    def test_the_shape_before_it_was_folded(self, tmp_path: Path) -> None:
        """As ComfyUI-GGUF's converter notes it."""

        def noted(*sides: int) -> bytes:
            value = struct.pack(f"<IQ{len(sides)}i", gguf.GGUFValueType.INT32, len(sides), *sides)
            return header([key(b"comfy.gguf.orig_shape.a", ARRAY, value)], [tensor(b"a", [16, 2])])

        found = opened(tmp_path / "x", noted(2, 1, 4, 2, 2)).entries["a"]
        assert found.shape == (2, 1, 4, 2, 2)
        for sides in ((2, 15), (-2, -16), ()):
            with pytest.raises(WeightsBroken, match=r"a as \[2, 16\], which cannot have been"):
                opened(tmp_path / "x", noted(*sides))

    def test_storages_in_words(self, tmp_path: Path) -> None:
        tensors: dict[str, GgufTensor] = {
            "a": (None, Kind.Q4_K, (64, 256)),
            "b": (None, Kind.Q6_K, (32, 256)),
            "c": (None, Kind.F32, (64,)),
        }
        save_gguf(tmp_path / "x", tensors, "wan")
        assert storage_of(weights_of(open_container(tmp_path / "x"))) == "Q4_K + Q6_K"


class TestLies:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (header(version=1), "GGUF of version 1, and versions 2 and 3"),
            (header(version=3 << 24), "big-endian"),
            (header(counts=(1 << 60, 0)), "tells of 1152921504606846976 tensors"),
            (header(counts=(0, 1 << 60)), "tells of 1152921504606846976 keys"),
            (header([text(b"name", 1 << 50)], counts=(0, 1)), "bytes of a string"),
            (header([text(b"\xff\xfe") + bytes(20)], counts=(0, 1)), "string that is not UTF-8"),
            (header([key(b"k", 99, bytes(8))]), "has k of type 99"),
            (header([key(b"k", STRING, text(b"", 1 << 62))]), "bytes of a string"),
            (
                header([key(b"k", ARRAY, struct.pack("<IQ", STRING, 1 << 61))]),
                "strings of k",
            ),
            (header([key(b"k", ARRAY, struct.pack("<IQ", 0, 1 << 61))]), "bytes of k"),
            (
                header([key(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(12))]),
                "an array of type 9",
            ),
            (header([key(b"k", ARRAY, struct.pack("<IQ", 77, 1))]), "an array of type 77"),
            (header([key(b"k", 0, b"1"), key(b"k", 0, b"1")]), "names 'k' twice"),
            (header(tensors=[tensor(b"a"), tensor(b"a", offset=128)]), "names 'a' twice"),
            (header(tensors=[tensor(b"a", [1] * 9)]), "a with 9 sides"),
            (header(tensors=[tensor(b"a", [1 << 63] * 4)]), "truncated"),
            (header(tensors=[tensor(b"a", offset=1 << 62)]), "truncated"),
            (header(tensors=[tensor(b"a"), tensor(b"b")]), "tensors that overlap: a and b"),
            (header(tensors=[tensor(b"a"), tensor(b"b", offset=64)]), "overlap"),
            (header(tensors=[tensor(b"a", offset=5)]), "offsets of 32 bytes"),
            (header(tensors=[tensor(b"a", [100], Kind.Q4_K)]), "multiples of 256 values"),
            (header(tensors=[tensor(b"a", [16, 2], Kind.Q8_0)]), "multiples of 32 values"),
            (header(tensors=[tensor(b"a", kind=9)]), "stores a as GGUF's Q8_1, which is not known"),
            (header(tensors=[tensor(b"a", kind=4242)]), "stores a as GGUF's type 4242"),
            (
                header([key(b"general.alignment", 4, struct.pack("<I", 0))]),
                "alignment of 0, which is no power of two",
            ),
            (header([key(b"general.alignment", 4, struct.pack("<I", 48))]), "no power of two"),
            (header([key(b"general.alignment", STRING, text(b"x"))]), "alignment of 'x'"),
        ],
    )
    def test_a_header_is_not_believed(self, content: bytes, message: str, tmp_path: Path) -> None:
        with pytest.raises(WeightsBroken, match=message):
            opened(tmp_path / "x", content)

    def test_a_header_of_terabytes_is_not_walked(self, tmp_path: Path) -> None:
        """A hole that would hold as many keys as it says."""
        with (tmp_path / "x").open("wb") as stream:
            stream.write(header(counts=(0, 1 << 34)))
            stream.truncate(1 << 40)
        with pytest.raises(WeightsBroken, match="header of over 100000000 bytes"):
            open_container(tmp_path / "x")

    def test_a_file_cut_anywhere(self, tmp_path: Path) -> None:
        raw = np.zeros(144 * 4, np.uint8)
        tensors: dict[str, GgufTensor] = {"a": (raw, Kind.Q4_K, (2, 512))}
        save_gguf(tmp_path / "whole", tensors, "wan")
        content = (tmp_path / "whole").read_bytes()
        for length in range(4, len(content), 7):
            (tmp_path / "cut").write_bytes(content[:length])
            with pytest.raises(WeightsBroken, match="truncated"):
                open_container(tmp_path / "cut")

    def test_any_change_of_a_byte_is_read_or_refused(self, tmp_path: Path) -> None:
        """1500 files with a few bytes changed: never anything but WeightsBroken."""
        raw = np.zeros(144 * 4, np.uint8)
        tensors: dict[str, GgufTensor] = {
            "a": (raw, Kind.Q4_K, (2, 512)),
            "b": (np.ones(4, np.float32), Kind.F32, (2, 2)),
        }
        save_gguf(tmp_path / "whole", tensors, "t5encoder", vocabulary=True)
        content = (tmp_path / "whole").read_bytes()
        chance, refused = random.Random(0), 0
        for _ in range(1500):
            changed = bytearray(content)
            for _ in range(chance.choice((1, 2, 8))):
                changed[chance.randrange(len(content) - len(raw))] = chance.randrange(256)
            (tmp_path / "x").write_bytes(changed)
            try:
                read_gguf(tmp_path / "x")
            except WeightsBroken:
                refused += 1
        assert refused > 300
