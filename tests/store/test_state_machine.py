"""Any order of transitions, with a crash at any statement of any of them, keeps every invariant of the record."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, event

from llamalith_app.store import check, conversations, job_reads, jobs, retention, turns
from llamalith_app.store.tables import Outcome, Status
from llamalith_app.store.users import ADMIN_ID
from tests.store.conftest import NewRecord
from tests.store.samples import NOW, finish, prompt, register_worker

CONVERSATIONS = ["a", "b", "c"]
MODELS = ["m", "n"]
OPEN = (Status.QUEUED, Status.PROCESSING)


class Crash(Exception):
    """The process ends here."""


class Known(NamedTuple):
    conversation: str
    model: str
    content: str
    status: Status
    turn_id: int
    parent: int | None
    """The job that it goes on from; None: from none that is left."""
    system: str
    """The system message in force for it."""
    context: str
    may_be_given_up: bool
    """It bounds its wait, and was never claimed."""
    bounds_its_wait: bool


class Record(RuleBasedStateMachine):
    """What the record must say, kept beside it in the plainest way."""

    new_record: NewRecord

    @initialize()
    def open(self) -> None:
        self.record = type(self).new_record()
        self.engine = self.record.__enter__()
        self.statements_left: int | None = None
        event.listen(self.engine, "before_cursor_execute", self.count)
        self.jobs: dict[int, Known] = {}
        self.claims: list[jobs.Claim] = []
        self.replies: dict[int, str] = {}
        self.retries: dict[int, int] = {}
        self.to_keep: set[str] = set()
        """Leases that a cancel ended and whose attempt has not told yet what it had written."""
        self.n_submitted = 0
        self.worker = self.run(None, register_worker)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.record.__exit__(None, None, None)

    def count(self, *_: object) -> None:
        if self.statements_left is not None:
            if self.statements_left == 0:
                raise Crash
            self.statements_left -= 1

    def run(self, crash_at: int | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """None where it crashed: nothing of it may remain then."""
        with self.engine.connect() as connection:
            try:
                with connection.begin():
                    self.statements_left = crash_at
                    return function(connection, *args, **kwargs)
            except Crash:
                return None
            finally:
                self.statements_left = None

    crash = st.none() | st.integers(0, 7)

    @rule(
        conversation=st.sampled_from(CONVERSATIONS),
        model=st.sampled_from(MODELS),
        system=st.sampled_from(["", "be terse", "be kind"]),
        context=st.sampled_from(["", "so far"]),
        queue_timeout_s=st.sampled_from([None, 60.0]),
        crash_at=crash,
    )
    def submit(
        self,
        conversation: str,
        model: str,
        system: str,
        context: str,
        queue_timeout_s: float | None,
        crash_at: int | None,
    ) -> None:
        self.n_submitted += 1
        content = f"prompt {self.n_submitted}"
        accepted = self.run(
            crash_at,
            jobs.submit,
            prompt(
                content,
                conversation,
                system_prompt=system,
                context=context,
                model=model,
                max_attempts=2,
                queue_timeout_s=queue_timeout_s,
            ),
            NOW,
        )
        if accepted is not None:
            assert accepted.job_id not in self.jobs
            self.jobs[accepted.job_id] = Known(
                conversation, model, content, Status.QUEUED, queue_timeout_s is not None, queue_timeout_s is not None
            )

    @rule(model=st.sampled_from(MODELS), crash_at=crash)
    def claim(self, model: str, crash_at: int | None) -> None:
        open_jobs = [(job_id, job) for job_id, job in self.jobs.items() if job.status in OPEN]
        heads = {job.conversation: (job_id, job) for job_id, job in reversed(open_jobs)}
        due = sorted(job_id for job_id, job in heads.values() if job.status is Status.QUEUED and job.model == model)
        claim = self.run(crash_at, jobs.claim, model, 1, self.worker, NOW)
        if claim is None:
            assert crash_at is not None or not due
            return
        assert claim.job_id == due[0]
        self.set(claim.job_id, Status.PROCESSING)
        self.jobs[claim.job_id] = self.jobs[claim.job_id]._replace(may_be_given_up=False)
        self.claims.append(claim)

    @rule(data=st.data(), crash_at=crash)
    def finish(self, data: st.DataObject, crash_at: int | None) -> None:
        claim = self.any_claim(data)
        if claim is None:
            return
        reply = f"reply to {claim.job_id} by {claim.attempt}"
        holds = self.holds(claim)
        if self.run(crash_at, finish, claim, reply):
            assert holds, "a stale lease wrote a reply"
            self.set(claim.job_id, Status.DONE)
            self.replies[claim.job_id] = reply
        else:
            assert not holds or crash_at is not None

    @rule(
        data=st.data(),
        outcome=st.sampled_from([Outcome.FAILED, Outcome.LOST, Outcome.RELEASED]),
        final=st.booleans(),
        crash_at=crash,
    )
    def fail(self, data: st.DataObject, outcome: Outcome, final: bool, crash_at: int | None) -> None:
        claim = self.any_claim(data)
        if claim is None:
            return
        holds = self.holds(claim)
        status = self.run(
            crash_at,
            jobs.fail,
            claim.job_id,
            claim.lease_token,
            NOW,
            outcome=outcome,
            kind="worker_lost",
            reason="gone",
            pause=None if final else timedelta(0),
        )
        if status is None:
            assert not holds or crash_at is not None
            return
        assert holds, "a stale lease ended an attempt"
        self.set(claim.job_id, status)

    @rule(data=st.data(), crash_at=crash)
    def cancel(self, data: st.DataObject, crash_at: int | None) -> None:
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        before = self.jobs[job_id].status
        status = self.run(crash_at, jobs.cancel, ADMIN_ID, job_id, NOW)
        if status is None:
            assert crash_at is not None
            return
        assert status is (Status.CANCELLED if before in OPEN else before)
        self.set_cancelled([job_id] if before in OPEN else [])

    @rule(
        statuses=st.sets(st.sampled_from(OPEN), min_size=1), model=st.none() | st.sampled_from(MODELS), crash_at=crash
    )
    def cancel_open(self, statuses: set[Status], model: str | None, crash_at: int | None) -> None:
        ids = self.run(crash_at, jobs.cancel_open, ADMIN_ID, NOW, statuses=statuses, limit=1000, model=model)
        if ids is None:
            assert crash_at is not None
            return
        wanted = {n for n, job in self.jobs.items() if job.status in statuses and model in (None, job.model)}
        assert set(ids) == wanted
        self.set_cancelled(ids)

    @rule(data=st.data(), crash_at=crash)
    def keep_written(self, data: st.DataObject, crash_at: int | None) -> None:
        claim = self.any_claim(data)
        if claim is None:
            return
        written = jobs.Written("so far", 1, 1)
        kept = self.run(crash_at, jobs.keep_written, claim.job_id, claim.lease_token, NOW, written=written)
        assert kept is (claim.lease_token in self.to_keep) or crash_at is not None
        if kept:
            self.to_keep.remove(claim.lease_token)

    @rule(data=st.data(), crash_at=crash)
    def retry(self, data: st.DataObject, crash_at: int | None) -> None:
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        before = self.jobs[job_id]
        again = self.run(crash_at, jobs.retry, ADMIN_ID, job_id, "r", NOW)
        if again is None:
            assert crash_at is not None
        elif before.status not in jobs.RETRYABLE:
            assert again is before.status
        else:
            assert again.is_new is (job_id not in self.retries)
            if again.is_new:
                self.retries[job_id] = again.job_id
                self.jobs[again.job_id] = before._replace(status=Status.QUEUED, may_be_given_up=before.bounds_its_wait)
            assert again.job_id == self.retries[job_id]

    @rule(crash_at=crash)
    def give_up(self, crash_at: int | None) -> None:
        given_up = self.run(crash_at, jobs.expire_queued, NOW + timedelta(seconds=60), 1000)
        if given_up is None:
            assert crash_at is not None
            return
        late = {n for n, job in self.jobs.items() if job.status is Status.QUEUED and job.may_be_given_up}
        assert set(given_up) == late
        for job_id in given_up:
            self.set(job_id, Status.ERROR)

    @rule(crash_at=crash)
    def expire(self, crash_at: int | None) -> None:
        ended = {n for n, job in self.jobs.items() if job.status not in OPEN}
        n_expired = self.run(crash_at, retention.expire, NOW + timedelta(seconds=60), 1000)
        if n_expired is None:
            assert crash_at is not None
            return
        assert n_expired == len(ended)
        self.to_keep -= {claim.lease_token for claim in self.claims if claim.job_id in ended}
        for job_id in ended:
            del self.jobs[job_id]
            self.replies.pop(job_id, None)
            self.retries.pop(job_id, None)

    @rule()
    def beat(self) -> None:
        tokens = [claim.lease_token for claim in self.claims]
        self.run(None, jobs.beat, tokens)
        held = {lease.lease_token for lease in self.run(None, jobs.held, self.worker)}
        assert held == {claim.lease_token for claim in self.claims if self.holds(claim)}

    @invariant()
    def every_rule_of_the_record_holds(self) -> None:
        with self.engine.connect() as connection:
            assert check.broken(connection) == []
            for job in job_reads.newest(connection, ADMIN_ID, limit=500):
                assert job.status == self.jobs[job.id].status
                if job.status == "done":
                    assert job.result == self.replies[job.id]
            for name in CONVERSATIONS:
                self.compare(connection, name)

    @invariant()
    def a_turn_holds_nothing_later_and_nothing_unanswered(self) -> None:
        with self.engine.connect() as connection:
            for claim in filter(self.holds, self.claims):
                seen = turns.turn(connection, claim.turn_id, 10_000).messages
                job = self.jobs[claim.job_id]
                wanted: list[str] = []
                for job_id, other in self.jobs.items():
                    if other.conversation == job.conversation and job_id < claim.job_id:
                        wanted += [other.content, self.replies[job_id]] if other.status is Status.DONE else []
                said = [message.content for message in seen if message.content != "so far"]
                assert [text for text in said if not text.startswith("be ")] == [*wanted, job.content]
                assert sum(message.role == "system" for message in seen) <= 1

    def compare(self, connection: Connection, name: str) -> None:
        """Prompts in the order they were accepted in, each reply right behind its prompt."""
        wanted: list[str] = []
        for job_id, job in self.jobs.items():
            if job.conversation == name:
                wanted += [job.content, *([self.replies[job_id]] if job_id in self.replies else [])]
        told = [
            message.content
            for message in conversations.messages(connection, ADMIN_ID, name)
            if message.role != "system" and message.content != "so far"
        ]
        assert told == wanted

    def any_claim(self, data: st.DataObject) -> jobs.Claim | None:
        return data.draw(st.sampled_from(self.claims)) if self.claims else None

    def holds(self, claim: jobs.Claim) -> bool:
        """The newest claim of a job that is still processing."""
        if claim.job_id not in self.jobs:
            return False
        newest = max((other.attempt for other in self.claims if other.job_id == claim.job_id), default=0)
        return self.jobs[claim.job_id].status is Status.PROCESSING and claim.attempt == newest

    def set_cancelled(self, ids: list[int]) -> None:
        self.to_keep |= {claim.lease_token for claim in self.claims if claim.job_id in ids and self.holds(claim)}
        for job_id in ids:
            self.set(job_id, Status.CANCELLED)

    def set(self, job_id: int, status: Status) -> None:
        self.jobs[job_id] = self.jobs[job_id]._replace(status=status)


@pytest.mark.parametrize(
    ("new_record", "examples", "steps"),
    [
        pytest.param("sqlite", 20, 30, id="sqlite-quick"),
        pytest.param("postgresql", 5, 30, id="postgresql-quick"),
        pytest.param("sqlite", 300, 60, id="sqlite-long", marks=pytest.mark.slow),
        pytest.param("postgresql", 30, 50, id="postgresql-long", marks=pytest.mark.slow),
    ],
    indirect=["new_record"],
)
def test_no_order_of_transitions_and_crashes_breaks_the_record(
    new_record: NewRecord, examples: int, steps: int
) -> None:
    Record.new_record = staticmethod(new_record)
    run_state_machine_as_test(
        Record,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )
