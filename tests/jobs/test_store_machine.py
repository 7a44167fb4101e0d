"""The job store against a model of it, by steps that hypothesis chooses: on both databases.

The model is a dictionary of what each job has to be. After every step: no accepted job is missing,
a final state is what it was, a running job alone has a lease, and a result belongs to one job.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.jobs.conftest import DATABASES
from tests.jobs.postgres import Postgres
from tests.jobs.samples import REPORT, Clock, kept_by, new_job
from wanfit.errors import NoSuchJob, StaleLease
from wanfit.jobs import schema
from wanfit.jobs.attempts import MAX_DEATHS, MAX_LOSSES
from wanfit.jobs.job import FINAL_STATES, Claim, Failure, Job, Progress, State
from wanfit.jobs.store import JobStore

LEASE_S = 10.0
EXAMPLES = {"sqlite": 30, "postgres": 12}
KILLED = Failure("worker_killed", "It is gone")


@dataclass
class Model:
    """What a job has to be."""

    order: int
    priority: int
    key: str | None
    deadline: float | None  # of the monotonic clock
    state: State = "queued"
    lease: str | None = None
    beat: float = 0.0  # when it was last seen alive
    closed_by: str | None = None  # the lease that ended or returned it
    cancel: bool = False
    deleted: bool = False
    losses: int = 0
    deaths: int = 0
    attempts: int = 0
    result: str | None = None
    events: list[str] = field(default_factory=lambda: ["queued"])

    def end(self, state: State, closed_by: str | None = None) -> None:
        self.state, self.lease, self.closed_by = state, None, closed_by
        self.events.append(state)

    def lose(self, *, blame: bool, closed_by: str | None = None) -> None:
        if self.cancel:
            self.end("cancelled", closed_by)
            return
        self.losses += 1
        self.deaths += blame
        over = self.deaths >= MAX_DEATHS or self.losses >= MAX_LOSSES
        self.end("failed" if over else "queued", closed_by)


class StoreMachine(RuleBasedStateMachine):
    """`new_url` gives an empty database for each run."""

    new_url: Callable[[], str]
    ids = Bundle("ids")
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.model: dict[str, Model] = {}
        self.seen_final: dict[str, Job] = {}
        self.claimed: list[Claim] = []
        self.url = type(self).new_url()
        self.store = self.open()

    def open(self) -> JobStore:
        clock = self.clock
        return JobStore(
            self.url, lease_s=LEASE_S, wall_s=clock.wall_s, monotonic_s=clock.monotonic_s
        )

    def teardown(self) -> None:
        self.store.close()

    @rule(
        target=ids,
        priority=st.integers(-1, 1),
        key=st.none() | st.sampled_from("ab"),
        wait_s=st.none() | st.integers(1, 60),
    )
    def submit(self, priority: int, key: str | None, wait_s: int | None) -> str:
        deadline_s = None if wait_s is None else self.clock.wall + wait_s
        new = new_job(
            priority=priority, idempotency_key=key, deadline_s=deadline_s, webhook="https://x.org"
        )
        job, created = self.store.submit(new)
        holders = [
            known
            for known, model in self.model.items()
            if key is not None and model.key == key and not model.deleted
        ]
        assert created == (not holders)
        if created:
            deadline = None if wait_s is None else self.clock.monotonic + wait_s
            self.model[job.id] = Model(len(self.model), priority, key, deadline)
        else:
            assert job.id == holders[0]
        return job.id

    @rule(target=claims)
    def claim(self) -> Any:
        self.expire()
        waiting = [(m.priority, -m.order, i) for i, m in self.model.items() if m.state == "queued"]
        claim = self.store.claim("another-boot/1/1/1/0")
        if not waiting:
            assert claim is None
            return multiple()
        assert claim is not None
        assert claim.job.id == max(waiting)[2]
        model = self.model[claim.job.id]
        model.attempts += 1
        assert claim.attempt == model.attempts
        model.state, model.lease, model.beat = "running", claim.lease, self.clock.monotonic
        model.events.append("started")
        self.store.reap()  # it sees the lease from now on
        self.claimed.append(claim)
        return claim

    @rule(target=claims, claim=claims)
    def another_takes_over(self, claim: Claim) -> Any:
        """The holder is silent for too long; the next claim may be of the same job."""
        self.time_passes(seconds=int(LEASE_S))
        return self.claim()

    @rule()
    def whoever_lost_its_lease_writes_nothing(self) -> None:
        for claim in self.claimed:
            if self.holds(claim) or self.model[claim.job.id].closed_by == claim.lease:
                continue
            store, kept = self.store, kept_by(claim)
            writes: list[Callable[[], object]] = [
                partial(store.heartbeat, claim, Progress(99.0), [("notice", {})]),
                partial(store.complete, claim, kept, REPORT),
                partial(store.fail, claim, KILLED),
                partial(store.crashed, claim, KILLED, blame=True),
                partial(store.give_back, claim, "late"),
                partial(store.cancelled, claim),
            ]
            for write in writes:
                with pytest.raises(StaleLease):
                    write()

    def holds(self, claim: Claim) -> bool:
        model = self.model[claim.job.id]
        return model.state == "running" and model.lease == claim.lease

    def write(
        self, claim: Claim, write: Callable[[], Job], effect: Callable[[Model], None]
    ) -> None:
        """Accepted from the newest attempt; again from the same one; refused from every other."""
        model = self.model[claim.job.id]
        if self.holds(claim):
            write()
            effect(model)
        elif model.closed_by == claim.lease:
            if not model.deleted and model.attempts == claim.attempt:
                write()
            else:
                with pytest.raises(StaleLease):
                    write()
        else:
            with pytest.raises(StaleLease):
                write()

    @rule(claim=claims, percent=st.floats(0, 99))
    def heartbeat(self, claim: Claim, percent: float) -> None:
        if not self.holds(claim):
            with pytest.raises(StaleLease):
                self.store.heartbeat(claim, Progress(percent), [("notice", {"message": "x"})])
            return
        model = self.model[claim.job.id]
        told = self.store.heartbeat(claim, Progress(percent), [("notice", {"message": "x"})])
        assert told == model.cancel
        model.events.append("notice")
        model.beat = self.clock.monotonic
        self.store.reap()

    @rule(claim=claims)
    def complete(self, claim: Claim) -> None:

        def effect(model: Model) -> None:
            if model.cancel:
                model.end("cancelled", claim.lease)
            else:
                model.end("completed", claim.lease)
                model.result = kept_by(claim).key

        self.write(claim, lambda: self.store.complete(claim, kept_by(claim), REPORT), effect)

    @rule(claim=claims)
    def fail(self, claim: Claim) -> None:
        self.write(
            claim,
            lambda: self.store.fail(claim, KILLED),
            lambda model: model.end("failed", claim.lease),
        )

    @rule(claim=claims, blame=st.booleans())
    def crash(self, claim: Claim, blame: bool) -> None:
        self.write(
            claim,
            lambda: self.store.crashed(claim, KILLED, blame=blame),
            lambda model: model.lose(blame=blame, closed_by=claim.lease),
        )

    @rule(claim=claims)
    def give_back(self, claim: Claim) -> None:
        self.write(
            claim,
            lambda: self.store.give_back(claim, "drained"),
            lambda model: model.end("cancelled" if model.cancel else "queued", claim.lease),
        )

    @rule(job_id=ids)
    def cancel(self, job_id: str) -> None:
        model = self.model[job_id]
        if model.deleted:
            with pytest.raises(NoSuchJob):
                self.store.cancel(job_id)
            return
        self.store.cancel(job_id)
        if model.state == "queued":
            model.end("cancelled")
        elif model.state == "running":
            model.cancel = True

    @rule(job_id=ids)
    def delete(self, job_id: str) -> None:
        model = self.model[job_id]
        if model.deleted:
            with pytest.raises(NoSuchJob):
                self.store.delete(job_id)
            return
        self.store.delete(job_id)
        if model.state not in FINAL_STATES:
            model.end("cancelled")
        model.deleted = True
        model.result = None

    @rule(seconds=st.integers(0, 20))  # whole ones, which add up exactly
    def time_passes(self, seconds: float) -> None:
        self.clock.pass_s(seconds)
        self.store.reap()
        for model in self.model.values():
            if model.state == "running" and self.clock.monotonic - model.beat >= LEASE_S:
                model.lose(blame=False)
        self.expire()

    @rule(seconds=st.sampled_from([-(10**8), -3600.0, 3600.0, 10**8]))
    def the_clock_jumps(self, seconds: float) -> None:
        """And nothing follows from it, as long as the process lives."""
        self.clock.wall += seconds
        self.store.reap()

    @precondition(lambda self: not any(m.deadline is not None for m in self.model.values()))
    @rule()
    def the_server_starts_again(self) -> None:
        """It has seen no lease yet, and gives each its full time."""
        self.store.close()
        self.store = self.open()
        self.store.reap()
        for model in self.model.values():
            model.beat = self.clock.monotonic

    def expire(self) -> None:
        for model in self.model.values():
            due = model.deadline is not None and self.clock.monotonic >= model.deadline
            if due and model.state == "queued":
                model.end("expired")

    @invariant()
    def every_job_is_what_it_has_to_be(self) -> None:
        for job_id, model in self.model.items():
            if model.deleted:
                with pytest.raises(NoSuchJob):
                    self.store.get(job_id)
                continue
            job = self.store.get(job_id)
            assert (job.state, job.attempts) == (model.state, model.attempts)
            assert (None if job.result is None else job.result.key) == model.result
            assert [event.kind for event in self.store.events(job_id)] == model.events

    @invariant()
    def a_final_state_never_changes(self) -> None:
        for job_id, model in self.model.items():
            if model.state in FINAL_STATES and not model.deleted:
                job = self.store.get(job_id)
                assert self.seen_final.setdefault(job_id, job) == job

    @invariant()
    def only_a_running_job_has_a_lease(self) -> None:
        leases = {claim.job.id: claim.lease for claim in self.store.running()}
        assert leases == {i: m.lease for i, m in self.model.items() if m.state == "running"}

    @invariant()
    def a_result_belongs_to_one_job(self) -> None:
        results = [model.result for model in self.model.values() if model.result is not None]
        assert sorted(self.store.results()) == sorted(results)
        counts = self.store.counts()
        assert counts["completed"] == len(results)

    @invariant()
    def every_end_is_told_once(self) -> None:
        notices = self.notices()
        ends = {i: m.state for i, m in self.model.items() if m.state in FINAL_STATES}
        hidden = {i for i, m in self.model.items() if m.deleted}
        assert sorted(notices) == sorted((i, s) for i, s in ends.items() if i not in hidden)

    def notices(self) -> list[tuple[str, str]]:
        columns = (schema.notices.c.job_id, schema.notices.c.state)
        with self.store._database.read() as connection:
            return [(job_id, state) for job_id, state in connection.execute(sa.select(*columns))]


@pytest.mark.parametrize("kind", DATABASES)
def test_the_store_does_what_the_model_does(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    numbers = itertools.count()
    server: Postgres | None = None
    if kind == "postgres":
        server = request.getfixturevalue("postgres")

    def fresh_url() -> str:
        return server.empty_database() if server else str(tmp_path / f"{next(numbers)}.db")

    class Machine(StoreMachine):
        new_url = staticmethod(fresh_url)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES[kind],
            stateful_step_count=25,
            deadline=None,
            phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
