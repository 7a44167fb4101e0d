"""Who is on the device now: brings each unit of weights just before a network runs it.

The order in which networks will ask is known beforehand: a route through all forwards of a stage,
both experts in it. One thread, the feeder, goes along the route ahead of the computation. For each
unit it takes a buffer (a slot that came free, or the unit's own if it is resident), queues the
copies on the device's copying lane, and hands the buffer over. The computation takes it by
`present`, runs the unit's part of the network, and gives the slot back with a mark of where it
stands. The lanes' marks order copies and computation, and the host waits for neither. So the
first step begins when its first unit is there, borders of steps and experts are nothing special,
and there is no load phase.

    mapping, registered with CUDA ------ one copy -----> slot ---> block k runs
    file --- readers ---> pinned ring ---- copies -----> slot ---> block k + 1 runs
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from wanfit.engine.weights.depot import Depot, RingBuffer, Span
from wanfit.engine.weights.lanes import Mark, lanes_of
from wanfit.engine.weights.layout import UnitLayout
from wanfit.engine.weights.pieces import Piece, read_into, split
from wanfit.engine.weights.units import Unit, parameters_in
from wanfit.plan.plan import NetworkName, Ring, Streaming, Where

Visit = tuple[NetworkName, str]  # a network's unit, as in ("high_noise", "blocks.7")


class Buffer:
    """Device memory for one unit at a time; `mark` ends what was last queued on it."""

    def __init__(self, flat: Tensor, mark: Mark) -> None:
        self.flat = flat
        self.mark = mark  # of a copy into it, or of work that reads it
        self._parameters: dict[UnitLayout, dict[str, nn.Parameter]] = {}

    def parameters(self, layout: UnitLayout) -> dict[str, nn.Parameter]:
        """The tensors of a unit in this buffer, made once for all units of the same layout."""
        if layout not in self._parameters:
            self._parameters[layout] = parameters_in(self.flat, layout)
        return self._parameters[layout]


@dataclass(frozen=True, slots=True)
class StreamUse:
    """What streaming did in one stage."""

    waited_s: float  # that computation stood still for copies, all visits together
    streamed_bytes: int  # copied into slots
    resident_bytes: int
    first_ready_s: float | None  # time.perf_counter() when the first unit was on the device


class Streamer:
    """Streams along one route. A context manager: leaving it stops, waits, gives all back."""

    def __init__(
        self,
        depot: Depot,
        units: Iterable[Unit],
        route: Iterable[Visit],
        streaming: Streaming,
        ring: Ring,
    ) -> None:
        self._depot, self._streaming, self._ring = depot, streaming, ring
        units = list(units)
        by_name = {(unit.network, unit.name): unit for unit in units}
        self._by_module = {unit.module: unit for unit in units}
        self._where: dict[Unit, Where] = {
            unit: streaming.placements[unit.network].of(unit.name) for unit in units
        }
        self._route = [by_name[visit] for visit in route]
        self._lanes = lanes_of(depot.device)
        self._own: dict[Unit, Buffer] = {}  # of resident units
        self._settled: set[Unit] = set()  # resident units that have arrived
        self._slots: SimpleQueue[Buffer | None] = SimpleQueue()
        self._arrivals: SimpleQueue[tuple[Unit, Buffer] | BaseException] = SimpleQueue()
        self._stopping = threading.Event()
        self._streamed_bytes = 0
        self._first_ready_s: float | None = None
        self._feeder = threading.Thread(target=self._feed, name="wanfit-feeder", daemon=True)

    def __enter__(self) -> Streamer:
        self._check_registration()
        resident = [unit for unit in self._by_module.values() if self._where[unit] == "resident"]
        streamed = [unit for unit in set(self._route) if self._where[unit] != "resident"]
        sizes = [unit.layout.num_bytes for unit in resident]
        for unit, buffer in zip(resident, self._new_buffers(sizes), strict=True):
            self._own[unit] = buffer
        if streamed:
            slot_bytes = self._streaming.slot_bytes
            largest = max(unit.layout.num_bytes for unit in streamed)
            assert largest <= slot_bytes, f"a slot has {slot_bytes} bytes, {largest} are needed"
            for buffer in self._new_buffers([slot_bytes] * self._streaming.num_slots):
                self._slots.put(buffer)
        self._feeder.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._slots.put(None)
        self._feeder.join()
        self._lanes.drain()
        for unit in self._by_module.values():
            unit.unbind()
        self._own.clear()
        for queue in (self._slots, self._arrivals):
            while not queue.empty():
                queue.get()

    @contextmanager
    def present(self, module: nn.Module) -> Iterator[None]:
        """The module's weights are on the device within. Modules come in the route's order.

        Raises what went wrong on the way, WeightsBroken for a file that cannot be read.
        """
        unit = self._by_module[module]
        if unit in self._settled:
            yield
            return
        buffer = self._arrival(unit)
        unit.bind(buffer.parameters(unit.layout))
        if self._where[unit] == "resident":
            self._settled.add(unit)
            yield
            return
        try:
            yield
        finally:
            unit.unbind()
            buffer.mark = self._lanes.computed()
            self._slots.put(buffer)

    def use(self) -> StreamUse:
        """What was done so far. Waits for the device."""
        return StreamUse(
            waited_s=self._lanes.waited_s(),
            streamed_bytes=self._streamed_bytes,
            resident_bytes=sum(buffer.flat.numel() for buffer in self._own.values()),
            first_ready_s=self._first_ready_s,
        )

    def _check_registration(self) -> None:
        """Where CUDA refuses to register these files, all goes through the ring."""
        for unit in self._route:
            if self._where[unit] == "registered":
                piece = unit.pieces[0]
                stop = piece.start + piece.file_bytes
                if not self._depot.register(piece.file, piece.start, stop):
                    for refused, where in self._where.items():
                        self._where[refused] = "mapped" if where == "registered" else where
                return

    def _new_buffers(self, sizes: Sequence[int]) -> list[Buffer]:
        """One allocation for all of them, so that rounding and gaps cost nothing."""
        whole = torch.empty(sum(sizes), dtype=torch.uint8, device=self._depot.device)
        mark = self._lanes.computed()
        return [Buffer(flat, mark) for flat in whole.split(list(sizes))] if sizes else []

    def _arrival(self, unit: Unit) -> Buffer:
        asked_s = time.perf_counter()
        arrived = self._arrivals.get()
        if isinstance(arrived, BaseException):
            self._arrivals.put(arrived)  # for whoever asks again
            raise arrived
        coming, buffer = arrived
        assert coming is unit, f"{coming.name} is next on the route, {unit.name} was asked for"
        self._lanes.compute_after(buffer.mark, asked_s)
        return buffer

    @torch.inference_mode()  # the buffers are inference tensors, and a mode belongs to a thread
    def _feed(self) -> None:
        """The feeder: goes along the route and queues the copies of every unit that comes."""
        readers = ThreadPoolExecutor(max(1, self._ring.num_readers), "wanfit-reader")
        try:
            visits = list(self._coming())
            to_read = (
                part
                for unit in visits
                for piece in unit.pieces
                if not self._is_direct(unit, piece)
                for part in split(piece, self._ring.piece_bytes)
            )
            ahead = _ReadAhead(self._depot, self._ring, to_read, readers)
            for unit in visits:
                buffer = self._own.get(unit) or self._slots.get()
                if buffer is None or self._stopping.is_set():
                    return
                self._lanes.copy_after(buffer.mark)
                for piece in unit.pieces:
                    if self._is_direct(unit, piece):
                        self._copy_direct(piece, buffer)
                    else:
                        self._copy_through_ring(piece, buffer, ahead)
                buffer.mark = self._lanes.copied()
                if unit not in self._own:
                    self._streamed_bytes += unit.layout.num_bytes
                if self._first_ready_s is None:
                    buffer.mark.synchronize()
                    self._first_ready_s = time.perf_counter()
                self._arrivals.put((unit, buffer))
        except BaseException as error:  # noqa: BLE001  the computing thread raises it
            self._arrivals.put(error)
        finally:
            readers.shutdown(cancel_futures=True)

    def _coming(self) -> Iterator[Unit]:
        """The route without the later visits of resident units."""
        seen: set[Unit] = set()
        for unit in self._route:
            if unit not in seen:
                yield unit
            if self._where[unit] == "resident":
                seen.add(unit)

    def _is_direct(self, unit: Unit, piece: Piece) -> bool:
        """Whether the device copies from the mapping itself."""
        return self._where[unit] == "registered" and piece.is_raw

    def _copy_direct(self, piece: Piece, buffer: Buffer) -> None:
        file = self._depot.file(piece.file)
        stop = piece.start + piece.num_bytes
        registered = self._depot.register(piece.file, piece.start, stop)
        # An unregistered mapping is copied too, slowly; the depot has said so.
        spans = file.cut(piece.start, stop) if registered else [Span(piece.start, stop)]
        for start, stop in spans:
            at = piece.at + start - piece.start
            self._lanes.copy(buffer.flat[at : at + stop - start], file.bytes[start:stop])

    def _copy_through_ring(self, piece: Piece, buffer: Buffer, ahead: _ReadAhead) -> None:
        for part in split(piece, self._ring.piece_bytes):
            ring_buffer, source = ahead.take()
            self._lanes.copy(buffer.flat[part.at : part.at + part.num_bytes], source)
            ahead.give_back(ring_buffer, self._lanes.copied())


class _ReadAhead:
    """Reads pieces in order, each into a buffer of the ring, as far ahead as the ring is long."""

    def __init__(
        self, depot: Depot, plan: Ring, pieces: Iterator[Piece], readers: ThreadPoolExecutor
    ) -> None:
        self._depot, self._plan, self._pieces, self._readers = depot, plan, pieces, readers
        self._reading: deque[tuple[RingBuffer, Future[Tensor]]] = deque()

    def take(self) -> tuple[RingBuffer, Tensor]:
        """The next piece's buffer, and its part that holds the bytes. Waits for the reader."""
        if not self._reading:
            for buffer in self._depot.ring(self._plan):
                self._read_next(buffer)
        buffer, reading = self._reading.popleft()
        return buffer, reading.result()

    def give_back(self, buffer: RingBuffer, copied: Mark) -> None:
        """The buffer is free for another piece after the mark."""
        buffer.copied = copied
        self._read_next(buffer)

    def _read_next(self, buffer: RingBuffer) -> None:
        piece = next(self._pieces, None)
        if piece is not None:
            file = self._depot.file(piece.file)
            direct = self._depot.direct_descriptor(piece.file) if self._plan.direct else None
            reading = self._readers.submit(read_into, buffer, piece, file, direct=direct)
            self._reading.append((buffer, reading))
