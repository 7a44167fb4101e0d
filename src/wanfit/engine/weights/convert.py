"""A model directory in diffusers layout, made into a store (`weights.store`).

Memory is bounded by a few pieces of `PIECE_ELEMENTS`, whatever the size of the model: tensors are
read with `pread` and converted piece by piece. Reading and converting, writing and adding up, and
waiting for the disk are three threads that overlap. A convert that is stopped at any time
continues after the last unit that reached the disk (`weights.partial`).

Left out: sources in other layouts, and fp8 as a source.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanfit.engine.ops.linear import quantise
from wanfit.engine.tokenizer import TOKENIZER_FILE
from wanfit.engine.weights.configs import Json
from wanfit.engine.weights.files import Entries, ModelFiles
from wanfit.engine.weights.headers import TensorEntry
from wanfit.engine.weights.layout import (
    TORCH_DTYPES,
    UnitLayout,
    join_name,
    lay_out,
)
from wanfit.engine.weights.networks import layouts_of, network_names
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.partial import (
    DoneUnit,
    PartialStore,
    check_target,
    sync_path,
    write_errors,
)
from wanfit.engine.weights.recognise import (
    MODEL_INDEX,
    STORE_FILE,
    STORE_PRECISIONS,
    is_store,
)
from wanfit.engine.weights.store import (
    FORMAT,
    NO_CHECKSUM,
    StoreIndex,
    header_checksum,
    store_file,
    store_json,
)
from wanfit.engine.weights.writer import UnitWriter
from wanfit.errors import BadOption, DiskFull, WeightsBroken
from wanfit.plan.plan import NetworkName, Precision
from wanfit.specs import ModelSpec

# Ours: 1 MB in fp32. Pieces of 8 MB are mapped and cleared anew by the allocator each time: 4.5 ns
# per weight to fp8 instead of 1.0 (one core of a 2-core EPYC).
PIECE_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class ConvertStep:
    """How far a convert is."""

    network: NetworkName
    done_bytes: int  # of the store; of a convert that continues, all that there is
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was written, and how fast."""

    output: Path
    model: str
    precision: Precision
    files: Mapping[str, int]  # name -> bytes
    resumed_bytes: int  # of the store, that an earlier run had written
    total_s: float

    def to_json(self) -> Json:
        """Plain values for JSON; every measured key ends in its unit."""
        store_bytes = sum(self.files.values())
        written_bytes = store_bytes - self.resumed_bytes
        return {
            "output": str(self.output),
            "model": self.model,
            "precision": self.precision,
            "files": dict(self.files),
            "store_bytes": store_bytes,
            "written_bytes": written_bytes,
            "resumed_bytes": self.resumed_bytes,
            "total_s": round(self.total_s, 3),
            "mb_per_s": round(written_bytes / self.total_s / 1e6, 1),
        }


OnStep = Callable[[ConvertStep], None]


@dataclass(frozen=True, slots=True)
class _FilePlan:
    """One file of the store, before it is written."""

    index: StoreIndex  # without checksums
    entries: Entries  # of the source
    header_bytes: int
    num_bytes: int

    @property
    def name(self) -> str:
        return store_file(self.index.network)


def convert_model(
    source: Path,
    target: Path,
    spec: ModelSpec,
    precision: Precision,
    on_step: OnStep | None = None,
) -> ConvertReport:
    """Writes the store of `spec` at `target` from the model at `source`.

    source: a directory in diffusers layout, in any of bf16, fp16, fp32 and fp64; or a bf16 store.
    target: a new path, or a store, which is replaced when the new one is whole.
    on_step: called after every piece; what it raises stops the convert, to be continued later.

    Raises WeightsError for a source that is not whole or not of `spec`, BadOutput for a place that
    cannot be written, DiskFull before the first byte or when the disk fills in spite of that.
    """
    began_s = time.perf_counter()
    assert precision in STORE_PRECISIONS, precision
    target = target.resolve()
    check_target(source, target)
    files = open_model(source, spec)
    if files.precision == "fp8":
        raise BadOption(f"{source} is a store in fp8", hint="Convert what it was made from")
    plans = [_plan_file(files, network, precision) for network in network_names(spec)]
    fingerprint = _fingerprint(files)
    headers = [header_checksum(plan.index.header()) for plan in plans]
    job = _digest([FORMAT, spec.name, precision, fingerprint, headers])
    with _one_thread(), write_errors(target), PartialStore(target, job) as partial:
        resumed_bytes = _resumed_bytes(partial)
        _check_disk(target, sum(plan.num_bytes for plan in plans), resumed_bytes)
        _write_store(plans, files, partial, precision, _Progress(plans, resumed_bytes, on_step))
        if _fingerprint(files) != fingerprint:
            raise WeightsBroken(f"{source} was changed while it was read", hint="Convert it again")
        partial.commit()
    return ConvertReport(
        output=target,
        model=spec.name,
        precision=precision,
        files={plan.name: plan.num_bytes for plan in plans},
        resumed_bytes=resumed_bytes,
        total_s=time.perf_counter() - began_s,
    )


class _Progress:
    """Counts bytes for `on_step`."""

    def __init__(self, plans: list[_FilePlan], resumed_bytes: int, on_step: OnStep | None) -> None:
        self._total_bytes = sum(plan.num_bytes for plan in plans)
        self._done_bytes = resumed_bytes
        self._on_step = on_step

    def add(self, network: NetworkName, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._on_step:
            self._on_step(ConvertStep(network, self._done_bytes, self._total_bytes))


def _plan_file(files: ModelFiles, network: NetworkName, precision: Precision) -> _FilePlan:
    entries = files.entries(network)
    layouts = layouts_of(files.spec, network, precision)
    if network == "vae":  # it runs in fp32, so it keeps what its source has
        layouts = {unit: _as_source(unit, layout, entries) for unit, layout in layouts.items()}
    index = StoreIndex(
        model=files.spec.name,
        network=network,
        precision=precision,
        layouts=layouts,
        checksums=dict.fromkeys(layouts, NO_CHECKSUM),
    )
    header_bytes = len(index.header())
    data_bytes = max(end for _, end in index.runs().values())
    return _FilePlan(index, entries, header_bytes, header_bytes + data_bytes)


def _as_source(unit: str, layout: UnitLayout, entries: Entries) -> UnitLayout:
    dtypes = {place.name: entries[join_name(unit, place.name)].dtype for place in layout.places}
    return lay_out(
        (place.name, "F32" if dtypes[place.name] == "F64" else dtypes[place.name], place.shape)
        for place in layout.places
    )


def _write_store(
    plans: list[_FilePlan],
    files: ModelFiles,
    partial: PartialStore,
    precision: Precision,
    progress: _Progress,
) -> None:
    headers: dict[NetworkName, Json] = {}
    for plan in plans:
        done = {unit.unit: unit for unit in partial.done if unit.file == plan.name}
        header = _write_file(plan, partial, done, progress)
        headers[plan.index.network] = {
            "bytes": plan.num_bytes,
            "header_crc32": header_checksum(header),
        }
    (partial.store / "tokenizer").mkdir(exist_ok=True)
    tokenizer = partial.store / "tokenizer" / TOKENIZER_FILE
    shutil.copyfile(files.path / "tokenizer" / TOKENIZER_FILE, tokenizer)
    about = partial.store / STORE_FILE
    content = json.dumps(store_json(files.spec, precision, headers), indent=2)
    about.write_text(content + "\n", encoding="utf-8")
    for path in (tokenizer, tokenizer.parent, about):
        sync_path(path)


def _write_file(
    plan: _FilePlan, partial: PartialStore, done: Mapping[str, DoneUnit], progress: _Progress
) -> bytes:
    """Writes what is not yet there of one file, its header last. Returns the header."""
    runs = plan.index.runs()
    begin = max((unit.end_bytes for unit in done.values()), default=plan.header_bytes)
    if not done:
        progress.add(plan.index.network, plan.header_bytes)
    with UnitWriter(partial, plan.name, begin) as writer, _Sources() as sources:
        for unit, layout in plan.index.layouts.items():
            if unit in done:
                continue
            num_bytes = runs[unit][1] - runs[unit][0]
            for piece in _unit_pieces(unit, layout, num_bytes, plan.entries, sources):
                writer.write(piece)
                progress.add(plan.index.network, piece.numel())
            writer.end_unit(unit)
        checksums = {unit: line.checksum for unit, line in done.items()} | writer.finish()
        index = plan.index
        header = StoreIndex(
            index.model, index.network, index.precision, index.layouts, checksums
        ).header()
        assert len(header) == plan.header_bytes
        writer.write_header(header)
    return header


def _unit_pieces(
    unit: str, layout: UnitLayout, num_bytes: int, entries: Entries, sources: _Sources
) -> Iterator[Tensor]:
    """The bytes of one unit from begin to end, zeros between tensors included: uint8 [...]."""
    position = 0
    scale: Tensor | None = None  # of the fp8 weight before, which it follows
    for place in layout.places:
        yield from _zeros(place.offset - position)
        if place.dtype == "F8_E4M3":
            # One tensor for all rows: many small ones among the pieces would fragment the heap.
            scale = torch.empty(place.shape[0], 1)
            pieces = sources.read(entries[join_name(unit, place.name)], row=place.shape[1])
            yield from _quantised(pieces, place.shape[1], scale)
        elif scale is not None:
            assert place.shape == scale.shape, f"{place.name} is not the scale of a weight"
            yield _bytes_of(scale)
            scale = None
        else:
            for piece in sources.read(entries[join_name(unit, place.name)]):
                yield _bytes_of(piece.to(TORCH_DTYPES[place.dtype]))
        position = place.offset + place.num_bytes
    yield from _zeros(num_bytes - position)


def _quantised(pieces: Iterable[Tensor], width: int, scale: Tensor) -> Iterator[Tensor]:
    """The bytes in fp8 of a weight [O, width] that comes in whole rows; fills `scale` [O, 1]."""
    row = 0
    for piece in pieces:
        weight, piece_scale = quantise(piece.view(-1, width))
        scale[row : row + len(weight)] = piece_scale
        row += len(weight)
        yield _bytes_of(weight)


def _zeros(count: int) -> Iterator[Tensor]:
    if count:
        yield torch.zeros(count, dtype=torch.uint8)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class _Sources:
    """The files of the source, opened once and read in pieces."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def read(self, entry: TensorEntry, row: int = 1) -> Iterator[Tensor]:
        """A tensor as flat pieces of whole rows (of `row` elements), in its own dtype."""
        dtype = TORCH_DTYPES[entry.dtype]
        step_bytes = max(PIECE_ELEMENTS // row, 1) * row * dtype.itemsize
        end = entry.offset + entry.num_bytes
        for offset in range(entry.offset, end, step_bytes):
            yield self._read(entry, offset, min(step_bytes, end - offset)).view(dtype)

    def _read(self, entry: TensorEntry, offset: int, num_bytes: int) -> Tensor:
        file = entry.file
        piece = torch.empty(num_bytes, dtype=torch.uint8)
        view = piece.numpy().data
        try:
            if file not in self._handles:
                self._handles[file] = os.open(file, os.O_RDONLY)
            done = 0
            while done < num_bytes:
                count = os.preadv(self._handles[file], [view[done:]], offset + done)
                if count == 0:
                    raise WeightsBroken(
                        f"{file} has {file.stat().st_size} bytes, and {entry.name} lies up to"
                        f" {entry.offset + entry.num_bytes}"
                    )
                done += count
        except OSError as error:
            raise WeightsBroken(f"{file} cannot be read: {error.strerror}") from None
        return piece


@contextmanager
def _one_thread() -> Iterator[None]:
    """Conversion on this thread alone, which keeps up with a disk beside the threads that write.

    Torch's helper threads wait for each other after every piece: on a busy 2-core machine fp8 came
    to 65 MB/s with them and to 630 without.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _resumed_bytes(partial: PartialStore) -> int:
    ends: dict[str, int] = {}
    for unit in partial.done:
        ends[unit.file] = max(ends.get(unit.file, 0), unit.end_bytes)
    return sum(ends.values())


def _check_disk(target: Path, total_bytes: int, resumed_bytes: int) -> None:
    needed_bytes = total_bytes - resumed_bytes
    free_bytes = shutil.disk_usage(target.parent).free
    if needed_bytes > free_bytes:
        raise DiskFull(
            f"The store needs {needed_bytes / 1e9:.2f} GB more ({needed_bytes} bytes), and the disk"
            f" of {target.parent} has {free_bytes / 1e9:.2f} GB free ({free_bytes} bytes)",
            hint="Make room, write elsewhere, or use --precision fp8",
        )


def _fingerprint(files: ModelFiles) -> str:
    """Changes when a file of the model does: names, sizes, times of change."""
    about = STORE_FILE if is_store(files.path) else MODEL_INDEX
    paths = {files.path / about, files.path / "tokenizer" / TOKENIZER_FILE}
    for network in network_names(files.spec):
        paths |= {entry.file for entry in files.entries(network).values()}
    stats = [(path.relative_to(files.path), path.stat()) for path in sorted(paths)]
    return _digest([[str(name), stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
