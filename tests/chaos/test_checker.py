"""Each rule of the checker finds a violation in a history or a record that is falsified for it."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import record as records
from tests.chaos.checker import check, max_concurrent_attempts
from tests.chaos.faults import SHARES, schedule
from tests.chaos.history import Heard, History, Lane, Operation, Sighting
from tests.chaos.record import Attempt, Entry, Job, Message, Record

Doctor = Callable[[History, Record], object]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


SAID = digest("<system>S</system><user>one</user>")
SAID_NEXT = digest(f"<system>S</system><user>one</user><assistant>{SAID}</assistant><user>three</user>")


def whole() -> tuple[History, Record]:
    """One conversation: job 1 is done, 2 cancelled, 3 done at its second attempt; 4 retries 2 and fails."""
    history = History()

    def operation(kind: str, invoked: float, **fields: object) -> None:
        known = {"outcome": "ok", "ended": invoked + 1} | fields
        history.operations.append(Operation(kind=kind, invoked=invoked, **known))  # type: ignore[arg-type]

    of_talk = {"conversation_id": "talk", "model": "fake"}
    operation("submit", 0, key="k1", content="one", job_ids=[1], **of_talk)
    operation("submit", 2, key="k2", content="two", job_ids=[2, 2], n_unanswered=1, **of_talk)
    operation("cancel", 4, subject=2, word="cancelled")
    operation("submit", 6, key="k3", content="three", job_ids=[3], **of_talk)
    operation("retry", 8, key="k4", subject=2, job_ids=[4])
    operation("submit", 9, content="never", outcome="unknown", **of_talk)
    history.see(Sighting(1, "done", SAID, "/api/jobs/1"))
    history.heard.append(Heard(job_id=3, final="done", text=SAID_NEXT, n_connections=2, n_restarts=1))

    history.lanes.append(Lane("2026-01-01 00:00:00", [1, 2, 3]))

    def job(job_id: int, turn: int, status: str, content: str, retry_of: int | None = None) -> Job:
        return Job(
            id=job_id,
            conversation=7,
            public_id="talk",
            turn=turn,
            model="fake",
            status=status,
            max_attempts=2,
            content=content,
            retry_of=retry_of,
            processed_at="2026-01-01 00:00:01",
        )

    def ran(job_id: int, lease_token: str, outcome: str, status: str) -> list[Entry]:
        return [
            Entry("status", job_id, "processing"),
            Entry("opened", job_id, None, lease_token),
            Entry("status", job_id, status),
            Entry("closed", job_id, outcome, lease_token),
        ]

    record = Record(
        jobs={
            1: job(1, 0, "done", "one"),
            2: job(2, 1, "cancelled", "two"),
            3: job(3, 2, "done", "three"),
            4: job(4, 3, "error", "two", retry_of=2),
        },
        messages=[
            Message(7, 0, "system", "S", None),
            Message(7, 2, "user", "one", 1),
            Message(7, 3, "assistant", SAID, 1),
            Message(7, 6, "user", "two", 2),
            Message(7, 10, "user", "three", 3),
            Message(7, 11, "assistant", SAID_NEXT, 3),
            Message(7, 14, "user", "two", 4),
        ],
        attempts=[
            Attempt(1, 1, "a", "done"),
            Attempt(3, 1, "b", "lost", "worker_lost"),
            Attempt(3, 2, "c", "done"),
            Attempt(4, 1, "d", "failed", "engine_died"),
            Attempt(4, 2, "e", "lost", "worker_lost"),
        ],
        journal=[
            *ran(1, "a", "done", "done"),
            Entry("status", 2, "cancelled"),
            *ran(3, "b", "lost", "queued"),
            *ran(3, "c", "done", "done"),
            *ran(4, "d", "failed", "queued"),
            *ran(4, "e", "lost", "error"),
        ],
    )
    return history, record


def broken(doctor: Doctor) -> list[str]:
    """The names of the broken rules, each once."""
    history, record = whole()
    doctor(history, record)
    return list(
        dict.fromkeys(found.rule.partition(":")[0] for found in check(history, record, fake_models=frozenset({"fake"})))
    )


def test_without_a_broken_promise_nothing_is_found() -> None:
    assert broken(lambda history, record: None) == []
    assert max_concurrent_attempts(whole()[1]) == 1


def answer_changes(history: History, record: Record) -> None:
    history.operations[1].job_ids[1] = 3


def reply_is_gone(history: History, record: Record) -> None:
    del record.messages[5]


def reply_of_another(history: History, record: Record) -> None:
    """As if the job had read the turn before it, which was cancelled."""
    text = f"<system>S</system><user>one</user><assistant>{SAID}</assistant><user>two</user><user>three</user>"
    record.messages[5] = record.messages[5]._replace(content=digest(text))
    history.heard.clear()


def cancelled_comes_back(history: History, record: Record) -> None:
    record.journal.append(Entry("status", 2, "queued"))


def second_attempt_overlaps(history: History, record: Record) -> None:
    opened = record.journal.index(Entry("opened", 3, None, "c"))
    record.journal.insert(record.journal.index(Entry("closed", 3, "lost", "b")), record.journal.pop(opened))


def prompts_change_places(history: History, record: Record) -> None:
    record.jobs[1].turn, record.jobs[3].turn = 2, 0
    record.messages[1:] = [
        Message(7, 2, "user", "three", 3),
        Message(7, 3, "assistant", digest("<system>S</system><user>three</user>"), 3),
        Message(7, 6, "user", "two", 2),
        Message(7, 10, "user", "one", 1),
        Message(7, 14, "user", "two", 4),
    ]
    record.jobs[1].status = "error"
    history.sightings.clear()
    history.heard.clear()


@pytest.mark.parametrize(
    ("doctor", "rules"),
    [
        (lambda history, record: history.operations[0].job_ids.__setitem__(0, 9), ["I1"]),
        (lambda history, record: setattr(record.jobs[1], "content", "another"), ["I1", "I14"]),
        (lambda history, record: setattr(record.jobs[4], "content", "another"), ["I1"]),
        (lambda history, record: setattr(record.jobs[4], "status", "queued"), ["I2"]),
        (cancelled_comes_back, ["I3"]),
        (lambda history, record: history.see(Sighting(1, "error", "why", "stream")), ["I3"]),
        (lambda history, record: history.see(Sighting(1, "done", "other", "stream")), ["I3"]),
        (reply_is_gone, ["I4", "I6", "I13"]),
        (lambda history, record: record.messages.append(Message(7, 7, "assistant", "late", 2)), ["I4"]),
        (lambda history, record: record.messages.append(Message(7, 15, "assistant", "more", 3)), ["I4", "I13"]),
        (prompts_change_places, ["I5"]),
        (reply_of_another, ["I6"]),
        (second_attempt_overlaps, ["I7"]),
        (lambda history, record: setattr(record.jobs[2], "status", "error"), ["I8"]),
        (lambda history, record: setattr(history.operations[2], "word", "processing"), ["I8"]),
        (lambda history, record: record.attempts.append(Attempt(2, 1, "a", "lost")), ["I9"]),
        (lambda history, record: record.attempts.append(Attempt(4, 3, "f", "lost")), ["I9"]),
        (answer_changes, ["I10"]),
        (lambda history, record: setattr(history.heard[0], "text", "x" + SAID_NEXT), ["I13"]),
        (lambda history, record: setattr(history.heard[0], "final", None), ["I13"]),
        (lambda history, record: setattr(history.heard[0], "broken", "an offset is wrong"), ["I13"]),
        (lambda history, record: history.lanes[0].job_ids.remove(2), ["I13"]),
        (lambda history, record: history.lanes[0].job_ids.reverse(), ["I13"]),
        (lambda history, record: setattr(record.jobs[4], "retry_of", None), ["I1", "I14"]),
        (lambda history, record: setattr(history.operations[5], "outcome", "open"), ["Everybody"]),
        (lambda history, record: setattr(history.operations[5], "outcome", "fail"), ["Everybody"]),
    ],
)
def test_a_broken_promise_is_found_under_its_rule(doctor: Doctor, rules: list[str]) -> None:
    assert broken(doctor) == rules


def test_an_unknown_submit_may_have_made_a_job_but_not_two() -> None:
    def make(n: int) -> Doctor:
        def doctor(history: History, record: Record) -> None:
            for turn in range(4, 4 + n):
                record.jobs[turn + 1] = Job(
                    id=turn + 1, conversation=7, public_id="talk", turn=turn, model="m", status="error", content="never"
                )

        return doctor

    assert broken(make(1)) == []
    assert broken(make(2)) == ["I14"]


def test_the_journal_has_every_change_in_the_order_of_the_commits(database_path: Path) -> None:
    records.keep_journal(database_path)
    connection = sqlite3.connect(database_path)
    connection.executescript(
        """
        INSERT INTO conversations (id, owner_id, public_id, created_at) VALUES (1, 1, 'talk', 'now');
        INSERT INTO turns (id, conversation_id, depth, created_at) VALUES (9, 1, 0, 'now');
        INSERT INTO workers (id, host, pid, lock_path, models, n_slots, heartbeat, started_at, seen_at)
            VALUES (1, 'h', 1, '', '[]', 1, 0, 'now', 'now');
        INSERT INTO jobs (id, conversation_id, owner_id, turn_id, model, system_prompt, priority, request_id,
                max_attempts, status, attempt, heartbeat, omitted_messages, not_before, created_at)
            VALUES (5, 1, 1, 9, 'm', '', 1, 'r', 3, 'queued', 0, 0, 0, 'now', 'now');
        UPDATE jobs SET status = 'processing', lease_token = 't';
        INSERT INTO attempts (job_id, attempt, worker_id, lease_token, started_at) VALUES (5, 1, 1, 't', 'now');
        UPDATE jobs SET heartbeat = 1;
        UPDATE jobs SET status = 'done', lease_token = NULL, processed_at = 'now';
        UPDATE attempts SET ended_at = 'now', outcome = 'done';
        """
    )
    connection.close()
    record = records.read(database_path)
    assert record.journal == [
        Entry("status", 5, "processing"),
        Entry("opened", 5, None, "t"),
        Entry("status", 5, "done"),
        Entry("closed", 5, "done", "t"),
    ]
    assert record.jobs[5] == Job(
        id=5, conversation=1, public_id="talk", turn=0, model="m", status="done", max_attempts=3, processed_at="now"
    )
    assert record.attempts == [Attempt(5, 1, "t", "done")]


def test_the_seed_determines_all_faults() -> None:
    assert schedule(1, 60, with_real=True) == schedule(1, 60, with_real=True)
    assert schedule(1, 60, with_real=True) != schedule(2, 60, with_real=True)
    faults = schedule(1, 600, with_real=True)
    assert {fault.act for fault in faults} == set(SHARES)
    everybody = {"up", "web-1", "web-2", "worker-1", "worker-2", "worker-real", "valkey"}
    assert {fault.target for fault in faults} == everybody
    assert {fault.target for fault in faults if fault.act == "freeze engine and kill"} >= {"up", "worker-real"}
    assert "worker-real" not in {fault.target for fault in schedule(1, 600, with_real=False)}
