"""Convert: whatever the source, the same store; and whatever happens, never half a store."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.tiny_models import TINY_T2V, TinyModel, write_tiny
from wanfit.engine.weights import convert, writer
from wanfit.engine.weights.configs import dit_config, model_index
from wanfit.engine.weights.convert import ConvertReport, ConvertStep, OnStep, convert_model
from wanfit.engine.weights.keys import DIT, to_diffusers
from wanfit.engine.weights.networks import on_meta, shapes_of
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.partial import PartialStore, check_target
from wanfit.engine.weights.recognise import recognise
from wanfit.engine.weights.verify import verify_units
from wanfit.engine.weights.writer import UnitWriter
from wanfit.errors import (
    BadOption,
    BadOutput,
    DiskFull,
    UnknownModel,
    WeightsBroken,
    WeightsMismatch,
    WeightsMissing,
)
from wanfit.plan.plan import Precision
from wanfit.specs import DEMO, MODELS, T2V_A14B, ModelSpec

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PATIENCE_S = 120
DIT_STEM = "transformer/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny(tmp_path_factory.mktemp("models") / "t2v", TINY_T2V, seed=3)


@pytest.fixture(scope="module")
def whole(source: TinyModel) -> Path:
    """The store that an undisturbed convert of `source` to bf16 writes."""
    path = source.path.parent / "whole"
    _convert(source.path, path, "bf16")
    return path


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors in several pieces, and every unit in the journal at once."""
    monkeypatch.setattr(convert, "PIECE_ELEMENTS", 100)
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_converts_as_it_loads(
    dtype: torch.dtype, precision: Precision, tmp_path: Path
) -> None:
    """The rest of the weights is rounded once, from what the source has, as a load in bf16 does."""
    model = write_tiny(tmp_path / "source", TINY_T2V, dtype=dtype)
    _convert(model.path, tmp_path / "store", precision)
    expected, opened = open_model(model.path, TINY_T2V), open_model(tmp_path / "store", TINY_T2V)
    for network in ("umt5", "low_noise"):
        entries = opened.entries(network)
        loaded = expected.load_umt5(CPU, torch.bfloat16)
        state = loaded.state_dict()
        if network == "low_noise":
            state = expected.load_dit("low_noise", CPU, torch.bfloat16).state_dict()
        found = (
            opened.load_umt5(CPU, torch.bfloat16).state_dict()
            if network == "umt5"
            else opened.load_dit("low_noise", CPU, torch.bfloat16).state_dict()
        )
        for name, tensor in state.items():
            if entries[name].dtype != "F8_E4M3":
                assert torch.equal(found[name], tensor), name
    stored = {torch.float64: "F32", torch.float32: "F32", torch.float16: "F16"}.get(dtype, "BF16")
    assert {entry.dtype for entry in opened.entries("vae").values()} == {stored}
    list(verify_units(opened))


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_shards_and_pieces_change_nothing(
    precision: Precision, source: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = Path(shutil.copytree(source.path, tmp_path / "sharded"))
    _shard(sharded / f"{DIT_STEM}.safetensors", 3)
    _convert(sharded, tmp_path / "pieces", precision)
    monkeypatch.undo()
    _convert(source.path, tmp_path / "whole", precision)
    assert _snapshot(tmp_path / "pieces") == _snapshot(tmp_path / "whole")


def test_a_bf16_store_converts_to_the_fp8_store_of_its_source(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "source", TINY_T2V, dtype=torch.bfloat16)
    _convert(model.path, tmp_path / "bf16", "bf16")
    _convert(model.path, tmp_path / "direct", "fp8")
    _convert(tmp_path / "bf16", tmp_path / "fp8", "fp8")
    assert _snapshot(tmp_path / "fp8") == _snapshot(tmp_path / "direct")
    with pytest.raises(BadOption, match="is a store in fp8"):
        _convert(tmp_path / "fp8", tmp_path / "again", "bf16")


def test_progress_counts_every_byte_once(source: TinyModel, tmp_path: Path) -> None:
    steps: list[ConvertStep] = []
    report = _convert(source.path, tmp_path / "store", "bf16", steps.append)
    done = [step.done_bytes for step in steps]
    assert done == sorted(set(done))
    written_bytes = {
        path.name: path.stat().st_size for path in (tmp_path / "store").glob("*.safetensors")
    }
    assert done[-1] == steps[0].total_bytes == sum(written_bytes.values())
    assert dict(report.files) == written_bytes
    assert report.to_json()["written_bytes"] == done[-1]
    assert list(dict.fromkeys(step.network for step in steps)) == [
        "umt5", "high_noise", "low_noise", "vae",
    ]  # fmt: skip


class TestMemory:
    def test_it_is_bounded_whatever_the_size_of_a_unit(self, tmp_path: Path) -> None:
        """Blocks of 332 MB in fp32, of which 64 MB at most are ever held, in either precision.

        The source is a hole: its size is real, and costs the disk nothing.
        """
        spec = replace(
            TINY_T2V,
            name="wide",
            boundary=None,
            dit=replace(TINY_T2V.dit, num_heads=64, ffn_width=32_768, num_blocks=2),
        )
        _write_hollow(tmp_path / "source", spec)
        block = [
            entry.num_bytes
            for name, entry in open_model(tmp_path / "source", spec).entries("high_noise").items()
            if name.startswith("blocks.0.")
        ]
        assert sum(block) > 300e6
        grown_bytes = _child(
            f"""
            from dataclasses import replace
            from tests.engine.tiny_models import TINY_T2V
            from wanfit.engine.ops.linear import quantise
            from wanfit.engine.weights.convert import convert_model
            from wanfit.engine.weights.open import open_model
            import torch

            def resident_bytes(field):
                for line in open("/proc/self/status"):
                    if line.startswith(field):
                        return 1024 * int(line.split()[1])

            spec = replace(
                TINY_T2V, name="wide", boundary=None,
                dit=replace(TINY_T2V.dit, num_heads=64, ffn_width=32_768, num_blocks=2),
            )
            quantise(torch.ones(2, 2))  # what the first use loads is not what is measured
            before = resident_bytes("VmRSS")
            open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
            for precision in ("bf16", "fp8"):
                source = open_model(Path({str(tmp_path / "source")!r}), spec)
                convert_model(source, Path({str(tmp_path)!r}) / precision, precision)
            print(resident_bytes("VmHWM") - before)
            """
        )
        assert int(grown_bytes) < 64e6, grown_bytes


@pytest.mark.usefixtures("small_steps")
class TestStopped:
    @pytest.mark.parametrize(
        ("part", "least"), [(0.02, 0), (0.1, 0.03), (0.2, 0.1), (0.28, 0.2), (0.9, 0.3)]
    )
    def test_an_interrupted_convert_continues(
        self, part: float, least: float, source: TinyModel, whole: Path, tmp_path: Path
    ) -> None:
        """Nothing under the final name; what was done is not done again; the same bytes.

        The last unit, the VAE, is 70 % of this model.
        """
        target = tmp_path / "store"
        _stop_at(part, source, target)
        assert not target.exists()
        report = _convert(source.path, target, "bf16")
        assert least <= report.resumed_bytes / sum(report.files.values()) <= part
        assert _snapshot(target) == _snapshot(whole)
        assert [path.name for path in tmp_path.iterdir()] == ["store"]

    def test_a_killed_convert_continues(
        self, source: TinyModel, whole: Path, tmp_path: Path
    ) -> None:
        """SIGKILL, again and again until one gets through."""
        target, ends = tmp_path / "store", []
        while not target.exists():
            script = _KILLED.format(source=str(source.path), target=str(target))
            child = _start_child(script)
            assert child.stdout is not None
            for _ in range(8):
                child.stdout.readline()  # one for each unit that is on the disk
            child.send_signal(signal.SIGKILL)
            ends.append(child.wait(PATIENCE_S))
            child.stdout.close()
            assert ends[-1] in (0, -signal.SIGKILL)
            assert len(ends) < 10
        assert -signal.SIGKILL in ends
        assert _snapshot(target) == _snapshot(whole)
        assert [path.name for path in tmp_path.iterdir()] == ["store"]

    @pytest.mark.parametrize("changed", ["source", "precision", "journal", "file"])
    def test_a_partial_of_something_else_is_not_continued(
        self, changed: str, source: TinyModel, tmp_path: Path
    ) -> None:
        target = tmp_path / "store"
        path, precision = Path(shutil.copytree(source.path, tmp_path / "source")), "bf16"
        model = replace(source, path=path)
        _stop_at(0.6, model, target)
        partial = tmp_path / ".store.partial"
        match changed:
            case "source":
                other = write_tiny(tmp_path / "other", TINY_T2V, seed=8)
                shutil.copytree(other.path, path, dirs_exist_ok=True)
            case "precision":
                precision = "fp8"
            case "journal":
                text = (partial / "journal").read_text(encoding="utf-8")
                (partial / "journal").write_text("x" + text, encoding="utf-8")
            case "file":
                os.truncate(partial / "store" / "high_noise.safetensors", 5000)
        report = _convert(path, target, _precision(precision))
        assert report.resumed_bytes == 0
        _convert(path, tmp_path / "expected", _precision(precision))
        assert _snapshot(target) == _snapshot(tmp_path / "expected")

    def test_a_half_written_line_of_the_journal_is_not_believed(
        self, source: TinyModel, whole: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "store"
        _stop_at(0.6, source, target)
        journal = tmp_path / ".store.partial/journal"
        os.truncate(journal, journal.stat().st_size - 4)
        report = _convert(source.path, target, "bf16")
        assert report.resumed_bytes > 0
        assert _snapshot(target) == _snapshot(whole)

    def test_one_process_at_a_time(self, source: TinyModel, tmp_path: Path) -> None:
        with (
            PartialStore(tmp_path / "store", "a job"),
            pytest.raises(BadOutput, match="is being written by another process"),
        ):
            _convert(source.path, tmp_path / "store", "bf16")

    def test_a_source_that_changes_meanwhile_is_not_believed(
        self, source: TinyModel, tmp_path: Path
    ) -> None:
        path = Path(shutil.copytree(source.path, tmp_path / "source"))

        def touch(step: ConvertStep) -> None:
            os.utime(path / f"{DIT_STEM}.safetensors")

        with pytest.raises(WeightsBroken, match="was changed while it was read"):
            _convert(path, tmp_path / "store", "bf16", touch)
        assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("small_steps")
class TestDisk:
    def test_too_little_room_is_told_before_the_first_byte(
        self, source: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10**6, 10**6, 400_000))
        with pytest.raises(DiskFull, match="and the disk of") as raised:
            _convert(source.path, tmp_path / "store", "bf16")
        assert "(983040 bytes)" in raised.value.message
        assert "(400000 bytes)" in raised.value.message
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_fills_is_told_and_the_convert_continues(
        self, source: TinyModel, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Here os.write writes a part, fails, and works again: whatever came after is not used.

        The next test has a real disk.
        """
        room_bytes = 250_000
        real_write = os.write

        def write(handle: int, content: memoryview) -> int:
            nonlocal room_bytes
            if room_bytes == 0:
                room_bytes = 1 << 40
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = real_write(handle, content[:room_bytes])
            room_bytes -= count
            return count

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", write)
            with pytest.raises(DiskFull, match="is full"):
                _convert(source.path, tmp_path / "store", "bf16")
        assert [path.name for path in tmp_path.iterdir()] == [".store.partial"]
        report = _convert(source.path, tmp_path / "store", "bf16")
        assert 0 < report.resumed_bytes < 250_000
        assert _snapshot(tmp_path / "store") == _snapshot(whole)

    def test_no_unit_with_a_gap_is_noted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One write fails while the rest of its unit is on the way already."""
        real_write, failures = os.write, [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

        def write(handle: int, content: memoryview) -> int:
            if failures:
                raise failures.pop()
            return real_write(handle, content)

        monkeypatch.setattr(os, "write", write)
        piece = torch.zeros(8, dtype=torch.uint8)
        with PartialStore(tmp_path / "store", "a job") as partial:
            with UnitWriter(partial, "file", 0) as unit_writer:
                for _ in range(2):
                    unit_writer.write(piece)
                unit_writer.end_unit("a unit")
                time.sleep(0.2)  # for the threads to do what they may
                with pytest.raises(OSError, match="No space left"):
                    unit_writer.finish()
            journal = (tmp_path / ".store.partial/journal").read_text(encoding="utf-8")
        assert "a unit" not in journal

    def test_a_real_disk_that_fills(self, source: TinyModel, whole: Path, tmp_path: Path) -> None:
        """A tmpfs of 4 MB, which something else fills while the convert runs."""
        disk = tmp_path / "disk"
        disk.mkdir()
        script = f"""
            from tests.engine.tiny_models import TINY_T2V
            from wanfit.engine.weights import writer
            from wanfit.engine.weights.convert import convert_model
            from wanfit.engine.weights.open import open_model
            from wanfit.errors import DiskFull
            writer.SYNC_BYTES = 1
            disk, source = Path({str(disk)!r}), Path({str(source.path)!r})
            ballast = disk / "ballast"

            def fill(step):
                if step.network == "high_noise" and not ballast.exists():
                    with ballast.open("wb", buffering=0) as stream:
                        try:
                            while True:
                                stream.write(bytes(4096))
                        except OSError:
                            pass

            try:
                convert_model(open_model(source, TINY_T2V), disk / "store", "bf16", fill)
            except DiskFull as error:
                assert "0.00 GB free" in error.message, error
            else:
                raise AssertionError("there was room")
            assert not (disk / "store").exists()
            ballast.unlink()
            report = convert_model(open_model(source, TINY_T2V), disk / "store", "bf16")
            assert report.resumed_bytes > 0
            for path in Path({str(whole)!r}).rglob("*.*"):
                relative = path.relative_to({str(whole)!r})
                assert (disk / "store" / relative).read_bytes() == path.read_bytes()
            print("continued")
            """
        mount = f'mount -t tmpfs -o size=4m none {disk} && exec {sys.executable} -c "$0"'
        for unshare in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
            if subprocess.run(
                [*unshare, "sh", "-c", f"mount -t tmpfs none {disk}"],
                capture_output=True, check=False,
            ).returncode == 0:  # fmt: skip
                break
        else:
            pytest.skip("this machine lets nobody mount a tmpfs")
        ended = subprocess.run(
            [*unshare, "sh", "-c", mount, _IMPORTS + textwrap.dedent(script)],
            cwd=ROOT, env=_ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S,
            check=False,
        )  # fmt: skip
        assert ended.stdout == "continued\n", ended


class TestTarget:
    def test_a_store_is_replaced_when_the_new_one_is_whole(
        self, source: TinyModel, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "store"
        other = write_tiny(tmp_path / "other", TINY_T2V, seed=8)
        _convert(other.path, target, "bf16")
        before = _snapshot(target)
        with monkeypatch.context() as patched:
            patched.setattr(convert, "PIECE_ELEMENTS", 100)
            _stop_at(0.6, source, target)
        assert _snapshot(target) == before
        _convert(source.path, target, "bf16")
        assert _snapshot(target) == _snapshot(whole)
        assert not (tmp_path / ".store.partial").exists()

    @pytest.mark.parametrize("killed", [False, True])
    def test_a_stop_between_the_two_renames_loses_nothing(
        self,
        killed: bool,
        source: TinyModel,
        whole: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Stopped there, the old store is put back at once; killed there, by the next convert."""
        target = Path(shutil.copytree(whole, tmp_path / "store"))
        (target / "mark").touch()
        real_rename = os.rename

        def rename(old: Path, new: Path) -> None:
            if old.name == "store" and new == target:
                raise KeyboardInterrupt
            if not (killed and old.name == "old"):
                real_rename(old, new)

        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", rename)
            if killed:  # nothing of ours runs after a kill, so nothing is cleaned up either
                patched.setattr(PartialStore, "_put_back", lambda self: None)
            with pytest.raises(KeyboardInterrupt):
                _convert(source.path, target, "bf16")
        assert (target / "mark").exists() != killed
        steps: list[ConvertStep] = []
        report = _convert(source.path, target, "bf16", steps.append)
        assert report.resumed_bytes == sum(report.files.values())
        assert steps == []
        assert _snapshot(target) == _snapshot(whole)
        assert [path.name for path in tmp_path.iterdir()] == ["store"]

    def test_an_empty_directory_may_be_filled(self, source: TinyModel, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        _convert(source.path, tmp_path / "store", "bf16")
        open_model(tmp_path / "store", TINY_T2V)

    def test_through_a_link_the_store_it_names_is_replaced(
        self, source: TinyModel, whole: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        _convert(source.path, tmp_path / "link", "bf16")
        assert (tmp_path / "link").is_symlink()
        assert _snapshot(tmp_path / "real") == _snapshot(whole)

    def test_something_else_is_never_overwritten(self, source: TinyModel, tmp_path: Path) -> None:
        (tmp_path / "photo.jpg").write_text("dear", encoding="utf-8")
        (tmp_path / "holiday").mkdir()
        (tmp_path / "holiday/photo.jpg").write_text("dear", encoding="utf-8")
        for target in (tmp_path / "photo.jpg", tmp_path / "holiday"):
            with pytest.raises(BadOutput, match="is there and is not a store"):
                _convert(source.path, target, "bf16")
        for target in (source.path, source.path.parent):
            with pytest.raises(BadOutput, match="holds the source"):
                _convert(source.path, target, "bf16")
        with pytest.raises(BadOutput, match="is a mount point"):
            check_target(source.path, Path("/proc"))
        assert (tmp_path / "holiday/photo.jpg").read_text(encoding="utf-8") == "dear"

    def test_where_nothing_can_be_written(self, source: TinyModel, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(BadOutput, match="Cannot write"):
            _convert(source.path, tmp_path / "file" / "store", "bf16")
        for length in (250, 300):  # without room for our suffix, and too long itself
            with pytest.raises(BadOutput, match="File name too long"):
                _convert(source.path, tmp_path / ("x" * length), "bf16")


class TestSource:
    @pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
    def test_every_model_is_recognised(self, spec: ModelSpec, tmp_path: Path) -> None:
        assert recognise(_write_json(tmp_path, spec)) == spec

    def test_stores_are_recognised(self, whole: Path, tmp_path: Path) -> None:
        assert recognise(whole, (DEMO, TINY_T2V)) == TINY_T2V
        with pytest.raises(UnknownModel, match="tiny-t2v"):
            recognise(whole)
        (tmp_path / "wanfit.json").write_text("{}", encoding="utf-8")
        with pytest.raises(WeightsBroken, match="does not name its model"):
            recognise(tmp_path)

    def test_what_is_none_of_ours_is_told(self, tmp_path: Path) -> None:
        spec = replace(T2V_A14B, dit=replace(T2V_A14B.dit, num_heads=12))
        with pytest.raises(WeightsMismatch, match="holds none of demo, ti2v-5b, t2v-a14b"):
            recognise(_write_json(tmp_path / "other", spec))
        with pytest.raises(WeightsMissing, match="There is no model directory"):
            recognise(tmp_path / "nowhere")
        with pytest.raises(WeightsMissing, match=r"model_index\.json is not there"):
            recognise(tmp_path)

    def test_a_source_that_breaks_off_is_told(
        self, source: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = Path(shutil.copytree(source.path, tmp_path / "source"))
        monkeypatch.setattr(convert, "PIECE_ELEMENTS", 100)

        def cut(step: ConvertStep) -> None:
            if step.network == "high_noise":
                os.truncate(path / f"{DIT_STEM}.safetensors", 30_000)

        with pytest.raises(WeightsBroken, match=r"has 30000 bytes, and .* lies up to \d+"):
            _convert(path, tmp_path / "store", "bf16", cut)
        assert not (tmp_path / "store").exists()


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


class _Stop(BaseException):
    """As a signal stops a convert."""


_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
_IMPORTS = "import sys\nfrom pathlib import Path\n"
_KILLED = """
    from tests.engine.tiny_models import TINY_T2V
    from wanfit.engine.weights import convert, writer
    from wanfit.engine.weights.open import open_model
    convert.PIECE_ELEMENTS, writer.SYNC_BYTES = 100, 1
    real_wait = writer.UnitWriter._wait

    def wait(self, units):
        real_wait(self, units)
        print("a unit", flush=True)

    writer.UnitWriter._wait = wait
    convert.convert_model(open_model(Path({source!r}), TINY_T2V), Path({target!r}), "bf16")
    """


def _convert(
    source: Path, target: Path, precision: Precision, on_step: OnStep | None = None
) -> ConvertReport:
    return convert_model(open_model(source, TINY_T2V), target, precision, on_step)


def _stop_at(part: float, source: TinyModel, target: Path) -> None:
    def stop(step: ConvertStep) -> None:
        if step.done_bytes > part * step.total_bytes:
            raise _Stop

    with pytest.raises(_Stop):
        _convert(source.path, target, "bf16", stop)


def _precision(name: str) -> Precision:
    return "fp8" if name == "fp8" else "bf16"


def _child(script: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", _IMPORTS + textwrap.dedent(script)],
        cwd=ROOT, env=_ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended
    return ended.stdout


def _start_child(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _IMPORTS + textwrap.dedent(script)],
        cwd=ROOT, env=_ENVIRONMENT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def _shard(file: Path, count: int) -> None:
    """Splits a file into shards with an index, as diffusers does."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    weight_map: dict[str, str] = {}
    for i in range(count):
        name = f"{file.stem}-{i + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[i::count])
        save_file(part, file.parent / name)
        weight_map |= dict.fromkeys(part, name)
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    file.unlink()


def _write_json(path: Path, spec: ModelSpec) -> Path:
    (path / "transformer").mkdir(parents=True)
    (path / "model_index.json").write_text(json.dumps(model_index(spec)), encoding="utf-8")
    config = path / "transformer" / "config.json"
    config.write_text(json.dumps(dit_config(spec.dit)), encoding="utf-8")
    return path


def _write_hollow(path: Path, spec: ModelSpec) -> None:
    """A directory of `spec` in fp32 whose transformer is a header and a hole of zeros."""
    write_tiny(path, replace(spec, dit=TINY_T2V.dit))
    _set_config(path / "transformer/config.json", dit_config(spec.dit))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes_of(on_meta(spec, "high_noise")).items():
        begin, end = end, end + 4 * math.prod(shape)
        header[to_diffusers(name, DIT)] = {
            "dtype": "F32", "shape": shape, "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    with (path / f"{DIT_STEM}.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def _set_config(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
