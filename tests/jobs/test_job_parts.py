"""The small parts: percent and patience by the plan, endings, who is alive, lines on a pipe."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from wanfit.jobs import endings, liveness
from wanfit.jobs.endings import ending_of
from wanfit.jobs.leases import Stillness
from wanfit.jobs.progress import Track
from wanfit.jobs.wire import Engine, Order, as_line, read_lines

PLAN: Mapping[str, Any] = {
    "stages": [
        {"stage": "text", "elapsed_s": 10.0},
        {"stage": "denoise", "elapsed_s": 80.0},
        {"stage": "decode", "elapsed_s": 10.0},
    ]
}


class TestProgress:
    def test_percent_is_of_the_seconds_of_the_plan(self) -> None:
        track = Track(PLAN)
        track.begin("text", None)
        assert track.now.percent == 0.0
        track.begin("denoise", 4)
        assert track.now.percent == 10.0
        track.step("denoise", 1, 4)
        assert (track.now.percent, track.now.step, track.now.steps) == (30.0, 1, 4)
        track.begin("decode", 2)
        assert track.now.percent == 90.0
        track.step("decode", 2, 2)
        assert track.now.percent == 99.0  # the files are not kept yet

    def test_percent_never_goes_back(self) -> None:
        """A clip that is tried again within less memory begins its stages anew."""
        track = Track(PLAN)
        track.step("denoise", 3, 4)
        track.begin("text", None)
        assert track.now.percent == 70.0
        assert track.now.stage == "text"

    @pytest.mark.parametrize(
        "plan", [{}, {"stages": []}, {"stages": [PLAN["stages"][0] | {"elapsed_s": 0.0}]}]
    )
    def test_without_seconds_there_is_progress_all_the_same(self, plan: dict[str, object]) -> None:
        track = Track(plan)
        track.step("denoise", 1, 2)
        assert 10 < track.now.percent < 90

    def test_a_step_may_take_ten_times_its_seconds_and_never_less_than_the_least(self) -> None:
        track = Track(PLAN)
        assert track.patience_s(5.0) == 5.0
        track.begin("text", None)
        assert track.patience_s(5.0) == 100.0
        track.begin("denoise", 40)
        assert track.patience_s(5.0) == 20.0
        assert track.patience_s(60.0) == 60.0


class TestEndings:
    @pytest.mark.parametrize(
        ("returncode", "kills", "code", "blame"),
        [
            (-signal.SIGKILL, (3, 4), "worker_killed", True),
            (-signal.SIGKILL, (3, 3), "worker_killed", False),
            (-signal.SIGKILL, (None, None), "worker_killed", True),
            (-signal.SIGTERM, (3, 3), "worker_killed", False),
            (-signal.SIGSEGV, (3, 3), "worker_crashed", True),
            (-signal.SIGBUS, (3, 4), "worker_crashed", True),
            (-99, (3, 3), "worker_crashed", True),
            (1, (3, 3), "worker_crashed", True),
        ],
    )
    def test_the_job_is_to_blame_unless_somebody_else_was(
        self, returncode: int, kills: tuple[int | None, int | None], code: str, blame: bool
    ) -> None:
        ending = ending_of(returncode, None, kills)
        assert (ending.failure.code, ending.blame) == (code, blame)

    def test_last_words_say_more_than_a_return_code(self) -> None:
        ending = ending_of(70, {"code": "gpu_error", "message": "CUDA"}, (0, 0))
        assert (ending.failure.code, ending.failure.message, ending.blame) == (
            "gpu_error",
            "CUDA",
            True,
        )

    @pytest.mark.parametrize(
        ("files", "count"),
        [
            ({"box/memory.events": "low 0\noom 2\noom_kill 2\n"}, 2),
            ({"memory/memory.oom_control": "under_oom 0\noom_kill 5\n"}, 5),
            ({"vmstat": "nr_free_pages 1\noom_kill 7\n"}, 7),
            ({"vmstat": "nr_free_pages 1\n"}, None),
        ],
    )
    def test_the_kernels_count_of_kills_is_found(
        self,
        files: dict[str, str],
        count: int | None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(endings, "PROC", tmp_path)
        monkeypatch.setattr(endings, "CGROUP", tmp_path)
        files = {"self/cgroup": "0::/box\n", **files}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        assert endings.oom_kills() == count


class TestLiveness:
    def test_a_worker_is_dead_when_its_process_is_gone(self) -> None:
        code = "from wanfit.jobs.liveness import worker_name; print(worker_name(2)); input()"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert not liveness.is_dead(name, same_host=True)
        process.kill()
        process.wait()
        assert liveness.is_dead(name, same_host=True)
        assert liveness.is_dead(name, same_host=False)
        process.communicate()

    def test_a_new_process_with_the_number_of_an_old_one_is_another(self) -> None:
        boot, namespace, pid, started, slot = liveness.worker_name().split("/")
        assert int(pid) == os.getpid()
        before = "/".join((boot, namespace, pid, str(int(started) - 1), slot))
        assert liveness.is_dead(before, same_host=False)

    def test_what_cannot_be_told_is_alive(self) -> None:
        boot, namespace, *_ = liveness.worker_name().split("/")
        other_container = f"{boot}/{int(namespace) + 1}/999999/1/0"
        assert not liveness.is_dead(other_container, same_host=True)
        other_boot = f"x/{namespace}/999999/1/0"
        assert not liveness.is_dead(other_boot, same_host=False)
        assert liveness.is_dead(other_boot, same_host=True)


class TestWire:
    def test_a_line_that_its_writer_died_in_is_left_out(self) -> None:
        whole = as_line({"kind": "ready"})
        assert list(read_lines(io.BytesIO(whole + whole[:-4]))) == [{"kind": "ready"}]

    def test_an_order_arrives_as_it_was(self) -> None:
        order = Order(
            "a.b", {"prompt": "x\n\0"}, None, "/out", Engine("cpu", weights={"demo": "/w"})
        )
        (message,) = read_lines(io.BytesIO(as_line(order.to_json())))
        assert Order.from_json(message) == order


def test_stillness_begins_anew_with_each_version() -> None:
    now_s = [0.0]
    watch = Stillness(lambda: now_s[0])
    assert not watch.is_over("a", 1, 10)
    now_s[0] = 9.0
    assert not watch.is_over("a", 2, 10)
    now_s[0] = 18.0
    assert not watch.is_over("a", 2, 10)
    now_s[0] = 19.0
    assert watch.is_over("a", 2, 10)
    watch.forget_others(["b"])
    assert not watch.is_over("a", 2, 10)
