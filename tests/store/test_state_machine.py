"""Every order of transitions, with a crash at any statement, keeps every invariant of the record."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import msgspec
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
from sqlalchemy import Connection, event, select

from llamalith_app.contracts.conversations import Message
from llamalith_app.errors import JobOpen
from llamalith_app.store import check, conversations, retention, tree, turns
from llamalith_app.store.jobs import leases, reads, submission, transitions
from llamalith_app.store.tables import JobRow, Outcome, Status
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
    may_be_given_up: bool
    """It has a queue_timeout_s and was never claimed."""
    bounds_its_wait: bool
    turn_id: int
    system_prompt: str
    """As sent with it."""
    context: str


class KnownTurn(NamedTuple):
    """Kept after its job is gone: later turns still continue it."""

    conversation: str
    job_id: int
    """0: none, it begins a fork."""
    parent_id: int | None
    in_force: str
    """The system message; empty: none."""


class Record(RuleBasedStateMachine):
    """The expected content of the record, in the simplest form."""

    new_record: NewRecord

    @initialize()
    def open(self) -> None:
        self.record = type(self).new_record()
        self.engine = self.record.__enter__()
        self.statements_left: int | None = None
        event.listen(self.engine, "before_cursor_execute", self.count)
        self.jobs: dict[int, Known] = {}
        self.turns: dict[int, KnownTurn] = {}
        self.heads: dict[str, int] = {}
        self.deleted: set[int] = set()
        """The turns that were deleted alone."""
        self.claims: list[transitions.Claim] = []
        self.read: dict[str, turns.ReplyTo] = {}
        """What each attempt has read, by its lease."""
        self.replies: dict[int, str] = {}
        self.retries: dict[int, int] = {}
        self.to_keep: set[str] = set()
        """Leases that a cancel ended and whose attempt has not stored its partial reply yet."""
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
        """None where it crashed: none of its writes may remain then."""
        with self.engine.connect() as connection:
            try:
                with connection.begin():
                    self.statements_left = crash_at
                    return function(connection, *args, **kwargs)
            except Crash:
                return None
            finally:
                self.statements_left = None

    crash = st.none() | st.integers(0, 9)

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
        new = self.prompt(conversation, model, system, context, queue_timeout_s)
        accepted = self.run(crash_at, submission.submit, new, NOW)
        self.know(accepted, new, self.heads.get(conversation))

    def prompt(
        self, conversation: str | None, model: str, system: str, context: str, queue_timeout_s: float | None = None
    ) -> submission.NewJob:
        self.n_submitted += 1
        return prompt(
            f"prompt {self.n_submitted}",
            conversation,
            system_prompt=system,
            context=context,
            model=model,
            max_attempts=2,
            queue_timeout_s=queue_timeout_s,
        )

    def know(
        self,
        accepted: submission.Accepted | None,
        new: submission.NewJob,
        parent_id: int | None,
        system_prompt: str | None = None,
    ) -> None:
        """The job that was made after that turn; None: none was made. `system_prompt`: instead of the request's."""
        if accepted is None:
            return
        job_id, turn_id = accepted.job_id, accepted.turn_id
        assert job_id is not None
        assert turn_id is not None
        assert job_id not in self.jobs
        bounds_its_wait = new.request.queue_timeout_s is not None
        system_prompt = (new.request.system_prompt or "") if system_prompt is None else system_prompt
        self.jobs[job_id] = Known(
            accepted.conversation_id,
            accepted.model,
            new.inputs[-1].content,
            Status.QUEUED,
            bounds_its_wait,
            bounds_its_wait,
            turn_id,
            system_prompt,
            new.inputs[0].content if len(new.inputs) > 1 else "",
        )
        before = "" if parent_id is None else self.turns[parent_id].in_force
        self.turns[turn_id] = KnownTurn(accepted.conversation_id, job_id, parent_id, system_prompt or before)
        self.heads[accepted.conversation_id] = turn_id

    @rule(data=st.data(), system=st.sampled_from(["", "be terse"]), crash_at=crash)
    def submit_behind(self, data: st.DataObject, system: str, crash_at: int | None) -> None:
        if not self.heads:
            return
        conversation = data.draw(st.sampled_from(sorted(self.heads)))
        parent = data.draw(st.sampled_from([tree.ROOT, *self.held(conversation)]))
        new = self.prompt(conversation, "m", system, "")
        new = new._replace(request=msgspec.structs.replace(new.request, parent=parent))
        accepted = self.run(crash_at, submission.submit, new, NOW)
        assert accepted is not None or crash_at is not None
        self.know(accepted, new, parent or None)

    def held(self, conversation: str) -> list[int]:
        """Turns with a job: its own, and those of others on the path to its head."""
        path = self.path(self.heads[conversation])
        turns_with_jobs = {job.turn_id for job in self.jobs.values()}
        return sorted(n for n in turns_with_jobs if self.turns[n].conversation == conversation or n in path)

    @rule(data=st.data(), system=st.sampled_from(["", "be terse"]), crash_at=crash)
    def submit_sibling(self, data: st.DataObject, system: str, crash_at: int | None) -> None:
        if not self.jobs:
            return
        beside = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))].turn_id
        new = self.prompt(None, "m", system, "")
        accepted = self.run(crash_at, submission.submit_sibling, new, beside, NOW)
        assert accepted is not None or crash_at is not None
        self.know(accepted, new, self.turns[beside].parent_id, system or self.turns[beside].in_force)

    @rule(
        data=st.data(),
        conversation=st.sampled_from(CONVERSATIONS),
        is_beside=st.booleans(),
        system=st.sampled_from(["", "be terse"]),
        models=st.permutations(MODELS),
        crash_at=st.none() | st.integers(0, 19),
    )
    def submit_compared(
        self,
        data: st.DataObject,
        conversation: str,
        is_beside: bool,
        system: str,
        models: list[str],
        crash_at: int | None,
    ) -> None:
        """All or none, whatever statement it crashes at: the invariants count the jobs."""
        beside = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))].turn_id if is_beside and self.jobs else None
        new = self.prompt(conversation if beside is None else None, MODELS[0], system, "")
        several = [new._replace(request=msgspec.structs.replace(new.request, model=model)) for model in models]
        accepted = self.run(crash_at, submission.submit_compared, several, beside, NOW)
        if accepted is None:
            assert crash_at is not None
            return
        assert [one.model for one in accepted] == [one.request.model for one in several]
        parent_id = self.heads.get(conversation) if beside is None else self.turns[beside].parent_id
        in_force = None if beside is None else system or self.turns[beside].in_force
        for one in accepted:
            self.know(one, new, parent_id, in_force)
            in_force = self.turns[accepted[0].turn_id].in_force
        self.heads[accepted[0].conversation_id] = accepted[0].turn_id

    @rule(data=st.data(), crash_at=crash)
    def fork(self, data: st.DataObject, crash_at: int | None) -> None:
        if not self.heads:
            return
        origin = data.draw(st.sampled_from(sorted(self.heads)))
        held = self.held(origin)
        if not held:
            return
        behind = data.draw(st.sampled_from(held))
        self.n_submitted += 1
        name = f"fork {self.n_submitted}"
        on_path = [self.jobs.get(self.turns[turn_id].job_id) for turn_id in self.path(behind)]
        may_fork = all(job is None or job.status not in OPEN for job in on_path)
        try:
            fork = self.run(crash_at, submission.fork, ADMIN_ID, origin, behind, name, NOW)
        except JobOpen:
            assert not may_fork
            return
        if fork is None:
            assert crash_at is not None
            return
        assert may_fork
        self.turns[fork.head_turn_id] = KnownTurn(name, 0, behind, self.turns[behind].in_force)
        self.heads[name] = fork.head_turn_id

    @rule(data=st.data(), crash_at=crash)
    def select_branch(self, data: st.DataObject, crash_at: int | None) -> None:
        if not self.heads:
            return
        conversation = data.draw(st.sampled_from(sorted(self.heads)))
        held = self.held(conversation)
        if not held:
            return
        turn_id = data.draw(st.sampled_from(held))
        head = self.run(crash_at, tree.select_branch, ADMIN_ID, conversation, turn_id)
        if head is None:
            assert crash_at is not None
            return
        assert turn_id in self.path(head)
        assert self.turns[head].conversation == conversation
        assert not any(self.turns[n].parent_id == head for n in held if self.turns[n].conversation == conversation)
        self.heads[conversation] = head

    @rule(data=st.data(), crash_at=crash)
    def delete_turn(self, data: st.DataObject, crash_at: int | None) -> None:
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[job_id]
        try:
            head = self.run(crash_at, retention.delete_turn, ADMIN_ID, job.conversation, job.turn_id)
        except JobOpen:
            assert job.status in OPEN
            return
        if head is None:
            assert crash_at is not None
            return
        assert job.status not in OPEN
        self.forget({job_id})
        self.deleted.add(job.turn_id)
        if self.heads[job.conversation] != job.turn_id:
            assert head == self.heads[job.conversation]
        elif head == job.turn_id:
            assert not any(one.conversation == job.conversation for one in self.jobs.values())
            self.turns[head] = self.turns[head]._replace(in_force="")
        assert self.turns[head].conversation == job.conversation
        self.heads[job.conversation] = head

    def forget(self, ended: set[int]) -> None:
        """These jobs are gone."""
        self.to_keep -= {claim.lease_token for claim in self.claims if claim.job_id in ended}
        for job_id in ended:
            del self.jobs[job_id]
            self.replies.pop(job_id, None)
        self.retries = {old: new for old, new in self.retries.items() if not {old, new} & ended}

    @rule(data=st.data(), crash_at=crash)
    def edit_prompt(self, data: st.DataObject, crash_at: int | None) -> None:
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[job_id]
        self.n_submitted += 1
        content = f"edited {self.n_submitted}"
        edited = self.run(crash_at, transitions.edit_prompt, ADMIN_ID, job_id, content)
        if edited is None:
            assert crash_at is not None
            return
        assert edited is (job.status is Status.QUEUED and job_id not in {claim.job_id for claim in self.claims})
        if edited:
            self.jobs[job_id] = job._replace(content=content)

    def path(self, turn_id: int | None) -> list[int]:
        """From the root to this turn."""
        found: list[int] = []
        while turn_id is not None:
            found.insert(0, turn_id)
            turn_id = self.turns[turn_id].parent_id
        return found

    def is_read(self, turn_id: int) -> list[tuple[str, str]]:
        """The messages that a job after that turn reads."""
        in_force = self.turns[turn_id].in_force
        return [*([("system", in_force)] if in_force else []), *self.texts(turn_id, answered=True)]

    def texts(self, turn_id: int | None, *, answered: bool) -> list[tuple[str, str]]:
        """The texts without system messages, of all turns of the path or of those with a reply."""
        found = []
        for job_id in (self.turns[one].job_id for one in self.path(turn_id)):
            job = self.jobs.get(job_id)
            if job is None or (answered and job.status is not Status.DONE):
                continue
            found += [("assistant", job.context)] if job.context else []
            found += [("user", job.content)]
            found += [("assistant", self.replies[job_id])] if job_id in self.replies else []
        return found

    @rule(data=st.data())
    def longest_stored_prefix(self, data: st.DataObject) -> None:
        """A caller that sends a whole history continues its path."""
        done = [job.turn_id for job in self.jobs.values() if job.status is Status.DONE]
        if not done:
            return
        turn_id = data.draw(st.sampled_from(sorted(done)))
        read = self.is_read(turn_id)
        history = [Message(role=role, content=content) for role, content in [*read, ("user", "and now?")]]
        found = self.run(None, turns.longest_stored_prefix, ADMIN_ID, history)
        if self.deleted & set(self.path(turn_id)):
            # Its digest may count a turn that is gone: then a shorter one is found, and never a wrong one.
            assert found is None or self.is_read(found.turn_id) == read[: found.n_messages]
            return
        assert found is not None
        assert found.n_messages == len(read)
        assert self.is_read(found.turn_id) == read
        assert self.run(None, turns.longest_stored_prefix, ADMIN_ID + 1, history) is None
        history[0] = Message(role="user", content="another beginning")
        assert self.run(None, turns.longest_stored_prefix, ADMIN_ID, history) is None

    @rule(model=st.sampled_from(MODELS), crash_at=crash)
    def claim(self, model: str, crash_at: int | None) -> None:
        open_jobs = [(job_id, job) for job_id, job in self.jobs.items() if job.status in OPEN]
        first_ones = {job.conversation: (job_id, job) for job_id, job in reversed(open_jobs)}
        due = sorted(
            job_id for job_id, job in first_ones.values() if job.status is Status.QUEUED and job.model == model
        )
        claim = self.run(crash_at, transitions.claim, model, 1, self.worker, NOW)
        if claim is None:
            assert crash_at is not None or not due
            return
        assert claim.job_id == due[0]
        self.set(claim.job_id, Status.PROCESSING)
        self.jobs[claim.job_id] = self.jobs[claim.job_id]._replace(may_be_given_up=False)
        self.claims.append(claim)
        self.read[claim.lease_token] = self.run(None, turns.read_turn, claim.turn_id, 10_000).reply_to

    @rule(data=st.data(), crash_at=crash)
    def finish(self, data: st.DataObject, crash_at: int | None) -> None:
        claim = self.any_claim(data)
        if claim is None:
            return
        reply = f"reply to {claim.job_id} by {claim.attempt}"
        holds = self.holds(claim)
        if self.run(crash_at, finish, claim, reply, reply_to=self.read[claim.lease_token]):
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
            transitions.fail,
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
        status = self.run(crash_at, transitions.cancel, ADMIN_ID, job_id, NOW)
        if status is None:
            assert crash_at is not None
            return
        assert status is (Status.CANCELLED if before in OPEN else before)
        self.set_cancelled([job_id] if before in OPEN else [])

    @rule(
        statuses=st.sets(st.sampled_from(OPEN), min_size=1), model=st.none() | st.sampled_from(MODELS), crash_at=crash
    )
    def cancel_open(self, statuses: set[Status], model: str | None, crash_at: int | None) -> None:
        ids = self.run(crash_at, transitions.cancel_open, ADMIN_ID, NOW, statuses=statuses, limit=1000, model=model)
        if ids is None:
            assert crash_at is not None
            return
        wanted = {n for n, job in self.jobs.items() if job.status in statuses and model in (None, job.model)}
        assert set(ids) == wanted
        self.set_cancelled(ids)

    @rule(data=st.data(), crash_at=crash)
    def store_partial(self, data: st.DataObject, crash_at: int | None) -> None:
        claim = self.any_claim(data)
        if claim is None:
            return
        written = transitions.PartialReply("so far", 1, 1)
        kept = self.run(crash_at, transitions.store_partial, claim.job_id, claim.lease_token, NOW, written=written)
        assert kept is (claim.lease_token in self.to_keep) or crash_at is not None
        if kept:
            self.to_keep.remove(claim.lease_token)

    @rule(data=st.data(), crash_at=crash)
    def retry(self, data: st.DataObject, crash_at: int | None) -> None:
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        before = self.jobs[job_id]
        again = self.run(crash_at, submission.retry, ADMIN_ID, job_id, "r", NOW)
        if again is None:
            assert crash_at is not None
        elif before.status not in submission.RETRYABLE:
            assert again is before.status
        else:
            assert again.is_new is (job_id not in self.retries)
            if again.is_new:
                self.retries[job_id] = again.job_id
                self.know_retry(again.job_id, before)
            assert again.job_id == self.retries[job_id]

    def know_retry(self, job_id: int, before: Known) -> None:
        with self.engine.connect() as connection:
            turn_id = connection.execute(select(JobRow.turn_id).where(JobRow.id == job_id)).scalar_one()
        self.jobs[job_id] = before._replace(
            status=Status.QUEUED, may_be_given_up=before.bounds_its_wait, turn_id=turn_id
        )
        parent_id = self.heads[before.conversation]
        in_force = before.system_prompt or self.turns[parent_id].in_force
        self.turns[turn_id] = KnownTurn(before.conversation, job_id, parent_id, in_force)
        self.heads[before.conversation] = turn_id

    @rule(crash_at=crash)
    def give_up(self, crash_at: int | None) -> None:
        given_up = self.run(crash_at, transitions.expire_queued, NOW + timedelta(seconds=60), 1000)
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
        n_expired = self.run(crash_at, retention.delete_expired_jobs, NOW + timedelta(seconds=60), 1000)
        if n_expired is None:
            assert crash_at is not None
            return
        assert n_expired == len(ended)
        touched = {self.jobs[job_id].conversation for job_id in ended}
        self.forget(ended)
        gone = touched - {job.conversation for job in self.jobs.values()}
        self.heads = {name: turn_id for name, turn_id in self.heads.items() if name not in gone}

    @rule()
    def heartbeat(self) -> None:
        tokens = [claim.lease_token for claim in self.claims]
        self.run(None, leases.heartbeat, tokens)
        held = {lease.lease_token for lease in self.run(None, leases.active_leases, self.worker)}
        assert held == {claim.lease_token for claim in self.claims if self.holds(claim)}

    @invariant()
    def every_rule_of_the_record_holds(self) -> None:
        with self.engine.connect() as connection:
            assert check.violations(connection) == []
            for job in reads.newest(connection, ADMIN_ID, limit=500):
                assert job.status == self.jobs[job.id].status
                if job.status == "done":
                    assert job.result == self.replies[job.id]
            for name in {*CONVERSATIONS, *self.heads}:
                self.compare(connection, name)

    @invariant()
    def a_job_reads_its_path_and_nothing_unanswered(self) -> None:
        with self.engine.connect() as connection:
            for claim in filter(self.holds, self.claims):
                seen = turns.read_turn(connection, claim.turn_id, 10_000).messages
                job, turn = self.jobs[claim.job_id], self.turns[claim.turn_id]
                wanted = [("system", turn.in_force)] if turn.in_force else []
                wanted += self.texts(turn.parent_id, answered=True)
                wanted += [("assistant", job.context)] if job.context else []
                assert [(message.role, message.content) for message in seen] == [*wanted, ("user", job.content)]

    def compare(self, connection: Connection, name: str) -> None:
        """The path to the head; each reply follows its prompt."""
        contents = [
            (message.role, message.content)
            for message in conversations.messages(connection, ADMIN_ID, name)
            if message.role != "system"
        ]
        assert contents == self.texts(self.heads.get(name), answered=False)

    def any_claim(self, data: st.DataObject) -> transitions.Claim | None:
        return data.draw(st.sampled_from(self.claims)) if self.claims else None

    def holds(self, claim: transitions.Claim) -> bool:
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
        pytest.param("sqlite", 10, 30, id="sqlite-quick"),
        pytest.param("postgresql", 5, 30, id="postgresql-quick", marks=pytest.mark.slow),
        pytest.param("sqlite", 60, 60, id="sqlite-long", marks=pytest.mark.slow),
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
