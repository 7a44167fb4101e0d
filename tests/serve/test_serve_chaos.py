"""Nothing that was accepted is lost, whatever dies: the short form of benchmarks/serve/chaos.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serve.chaos import Wanted, growth, run


def test_every_accepted_job_ends_once_in_a_clip_that_plays(tmp_path: Path) -> None:
    """Two kills of the GPU process and one of the server, at random moments among 30 jobs.

    The run itself looks at every reply, clip, row, event and file; here is what it found wrong.
    """
    wanted = Wanted(jobs=30, clients=10, gpu_kills=2, server_kills=1, calm=0, seed=1)
    said: list[str] = []
    found = run(wanted, tmp_path, said.append)
    assert found.wrong == []
    assert len(found.accepted) == found.clips == 30
    assert (found.gpu_kills, found.server_kills) == (2, 1)
    assert found.lost_replies > 0


@pytest.mark.parametrize(("late", "expected"), [(100, 0.0), (120, 0.2)])
def test_growth_is_of_the_last_quarter_against_the_second(late: int, expected: float) -> None:
    samples = [(clips, 300 if clips < 20 else 100 if clips < 75 else late) for clips in range(101)]
    before, after = growth(samples)
    assert after / before - 1 == pytest.approx(expected)
