"""A store from files that come one after the other, so that one of them at most is on the disk.

`weights.convert` writes unit after unit and reads each tensor when its turn comes, and the tensors
of a unit lie anywhere in the source. Here a file of the source is gone through while it is there,
and each of its tensors written straight to its place in files of full length, which are holes at
first. A file is noted in the journal once all that was made of it is on the disk; then it may go,
and a run that is killed continues with the next. Checksums are added up at the end, by one read of
the store. Its bytes are those that `convert_model` writes.
"""

from __future__ import annotations

import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from wanfit.engine.weights.configs import Json
from wanfit.engine.weights.convert import (
    ConvertReport,
    FilePlan,
    check_disk,
    digest,
    one_thread,
    plan_file,
    unit_pieces,
    write_about,
)
from wanfit.engine.weights.decode import Sources
from wanfit.engine.weights.files import ModelFiles
from wanfit.engine.weights.keys import network_names
from wanfit.engine.weights.layout import UnitLayout, join_name, lay_out
from wanfit.engine.weights.partial import (
    DoneUnit,
    PartialStore,
    allocated_bytes,
    check_target,
    write_errors,
)
from wanfit.engine.weights.store import FORMAT, checksum_text, header_checksum
from wanfit.plan.plan import NetworkName, Precision

READ_BYTES = 4 << 20  # ours: of the store at a time, when checksums are added up

# Makes the file at a path of the source whole for as long as the `with` lasts.
Bring = Callable[[Path], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class LeanStep:
    """How far it is, earlier runs included."""

    phase: Literal["write", "check"]  # tensors to the store; reading it again for its checksums
    what: str  # a file of the source, or of the store
    done_bytes: int  # of the store
    total_bytes: int


OnStep = Callable[[LeanStep], None]


class _Tensor(NamedTuple):
    """One tensor of the source and where it goes; in fp8 with its scale behind it."""

    source: Path
    source_offset: int
    plan: FilePlan
    unit: str
    layout: UnitLayout  # of this tensor alone, from its begin
    begin: int  # bytes from the begin of the store's file
    num_bytes: int


def store_bytes(files: ModelFiles, precision: Precision) -> int:
    """How large the store will be, tokenizer and wanfit.json left out."""
    return sum(plan.num_bytes for plan in _plans(files, precision))


def convert_lean(
    source: ModelFiles,
    target: Path,
    precision: Precision,
    *,
    origin: str,
    bring: Bring,
    on_step: OnStep | None = None,
) -> ConvertReport:
    """Writes the store of `source` at `target`, one file of the source after the other.

    source: opened by headers alone; its files may be holes for as long as `bring` does not have
    them whole. origin: says which files these are, whatever their dates: a partial store of other
    ones is thrown away. target, on_step, errors: as `convert_model` has them, and whatever `bring`
    raises; the next run continues with the file at hand.
    """
    began_s = time.perf_counter()
    target = target.resolve()
    check_target(source.path, target)
    plans = _plans(source, precision)
    headers = [header_checksum(plan.index.header()) for plan in plans]
    job = digest(["lean", FORMAT, source.spec.name, precision, origin, headers])
    tensors = sorted(
        (tensor for plan in plans for tensor in _tensors(plan)),
        key=lambda tensor: (tensor.source, tensor.source_offset),
    )
    with one_thread(), write_errors(target), PartialStore(target, job) as partial:
        total_bytes = sum(plan.num_bytes for plan in plans)
        check_disk(target, total_bytes, allocated_bytes(partial.store))
        for plan in plans:
            _make_hole(partial.store / plan.name, plan.num_bytes)
        progress = _Progress(total_bytes, on_step)
        resumed_bytes = _write_all(source.path, tensors, partial, bring, progress)
        _finish(source, precision, plans, partial, _Progress(total_bytes, on_step))
        partial.commit()
    return ConvertReport(
        output=target,
        model=source.spec.name,
        precision=precision,
        files={plan.name: plan.num_bytes for plan in plans},
        resumed_bytes=resumed_bytes,
        total_s=time.perf_counter() - began_s,
    )


class _Progress:
    """Counts bytes for `on_step`."""

    def __init__(self, total_bytes: int, on_step: OnStep | None) -> None:
        self._done_bytes = 0
        self._total_bytes = total_bytes
        self._on_step = on_step

    def add(self, phase: Literal["write", "check"], what: str, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._on_step:
            self._on_step(LeanStep(phase, what, self._done_bytes, self._total_bytes))

    def finish(self, phase: Literal["write", "check"], what: str) -> None:
        self.add(phase, what, self._total_bytes - self._done_bytes)


def _plans(files: ModelFiles, precision: Precision) -> list[FilePlan]:
    return [plan_file(files, network, precision) for network in network_names(files.spec)]


def _tensors(plan: FilePlan) -> Iterable[_Tensor]:
    runs = plan.index.runs()
    for unit, layout in plan.index.layouts.items():
        begin = plan.header_bytes + runs[unit][0]
        for i, place in enumerate(layout.places):
            entry = plan.entries.get(join_name(unit, place.name))
            if entry is None:
                assert layout.places[i - 1].dtype == "F8_E4M3", f"{place.name} has no source"
                continue  # a scale, which goes with the weight before
            end = i + 2 if place.dtype == "F8_E4M3" else i + 1
            alone = lay_out((p.name, p.dtype, p.shape) for p in layout.places[i:end])
            last = alone.places[-1]
            yield _Tensor(
                source=entry.file,
                source_offset=entry.offset,
                plan=plan,
                unit=unit,
                layout=alone,
                begin=begin + place.offset,
                num_bytes=last.offset + last.num_bytes,
            )


def _write_all(
    folder: Path, tensors: list[_Tensor], partial: PartialStore, bring: Bring, progress: _Progress
) -> int:
    """Goes through the files of the source; how many bytes an earlier run had written."""
    resumed_bytes = 0
    for file, group in itertools.groupby(tensors, key=lambda tensor: tensor.source):
        here, name = list(group), file.relative_to(folder).as_posix()
        num_bytes = sum(tensor.num_bytes for tensor in here)
        lines = dict.fromkeys(_line(tensor.plan, name) for tensor in here)
        if lines.keys() <= set(partial.done):
            resumed_bytes += num_bytes
            progress.add("write", name, num_bytes)
            continue
        with bring(file):
            _write_tensors(here, partial.store, name, progress)
            partial.record(lines)
    progress.finish("write", name)  # headers, and what lies between tensors
    return resumed_bytes


def _line(plan: FilePlan, source: str) -> DoneUnit:
    """What the journal says of a file of the source, for one file of the store."""
    return DoneUnit(plan.name, source, plan.num_bytes, "")


def _make_hole(file: Path, num_bytes: int) -> None:
    """A file of full length that holds no more of the disk than what was written to it."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.ftruncate(handle, num_bytes)
    finally:
        os.close(handle)


def _write_tensors(tensors: list[_Tensor], store: Path, what: str, progress: _Progress) -> None:
    """Converts tensors to their places, and waits until they are on the disk."""
    handles: dict[str, int] = {}
    try:
        with Sources() as sources:
            for tensor in tensors:
                name = tensor.plan.name
                if name not in handles:
                    handles[name] = os.open(store / name, os.O_RDWR)
                at = tensor.begin
                for piece in unit_pieces(
                    tensor.plan, tensor.unit, tensor.layout, tensor.num_bytes, sources
                ):
                    left = memoryview(piece.numpy())  # type: ignore[arg-type]  # it has a buffer
                    while left:
                        written = os.pwrite(handles[name], left, at)
                        left, at = left[written:], at + written
                    progress.add("write", what, piece.numel())
        for handle in handles.values():
            os.fdatasync(handle)
    finally:
        for handle in handles.values():
            os.close(handle)


def _finish(
    files: ModelFiles,
    precision: Precision,
    plans: list[FilePlan],
    partial: PartialStore,
    progress: _Progress,
) -> None:
    """Adds checksums and headers to the files, and what a store has beside them."""
    headers: dict[NetworkName, Json] = {}
    for plan in plans:
        header = _add_header(plan, partial.store / plan.name, progress)
        headers[plan.index.network] = {
            "bytes": plan.num_bytes,
            "header_crc32": header_checksum(header),
        }
    write_about(files, precision, headers, partial)


def _add_header(plan: FilePlan, file: Path, progress: _Progress) -> bytes:
    handle = os.open(file, os.O_RDWR)
    try:
        checksums = {}
        for unit, (begin, end) in plan.index.runs().items():
            run = (plan.header_bytes + begin, plan.header_bytes + end)
            checksums[unit] = _checksum(handle, *run)
            progress.add("check", plan.name, end - begin)
        header = replace(plan.index, checksums=checksums).header()
        assert len(header) == plan.header_bytes
        written = os.pwrite(handle, header, 0)
        assert written == len(header), "a header of some hundred kB is written in one go"
        os.fsync(handle)
        progress.add("check", plan.name, plan.header_bytes)
    finally:
        os.close(handle)
    return header


def _checksum(handle: int, begin: int, end: int) -> str:
    crc32 = 0
    while begin < end:
        piece = os.pread(handle, min(READ_BYTES, end - begin), begin)
        assert piece, "a hole of full length ends early"
        crc32 = zlib.crc32(piece, crc32)
        begin += len(piece)
    return checksum_text(crc32)
