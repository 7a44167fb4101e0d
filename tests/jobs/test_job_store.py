"""What the job store promises, on SQLite and on Postgres alike."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.jobs.samples import REPORT, WORKER, Clock, claimed, kept_by, new_job
from wanfit.errors import BadOption, KeyReused, NoSuchJob, QueueFull, StaleLease
from wanfit.jobs.attempts import MAX_LOSSES
from wanfit.jobs.job import Claim, Failure, Job, Progress, QueueLimit, new_id
from wanfit.jobs.store import JobStore

KILLED = Failure("worker_killed", "The kernel killed it", "Ask for less")


def kinds(store: JobStore, job_id: str) -> list[str]:
    return [event.kind for event in store.events(job_id)]


class TestSubmitting:
    def test_an_accepted_job_is_there_after_the_store_is_opened_again(
        self, database_url: str, open_store: Callable[..., JobStore]
    ) -> None:
        new = new_job(
            image=b"\x89PNG\0\xff",
            priority=3,
            deadline_s=1e12,
            timeout_s=5.0,
            webhook="https://example.org/hook?a=1",
            expected_s=2.5,
            plan={"stages": []},
            extra={"seconds": "5"},
        )
        first = open_store(database_url)
        job, created = first.submit(new)
        first.close()
        again = open_store(database_url)
        assert created
        assert again.get(job.id) == job
        assert again.image(job.id) == new.image
        given = ("request", "priority", "deadline_s", "timeout_s", "webhook", "plan", "extra")
        assert {name: getattr(job, name) for name in given} == {
            name: getattr(new, name) for name in given
        }

    @pytest.mark.parametrize("prompt", ["a\0b", "\ud800", "\U0001f3a5 'a\" \\ \n", "x" * 10_000])
    def test_any_prompt_comes_back_as_it_was(self, store: JobStore, prompt: str) -> None:
        """NUL and lone surrogates too, which Postgres takes in no text column."""
        request = {"prompt": prompt, "guidance_high": 0.1 + 0.2, "seed": 2**63 - 1}
        job, _ = store.submit(new_job(request=request, idempotency_key=prompt, webhook=prompt))
        assert store.get(job.id).request == request
        assert store.get(job.id).webhook == prompt

    def test_the_same_key_is_the_same_job_for_its_owner_alone(self, store: JobStore) -> None:
        new = new_job(idempotency_key="k", body_hash="b")
        job, created = store.submit(new)
        assert created
        assert store.submit(new) == (job, False)
        other, created = store.submit(replace(new, owner="bob"))
        assert created
        assert other.id != job.id

    def test_the_same_key_with_another_body_is_refused(self, store: JobStore) -> None:
        store.submit(new_job(idempotency_key="k", body_hash="b"))
        with pytest.raises(KeyReused):
            store.submit(new_job(idempotency_key="k", body_hash="c"))
        assert store.counts()["queued"] == 1

    def test_a_retry_without_a_key_is_the_same_job_within_its_window(
        self, database_url: str, open_store: Callable[..., JobStore]
    ) -> None:
        """A first sending never is: two people may want the same clip twice."""
        clock = Clock()
        store = open_store(database_url, wall_s=clock.wall_s, monotonic_s=clock.monotonic_s)
        job, _ = store.submit(new_job(body_hash="b"))
        second, created = store.submit(new_job(body_hash="b"))
        assert created
        clock.pass_s(59)
        assert store.submit(new_job(body_hash="b", dedupe_s=60.0)) == (second, False)
        clock.pass_s(2)
        third, created = store.submit(new_job(body_hash="b", dedupe_s=60.0))
        assert created
        assert len({job.id, second.id, third.id}) == 3

    def test_an_id_that_a_face_brings_is_the_same_job_each_time(self, store: JobStore) -> None:
        job, _ = store.submit(new_job(id="abc-u1", body_hash="b"))
        assert job.id == "abc-u1"
        assert store.submit(new_job(id="abc-u1", body_hash="b")) == (job, False)
        with pytest.raises(KeyReused):
            store.submit(new_job(id="abc-u1", body_hash="c"))
        with pytest.raises(KeyReused):
            store.submit(new_job(id="abc-u1", owner="bob"))
        store.delete("abc-u1")
        with pytest.raises(KeyReused):
            store.submit(new_job(id="abc-u1", body_hash="b"))

    @pytest.mark.parametrize("bad", ["", "../x", "a/b", "a" * 81, "a\n", "\u00e4", "a.b"])
    def test_an_id_that_is_no_name_of_a_file_is_refused(self, store: JobStore, bad: str) -> None:
        with pytest.raises(BadOption):
            store.submit(new_job(id=bad))

    def test_limits_hold_for_the_queue_and_for_each_owner(self, store: JobStore) -> None:
        limit = QueueLimit(queued=3, queued_by_owner=2)
        first, _ = store.submit(new_job(idempotency_key="k"), limit)
        store.submit(new_job(), limit)
        with pytest.raises(QueueFull):
            store.submit(new_job(), limit)
        store.submit(new_job(owner="bob"), limit)
        with pytest.raises(QueueFull):
            store.submit(new_job(owner="cid"), limit)
        assert store.submit(new_job(idempotency_key="k"), limit) == (first, False)  # no new one
        claimed(store)
        store.submit(new_job(owner="cid"), limit)

    def test_a_limit_holds_when_many_come_at_once(self, store: JobStore) -> None:
        accepted, refused = [], []

        def send() -> None:
            try:
                accepted.append(store.submit(new_job(), QueueLimit(queued=5)))
            except QueueFull as error:
                refused.append(error)

        threads = [threading.Thread(target=send) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(accepted), len(refused)) == (5, 11)

    def test_one_key_sent_many_times_at_once_is_one_job(self, store: JobStore) -> None:
        answers = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(store.submit(new_job(idempotency_key="k")))
            )
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({job.id for job, _ in answers}) == 1
        assert sum(created for _, created in answers) == 1

    def test_the_cache_answers_its_owner_with_the_files_of_an_earlier_job(
        self, store: JobStore
    ) -> None:
        """Only once that is completed, and while its files are there."""
        new = new_job(cache_key="same clip", webhook="https://example.org")
        first, _ = store.submit(new)
        claim = claimed(store)
        store.complete(claim, kept_by(claim), REPORT)
        hit, created = store.submit(new)
        assert created
        assert (hit.state, hit.cached, hit.percent) == ("completed", True, 100.0)
        assert hit.result == store.get(first.id).result == kept_by(claim)
        assert {notice.job_id for notice in store.due_notices()} == {first.id, hit.id}
        assert store.submit(replace(new, owner="bob"))[0].state == "queued"
        assert store.submit(new_job())[0].state == "queued"
        store.delete(first.id)
        assert store.is_result(kept_by(claim).key)  # the second job has the files still
        store.note_outputs([kept_by(claim).key], gone=True)
        assert store.submit(new)[0].state == "queued"
        assert store.get(hit.id).output_gone


class TestClaiming:
    def test_priority_first_then_the_order_of_acceptance(self, store: JobStore) -> None:
        ids = [store.submit(new_job(priority=priority))[0].id for priority in (0, 5, 0, 5)]
        order = [claimed(store).job.id for _ in ids]
        assert order == [ids[1], ids[3], ids[0], ids[2]]
        assert store.claim(WORKER) is None

    def test_no_job_goes_to_two_workers(self, store: JobStore) -> None:
        ids = {store.submit(new_job())[0].id for _ in range(12)}
        taken: list[str] = []

        def work() -> None:
            while (claim := store.claim(WORKER)) is not None:
                taken.append(claim.job.id)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == sorted(ids)

    def test_progress_is_seen_and_told_in_order(self, store: JobStore) -> None:
        job, _ = store.submit(new_job())
        claim = claimed(store)
        stage = ("stage", {"stage": "denoise", "steps": 4})
        step = ("step", {"stage": "denoise", "step": 1, "steps": 4})
        assert not store.heartbeat(claim, Progress(10.5, "denoise", 1, 4), [stage, step])  # type: ignore[list-item]
        now = store.get(job.id)
        assert (now.percent, now.stage, now.step, now.steps) == (10.5, "denoise", 1, 4)
        events = store.events(job.id)
        assert [event.seq for event in events] == [1, 2, 3, 4]
        assert kinds(store, job.id) == ["queued", "started", "stage", "step"]
        assert events[3].data == step[1]
        assert store.events(job.id, after=3) == events[3:]

    def test_only_the_newest_preview_is_kept(self, store: JobStore) -> None:
        """And its number is never used again, so a reader who comes back misses nothing."""
        job, _ = store.submit(new_job())
        claim = claimed(store)
        for text in ("a", "b", "c"):
            store.heartbeat(claim, Progress(1.0), [("preview", {"base64": text})])
        events = store.events(job.id)
        assert [event.seq for event in events] == [1, 2, 5]
        assert events[-1].data == {"base64": "c"}

    def test_a_completed_job_has_its_result_report_and_notice(self, store: JobStore) -> None:
        job, _ = store.submit(new_job(webhook="https://example.org/hook"))
        claim = claimed(store)
        done = store.complete(claim, kept_by(claim), REPORT)
        assert done == store.get(job.id)
        assert (done.state, done.percent, done.result) == ("completed", 100.0, kept_by(claim))
        assert done.report == REPORT
        assert store.running() == []
        (notice,) = store.due_notices()
        assert (notice.job_id, notice.state, notice.url) == (job.id, "completed", done.webhook)
        assert store.results() == {kept_by(claim).key: False}


class TestFencing:
    def test_an_attempt_whose_job_went_to_another_writes_nothing(self, store: JobStore) -> None:
        job, _ = store.submit(new_job())
        stale = claimed(store)
        store.crashed(stale, KILLED, blame=False)
        newer = claimed(store)
        assert (newer.job.id, newer.attempt) == (job.id, 2)
        writes: list[Callable[[], object]] = [
            lambda: store.complete(stale, kept_by(stale), REPORT),
            lambda: store.fail(stale, KILLED),
            lambda: store.crashed(stale, KILLED, blame=True),
            lambda: store.give_back(stale, "drained"),
            lambda: store.cancelled(stale),
            lambda: store.heartbeat(stale, Progress(50.0), [("notice", {})]),
        ]
        before = store.get(job.id), store.events(job.id)
        for write in writes:
            with pytest.raises(StaleLease):
                write()
        assert (store.get(job.id), store.events(job.id)) == before
        done = store.complete(newer, kept_by(newer), REPORT)
        for write in writes:
            with pytest.raises(StaleLease):
                write()
        assert store.get(job.id) == done

    def test_a_reaped_attempt_is_refused_though_nobody_took_its_job_yet(
        self, database_url: str, open_store: Callable[..., JobStore]
    ) -> None:
        clock = Clock()
        store = open_store(database_url, lease_s=10, monotonic_s=clock.monotonic_s)
        job, _ = store.submit(new_job())
        claim = claimed(store)
        store.reap()
        clock.pass_s(11)
        assert [reaped.id for reaped in store.reap()] == [job.id]
        with pytest.raises(StaleLease):
            store.complete(claim, kept_by(claim), REPORT)
        assert store.get(job.id).state == "queued"

    def test_a_write_whose_answer_was_lost_may_be_made_again(self, store: JobStore) -> None:
        store.submit(new_job(webhook="https://example.org"))
        claim = claimed(store)
        done = store.complete(claim, kept_by(claim), REPORT)
        assert store.complete(claim, kept_by(claim), REPORT) == done
        assert kinds(store, done.id).count("completed") == 1
        assert len(store.due_notices()) == 1


class TestLosing:
    def test_the_second_death_of_its_worker_fails_a_job_with_its_plan(
        self, store: JobStore
    ) -> None:
        plan = {"host_peak_bytes": 10**9}
        bad, _ = store.submit(new_job(plan=plan))
        good, _ = store.submit(new_job())
        assert store.crashed(claimed(store), KILLED, blame=True).state == "queued"
        again = claimed(store)
        assert (again.job.id, again.attempt) == (bad.id, 2)
        failed = store.crashed(again, KILLED, blame=True)
        assert failed.state == "failed"
        assert failed.error is not None
        assert failed.error.code == "worker_killed"
        assert "2 times" in failed.error.message
        assert failed.error.plan == plan
        assert claimed(store).job.id == good.id  # the queue goes on

    def test_a_job_that_is_not_to_blame_has_more_attempts_but_not_endless_ones(
        self, store: JobStore
    ) -> None:
        job, _ = store.submit(new_job())
        for _ in range(MAX_LOSSES - 1):
            assert store.crashed(claimed(store), KILLED, blame=False).state == "queued"
        failed = store.crashed(claimed(store), KILLED, blame=False)
        assert failed.state == "failed"
        assert failed.error is not None
        assert failed.error.code == "attempts_exhausted"
        assert store.claim(WORKER) is None
        assert job.id == failed.id

    def test_giving_back_counts_for_nothing_and_keeps_the_place(self, store: JobStore) -> None:
        job, _ = store.submit(new_job())
        store.submit(new_job())
        for _ in range(2 * MAX_LOSSES):
            claim = claimed(store)
            assert claim.job.id == job.id
            store.give_back(claim, "drained")
        assert store.get(job.id).state == "queued"
        assert store.get(job.id).attempts == 2 * MAX_LOSSES

    def test_a_cancelled_job_does_not_run_again_when_its_worker_is_lost(
        self, store: JobStore
    ) -> None:
        ways: list[Callable[[Claim], Job]] = [
            lambda claim: store.crashed(claim, KILLED, blame=False),
            lambda claim: store.give_back(claim, "drained"),
        ]
        for lose in ways:
            job, _ = store.submit(new_job())
            claim = claimed(store)
            store.cancel(job.id)
            lose(claim)
            assert store.get(job.id).state == "cancelled"


class TestCancelling:
    def test_a_waiting_job_is_cancelled_at_once(self, store: JobStore) -> None:
        job, _ = store.submit(new_job(webhook="https://example.org"))
        assert store.cancel(job.id).state == "cancelled"
        assert store.claim(WORKER) is None
        assert [notice.state for notice in store.due_notices()] == ["cancelled"]

    def test_a_running_job_hears_it_by_its_heartbeat(self, store: JobStore) -> None:
        job, _ = store.submit(new_job())
        claim = claimed(store)
        assert not store.heartbeat(claim)
        assert store.cancel(job.id).state == "running"
        assert store.heartbeat(claim)
        assert store.cancelled(claim).state == "cancelled"

    def test_who_was_told_that_it_is_cancelled_sees_no_result(self, store: JobStore) -> None:
        """The clip was finished in the same moment."""
        job, _ = store.submit(new_job())
        claim = claimed(store)
        store.cancel(job.id)
        ended = store.complete(claim, kept_by(claim), REPORT)
        assert (ended.state, ended.result) == ("cancelled", None)
        assert store.results() == {}

    def test_a_final_state_stays(self, store: JobStore) -> None:
        job, _ = store.submit(new_job())
        claim = claimed(store)
        done = store.complete(claim, kept_by(claim), REPORT)
        assert store.cancel(job.id) == done

    def test_a_deleted_job_is_gone_for_everybody_and_its_words_are_erased(
        self, store: JobStore
    ) -> None:
        job, _ = store.submit(new_job(image=b"png", webhook="https://example.org"))
        claim = claimed(store)
        assert store.delete(job.id).state == "running"
        for read in (store.get, store.cancel, store.delete):
            with pytest.raises(NoSuchJob):
                read(job.id)
        with pytest.raises(StaleLease):
            store.heartbeat(claim)
        with pytest.raises(StaleLease):
            store.complete(claim, kept_by(claim), REPORT)
        assert store.image(job.id) is None
        assert store.events(job.id) == []
        assert store.due_notices() == []
        assert sum(store.counts().values()) == 0
        assert store.claim(WORKER) is None


class TestReading:
    def test_an_owner_sees_only_what_is_his(self, store: JobStore) -> None:
        job, _ = store.submit(new_job())
        assert store.get(job.id, "ann") == job
        for read in (store.get, store.cancel, store.delete):
            with pytest.raises(NoSuchJob):
                read(job.id, "bob")
        assert store.page("bob").jobs == ()
        with pytest.raises(NoSuchJob):
            store.page("bob", after=job.id)
        assert store.counts("ann")["queued"] == 1
        assert store.counts("bob")["queued"] == 0

    def test_pages_show_every_job_once_whatever_comes_and_goes_meanwhile(
        self, store: JobStore
    ) -> None:
        ids = [store.submit(new_job())[0].id for _ in range(7)]
        seen: list[str] = []
        after = None
        while True:
            page = store.page("ann", after=after, limit=3)
            seen += [job.id for job in page.jobs]
            if not page.has_more:
                break
            after = page.jobs[-1].id
            store.submit(new_job())  # newer ones come first, and do not move the rest
            store.delete(after)  # even the one that marks the place
        assert seen == ids[::-1]
        assert [job.id for job in store.page("ann", order="asc", limit=2).jobs] == [ids[0], ids[2]]

    def test_the_outlook_adds_up_what_is_before_a_job(
        self, database_url: str, open_store: Callable[..., JobStore]
    ) -> None:
        clock = Clock()
        store = open_store(database_url, wall_s=clock.wall_s, monotonic_s=clock.monotonic_s)
        running, _ = store.submit(new_job(expected_s=100.0))
        store.heartbeat(claimed(store), Progress(40.0, "denoise"))
        first, second, urgent = (
            store.submit(new_job(expected_s=seconds, priority=priority))[0]
            for seconds, priority in ((10.0, 0), (20.0, 0), (5.0, 1))
        )
        now_s = clock.wall
        assert store.outlook(store.get(running.id)).ends_s == pytest.approx(now_s + 60)
        looks = [store.outlook(store.get(job.id)) for job in (urgent, first, second)]
        assert [look.position for look in looks] == [0, 1, 2]
        starts = [look.starts_s and look.starts_s - now_s for look in looks]
        ends = [look.ends_s and look.ends_s - now_s for look in looks]
        assert starts == pytest.approx([60, 65, 75])
        assert ends == pytest.approx([65, 75, 95])
        assert store.outlook(second, workers=2).starts_s == pytest.approx(now_s + 37.5)

    def test_the_outlook_learns_how_long_jobs_really_take(
        self, database_url: str, open_store: Callable[..., JobStore]
    ) -> None:
        clock = Clock()
        store = open_store(database_url, wall_s=clock.wall_s, monotonic_s=clock.monotonic_s)
        for _ in range(3):
            store.submit(new_job(expected_s=10.0))
            claim = claimed(store)
            clock.pass_s(20)
            store.complete(claim, kept_by(claim), REPORT)
        job, _ = store.submit(new_job(expected_s=10.0))
        assert store.outlook(job).ends_s == pytest.approx(clock.wall + 20)

    def test_ids_sort_by_the_time_they_were_drawn(self) -> None:
        ids = [new_id() for _ in range(100)]
        assert len(set(ids)) == 100
        times = [drawn[:12] for drawn in ids]
        assert times == sorted(times)

    def test_a_listener_hears_of_every_change_after_its_commit(self, store: JobStore) -> None:
        heard: list[tuple[str, str]] = []
        forget = store.listen(lambda job_id: heard.append((job_id, store.get(job_id).state)))
        job, _ = store.submit(new_job())
        claim = claimed(store)
        store.heartbeat(claim, Progress(1.0))
        store.complete(claim, kept_by(claim), REPORT)
        forget()
        store.submit(new_job())
        assert heard == [(job.id, state) for state in ("queued", "running", "running", "completed")]


class TestOutbox:
    def finished(self, store: JobStore) -> str:
        job, _ = store.submit(new_job(webhook="https://example.org"))
        return store.cancel(job.id).id

    def test_a_notice_is_sent_once_and_held_back_from_others_meanwhile(
        self, database_url: str, open_store: Callable[..., JobStore]
    ) -> None:
        clock = Clock()
        store = open_store(database_url, monotonic_s=clock.monotonic_s)
        other = open_store(database_url, monotonic_s=clock.monotonic_s)
        self.finished(store)
        (notice,) = store.due_notices(hold_s=60)
        assert other.due_notices() == []
        assert store.due_notices() == []
        clock.pass_s(61)  # whoever took it died
        (again,) = other.due_notices(hold_s=60)
        assert (again.id, again.attempts) == (notice.id, 2)
        other.notice_sent(again)
        clock.pass_s(1000)
        assert store.due_notices() == other.due_notices() == []

    def test_a_failed_notice_comes_again_when_its_wait_is_over_until_it_is_given_up(
        self, database_url: str, open_store: Callable[..., JobStore]
    ) -> None:
        """Seconds that passed count, and no jump of the clock."""
        clock = Clock()
        store = open_store(database_url, wall_s=clock.wall_s, monotonic_s=clock.monotonic_s)
        self.finished(store)
        (notice,) = store.due_notices()
        store.notice_failed(notice, "refused \0", retry_in_s=30)
        assert store.due_notices() == []
        clock.wall += 10**6
        assert store.due_notices() == []
        clock.wall -= 2 * 10**6
        clock.pass_s(31)
        (again,) = store.due_notices()
        store.notice_failed(again, "refused", retry_in_s=None)
        clock.pass_s(10**6)
        assert store.due_notices() == []
