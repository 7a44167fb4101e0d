"""Decoding: the values of every encoding, whatever the pieces, against those who define it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import _type_traits, dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.checkpoints import DTYPES, save_gguf, save_safetensors
from wanfit.engine.weights.container import open_container, weights_of
from wanfit.engine.weights.decode import Rows, Sources, decoded_rows
from wanfit.engine.weights.headers import TensorEntry
from wanfit.errors import WeightsBroken

# gguf-py has quantisers for these; it only decodes the others.
QUANTISERS = ("F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")
PIECES = (1, 100, 300, 1 << 20)  # most values of a piece


def all_of(entry: TensorEntry, most_values: int = 1 << 20) -> Tensor:
    with Sources() as sources:
        return torch.cat(list(decoded_rows(sources, entry, most_values))).view(entry.shape)


def gguf_entry(
    file: Path, data: np.ndarray[Any, Any], kind: Kind, shape: tuple[int, ...]
) -> TensorEntry:
    save_gguf(file, {"w": (data, kind, shape)}, "wan")
    return open_container(file).entries["w"]


class TestGguf:
    @pytest.mark.parametrize("most_values", PIECES)
    @pytest.mark.parametrize("name", QUANTISERS)
    def test_what_the_package_quantised(self, name: str, most_values: int, tmp_path: Path) -> None:
        """Bit for bit what gguf.quants.dequantize says of the whole tensor."""
        values = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).numpy()
        data = quantize(values, Kind[name])
        entry = gguf_entry(tmp_path / "x", data, Kind[name], (7, 96))
        found = all_of(entry, most_values).float()
        assert np.array_equal(found.numpy(), dequantize(data, Kind[name]))
        assert np.abs(found.numpy() - values).max() < 0.5  # it is the tensor, not just any bits

    @pytest.mark.parametrize("most_values", PIECES)
    @pytest.mark.parametrize(
        "kind", [k for k in _type_traits if k.name not in QUANTISERS], ids=lambda k: k.name
    )
    def test_random_blocks_of_every_other_type(
        self, kind: Kind, most_values: int, tmp_path: Path
    ) -> None:
        """K-quants, IQ and the rest: whole blocks of random bytes, but for infinite scales."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        chance = np.random.default_rng(0)
        data = chance.integers(0, 60, (5, 3 * block_bytes), dtype=np.uint8)  # no fp16 infinities
        entry = gguf_entry(tmp_path / "x", data, kind, (5, 3 * block))
        with np.errstate(over="ignore"):
            expected = dequantize(data, kind)
            found = all_of(entry, most_values)
        assert np.isfinite(expected).all()
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), expected)

    def test_rows_that_are_no_whole_blocks(self, tmp_path: Path) -> None:
        """As of a tensor whose sides were folded: [6, 32] Q8_0 seen as [24, 8]."""
        values = np.arange(192, dtype=np.float32).reshape(6, 32)
        data = quantize(values, Kind.Q8_0)
        entry = gguf_entry(tmp_path / "x", data, Kind.Q8_0, (6, 32))
        for most_values in (*PIECES, 40):
            found = all_of(replace(entry, shape=(24, 2, 2, 2)), most_values)
            assert np.array_equal(found.numpy().reshape(6, 32), dequantize(data, Kind.Q8_0))


class TestPlainAndScaled:
    @pytest.mark.parametrize("most_values", PIECES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_plain_values_keep_their_dtype(
        self, dtype: torch.dtype, most_values: int, tmp_path: Path
    ) -> None:
        tensor = torch.randn(9, 5, 7).to(dtype)
        save_safetensors(tmp_path / "x", {"w": tensor})
        found = all_of(open_container(tmp_path / "x").entries["w"], most_values)
        assert found.dtype == dtype
        assert torch.equal(found, tensor)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
    def test_each_of_the_256_bytes(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """As torch has them, infinities and not-a-numbers included."""
        tensor = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
        save_safetensors(tmp_path / "x", {"w": tensor})
        found = all_of(open_container(tmp_path / "x").entries["w"])
        assert torch.equal(found.view(torch.int32), tensor.float().view(torch.int32))

    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(1, 12),
        width=st.integers(1, 20),
        most_values=st.integers(1, 300),
        dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float16]),
        scale_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        per_row=st.booleans(),
    )
    def test_a_scale_reaches_its_rows_whatever_the_pieces(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        rows: int,
        width: int,
        most_values: int,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        per_row: bool,
    ) -> None:
        file = tmp_path_factory.mktemp("x") / "x"
        weight = ((torch.arange(rows * width) % 200).view(rows, width) - 100).to(dtype)
        scale = (torch.arange(rows if per_row else 1) + 1).to(scale_dtype).div(8)
        save_safetensors(file, {"l.weight": weight, "l.weight_scale": scale})
        entry = weights_of(open_container(file))["l.weight"]
        expected = weight.float() * scale.float().view(-1, 1)
        assert torch.equal(all_of(entry, most_values), expected)

    def test_numbers_rows_of_nothing_and_vectors(self, tmp_path: Path) -> None:
        tensors = {"n": torch.tensor(3.0), "none": torch.empty(0, 4), "v": torch.arange(300.0)}
        save_safetensors(tmp_path / "x", tensors)
        entries = open_container(tmp_path / "x").entries
        assert all_of(entries["n"]) == 3
        assert torch.equal(all_of(entries["v"], 7), tensors["v"])
        with Sources() as sources:
            assert list(decoded_rows(sources, entries["none"], 7)) == []
            assert [tuple(piece.shape) for piece in decoded_rows(sources, entries["v"], 200)] == [
                (200, 1), (100, 1),
            ]  # fmt: skip

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
    def test_whole_numbers_are_no_weights(self, dtype: torch.dtype, tmp_path: Path) -> None:
        save_safetensors(tmp_path / "x", {"w": torch.ones(3, dtype=dtype)})
        entry = open_container(tmp_path / "x").entries["w"]
        with Sources() as sources, pytest.raises(WeightsBroken, match=f"w as {DTYPES[dtype]}"):
            Rows(sources, entry)


class TestSources:
    def test_a_file_that_was_cut_meanwhile(self, tmp_path: Path) -> None:
        save_safetensors(tmp_path / "x", {"w": torch.ones(100)})
        entry = open_container(tmp_path / "x").entries["w"]
        with (tmp_path / "x").open("r+b") as stream:
            stream.truncate(entry.offset + 10)
        message = rf"has {entry.offset + 10} bytes, and w lies up to {entry.offset + 400}"
        with Sources() as sources, pytest.raises(WeightsBroken, match=message):
            list(decoded_rows(sources, entry, 50))

    def test_a_file_that_went_away(self, tmp_path: Path) -> None:
        save_safetensors(tmp_path / "x", {"w": torch.ones(100)})
        entry = open_container(tmp_path / "x").entries["w"]
        (tmp_path / "x").unlink()
        with Sources() as sources, pytest.raises(WeightsBroken, match="No such file"):
            list(decoded_rows(sources, entry, 50))

    def test_what_several_threads_make_comes_in_order(self) -> None:
        """The second make waits for the third, so one thread alone would not end."""
        if len(os.sched_getaffinity(0)) < 2:
            pytest.skip("one core: one thread")
        third_began = threading.Event()

        def make(i: int) -> Tensor:
            if i == 2:
                third_began.set()
            assert i != 1 or third_began.wait(20)
            return torch.tensor(i)

        late = torch.zeros((), dtype=torch.int64)

        def makes() -> Iterator[object]:
            for i in range(50):
                yield lambda i=i: make(i)
            yield late

        with Sources() as sources:
            pieces = sources.in_order(makes())  # type: ignore[arg-type]
            assert [int(piece) for piece in pieces] == [*range(50), 0]

    def test_an_error_of_a_thread_reaches_the_caller(self) -> None:
        def broken() -> Tensor:
            raise WeightsBroken("it is broken")

        with Sources() as sources:
            pieces = sources.in_order([lambda: torch.zeros(1), broken, lambda: torch.zeros(1)])
            assert next(pieces).item() == 0
            with pytest.raises(WeightsBroken, match="it is broken"):
                next(pieces)
