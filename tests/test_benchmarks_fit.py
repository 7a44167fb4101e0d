"""The benchmark of memory: what of it runs without a GPU, on tiny models and real files."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fit
from benchmarks.confine import CannotConfine, _Peaks, _sample, cgroup_root, confined
from benchmarks.figures import Figure, figure_line, insert_section, read_figures, table
from benchmarks.fit_forward import ForwardCase, run_case
from benchmarks.fit_predicted import MODELS, MOST_TOKENS, _random_shape
from benchmarks.stores import Stores
from benchmarks.true_size import holes_of, write_true_size
from tests.engine.tiny_models import TINY_T2V, TINY_TI2V
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.verify import verify_units
from wanfit.geometry import geometry_of
from wanfit.plan.plan import Precision
from wanfit.specs import ModelSpec


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("spec", [TINY_T2V, TINY_TI2V], ids=lambda spec: spec.name)
def test_a_true_size_store_is_a_store(
    tmp_path: Path, spec: ModelSpec, precision: Precision
) -> None:
    """It opens, its checksums hold, its tokenizer reads, and its values have the scale they are
    said to have."""
    write_true_size(tmp_path, spec, precision)
    files = open_model(tmp_path, spec)
    assert files.precision == precision
    for _ in verify_units(files):
        pass
    assert files.tokenizer().encode("a red circle").ids

    block = files.load_dit("high_noise", torch.device("cpu"), torch.bfloat16).blocks[1]
    weight = block.get_submodule("ffn.up").unpack(torch.float32).weight.float()  # type: ignore[operator]
    assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)
    modulation = block.get_parameter("modulation")
    assert modulation.dtype == torch.float32
    assert modulation.std().item() == pytest.approx(0.1, rel=0.3)


def test_no_two_blocks_of_a_true_size_store_are_alike(tmp_path: Path) -> None:
    write_true_size(tmp_path, TINY_T2V, "bf16")
    files = open_model(tmp_path, TINY_T2V)
    weights = [
        block.get_parameter("self_attn.q.weight")
        for expert in TINY_T2V.experts
        for block in files.load_dit(expert, torch.device("cpu"), torch.bfloat16).blocks
    ]
    for i, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[:i])


def test_holes_are_zeros_and_are_said(tmp_path: Path) -> None:
    written = write_true_size(tmp_path, TINY_T2V, "bf16", real_blocks={"low_noise": 1, "umt5": 0})
    assert written.holes == holes_of(tmp_path) == {"low_noise": 2, "umt5": 3}
    files = open_model(tmp_path, TINY_T2V)
    for _ in verify_units(files):
        pass
    blocks = files.load_dit("low_noise", torch.device("cpu"), torch.bfloat16).blocks
    zero = [not any(p.any() for p in block.parameters()) for block in blocks]
    assert zero == [False, True, True]
    high = files.load_dit("high_noise", torch.device("cpu"), torch.bfloat16)
    assert all(parameter.any() for parameter in high.parameters())


def test_a_better_store_serves_for_a_worse_one(tmp_path: Path) -> None:
    stores = Stores(tmp_path / "stores")
    whole = stores.get(TINY_T2V, "bf16", "whole")
    assert stores.get(TINY_T2V, "bf16", "hollow") == whole
    hollow = stores.get(TINY_T2V, "fp8", "hollow")
    assert set(holes_of(hollow)) == {"umt5", "high_noise", "low_noise"}
    stores.remove()
    assert not list((tmp_path / "stores").iterdir())


def test_a_forward_is_the_same_wherever_its_weights_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_true_size(tmp_path, TINY_TI2V, "bf16")
    case = ForwardCase(
        "tiny", TINY_TI2V, "bf16", 64, 64, 9, ("resident", "registered", "ring", "plan"), timed=1
    )
    run_case(case, tmp_path, torch.device("cpu"), compiled=False)
    figures = {figure.what: figure for figure in read_figures(capsys.readouterr().out.splitlines())}
    for way in ("registered", "ring", "plan"):
        assert figures[f"{way} gives the same velocity as resident"].passed
        assert figures[f"{way} against resident"].value
    assert len(figures["forward, ring"].detail["forward_ms"]) == case.rounds * case.timed
    assert figures["forward, ring"].detail["streamed_gb_per_forward"] > 0
    assert figures["forward, resident"].detail["streamed_gb_per_forward"] == 0


@given(st.integers(0, 1 << 20))
def test_random_cases_are_legal(seed: int) -> None:
    draw = random.Random(seed)
    spec = draw.choice(MODELS)
    (width, height), frames = _random_shape(draw, spec, MOST_TOKENS)
    geometry_of(spec, width, height, frames)  # raises for illegal ones


def test_what_was_not_measured_does_not_pass() -> None:
    assert Figure("s", "a", 1.01, "x", at_most=1.02).passed is True
    assert Figure("s", "a", 1.03, "x", at_most=1.02).passed is False
    assert Figure("s", "a", None, "x", at_most=1.02).passed is False
    assert Figure("s", "a", None, must=True).passed is False
    assert Figure("s", "a", 59.0, at_least=60).passed is False
    assert Figure("s", "a", 3.0).passed is None


def test_figures_survive_the_way_through_a_log(tmp_path: Path) -> None:
    figures = [Figure("s", "a", 1.5, "x", at_most=2, detail={"raw": [1, 2]}), Figure("s", "b", 2.0)]
    log = ["noise", *map(figure_line, figures), figure_line(Figure("s", "b", 3.0))]
    read = read_figures(log)
    assert [figure.value for figure in read] == [1.5, 3.0]
    assert "| s: a | 1.500 x | <= 2.000 x | pass |  |" in table(read)

    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n\nIntro.\n\n## Old\ntext\n")
    insert_section(results, "## New\nmore\n")
    assert results.read_text() == "# Results\n\nIntro.\n\n## New\nmore\n\n## Old\ntext\n"


def test_a_section_is_stopped_at_its_limit() -> None:
    """What it printed until then is kept, and its own children end with it."""
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    lines: list[str] = []
    began_s = time.perf_counter()
    ended = fit._run_child([sys.executable, "-c", script], 1.5, lines.append)
    assert time.perf_counter() - began_s < 20
    assert ended == "stopped at its limit of 1.5 s"
    (pid,) = lines
    _assert_ends(int(pid))


def test_a_confined_command_is_measured_and_ended_at_its_limit() -> None:
    if _no_group():
        pytest.skip("this process may make no cgroup v2")
    hold = "b = bytearray(60_000_000); print('{}'); import time; time.sleep(0.6)"
    found = confined([sys.executable, "-c", hold], memory_max=None)
    assert found.returncode == 0
    assert found.stdout == "{}\n"
    assert 60_000_000 < found.resident_anon_peak < 200_000_000
    assert found.samples >= 3

    late = confined(["/bin/sh", "-c", "sleep 60 & echo $!; sleep 60"], memory_max=None, timeout_s=1)
    assert late.timed_out
    assert late.elapsed_s < 20
    assert late.returncode == -9
    _assert_ends(int(late.stdout))


def test_a_confined_command_cannot_pass_its_memory() -> None:
    """The kernel kills what asks for more than the limit, and the result says so."""
    try:
        greedy = "b = bytearray(400_000_000); print(len(b))"
        found = confined([sys.executable, "-c", greedy], memory_max=100_000_000)
    except CannotConfine as error:
        pytest.skip(str(error))
    assert found.returncode == -9
    assert found.oom_kills >= 1
    assert found.stdout == ""
    assert found.memory_peak <= 100_000_000


def test_what_is_held_leaves_cache_out_that_the_kernel_can_take_back(tmp_path: Path) -> None:
    """A group's files as Linux writes them: mapped pages of files count, others do not."""
    (tmp_path / "memory.stat").write_text(
        "anon 1000\nfile 50000\nkernel 200\nshmem 30\nfile_mapped 4000\n"
    )
    (tmp_path / "memory.current").write_text("51230\n")
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    peaks = _Peaks()
    _sample(tmp_path, peaks)
    (tmp_path / "memory.stat").write_text("anon 10\nfile 60000\nkernel 1\n")
    _sample(tmp_path, peaks)
    assert peaks["held"] == 1000 + 30 + 200 + 4000
    assert peaks["file"] == 60000
    assert peaks["anon"] == 1000
    assert peaks["current"] == 51230
    assert peaks["resident_anon"] > 1_000_000
    assert peaks.samples == 2


def _no_group() -> bool:
    try:
        confined(["/bin/true"], memory_max=None)
    except CannotConfine:
        return True
    return not cgroup_root().is_dir()


def _assert_ends(pid: int) -> None:
    until_s = time.perf_counter() + 10
    while time.perf_counter() < until_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs")
