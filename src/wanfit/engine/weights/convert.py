"""A model in any layout, made into a store (`weights.store`).

Memory is bounded by a few pieces of `PIECE_ELEMENTS`, whatever the size of the model: tensors are
read with `pread`, decoded (`weights.decode`), merged with adapters and rounded piece by piece. A
few threads do that, one writes and adds up, and one waits for the disk. A convert that is stopped
at any time continues after the last unit that reached the disk (`weights.partial`).

The text encoder is bf16 in every store. The autoencoder runs in fp32, so it keeps what its source
has; in fp32 where that is quantised. A weight in fp8 with a scale goes into an fp8 store as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanfit.engine.ops.linear import quantise
from wanfit.engine.tokenizer import TOKENIZER_FILE
from wanfit.engine.weights.configs import Json
from wanfit.engine.weights.decode import Merge, Rows, Sources
from wanfit.engine.weights.files import Entries, ModelFiles
from wanfit.engine.weights.keys import network_names
from wanfit.engine.weights.layout import TORCH_DTYPES, UnitLayout, join_name, lay_out
from wanfit.engine.weights.networks import layouts_of
from wanfit.engine.weights.partial import (
    DoneUnit,
    PartialStore,
    check_target,
    sync_path,
    write_errors,
)
from wanfit.engine.weights.recognise import STORE_FILE, STORE_PRECISIONS
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
    merged: tuple[Json, ...] = ()  # adapters: expert, file, strength

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
            "merged": list(self.merged),
        }


OnStep = Callable[[ConvertStep], None]
Make = Callable[[], Tensor]  # makes a piece, in some thread


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file of the store, before it is written."""

    index: StoreIndex  # without checksums
    entries: Entries  # of the source
    header_bytes: int
    num_bytes: int

    @property
    def name(self) -> str:
        return store_file(self.index.network)


def convert_model(
    source: ModelFiles,
    target: Path,
    precision: Precision,
    on_step: OnStep | None = None,
    merge: Merge | None = None,
) -> ConvertReport:
    """Writes the store of `source` at `target`.

    source: opened and so checked (`open_model`, `open_parts`): any layout but a store in fp8.
    target: a new path, or a store, which is replaced when the new one is whole.
    on_step: called after every piece; what it raises stops the convert, to be continued later.
    merge: adapters to add to the weights.

    Raises WeightsError for a source that cannot be read or changes meanwhile, BadOption for a store
    in fp8, BadOutput for a place that cannot be written, DiskFull before the first byte or when the
    disk fills in spite of that.
    """
    began_s = time.perf_counter()
    assert precision in STORE_PRECISIONS, precision
    target = target.resolve()
    check_target(source.path, target, _weight_files(source))
    if source.precision == "fp8":
        raise BadOption(f"{source.path} is a store in fp8", hint="Convert what it was made from")
    plans = [plan_file(source, network, precision) for network in network_names(source.spec)]
    fingerprint = _fingerprint(source, merge)
    headers = [header_checksum(plan.index.header()) for plan in plans]
    about = [source.spec.name, precision, source.tokenizer_json()]
    job = digest([FORMAT, *about, fingerprint, headers])
    with one_thread(), write_errors(target), PartialStore(target, job) as partial:
        resumed_bytes = _resumed_bytes(partial)
        check_disk(target, sum(plan.num_bytes for plan in plans), resumed_bytes)
        progress = _Progress(plans, resumed_bytes, on_step)
        headers_json = _write_files(plans, partial, merge, progress)
        if _fingerprint(source, merge) != fingerprint:
            raise WeightsBroken(
                f"{source.path}, or an adapter, was changed while it was read",
                hint="Convert it again",
            )
        write_about(source, precision, headers_json, partial, merge)
        partial.commit()
    return ConvertReport(
        output=target,
        model=source.spec.name,
        precision=precision,
        files={plan.name: plan.num_bytes for plan in plans},
        resumed_bytes=resumed_bytes,
        total_s=time.perf_counter() - began_s,
        merged=tuple(merge.to_json()) if merge else (),
    )


class _Progress:
    """Counts bytes for `on_step`."""

    def __init__(self, plans: list[FilePlan], resumed_bytes: int, on_step: OnStep | None) -> None:
        self._total_bytes = sum(plan.num_bytes for plan in plans)
        self._done_bytes = resumed_bytes
        self._on_step = on_step

    def add(self, network: NetworkName, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._on_step:
            self._on_step(ConvertStep(network, self._done_bytes, self._total_bytes))


def plan_file(files: ModelFiles, network: NetworkName, precision: Precision) -> FilePlan:
    """One file of the store of `files`: what lies where in it."""
    entries = files.entries(network)
    layouts = layouts_of(files.spec, network, precision)
    if network == "vae":
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
    return FilePlan(index, entries, header_bytes, header_bytes + data_bytes)


def _as_source(unit: str, layout: UnitLayout, entries: Entries) -> UnitLayout:
    def dtype(name: str) -> str:
        entry = entries[join_name(unit, name)]
        return entry.dtype if entry.is_plain and entry.dtype != "F64" else "F32"

    return lay_out((place.name, dtype(place.name), place.shape) for place in layout.places)


def _write_files(
    plans: list[FilePlan], partial: PartialStore, merge: Merge | None, progress: _Progress
) -> dict[NetworkName, Json]:
    """Writes what is not yet there. Returns what wanfit.json says of each file."""
    headers: dict[NetworkName, Json] = {}
    for plan in plans:
        done = {unit.unit: unit for unit in partial.done if unit.file == plan.name}
        header = _write_file(plan, partial, done, merge, progress)
        headers[plan.index.network] = {
            "bytes": plan.num_bytes,
            "header_crc32": header_checksum(header),
        }
    return headers


def write_about(
    files: ModelFiles,
    precision: Precision,
    headers: Mapping[NetworkName, Json],
    partial: PartialStore,
    merge: Merge | None = None,
) -> None:
    """Writes what a store has beside its weights: the tokenizer, and wanfit.json last."""
    folder = partial.store / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer = folder / TOKENIZER_FILE
    tokenizer.write_text(files.tokenizer_json(), encoding="utf-8")
    about = partial.store / STORE_FILE
    content = store_json(files.spec, precision, headers)
    if merge:
        content["merged"] = merge.to_json()
    about.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in (tokenizer, folder, about):
        sync_path(path)


def _write_file(
    plan: FilePlan,
    partial: PartialStore,
    done: Mapping[str, DoneUnit],
    merge: Merge | None,
    progress: _Progress,
) -> bytes:
    """Writes what is not yet there of one file, its header last. Returns the header."""
    network, runs = plan.index.network, plan.index.runs()
    begin = max((unit.end_bytes for unit in done.values()), default=plan.header_bytes)
    if not done:
        progress.add(network, plan.header_bytes)
    with UnitWriter(partial, plan.name, begin) as writer, Sources() as sources:
        for unit, layout in plan.index.layouts.items():
            if unit in done:
                continue
            num_bytes = runs[unit][1] - runs[unit][0]
            for piece in unit_pieces(plan, unit, layout, num_bytes, sources, merge):
                writer.write(piece)
                progress.add(network, piece.numel())
            writer.end_unit(unit)
        checksums = {unit: line.checksum for unit, line in done.items()} | writer.finish()
        header = replace(plan.index, checksums=checksums).header()
        assert len(header) == plan.header_bytes
        writer.write_header(header)
    return header


def unit_pieces(
    plan: FilePlan,
    unit: str,
    layout: UnitLayout,
    num_bytes: int,
    sources: Sources,
    merge: Merge | None = None,
) -> Iterator[Tensor]:
    """The bytes of one unit from begin to end, zeros between tensors included: uint8 [...].

    layout, num_bytes: of the unit, or of a part of it that is to be written alone.
    """
    return sources.in_order(_unit_makes(plan, unit, layout, num_bytes, sources, merge))


def _unit_makes(
    plan: FilePlan,
    unit: str,
    layout: UnitLayout,
    num_bytes: int,
    sources: Sources,
    merge: Merge | None,
) -> Iterator[Make | Tensor]:
    position = 0
    scale: Tensor | None = None  # of the fp8 weight before, which it follows
    for place in layout.places:
        yield from _zeros(place.offset - position)
        if scale is not None:
            assert place.shape == scale.shape, f"{place.name} is not the scale of a weight"
            yield _bytes_of(scale)
            scale = None
        else:
            name = join_name(unit, place.name)
            rows = _Merged(plan.index.network, name, Rows(sources, plan.entries[name]), merge)
            if place.dtype == "F8_E4M3":
                # One tensor for all rows: many small ones among the pieces fragment the heap.
                scale = torch.empty(place.shape[0], 1)
                yield from _in_fp8(rows, scale)
            else:
                yield from _rounded(rows, TORCH_DTYPES[place.dtype])
        position = place.offset + place.num_bytes
    yield from _zeros(num_bytes - position)


class _Merged:
    """The rows of one parameter, with what is merged into it."""

    def __init__(self, network: NetworkName, name: str, rows: Rows, merge: Merge | None) -> None:
        self.stored = rows
        self._network, self._name = network, name
        self._merge = merge if merge and merge.touches(network, name) else None

    @property
    def is_as_stored(self) -> bool:
        return self._merge is None

    def cut(self) -> Iterator[tuple[int, int]]:
        """(first row, rows) of its pieces."""
        return self.stored.cut(PIECE_ELEMENTS)

    def __call__(self, first: int, count: int) -> Tensor:
        """[count, I]: fp32, or a plain dtype that nothing was done to."""
        values = self.stored.decoded(first, count)
        if self._merge is None:
            return values
        shape = (count, *self.stored.entry.shape[1:])
        merged = self._merge.apply(self._network, self._name, first, values.float().view(shape))
        return merged.reshape(count, self.stored.width)


def _rounded(rows: _Merged, dtype: torch.dtype) -> Iterator[Make]:
    def rounded(first: int, count: int) -> Tensor:
        return _bytes_of(rows(first, count).to(dtype))

    for first, count in rows.cut():
        yield functools.partial(rounded, first, count)


def _in_fp8(rows: _Merged, scale: Tensor) -> Iterator[Make]:
    """A weight [O, I] in fp8; `scale` [O, 1] is filled on the way."""
    if rows.is_as_stored and rows.stored.entry.dtype == "F8_E4M3":
        # Exact: our scale is one for each row too, which theirs may be for all rows.
        scale.copy_(torch.ones(1, 1) if rows.stored.scale is None else rows.stored.scale)
        for first, count in rows.cut():
            yield functools.partial(rows.stored.raw, first, count)
        return

    def quantised(first: int, count: int) -> Tensor:
        weight, piece_scale = quantise(rows(first, count))
        scale[first : first + count] = piece_scale
        return _bytes_of(weight)

    for first, count in rows.cut():
        yield functools.partial(quantised, first, count)


def _zeros(count: int) -> Iterator[Tensor]:
    if count:
        yield torch.zeros(count, dtype=torch.uint8)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's own threads off: each of ours converts a piece alone.

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


def check_disk(target: Path, total_bytes: int, resumed_bytes: int) -> None:
    needed_bytes = total_bytes - resumed_bytes
    free_bytes = shutil.disk_usage(target.parent).free
    if needed_bytes > free_bytes:
        raise DiskFull(
            f"The store needs {needed_bytes / 1e9:.2f} GB more ({needed_bytes} bytes), and the disk"
            f" of {target.parent} has {free_bytes / 1e9:.2f} GB free ({free_bytes} bytes)",
            hint="Make room, write elsewhere, or use --precision fp8",
        )


def _fingerprint(files: ModelFiles, merge: Merge | None) -> str:
    """Changes when a file of the model does, or what is merged: names, sizes, times of change."""
    about: list[Any] = [merge.fingerprint() if merge else []]
    for network in network_names(files.spec):
        paths = {entry.file for entry in files.entries(network).values()}
        stats = [(_name(path, files.path), path.stat()) for path in sorted(paths)]
        about.append([network, *([name, s.st_size, s.st_mtime_ns] for name, s in stats)])
    return digest(about)


def _weight_files(files: ModelFiles) -> set[Path]:
    networks = network_names(files.spec)
    return {entry.file for name in networks for entry in files.entries(name).values()}


def _name(path: Path, folder: Path) -> str:
    """Of a file of the model, whose directory may be moved as a whole."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path.resolve())


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
