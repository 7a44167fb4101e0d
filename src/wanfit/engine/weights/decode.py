"""The values of a tensor, whatever its encoding: read and decoded in pieces of whole rows.

    F64 F32 F16 BF16        as they are, in their own dtype
    the same with a scale   fp32: value * scale
    F8_E4M3 F8_E5M2 I8      fp32: q.float() * scale, one scale or one for each row
    GGUF's blocks           fp32, by gguf.quants.dequantize

GGUF is decoded in fp32, as gguf-py and llama.cpp do. diffusers and ComfyUI-GGUF compute in fp16,
which is one rounding more.

Dims: O rows (the first side of a shape), I values in a row.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wanfit.engine.weights.headers import BLOCKS, PLAIN_DTYPES, TensorEntry, block_of
from wanfit.engine.weights.layout import TORCH_DTYPES
from wanfit.errors import WeightsBroken
from wanfit.plan.plan import NetworkName

WORKERS = 4  # ours, at most: decoding a K-quant takes three times as long as writing it in bf16


class Merge(Protocol):
    """What changes weights on their way: adapters (`weights.lora.Merge`)."""

    def touches(self, network: NetworkName, name: str) -> bool:
        """Whether `apply` changes our parameter `name` of `network`."""
        ...

    def apply(self, network: NetworkName, name: str, first_row: int, rows: Tensor) -> Tensor:
        """fp32 [n, ...] from `first_row` on to fp32 of the same shape; several threads call it."""
        ...

    def fingerprint(self) -> list[Any]:
        """For JSON: changes when what is merged does."""
        ...

    def to_json(self) -> list[dict[str, Any]]:
        """What is merged, for people."""
        ...


class Rows:
    """The values of one tensor by whole rows; a number alone is one row of one value."""

    def __init__(self, sources: Sources, entry: TensorEntry) -> None:
        """Reads the scale, if there is one. Raises WeightsBroken, also for a dtype of no weight."""
        if entry.dtype not in _DECODERS and entry.dtype not in BLOCKS:
            raise WeightsBroken(
                f"{entry.file} has {entry.name} as {entry.dtype}, which no weight is"
            )
        self.entry = entry
        self.count = entry.shape[0] if entry.shape else 1
        self.width = math.prod(entry.shape[1:])
        self._sources = sources
        self._block_values, self._block_bytes = block_of(entry.dtype)
        # So many rows are whole blocks, though one alone may not be.
        self._step = self._block_values // math.gcd(self._block_values, max(self.width, 1))
        self._scale = None if entry.scale is None else _read_scale(sources, entry.scale, self.count)

    @property
    def scale(self) -> Tensor | None:
        """fp32 [O, 1]."""
        return self._scale

    def cut(self, most_values: int) -> Iterator[tuple[int, int]]:
        """(first row, rows) of pieces with at most `most_values`, or as few as a piece may have."""
        rows = most_values // max(self.width * self._step, 1) * self._step
        rows = max(rows, self._step)
        for first in range(0, self.count, rows):
            yield first, min(rows, self.count - first)

    def raw(self, first: int, count: int) -> Tensor:
        """The bytes of some rows, uint8 [...]: whole blocks."""
        begin, end = first * self.width, (first + count) * self.width
        at, behind = begin // self._block_values, -(-end // self._block_values)
        return self._sources.read(
            self.entry, at * self._block_bytes, (behind - at) * self._block_bytes
        )

    def decoded(self, first: int, count: int) -> Tensor:
        """Some rows that `cut` gave, [count, I]: fp32, or a plain dtype without a scale."""
        raw = self.raw(first, count)
        decode = _DECODERS.get(self.entry.dtype)
        values = decode(raw) if decode else _from_blocks(raw, self.entry.dtype)
        values = values.view(count, self.width)
        if self._scale is None:
            return values
        # A new tensor where it was not fp32, so the product may be in place.
        return values.float().mul_(self._scale[first : first + count])


class Sources:
    """Files that are read in pieces by several threads: opened once, closed at the end."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._num_workers = min(WORKERS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self._num_workers, "decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for handle in self._handles.values():
            os.close(handle)

    def in_order(self, makes: Iterable[Callable[[], Tensor] | Tensor]) -> Iterator[Tensor]:
        """What these make, one after the other, while the next are being made by other threads.

        A tensor among them is given when all before it are made.
        """
        ahead = deque[Future[Tensor] | Tensor]()
        for make in makes:
            ahead.append(make if isinstance(make, Tensor) else self._pool.submit(make))
            if len(ahead) > 2 * self._num_workers:
                yield _made(ahead.popleft())
        while ahead:
            yield _made(ahead.popleft())

    def read(self, entry: TensorEntry, begin: int, num_bytes: int) -> Tensor:
        """Bytes [begin, begin + num_bytes) of a tensor, as uint8. Raises WeightsBroken."""
        piece = torch.empty(num_bytes, dtype=torch.uint8)
        view = piece.numpy().data
        offset = entry.offset + begin
        try:
            handle = self._handle(entry.file)
            done = 0
            while done < num_bytes:
                count = os.preadv(handle, [view[done:]], offset + done)
                if count == 0:
                    raise WeightsBroken(
                        f"{entry.file} has {entry.file.stat().st_size} bytes, and {entry.name}"
                        f" lies up to {entry.offset + entry.num_bytes}"
                    )
                done += count
        except OSError as error:
            raise WeightsBroken(f"{entry.file} cannot be read: {error.strerror}") from None
        return piece

    def _handle(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._handles[file]


def decoded_rows(sources: Sources, entry: TensorEntry, most_values: int) -> Iterator[Tensor]:
    """A tensor piece by piece, [n, I] each: fp32, or its own dtype where that is plain.

    Raises WeightsBroken when the file cannot be read, or holds no weight there.
    """
    rows = Rows(sources, entry)
    for first, count in rows.cut(most_values):
        yield rows.decoded(first, count)


def _made(piece: Future[Tensor] | Tensor) -> Tensor:
    return piece if isinstance(piece, Tensor) else piece.result()


def _read_scale(sources: Sources, entry: TensorEntry, rows: int) -> Tensor:
    """fp32 [O, 1], of a scale of shape (), (1,), (1, 1), (O,) or (O, 1)."""
    values = sources.read(entry, 0, entry.num_bytes).view(TORCH_DTYPES[entry.dtype]).float()
    return values.view(-1, 1).expand(rows, 1)


def _as_is(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda raw: raw.view(dtype)


def _from_int8(raw: Tensor) -> Tensor:
    return raw.view(torch.int8).float()


def _from_fp8(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """By table: torch takes 2.6 ns for a value of e4m3, and this 0.6 (one core of an EPYC)."""

    def decode(raw: Tensor) -> Tensor:
        return torch.from_numpy(np.take(_fp8_values(dtype), raw.numpy()))

    return decode


@cache
def _fp8_values(dtype: torch.dtype) -> npt.NDArray[np.float32]:
    """The value of each of the 256 bytes, fp32."""
    values: npt.NDArray[np.float32] = (
        torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    )
    return values


def _from_blocks(raw: Tensor, dtype: str) -> Tensor:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = raw.numpy().reshape(1, -1)  # the package goes through 16 rows at a time
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[dtype]))


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    **{dtype: _as_is(TORCH_DTYPES[dtype]) for dtype in PLAIN_DTYPES},
    "F8_E4M3": _from_fp8(torch.float8_e4m3fn),
    "F8_E5M2": _from_fp8(torch.float8_e5m2),
    "I8": _from_int8,
}
