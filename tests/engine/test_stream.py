"""Streaming changes where weights are and when, never what is computed; and gives all back."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.engine.plans import SMALL_RING, hand_made_plan
from tests.engine.tiny_models import TINY_T2V, TINY_TI2V, write_tiny
from wanfit.engine.denoise import route
from wanfit.engine.pipeline import generate_frames
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.layout import network_layouts
from wanfit.engine.weights.networks import on_meta
from wanfit.engine.weights.open import open_model
from wanfit.errors import WeightsBroken
from wanfit.events import FramesReady, WeightsMoved
from wanfit.plan.plan import Plan, Where
from wanfit.request import ResolvedRequest, VideoRequest, resolve
from wanfit.specs import ModelSpec

CPU = torch.device("cpu")
PLACES: tuple[Where, ...] = ("resident", "registered", "mapped")


def request_for(spec: ModelSpec, **options: object) -> ResolvedRequest:
    fields = {"prompt": "a red circle", "size": "32x32", "frames": 9, "steps": 3, "seed": 5}
    return resolve(VideoRequest.parse({**fields, **options}), spec)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models, in fp32 and in bf16 files."""
    root = tmp_path_factory.mktemp("models")
    return {
        f"{spec.name} {dtype}": write_tiny(root / f"{spec.name}-{dtype}", spec, dtype=dtype).path
        for spec in (TINY_T2V, TINY_TI2V)
        for dtype in (torch.float32, torch.bfloat16)
    }


def clip(plan: Plan, path: Path, depot: Depot) -> npt.NDArray[np.uint8]:
    files = open_model(path, plan.request.spec)
    events = generate_frames(plan, files, None, depot)
    return np.concatenate([event.frames for event in events if isinstance(event, FramesReady)])


@pytest.fixture
def depot() -> Iterator[Depot]:
    depot = Depot(CPU)
    yield depot
    depot.release()
    assert depot.registered_bytes == depot.ring_bytes == 0


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [TINY_T2V, TINY_TI2V], ids=["two experts", "one"])
def test_where_weights_lie_does_not_change_a_bit(
    spec: ModelSpec, stored: torch.dtype, models: dict[str, Path], depot: Depot
) -> None:
    """Resident, registered, mapped or mixed, two slots or four, and with conversion on the way."""
    path = models[f"{spec.name} {stored}"]
    request = request_for(spec)
    expected = clip(hand_made_plan(request), path, depot)
    for where, num_slots in itertools.product(PLACES, (2, 4)):
        plan = hand_made_plan(request, where=where, num_slots=num_slots)
        assert np.array_equal(clip(plan, path, depot), expected), (where, num_slots)
    around = hand_made_plan(request, where="mapped", ring=replace(SMALL_RING, direct=True))
    assert np.array_equal(clip(around, path, depot), expected), "read around the page cache"
    mixed: dict[str, Where] = {"blocks.0": "resident", "blocks.1": "registered"}
    assert np.array_equal(clip(hand_made_plan(request, where=mixed), path, depot), expected)


def test_cutting_the_work_does_not_change_the_clip(models: dict[str, Path], depot: Depot) -> None:
    """Rows and heads at a time: sums of matrix products may round elsewhere, by a level at most."""
    request = request_for(TINY_TI2V)
    path = models[f"{TINY_TI2V.name} {torch.float32}"]
    whole = clip(hand_made_plan(request), path, depot).astype(int)
    cut = clip(hand_made_plan(request, rows=1, heads=1), path, depot).astype(int)
    assert np.abs(whole - cut).max() <= 1
    assert (whole != cut).mean() < 0.01


def test_the_report_counts_what_was_moved(models: dict[str, Path], depot: Depot) -> None:
    """Every byte of every block goes through the slots once per forward; none when resident."""
    request = request_for(TINY_T2V)
    path = models[f"{TINY_T2V.name} {torch.float32}"]
    files = open_model(path, TINY_T2V)
    layouts = network_layouts(on_meta(TINY_T2V, "high_noise"), "fp32")
    moved = {}
    for where in PLACES:
        events = list(generate_frames(hand_made_plan(request, where=where), files, None, depot))
        moved[where] = [event for event in events if isinstance(event, WeightsMoved)]
    for where in ("registered", "mapped"):
        text, denoise = moved[where]
        assert (text.stage, denoise.stage) == ("text", "denoise")
        assert (text.forwards, denoise.forwards) == (1, 3 * 2)
        assert denoise.resident_bytes == 0
        assert denoise.streamed_bytes == sum(layouts[unit].num_bytes for _, unit in route(request))
        assert denoise.first_ready_s is not None
        assert denoise.waited_s >= 0
    assert moved["resident"][1].streamed_bytes == 0
    assert moved["resident"][1].resident_bytes > 0


def test_a_reader_that_fails_ends_the_job_with_one_error_and_the_next_one_runs(
    models: dict[str, Path], depot: Depot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step, in its own thread; no thread and no slot is left behind."""
    request = request_for(TINY_T2V)
    path = models[f"{TINY_T2V.name} {torch.float32}"]
    plan = hand_made_plan(request, where="mapped")
    expected = clip(plan, path, depot)
    real, calls = os.preadv, itertools.count()

    def failing(*args: Any) -> int:
        if next(calls) == 40:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(os, "preadv", failing)
    threads = threading.active_count()
    with pytest.raises(WeightsBroken, match="Input/output error"):
        clip(plan, path, depot)
    assert threading.active_count() == threads
    monkeypatch.undo()
    assert np.array_equal(clip(plan, path, depot), expected)


def test_a_job_that_is_cancelled_gives_everything_back(
    models: dict[str, Path], depot: Depot
) -> None:
    """The consumer stops asking in the middle of denoising."""
    path = models[f"{TINY_T2V.name} {torch.float32}"]
    plan = hand_made_plan(request_for(TINY_T2V), where="mapped")
    threads = threading.active_count()
    events = generate_frames(plan, open_model(path, TINY_T2V), None, depot)
    for event in events:
        if getattr(event, "step", None) == 2:
            break
    events.close()
    assert threading.active_count() == threads


def test_a_file_cut_while_in_use_is_reported(tmp_path: Path) -> None:
    """By the ring's readers, which reach its new end; a mapping would be killed by the kernel."""
    written = write_tiny(tmp_path / "model", TINY_T2V)
    depot = Depot(CPU)
    files = open_model(written.path, TINY_T2V)
    plan = hand_made_plan(request_for(TINY_T2V), where="mapped")
    shard = written.path / "transformer" / "diffusion_pytorch_model.safetensors"

    def run_and_cut() -> None:
        for event in generate_frames(plan, files, None, depot):
            if getattr(event, "step", None) == 1:
                with shard.open("r+b") as file:
                    file.truncate(shard.stat().st_size // 2)

    with pytest.raises(WeightsBroken, match="cut while in use"):
        run_and_cut()
    depot.release()


@pytest.mark.gpu
@pytest.mark.parametrize("where", PLACES)
def test_a_gpu_computes_the_same_wherever_weights_lie_and_gets_all_back(
    where: Where, models: dict[str, Path]
) -> None:
    """Both experts in fp32: bit for bit as resident; nothing is registered or allocated after."""
    request = request_for(TINY_T2V)
    path = models[f"{TINY_T2V.name} {torch.float32}"]
    depot = Depot(torch.device("cuda"))
    expected = clip(hand_made_plan(request, device="cuda"), path, depot)
    plan = hand_made_plan(request, where=where, num_slots=3, device="cuda")
    assert np.array_equal(clip(plan, path, depot), expected)
    assert (depot.registered_bytes > 0) == (where == "registered")
    depot.release()
    assert depot.registered_bytes == depot.ring_bytes == 0
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == 0
