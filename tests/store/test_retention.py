"""Ended jobs that are kept no longer: what goes, what stays, and what is left to the turns after them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from sqlalchemy import Connection, Engine, text, update

from llamalith_app.store import check, conversations, retention, turns
from llamalith_app.store.jobs import reads, submission, transitions
from llamalith_app.store.tables import JobRow
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, finish, prompt, register_worker

DAY = timedelta(days=1)


@pytest.fixture
def connection(engine: Engine) -> Connection:
    connection = engine.connect()
    connection.begin()
    register_worker(connection)
    return connection


@pytest.fixture(autouse=True)
def _whole(connection: Connection) -> Iterator[None]:
    yield
    assert check.broken(connection) == []
    connection.close()


def queue(connection: Connection, content: str, *, system_prompt: str = "", context: str = "") -> int:
    job_id = submission.submit(connection, prompt(content, system_prompt=system_prompt, context=context), NOW).job_id
    assert job_id is not None
    return job_id


def answer(connection: Connection, at: datetime = NOW) -> transitions.Claim:
    """The next job gets its reply; it ended at that time."""
    claim = transitions.claim(connection, "m", 1, 1, NOW)
    assert claim is not None
    assert finish(connection, claim, f"reply to {claim.job_id}")
    connection.execute(update(JobRow).where(JobRow.id == claim.job_id).values(processed_at=at))
    return claim


def said(connection: Connection) -> list[str]:
    return [message.content for message in conversations.messages(connection, ADMIN_ID, "c")]


def test_a_turn_goes_with_all_that_was_said_in_it_and_its_attempts(connection: Connection) -> None:
    queue(connection, "old", context="so far")
    answer(connection, NOW)
    queue(connection, "young")
    answer(connection, NOW + DAY)
    queue(connection, "waits")
    assert not retention.has_expired(connection, NOW - timedelta(seconds=1))
    assert retention.has_expired(connection, NOW)
    assert retention.expire(connection, NOW, 100) == 1
    assert not retention.has_expired(connection, NOW)
    assert said(connection) == ["young", "reply to 2", "waits"]
    assert reads.one(connection, ADMIN_ID, 1) is None
    assert reads.attempts(connection, ADMIN_ID, 1) is None
    assert [job.id for job in reads.newest(connection, ADMIN_ID, limit=9)] == [3, 2]
    assert check.counts(connection)["attempts"] == 1


def test_what_ended_first_goes_first_so_many_at_a_time(connection: Connection) -> None:
    for at in (NOW + DAY, NOW, NOW):
        queue(connection, "x")
        answer(connection, at)
    left = []
    while retention.expire(connection, NOW + DAY, 1):
        left.append([job.id for job in reads.newest(connection, ADMIN_ID, limit=9)])
    assert left == [[3, 1], [1], []]


def test_what_failed_and_what_was_cancelled_goes_too_and_what_is_open_never(connection: Connection) -> None:
    first = queue(connection, "cancelled")
    transitions.cancel(connection, ADMIN_ID, first, NOW)
    submission.submit(connection, prompt("given up", queue_timeout_s=1), NOW)
    transitions.expire_queued(connection, NOW + timedelta(seconds=1), 9)
    queue(connection, "runs")
    assert transitions.claim(connection, "m", 1, 1, NOW)
    queue(connection, "waits")
    assert retention.expire(connection, NOW + 1000 * DAY, 100) == 2
    assert said(connection) == ["runs", "waits"]


def test_a_conversation_gives_no_turn_twice_as_long_as_it_stays(connection: Connection) -> None:
    queue(connection, "old")
    depth = turns.parent(connection, answer(connection).turn_id).depth
    queue(connection, "young")
    answer(connection, NOW + DAY)
    retention.expire(connection, NOW, 100)
    (listed,) = conversations.newest(connection, ADMIN_ID, limit=9, offset=0, max_text=9)
    assert (listed.first_prompt, listed.status) == ("young", "done")
    queue(connection, "new")
    assert turns.parent(connection, answer(connection).turn_id).depth == depth + 2


def listed(connection: Connection) -> list[str]:
    found = conversations.newest(connection, ADMIN_ID, limit=9, offset=0, max_text=9)
    return sorted(summary.public_id for summary in found)


@pytest.mark.parametrize("system_prompt", ["", "be kind"])
def test_a_conversation_goes_with_its_last_turn_and_its_id_begins_anew(
    connection: Connection, system_prompt: str
) -> None:
    for content, at in (("1", NOW), ("2", NOW + DAY)):
        queue(connection, content, system_prompt=system_prompt)
        answer(connection, at)
    other = submission.submit(connection, prompt("another", "other"), NOW).job_id
    assert other is not None
    assert retention.expire(connection, NOW, 100) == 1
    assert listed(connection) == ["c", "other"]
    assert retention.expire(connection, NOW + DAY, 100) == 1
    assert listed(connection) == ["other"]
    assert not conversations.exists(connection, ADMIN_ID, "c")
    assert check.counts(connection)["messages"] == 1
    transitions.cancel(connection, ADMIN_ID, other, NOW)
    queue(connection, "new")
    claim = answer(connection)
    assert turns.parent(connection, claim.turn_id).depth == 0
    assert claim.conversation_id > 2, (
        "nothing that was kept elsewhere of the one that is gone can be taken for this one"
    )
    assert said(connection) == ["new", f"reply to {claim.job_id}"]


def look_through(connection: Connection, until: datetime) -> list[str]:
    """A whole round, two conversations at a time; what is listed after it."""
    after = 0
    while True:
        looked = retention.look_through(connection, until, after, 2)
        assert retention.forget_conversations(connection, until, looked.forgotten) == len(looked.forgotten)
        after = looked.last
        if not after:
            return listed(connection)


def test_what_earlier_versions_left_of_conversations_goes_too_some_at_a_time(connection: Connection) -> None:
    for number in range(5):
        submission.submit(connection, prompt("x", f"left {number}"), NOW)
        transitions.cancel(connection, ADMIN_ID, number + 1, NOW)
    for table in ("messages", "jobs"):
        connection.execute(text(f"DELETE FROM {table}"))
    queue(connection, "waits")
    assert len(listed(connection)) == 6
    assert look_through(connection, NOW) == ["c"]


def test_a_system_message_that_was_stored_alone_is_kept_as_long_as_a_turn(connection: Connection) -> None:
    submission.submit(connection, prompt("", "alone", system_prompt="be kind"), NOW)
    submission.submit(connection, prompt("", "again", system_prompt="be kind"), NOW)
    submission.submit(connection, prompt("", "again", system_prompt="be terse"), NOW + DAY)
    submission.submit(connection, prompt("", "used", system_prompt="be kind"), NOW)
    used = submission.submit(connection, prompt("x", "used"), NOW).job_id
    assert used is not None
    assert look_through(connection, NOW - timedelta(seconds=1)) == ["again", "alone", "used"]
    assert look_through(connection, NOW) == ["again", "used"]
    transitions.cancel(connection, ADMIN_ID, used, NOW + DAY)
    assert look_through(connection, NOW) == ["again", "used"]
    assert retention.expire(connection, NOW + DAY, 9) == 1
    assert look_through(connection, NOW + DAY) == []


def test_what_is_said_while_others_look_stays(connection: Connection) -> None:
    submission.submit(connection, prompt("", "c", system_prompt="be kind"), NOW)
    looked = retention.look_through(connection, NOW, 0, 9)
    assert looked == (0, [1])
    queue(connection, "just now")
    assert retention.forget_conversations(connection, NOW, looked.forgotten) == 0
    assert said(connection) == ["be kind", "just now"]


def test_the_system_message_in_force_stays_while_a_turn_is_left(connection: Connection) -> None:
    queue(connection, "old", system_prompt="be kind")
    answer(connection)
    queue(connection, "young")
    answer(connection, NOW + DAY)
    retention.expire(connection, NOW, 100)
    assert said(connection) == ["be kind", "young", "reply to 2"]
    retention.expire(connection, NOW, 100)
    queue(connection, "new")
    claim = answer(connection)
    turn = turns.turn(connection, claim.turn_id, 1000)
    assert [message.content for message in turn.messages] == ["be kind", "young", "reply to 2", "new"]


def test_a_system_message_goes_once_another_took_its_place_and_no_job_of_it_is_left(connection: Connection) -> None:
    queue(connection, "1", system_prompt="be kind")
    answer(connection, NOW)
    queue(connection, "2")
    answer(connection, NOW + DAY)
    queue(connection, "3", system_prompt="be terse")
    answer(connection, NOW + 2 * DAY)
    retention.expire(connection, NOW, 100)
    assert said(connection) == ["be kind", "2", "reply to 2", "be terse", "3", "reply to 3"]
    retention.expire(connection, NOW + DAY, 100)
    assert said(connection) == ["be terse", "3", "reply to 3"]
    retention.expire(connection, NOW + 2 * DAY, 100)
    assert said(connection) == []


def test_a_system_message_does_not_stay_for_a_job_that_came_before_it(connection: Connection) -> None:
    for content, at, system_prompt in (("1", NOW + DAY, ""), ("2", NOW, "be kind"), ("3", NOW + DAY, "be terse")):
        queue(connection, content, system_prompt=system_prompt)
        answer(connection, at)
    retention.expire(connection, NOW, 100)
    assert said(connection) == ["1", "reply to 1", "be terse", "3", "reply to 3"]


def test_a_later_turn_sees_what_is_left_of_those_before_it(connection: Connection) -> None:
    for content, at in (("1", NOW), ("2", NOW + DAY)):
        queue(connection, content)
        answer(connection, at)
    queue(connection, "3")
    claim = transitions.claim(connection, "m", 1, 1, NOW)
    assert claim is not None
    retention.expire(connection, NOW, 100)
    turn = turns.turn(connection, claim.turn_id, 1000)
    assert [message.content for message in turn.messages] == ["2", "reply to 2", "3"]
    assert finish(connection, claim)


def test_a_retry_outlives_the_job_that_it_tries_again(connection: Connection) -> None:
    first = queue(connection, "once more")
    transitions.cancel(connection, ADMIN_ID, first, NOW)
    again = submission.retry(connection, ADMIN_ID, first, "r", NOW)
    assert isinstance(again, submission.Retry)
    assert retention.expire(connection, NOW, 100) == 1
    job = reads.one(connection, ADMIN_ID, again.job_id)
    assert job is not None
    assert job.retry_of == first
    assert submission.retry(connection, ADMIN_ID, first, "r", NOW) is None


def test_the_checks_find_a_retry_of_another_conversations_job(connection: Connection) -> None:
    queue(connection, "mine")
    other = submission.submit(connection, prompt("not mine", "other"), NOW).job_id
    assert other is not None
    transitions.cancel(connection, ADMIN_ID, 1, NOW)
    connection.execute(text("UPDATE jobs SET retry_of = 1 WHERE id = 2"))
    (broken,) = check.broken(connection)
    assert broken.rule == "a job tries again one of its own conversation that ended without a reply, or that is gone"
    connection.execute(text("UPDATE jobs SET retry_of = NULL"))


def test_the_transcript_leaves_out_what_is_gone(connection: Connection) -> None:
    for number in range(6):
        queue(connection, str(number), system_prompt="be kind")
        answer(connection, NOW if number < 4 else NOW + DAY)
    retention.expire(connection, NOW, 100)

    def shown(**of: int) -> tuple[list[int], int, int]:
        thread = conversations.thread(connection, ADMIN_ID, "c", limit=1, max_text=9, **of)
        assert thread is not None
        return [turn.turn for turn in thread.turns], thread.n_earlier, thread.earlier_until

    assert shown() == ([5], 2, 5)
    assert shown(before=5) == ([4], 1, 1)
    assert shown(before=1) == ([0], 0, 0), "its system message is in force"
