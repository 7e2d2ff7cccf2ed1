"""The jobs of OpenAI clients in the record: joined, left, cancelled, and how long they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Connection, Engine, update

from llamalith_app.contracts.conversations import Message
from llamalith_app.store import calls, check, conversations, retention, turns
from llamalith_app.store.calls import Call
from llamalith_app.store.jobs import reads, submission, transitions
from llamalith_app.store.tables import JobRow
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, finish, prompt, register_worker

SECOND, DAY = timedelta(seconds=1), timedelta(days=1)


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        register_worker(connection)
        yield connection
        assert check.violations(connection) == []


def called(connection: Connection, digest: str | None = "d", *, is_stored: bool = True, conversation: str = "c") -> int:
    job_id = submission.submit(connection, prompt(conversation_id=conversation), NOW).job_id
    assert job_id is not None
    calls.add(connection, job_id, Call(digest, is_stored), NOW)
    return job_id


def answered(connection: Connection, job_id: int) -> None:
    claim = transitions.claim(connection, "m", 1, 1, NOW)
    assert claim is not None
    assert claim.job_id == job_id
    assert finish(connection, claim, "a reply")
    connection.execute(update(JobRow).where(JobRow.id == job_id).values(processed_at=NOW))


def test_a_call_is_joined_once_after_it_was_left_and_within_the_grace(connection: Connection) -> None:
    job_id = called(connection)
    assert calls.join(connection, "d", NOW - SECOND) is None
    calls.leave(connection, job_id, NOW)
    assert calls.join(connection, "other", NOW - SECOND) is None
    assert calls.join(connection, "d", NOW) is None
    assert calls.join(connection, "d", NOW - SECOND) == job_id
    assert calls.join(connection, "d", NOW - SECOND) is None
    assert calls.first_left(connection) is None


def test_who_sends_a_call_again_joins_it_though_it_seems_to_be_waited_for(connection: Connection) -> None:
    job_id = called(connection)
    assert calls.join(connection, "d", NOW, since_repeat=NOW) is None
    assert calls.join(connection, "d", NOW, since_repeat=NOW - SECOND) == job_id
    calls.leave(connection, job_id, NOW)
    assert calls.first_left(connection) is None
    calls.leave(connection, job_id, NOW)
    assert calls.first_left(connection) == NOW
    # One more than came: of another process that did not see the end of its own.
    calls.leave(connection, job_id, NOW + DAY)
    assert calls.first_left(connection) == NOW


def test_what_ended_without_a_reply_is_not_joined_and_a_reply_that_was_missed_is(connection: Connection) -> None:
    missed = called(connection, "missed", conversation="a")
    answered(connection, missed)
    cancelled = called(connection, "cancelled")
    transitions.cancel(connection, ADMIN_ID, cancelled, NOW)
    for job_id in (missed, cancelled):
        calls.leave(connection, job_id, NOW)
    assert calls.join(connection, "cancelled", NOW - SECOND) is None
    assert calls.join(connection, "missed", NOW - SECOND) == missed


def test_only_open_jobs_that_were_left_long_enough_are_cancelled_and_nobody_joins_them_then(
    connection: Connection,
) -> None:
    done = called(connection, "done", conversation="a")
    answered(connection, done)
    waits, goes_on, young = (called(connection, digest, conversation=str(digest)) for digest in ("w", None, "y"))
    stays = called(connection, "stays", conversation="stays")
    for job_id, at in ((done, NOW), (waits, NOW), (goes_on, NOW), (young, NOW + SECOND)):
        calls.leave(connection, job_id, at)
    assert calls.cancel_left(connection, NOW, NOW + SECOND) == [waits]
    assert calls.join(connection, "done", NOW - SECOND) is None
    assert calls.first_left(connection) == NOW + SECOND
    statuses = {job.id: job.status for job in reads.newest(connection, ADMIN_ID, limit=9)}
    assert [statuses[job_id] for job_id in (done, waits, goes_on, young, stays)] == [
        *("done", "cancelled", "queued", "queued", "queued"),
    ]


@pytest.mark.parametrize("stored", [True, False])
def test_calls_expire_with_all_that_was_said_in_them_and_no_others(connection: Connection, stored: bool) -> None:
    kept, gone = (
        called(connection, is_stored=is_stored, conversation=str(is_stored)) for is_stored in (not stored, stored)
    )
    open_job = called(connection, is_stored=stored, conversation="open")
    for job_id in (kept, gone):
        answered(connection, job_id)
    assert not retention.has_expired_calls(connection, NOW - SECOND, stored=stored)
    assert retention.has_expired_calls(connection, NOW, stored=stored)
    assert retention.delete_expired_calls(connection, NOW, 9, stored=stored) == 1
    assert {job.id for job in reads.newest(connection, ADMIN_ID, limit=9)} == {kept, open_job}
    assert conversations.messages(connection, ADMIN_ID, str(stored)) == []
    assert calls.find(connection, gone) is None
    assert not retention.has_expired_calls(connection, NOW, stored=stored)


def test_no_history_goes_on_from_what_is_not_to_be_stored(connection: Connection) -> None:
    history = [Message(role="user", content="hello"), Message(role="assistant", content="a reply")]
    answered(connection, called(connection, is_stored=False, conversation="a"))
    assert turns.longest_stored_prefix(connection, ADMIN_ID, history) is None
    answered(connection, called(connection, conversation="b"))
    assert turns.longest_stored_prefix(connection, ADMIN_ID, history) is not None
