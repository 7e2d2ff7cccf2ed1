"""Retention: what is deleted, what stays, and what later turns still read."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from sqlalchemy import Connection, Engine, text, update

from llamalith_app.store import check, conversation_list, conversations, retention, turns
from llamalith_app.store.conversation_list import Filter
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
    assert check.violations(connection) == []
    connection.close()


def queue(connection: Connection, content: str, *, system_prompt: str = "", context: str = "") -> int:
    job_id = submission.submit(connection, prompt(content, system_prompt=system_prompt, context=context), NOW).job_id
    assert job_id is not None
    return job_id


def answer(connection: Connection, at: datetime = NOW) -> transitions.Claim:
    """Claims the next job and stores its reply, at that time."""
    claim = transitions.claim(connection, "m", 1, 1, NOW)
    assert claim is not None
    assert finish(connection, claim, f"reply to {claim.job_id}")
    connection.execute(update(JobRow).where(JobRow.id == claim.job_id).values(processed_at=at))
    return claim


def contents(connection: Connection) -> list[str]:
    return [message.content for message in conversations.messages(connection, ADMIN_ID, "c")]


def test_a_turn_is_deleted_with_all_its_messages_and_attempts(connection: Connection) -> None:
    queue(connection, "old", context="so far")
    answer(connection, NOW)
    queue(connection, "young")
    answer(connection, NOW + DAY)
    queue(connection, "waits")
    assert not retention.has_expired_jobs(connection, NOW - timedelta(seconds=1))
    assert retention.has_expired_jobs(connection, NOW)
    assert retention.delete_expired_jobs(connection, NOW, 100) == 1
    assert not retention.has_expired_jobs(connection, NOW)
    assert contents(connection) == ["young", "reply to 2", "waits"]
    assert reads.job_by_id(connection, ADMIN_ID, 1) is None
    assert reads.attempts(connection, ADMIN_ID, 1) is None
    assert [job.id for job in reads.newest(connection, ADMIN_ID, limit=9)] == [3, 2]
    assert check.row_counts(connection)["attempts"] == 1


def test_the_jobs_that_ended_first_are_deleted_first_up_to_the_limit(connection: Connection) -> None:
    for at in (NOW + DAY, NOW, NOW):
        queue(connection, "x")
        answer(connection, at)
    left = []
    while retention.delete_expired_jobs(connection, NOW + DAY, 1):
        left.append([job.id for job in reads.newest(connection, ADMIN_ID, limit=9)])
    assert left == [[3, 1], [1], []]


def test_failed_and_cancelled_jobs_are_deleted_and_open_ones_never(connection: Connection) -> None:
    first = queue(connection, "cancelled")
    transitions.cancel(connection, ADMIN_ID, first, NOW)
    submission.submit(connection, prompt("given up", queue_timeout_s=1), NOW)
    transitions.expire_queued(connection, NOW + timedelta(seconds=1), 9)
    queue(connection, "runs")
    assert transitions.claim(connection, "m", 1, 1, NOW)
    queue(connection, "waits")
    assert retention.delete_expired_jobs(connection, NOW + 1000 * DAY, 100) == 2
    assert contents(connection) == ["runs", "waits"]


def test_a_conversation_gives_no_turn_number_twice_while_it_exists(connection: Connection) -> None:
    queue(connection, "old")
    depth = turns.parent(connection, answer(connection).turn_id).depth
    queue(connection, "young")
    answer(connection, NOW + DAY)
    retention.delete_expired_jobs(connection, NOW, 100)
    (listed,) = conversation_list.listed(connection, ADMIN_ID, Filter(), limit=9)
    assert (listed.first_prompt, listed.status) == ("young", "done")
    queue(connection, "new")
    assert turns.parent(connection, answer(connection).turn_id).depth == depth + 2


def listed(connection: Connection) -> list[str]:
    found = conversation_list.listed(connection, ADMIN_ID, Filter(), limit=9)
    return sorted(summary.public_id for summary in found)


@pytest.mark.parametrize("system_prompt", ["", "be kind"])
def test_a_conversation_is_deleted_with_its_last_turn_and_its_id_may_be_used_again(
    connection: Connection, system_prompt: str
) -> None:
    for content, at in (("1", NOW), ("2", NOW + DAY)):
        queue(connection, content, system_prompt=system_prompt)
        answer(connection, at)
    other = submission.submit(connection, prompt("another", "other"), NOW).job_id
    assert other is not None
    assert retention.delete_expired_jobs(connection, NOW, 100) == 1
    assert listed(connection) == ["c", "other"]
    assert retention.delete_expired_jobs(connection, NOW + DAY, 100) == 1
    assert listed(connection) == ["other"]
    assert not conversations.exists(connection, ADMIN_ID, "c")
    assert check.row_counts(connection)["messages"] == 1
    transitions.cancel(connection, ADMIN_ID, other, NOW)
    queue(connection, "new")
    claim = answer(connection)
    assert turns.parent(connection, claim.turn_id).depth == 0
    assert claim.conversation_id > 2, (
        "nothing that was kept elsewhere of the one that is gone can be taken for this one"
    )
    assert contents(connection) == ["new", f"reply to {claim.job_id}"]


def scan_conversations(connection: Connection, until: datetime) -> list[str]:
    """A complete scan, two conversations at a time. Returns the conversations that are listed after it."""
    after = 0
    while True:
        scanned = retention.scan_conversations(connection, until, after, 2)
        assert retention.delete_expired_conversations(connection, until, scanned.expired) == len(scanned.expired)
        after = scanned.last
        if not after:
            return listed(connection)


def test_conversations_that_earlier_versions_left_without_jobs_are_deleted_some_at_a_time(
    connection: Connection,
) -> None:
    for number in range(5):
        submission.submit(connection, prompt("x", f"left {number}"), NOW)
        transitions.cancel(connection, ADMIN_ID, number + 1, NOW)
    for table in ("messages", "jobs"):
        connection.execute(text(f"DELETE FROM {table}"))
    queue(connection, "waits")
    assert len(listed(connection)) == 6
    assert scan_conversations(connection, NOW) == ["c"]


def test_a_system_message_without_a_job_expires_at_the_age_of_a_job(connection: Connection) -> None:
    submission.submit(connection, prompt("", "alone", system_prompt="be kind"), NOW)
    submission.submit(connection, prompt("", "again", system_prompt="be kind"), NOW)
    submission.submit(connection, prompt("", "again", system_prompt="be terse"), NOW + DAY)
    submission.submit(connection, prompt("", "used", system_prompt="be kind"), NOW)
    used = submission.submit(connection, prompt("x", "used"), NOW).job_id
    assert used is not None
    assert scan_conversations(connection, NOW - timedelta(seconds=1)) == ["again", "alone", "used"]
    assert scan_conversations(connection, NOW) == ["again", "used"]
    transitions.cancel(connection, ADMIN_ID, used, NOW + DAY)
    assert scan_conversations(connection, NOW) == ["again", "used"]
    assert retention.delete_expired_jobs(connection, NOW + DAY, 9) == 1
    assert scan_conversations(connection, NOW + DAY) == []


def test_a_message_sent_between_scan_and_deletion_stays(connection: Connection) -> None:
    submission.submit(connection, prompt("", "c", system_prompt="be kind"), NOW)
    scanned = retention.scan_conversations(connection, NOW, 0, 9)
    assert scanned == (0, [1])
    queue(connection, "just now")
    assert retention.delete_expired_conversations(connection, NOW, scanned.expired) == 0
    assert contents(connection) == ["be kind", "just now"]


def test_the_system_message_in_force_stays_while_a_turn_is_left(connection: Connection) -> None:
    queue(connection, "old", system_prompt="be kind")
    answer(connection)
    queue(connection, "young")
    answer(connection, NOW + DAY)
    retention.delete_expired_jobs(connection, NOW, 100)
    assert contents(connection) == ["be kind", "young", "reply to 2"]
    retention.delete_expired_jobs(connection, NOW, 100)
    queue(connection, "new")
    claim = answer(connection)
    turn = turns.read_turn(connection, claim.turn_id, 1000)
    assert [message.content for message in turn.messages] == ["be kind", "young", "reply to 2", "new"]


def test_a_system_message_is_deleted_once_it_was_replaced_and_its_last_job_has_expired(connection: Connection) -> None:
    queue(connection, "1", system_prompt="be kind")
    answer(connection, NOW)
    queue(connection, "2")
    answer(connection, NOW + DAY)
    queue(connection, "3", system_prompt="be terse")
    answer(connection, NOW + 2 * DAY)
    retention.delete_expired_jobs(connection, NOW, 100)
    assert contents(connection) == ["be kind", "2", "reply to 2", "be terse", "3", "reply to 3"]
    retention.delete_expired_jobs(connection, NOW + DAY, 100)
    assert contents(connection) == ["be terse", "3", "reply to 3"]
    retention.delete_expired_jobs(connection, NOW + 2 * DAY, 100)
    assert contents(connection) == []


def test_an_earlier_job_does_not_keep_a_system_message(connection: Connection) -> None:
    for content, at, system_prompt in (("1", NOW + DAY, ""), ("2", NOW, "be kind"), ("3", NOW + DAY, "be terse")):
        queue(connection, content, system_prompt=system_prompt)
        answer(connection, at)
    retention.delete_expired_jobs(connection, NOW, 100)
    assert contents(connection) == ["1", "reply to 1", "be terse", "3", "reply to 3"]


def test_a_later_turn_reads_what_is_left_of_earlier_ones(connection: Connection) -> None:
    for content, at in (("1", NOW), ("2", NOW + DAY)):
        queue(connection, content)
        answer(connection, at)
    queue(connection, "3")
    claim = transitions.claim(connection, "m", 1, 1, NOW)
    assert claim is not None
    retention.delete_expired_jobs(connection, NOW, 100)
    turn = turns.read_turn(connection, claim.turn_id, 1000)
    assert [message.content for message in turn.messages] == ["2", "reply to 2", "3"]
    assert finish(connection, claim)


def test_a_retry_outlives_the_job_that_it_retries(connection: Connection) -> None:
    first = queue(connection, "once more")
    transitions.cancel(connection, ADMIN_ID, first, NOW)
    again = submission.retry(connection, ADMIN_ID, first, "r", NOW)
    assert isinstance(again, submission.Retry)
    assert retention.delete_expired_jobs(connection, NOW, 100) == 1
    job = reads.job_by_id(connection, ADMIN_ID, again.job_id)
    assert job is not None
    assert job.retry_of == first
    assert submission.retry(connection, ADMIN_ID, first, "r", NOW) is None


def test_the_checks_find_a_retry_of_another_conversations_job(connection: Connection) -> None:
    queue(connection, "mine")
    other = submission.submit(connection, prompt("not mine", "other"), NOW).job_id
    assert other is not None
    transitions.cancel(connection, ADMIN_ID, 1, NOW)
    connection.execute(text("UPDATE jobs SET retry_of = 1 WHERE id = 2"))
    (broken,) = check.violations(connection)
    assert broken.rule == "a job retries one of its own conversation that ended without a reply, or that has expired"
    connection.execute(text("UPDATE jobs SET retry_of = NULL"))


def test_the_transcript_leaves_out_expired_turns(connection: Connection) -> None:
    for number in range(6):
        queue(connection, str(number), system_prompt="be kind")
        answer(connection, NOW if number < 4 else NOW + DAY)
    retention.delete_expired_jobs(connection, NOW, 100)

    def shown(**of: int) -> tuple[list[int], int, int]:
        thread = conversations.thread(connection, ADMIN_ID, "c", limit=1, max_text=9, **of)
        assert thread is not None
        return [turn.turn for turn in thread.turns], thread.n_earlier, thread.earlier_until

    assert shown() == ([5], 2, 5)
    assert shown(before=5) == ([4], 1, 1)
    assert shown(before=1) == ([0], 0, 0), "its system message is in force"
