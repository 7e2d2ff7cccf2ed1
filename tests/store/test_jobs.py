"""The transitions of a job, one guarantee per test."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import Connection, Engine, select, text
from sqlalchemy.exc import IntegrityError

from llamalith_app.store import check, conversation_list, conversations, turns
from llamalith_app.store.conversation_list import Filter
from llamalith_app.store.jobs import leases, reads, statements, submission, transitions, waiting
from llamalith_app.store.jobs.transitions import AttemptTimes
from llamalith_app.store.tables import JobRow, Outcome, Status
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, fail, finish, prompt, register_worker


def test_ids_are_never_given_twice(engine: Engine) -> None:
    with engine.begin() as connection:
        first = submission.submit(connection, prompt(), NOW)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM messages"))
        connection.execute(text("DELETE FROM jobs"))
        second = submission.submit(connection, prompt(), NOW)
    assert first.job_id is not None
    assert second.job_id == first.job_id + 1


@pytest.mark.parametrize("n_looked_at_first", [1, 3, 100])
def test_conversations_are_listed_by_their_newest_turn_wherever_that_is_found(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, n_looked_at_first: int
) -> None:
    monkeypatch.setattr(conversation_list, "RECENT_TURNS", n_looked_at_first)
    with engine.begin() as connection:
        for conversation_id in ("a", "b", "c", "a", "d", "a"):
            submission.submit(connection, prompt("x", conversation_id), NOW)
        submission.submit(connection, prompt("", "e", system_prompt="no job yet"), NOW)
        pages: list[list[str]] = []
        before = None
        for _ in range(3):
            found = conversation_list.listed(connection, ADMIN_ID, Filter(), limit=2, before=before)
            pages.append([one.public_id for one in found])
            before = found[-1].cursor
    assert pages == [["e", "a"], ["d", "c"], ["b"]]


def test_a_job_is_not_claimed_during_its_backoff(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt(), NOW)
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        fail(
            connection,
            claim,
            pause=timedelta(seconds=5),
        )
        assert transitions.claim(connection, "m", 1, worker, NOW + timedelta(seconds=4)) is None
        again = transitions.claim(connection, "m", 1, worker, NOW + timedelta(seconds=5))
    assert again is not None
    assert again.attempt == 2


def test_a_clock_that_went_back_delays_no_job_beyond_the_longest_backoff(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt(), NOW)
        earlier = NOW - timedelta(hours=1)
        assert [one.n_jobs for one in waiting.due_jobs(connection, ["m"], earlier)] == [1]
        claim = transitions.claim(connection, "m", 1, worker, earlier)
        assert claim is not None
        fail(connection, claim, pause=timedelta(seconds=60))
        assert transitions.claim(connection, "m", 1, worker, NOW) is None
        assert transitions.claim(connection, "m", 1, worker, earlier) is not None


def test_a_job_in_its_backoff_holds_up_its_conversation(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt("first"), NOW)
        submission.submit(connection, prompt("second"), NOW)
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        fail(
            connection,
            claim,
            pause=timedelta(seconds=5),
        )
        assert transitions.claim(connection, "m", 1, worker, NOW) is None
        assert waiting.due_jobs(connection, ["m"], NOW) == []


def test_the_last_attempt_ends_as_error_with_its_reason(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt(max_attempts=2), NOW)
        for expected in (Status.QUEUED, Status.ERROR):
            claim = transitions.claim(connection, "m", 1, worker, NOW)
            assert claim is not None
            status = fail(
                connection,
                claim,
                outcome=Outcome.LOST,
                kind="worker_lost",
                reason="It is gone.",
            )
            assert status is expected
        job = reads.job_by_id(connection, ADMIN_ID, 1)
    assert job is not None
    assert (job.status, job.result, job.attempt) == ("error", "It is gone.", 2)
    assert job.error is not None
    assert job.error.kind == "worker_lost"


def test_a_released_attempt_is_not_spent(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt(max_attempts=1), NOW)
        for _ in range(5):
            claim = transitions.claim(connection, "m", 1, worker, NOW)
            assert claim is not None
            status = fail(
                connection,
                claim,
                outcome=Outcome.RELEASED,
            )
            assert status is Status.QUEUED


def test_a_sweep_that_saw_an_old_heartbeat_ends_no_lease(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt(), NOW)
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        (seen,) = leases.active_leases(connection)
        leases.heartbeat(connection, [claim.lease_token])
        status = fail(
            connection,
            claim,
            outcome=Outcome.LOST,
            kind="worker_lost",
            seen_heartbeat=seen.heartbeat,
        )
        assert status is None
        assert finish(connection, claim)


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("UPDATE jobs SET status = 'queued' WHERE id = 1", "never changes"),
        ("UPDATE jobs SET lease_token = 'x' WHERE id = 2", "lease_while_processing"),
        ("UPDATE jobs SET status = 'paused' WHERE id = 2", "status_known"),
        ("UPDATE jobs SET status = 'error', processed_at = created_at WHERE id = 2", "error_has_reason"),
        ("UPDATE jobs SET owner_id = 2 WHERE id = 2", "(?i)foreign key"),
        (
            "INSERT INTO messages (turn_id, position, role, content, is_reply, created_at)"
            " VALUES (1, 7, 'assistant', 'twice', true, '2026-01-01 00:00:00')",
            "(?i)unique",
        ),
        ("UPDATE jobs SET turn_id = 1 WHERE id = 2", "(?i)unique"),
        ("UPDATE jobs SET turn_id = 4 WHERE id = 2", "(?i)foreign key"),
        (
            "INSERT INTO messages (turn_id, position, role, content, is_reply, created_at)"
            " VALUES (2, 7, 'user', 'a reply by a person', true, '2026-01-01 00:00:00')",
            "reply_by_the_assistant",
        ),
    ],
)
def test_the_database_itself_refuses_invalid_rows(engine: Engine, statement: str, why: str) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt(), NOW)
        submission.submit(connection, prompt(), NOW)
        submission.submit(connection, prompt(conversation_id="other"), NOW)
        submission.submit(connection, prompt("", conversation_id="other", system_prompt="alone"), NOW)
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        finish(connection, claim)
    with engine.connect() as connection, pytest.raises(IntegrityError, match=why):
        connection.execute(text(statement))


def test_the_system_message_of_an_earlier_turn_stays_in_force_until_another_comes(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        for content, system in (("1", "A"), ("2", ""), ("3", "A"), ("4", "B")):
            submission.submit(connection, prompt(content, system_prompt=system), NOW)
        contents = []
        for _ in range(4):
            claim = transitions.claim(connection, "m", 1, worker, NOW)
            assert claim is not None
            turn = turns.read_turn(connection, claim.turn_id, 1000)
            contents.append([message.content for message in turn.messages])
            finish(connection, claim, f"r{claim.job_id}")
        messages = [m.content for m in conversations.messages(connection, ADMIN_ID, "c")]
    assert contents == [
        ["A", "1"],
        ["A", "1", "r1", "2"],
        ["A", "1", "r1", "2", "r2", "3"],
        ["B", "1", "r1", "2", "r2", "3", "r3", "4"],
    ]
    assert messages == ["A", "1", "r1", "2", "r2", "3", "r3", "B", "4", "r4"]


def test_a_turn_has_no_more_characters_of_earlier_turns_than_asked_for(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        for _ in range(3):
            submission.submit(connection, prompt("x" * 10), NOW)
            claim = transitions.claim(connection, "m", 1, worker, NOW)
            assert claim is not None
            finish(connection, claim, "y" * 10)
        submission.submit(connection, prompt("now"), NOW)
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        turn = turns.read_turn(connection, claim.turn_id, 40)
    assert [message.content[0] for message in turn.messages] == ["x", "y", "x", "y", "n"]
    assert turn.n_omitted == 2


def test_check_names_the_rows_that_violate_an_invariant(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt(), NOW)
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        finish(connection, claim)
        connection.execute(text("DELETE FROM messages WHERE role = 'assistant'"))
        broken, *_ = check.violations(connection)
    assert broken.rule == "a done job has exactly one reply, the last message of its own turn"
    assert broken.rows == [{"job_id": 1, "status": "done", "replies": 0}]


def first_in_lanes(connection: Connection) -> list[int]:
    query = "SELECT id FROM jobs WHERE status = 'queued' AND is_head ORDER BY id"
    return list(connection.execute(text(query)).scalars())


def queued(connection: Connection, conversation_id: str = "c", queue_timeout_s: float | None = None) -> int:
    wanted = prompt(conversation_id=conversation_id, queue_timeout_s=queue_timeout_s)
    job_id = submission.submit(connection, wanted, NOW).job_id
    assert job_id is not None
    return job_id


@pytest.mark.parametrize("end", ["finish", "fail", "cancel", "cancel_open", "give_up"])
def test_the_next_job_of_a_conversation_becomes_the_first_whatever_ends_the_one_before(
    engine: Engine, end: str
) -> None:
    with engine.begin() as connection:
        register_worker(connection)
        first, second, other = queued(connection, "c", 60), queued(connection), queued(connection, "other")
        assert first_in_lanes(connection) == [first, other]
        if end == "give_up":
            assert transitions.expire_queued(connection, NOW + timedelta(seconds=60), 10) == [first]
        elif end == "cancel":
            assert transitions.cancel(connection, ADMIN_ID, first, NOW) is Status.CANCELLED
        else:
            claim = transitions.claim(connection, "m", 1, 1, NOW)
            assert claim is not None
            assert first_in_lanes(connection) == [other]
            if end == "finish":
                assert finish(connection, claim)
            elif end == "fail":
                assert fail(connection, claim, pause=None) is Status.ERROR
            else:
                transitions.cancel_open(connection, ADMIN_ID, NOW, statuses=[Status.PROCESSING], limit=10)
        assert first_in_lanes(connection) == [second, other]
        assert check.violations(connection) == []


def test_the_end_of_a_job_behind_the_first_promotes_no_other(engine: Engine) -> None:
    with engine.begin() as connection:
        first, second, third = (queued(connection) for _ in range(3))
        transitions.cancel(connection, ADMIN_ID, second, NOW)
        assert first_in_lanes(connection) == [first]
        transitions.cancel(connection, ADMIN_ID, first, NOW)
        assert first_in_lanes(connection) == [third]


def test_the_checks_find_a_job_that_should_be_the_first_in_its_lane(engine: Engine) -> None:
    with engine.begin() as connection:
        submission.submit(connection, prompt(), NOW)
        submission.submit(connection, prompt(), NOW)
        connection.execute(text("UPDATE jobs SET is_head = NOT is_head"))
        (broken,) = check.violations(connection)
    assert (
        broken.rule == "an open job is the first in its lane exactly where nothing earlier in its conversation is open"
    )
    assert [row["job_id"] for row in broken.rows] == [1, 2]


def test_no_later_turn_reads_a_turn_whose_job_was_cancelled(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        for content in ("1", "2", "3"):
            submission.submit(connection, prompt(content, context=f"before {content}"), NOW)
        claims = []
        for number in range(3):
            claim = transitions.claim(connection, "m", 1, worker, NOW)
            assert claim is not None
            claims.append(claim)
            if number == 0:
                finish(connection, claim, "r1")
            if number == 1:
                assert transitions.cancel(connection, ADMIN_ID, claim.job_id, NOW) is Status.CANCELLED
                written = transitions.PartialReply("half of r2", 1, 1)
                assert transitions.store_partial(connection, claim.job_id, claim.lease_token, NOW, written=written)
        turn = turns.read_turn(connection, claims[2].turn_id, 1000)
    assert [message.content for message in turn.messages] == ["before 1", "1", "r1", "before 3", "3"]


def test_only_the_attempt_that_a_cancel_ended_stores_its_partial_reply(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt(), NOW)
        first = transitions.claim(connection, "m", 1, worker, NOW)
        assert first is not None
        fail(connection, first)
        second = transitions.claim(connection, "m", 1, worker, NOW)
        assert second is not None
        written = transitions.PartialReply("half", 3, 2, "a thought")

        def keep(claim: transitions.Claim) -> bool:
            return transitions.store_partial(
                connection, claim.job_id, claim.lease_token, NOW, written=written, times=AttemptTimes(NOW)
            )

        assert not keep(second), "not yet cancelled"
        transitions.cancel(connection, ADMIN_ID, second.job_id, NOW)
        assert [keep(first), keep(second), keep(second)] == [False, True, False]
        job = reads.job_by_id(connection, ADMIN_ID, second.job_id)
        assert check.violations(connection) == []
    assert job is not None
    assert (job.status, job.partial, job.result) == ("cancelled", "half", None)
    assert (job.thinking, job.thinking_s, job.loaded_at) == ("a thought", None, NOW)


def test_what_is_known_of_an_attempt_stays_whoever_ends_it_and_nobody_but_people_reads_what_was_thought(
    engine: Engine,
) -> None:
    loaded, read, first = (NOW + timedelta(seconds=n) for n in (1, 2, 3))
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt(), NOW)
        lost = transitions.claim(connection, "m", 1, worker, NOW)
        assert lost is not None
        transitions.note_times(connection, {lost.lease_token: AttemptTimes(loaded), "another": AttemptTimes(read)})
        transitions.note_times(connection, {lost.lease_token: AttemptTimes(loaded, read)})
        fail(connection, lost, outcome=Outcome.LOST)
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        job = reads.job_by_id(connection, ADMIN_ID, claim.job_id)
        assert job is not None
        assert (job.attempt, job.loaded_at) == (2, None), "those of the newest attempt"
        assert finish(connection, claim, thinking="hm", thinking_s=1.5, times=AttemptTimes(loaded, read, first))
        job = reads.job_by_id(connection, ADMIN_ID, claim.job_id)
        assert job is not None
        assert (job.result, job.thinking, job.thinking_s) == ("a reply", "hm", 1.5)
        assert (job.loaded_at, job.prompt_read_at, job.first_token_at) == (loaded, read, first)
        found = reads.attempts(connection, ADMIN_ID, claim.job_id)
        assert found is not None
        assert [(one.loaded_at, one.prompt_read_at, one.first_token_at) for one in found] == [
            (loaded, read, None),
            (loaded, read, first),
        ]
        shown = conversations.messages(connection, ADMIN_ID, "c")
        assert [(message.content, message.thinking) for message in shown] == [("hello", None), ("a reply", "hm")]
        submission.submit(connection, prompt("and now?"), NOW)
        again = transitions.claim(connection, "m", 1, worker, NOW)
        assert again is not None
        history = turns.read_turn(connection, again.turn_id, 1000).messages
        assert [message.thinking for message in history] == [None, None, None]
        prefix = turns.longest_stored_prefix(connection, ADMIN_ID, history)
        assert prefix is not None
        assert prefix.n_messages == 2, "the digest is that of the texts"
        assert check.violations(connection) == []


def test_a_job_that_waited_too_long_for_its_first_start_ends_and_is_never_claimed(engine: Engine) -> None:
    late = NOW + timedelta(seconds=60)
    with engine.begin() as connection:
        worker = register_worker(connection)
        bounded = prompt(conversation_id="a", queue_timeout_s=59.5)
        submission.submit(connection, bounded, NOW)
        submission.submit(connection, bounded, NOW)
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        fail(connection, claim)
        again = transitions.claim(connection, "m", 1, worker, late)
        assert again is not None, "it was started in time, so a failed attempt does not end its patience"
        finish(connection, again)
        assert waiting.due_jobs(connection, ["m"], late) == []
        assert transitions.claim(connection, "m", 1, worker, late) is None
        assert transitions.expire_queued(connection, NOW + timedelta(seconds=59), 10) == []
        assert transitions.expire_queued(connection, late, 10) == [2]
        assert transitions.expire_queued(connection, late, 10) == []
        job = reads.job_by_id(connection, ADMIN_ID, 2)
        assert check.violations(connection) == []
    assert job is not None
    assert job.error is not None
    assert (job.status, job.error.kind, job.queue_timeout_s) == ("error", "timeout", 59.5)
    assert job.error.reason == "It waited 60.0 s in the queue; queue_timeout_s allowed 59.5."


def test_queries_that_are_polled_scan_no_table(sqlite_engine: Engine) -> None:
    waits = select(JobRow.id, JobRow.created_at, JobRow.not_after).where(statements.waits_too_long).limit(10)
    with sqlite_engine.connect() as connection:
        for statement, index in ((leases._ACTIVE_OF_WORKER, "held_by_worker"), (waits, "given_up_in_the_queue")):
            compiled = statement.compile(sqlite_engine)
            values = tuple("1" for _ in compiled.positiontup or ())
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}", values).fetchall()
            assert [f"USING INDEX {index}" in row[3] for row in plan] == [True]


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        (
            "UPDATE jobs SET partial = 'x' WHERE id = 1",
            "only a job that was cancelled or ended in an error has a partial reply",
        ),
        ("UPDATE attempts SET outcome = 'cancelled'", "an attempt was cancelled only where its job was"),
    ],
)
def test_check_finds_what_no_cancel_can_have_written(engine: Engine, statement: str, rule: str) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submission.submit(connection, prompt(), NOW)
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        finish(connection, claim)
        connection.execute(text(statement))
        assert rule in [broken.rule for broken in check.violations(connection)]
