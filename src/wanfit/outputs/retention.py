"""Which clips have to go: too old, too many, or the disk too full; the oldest first."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from wanfit.outputs.store import Retention, Stored


def too_old(
    stored: Iterable[Stored], now_s: float, rules: Retention, keep: Container[str]
) -> Iterator[Stored]:
    """Clips past their age, but for those of the jobs in `keep`."""
    if rules.max_age_s is not None:
        for clip in stored:
            if _may_go(clip, now_s, rules, keep) and now_s - clip.kept_s > rules.max_age_s:
                yield clip


def too_much(
    stored: Iterable[Stored], now_s: float, rules: Retention, keep: Container[str], over_bytes: int
) -> Iterator[Stored]:
    """The oldest clips that together have at least `over_bytes`, or all that may go."""
    for clip in sorted(stored, key=lambda clip: clip.kept_s):
        if over_bytes <= 0:
            return
        if _may_go(clip, now_s, rules, keep):
            over_bytes -= clip.num_bytes
            yield clip


def _may_go(clip: Stored, now_s: float, rules: Retention, keep: Container[str]) -> bool:
    """Not while its job runs or it is young; a clock that was set back makes a clip young."""
    return clip.job_id not in keep and now_s - clip.kept_s >= rules.min_age_s
