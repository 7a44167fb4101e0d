"""A store made file by file: the same bytes as `convert_model`, with one file there at a time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_diffusers
from tests.engine.tiny_models import TINY_I2V, TINY_T2V, TINY_TI2V
from wanfit.engine.weights.lean import LeanStep, convert_lean, store_bytes
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.partial import allocated_bytes
from wanfit.engine.weights.store import open_store
from wanfit.engine.weights.verify import verify_units
from wanfit.errors import BadOutput, DiskFull
from wanfit.plan.plan import Precision
from wanfit.specs import ModelSpec

SPECS = {spec.name: spec for spec in (TINY_T2V, TINY_I2V, TINY_TI2V)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two experts in two shards each."""
    write_diffusers(tmp_path / "source", TINY_T2V, num_shards=2)
    return tmp_path / "source"


class Shelf:
    """Files of a source that are holes but while they are asked for; counts what is whole."""

    def __init__(self, source: Path) -> None:
        self.whole = 0
        self.most = 0
        self.brought: list[str] = []
        self._source = source
        self._kept = source.with_name("kept")
        shutil.copytree(source, self._kept)
        for file in source.rglob("*.safetensors"):
            header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
            num_bytes = file.stat().st_size
            os.truncate(file, header_bytes)
            os.truncate(file, num_bytes)

    @contextmanager
    def bring(self, file: Path) -> Iterator[None]:
        name = file.relative_to(self._source)
        self.brought.append(name.as_posix())
        self.whole += 1
        self.most = max(self.most, self.whole)
        hole = file.read_bytes()
        shutil.copyfile(self._kept / name, file)
        yield
        self.whole -= 1
        file.write_bytes(hole)


def contents(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file()
    }


def ordinary(source: Path, target: Path, spec: ModelSpec, precision: Precision) -> Path:
    from wanfit.engine.weights.convert import convert_model

    convert_model(open_model(source, spec), target, precision)
    return target


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", SPECS)
def test_a_lean_store_has_the_bytes_of_an_ordinary_one(
    tmp_path: Path, name: str, dtype: torch.dtype, precision: Precision
) -> None:
    """And of the source one file at most is whole at a time."""
    spec = SPECS[name]
    write_diffusers(tmp_path / "source", spec, dtype=dtype, num_shards=3)
    whole = ordinary(tmp_path / "source", tmp_path / "whole", spec, precision)
    shelf = Shelf(tmp_path / "source")
    files = open_model(tmp_path / "source", spec)
    report = convert_lean(files, tmp_path / "lean", precision, origin="a", bring=shelf.bring)
    assert contents(tmp_path / "lean") == contents(whole)
    assert shelf.most == 1
    assert len(shelf.brought) == len(set(shelf.brought)) == 3 * len(report.files)
    assert sum(report.files.values()) == store_bytes(files, precision)
    assert not list(tmp_path.glob(".*.partial"))
    store = open_store(tmp_path / "lean", spec)
    assert len(list(verify_units(store))) == len(store.units)


class Stop(Exception):
    """Ends a run."""


def stop_at(phase: str, what: str) -> Callable[[LeanStep], None]:
    def on_step(step: LeanStep) -> None:
        if step.phase == phase and what in step.what:
            raise Stop

    return on_step


@pytest.mark.parametrize(
    ("phase", "what", "left"),
    [
        ("write", "transformer/diffusion_pytorch_model-00002", 5),
        ("write", "vae/diffusion_pytorch_model-00002", 1),
        ("check", "umt5", 0),
        ("check", "vae", 0),
    ],
)
def test_a_stopped_run_goes_on_with_the_file_at_hand(
    tmp_path: Path, source: Path, phase: str, what: str, left: int
) -> None:
    """Files come in the order of their names: text encoder, transformers, VAE, in two each."""
    whole = ordinary(source, tmp_path / "whole", TINY_T2V, "bf16")
    shelf = Shelf(source)
    files = open_model(source, TINY_T2V)
    target = tmp_path / "lean"
    with pytest.raises(Stop):
        convert_lean(
            files, target, "bf16", origin="a", bring=shelf.bring, on_step=stop_at(phase, what)
        )
    assert not target.exists()
    shelf.brought.clear()
    steps: list[LeanStep] = []
    convert_lean(files, target, "bf16", origin="a", bring=shelf.bring, on_step=steps.append)
    assert contents(target) == contents(whole)
    assert len(shelf.brought) == left
    for phase in ("write", "check"):
        counted = [step for step in steps if step.phase == phase]
        done = [step.done_bytes for step in counted]
        assert done == sorted(done)
        assert done[-1] == counted[-1].total_bytes
    assert counted[-1].total_bytes == store_bytes(files, "bf16")


def test_a_stopped_run_of_other_files_is_thrown_away(tmp_path: Path, source: Path) -> None:
    shelf = Shelf(source)
    files = open_model(source, TINY_T2V)
    target = tmp_path / "lean"
    with pytest.raises(Stop):
        convert_lean(
            files, target, "bf16", origin="a", bring=shelf.bring, on_step=stop_at("check", "vae")
        )
    shelf.brought.clear()
    convert_lean(files, target, "bf16", origin="b", bring=shelf.bring)
    assert len(shelf.brought) == 8


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.engine.test_lean import SPECS, Shelf, convert_lean, open_model

source, target, phase, what = sys.argv[1:]
def on_step(step):
    if step.phase == phase and what in step.what:
        os.kill(os.getpid(), signal.SIGKILL)
files = open_model(Path(source), SPECS["tiny-t2v"])
shelf = Shelf.__new__(Shelf)
shelf.__dict__ |= dict(whole=0, most=0, brought=[], _source=Path(source),
                       _kept=Path(source).with_name("kept"))
convert_lean(files, Path(target), "fp8", origin="a", bring=shelf.bring, on_step=on_step)
"""


def test_a_killed_run_leaves_nothing_under_its_name_and_goes_on(
    tmp_path: Path, source: Path
) -> None:
    """SIGKILL in one shard after the other, and in the checksums; each run gets further."""
    whole = ordinary(source, tmp_path / "whole", TINY_T2V, "fp8")
    target = tmp_path / "lean"
    shelf = Shelf(source)
    holes = contents(source)
    for phase, what in (
        ("write", "transformer/diffusion_pytorch_model-00001"),
        ("write", "transformer_2/diffusion_pytorch_model-00002"),
        ("check", "low_noise"),
    ):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(source), str(target), phase, what], check=False
        )
        assert killed.returncode == -signal.SIGKILL
        assert not target.exists()
        for name, content in holes.items():  # the shard at hand goes the way of the process
            (source / name).write_bytes(content)
    convert_lean(open_model(source, TINY_T2V), target, "fp8", origin="a", bring=shelf.bring)
    assert shelf.brought == []
    assert contents(target) == contents(whole)


def test_two_runs_at_once_are_refused(tmp_path: Path, source: Path) -> None:
    shelf = Shelf(source)
    files = open_model(source, TINY_T2V)

    def second(step: LeanStep) -> None:
        convert_lean(files, tmp_path / "lean", "bf16", origin="a", bring=shelf.bring)

    with pytest.raises(BadOutput, match="being written by another process"):
        convert_lean(
            files, tmp_path / "lean", "bf16", origin="a", bring=shelf.bring, on_step=second
        )


def test_too_small_a_disk_is_said_before_a_file_is_brought(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(source)
    files = open_model(source, TINY_T2V)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match="1000 bytes"):
        convert_lean(files, tmp_path / "lean", "bf16", origin="a", bring=shelf.bring)
    assert shelf.brought == []
    assert not list(tmp_path.glob(".lean*"))


def test_files_in_the_making_are_holes(tmp_path: Path, source: Path) -> None:
    """The disk holds what was written, so that shard and store together stay small."""
    shelf = Shelf(source)
    files = open_model(source, TINY_T2V)
    held: list[int] = []
    folder = tmp_path / ".lean.partial" / "store"

    def on_step(step: LeanStep) -> None:
        if step.phase == "write":
            held.append(allocated_bytes(folder))

    convert_lean(files, tmp_path / "lean", "bf16", origin="a", bring=shelf.bring, on_step=on_step)
    assert held[0] < store_bytes(files, "bf16") / 2 < held[-1]
