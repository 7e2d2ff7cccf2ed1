"""The query plans of frequent statements: SQLite uses an index, however many rows there are. No clock is read.

Every statement that an operation really runs is explained, with what it was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event

from llamalith_app.contracts.conversations import Message
from llamalith_app.store import (
    calls,
    conversation_changes,
    conversation_list,
    conversations,
    keys,
    retention,
    search,
    tree,
    turns,
)
from llamalith_app.store.calls import Call
from llamalith_app.store.conversation_list import Filter
from llamalith_app.store.jobs import details, leases, listing, reads, statistics, submission, transitions, waiting
from llamalith_app.store.jobs.listing import JobFilter
from llamalith_app.store.tables import Status
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, fail, finish, prompt, register_worker

LATER = NOW + timedelta(days=2)


@contextmanager
def explained(connection: Connection, steps: list[str]) -> Iterator[None]:
    """Appends the steps of the query plans of all statements within."""

    def explain(_: Connection, cursor: Any, statement: str, parameters: Any, __: object, many: bool) -> None:
        cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters[0] if many else parameters)
        steps.extend(row[3] for row in cursor.fetchall())

    event.listen(connection, "before_cursor_execute", explain)
    yield
    event.remove(connection, "before_cursor_execute", explain)


def claimed(connection: Connection) -> transitions.Claim:
    claim = transitions.claim(connection, "m", 1, 1, NOW)
    assert claim is not None
    return claim


def queued(connection: Connection) -> int:
    job_id = submission.submit(connection, prompt(), NOW).job_id
    assert job_id is not None
    return job_id


def called(connection: Connection) -> int:
    job_id = queued(connection)
    calls.add(connection, job_id, Call("d"), NOW)
    return job_id


def forkable(connection: Connection) -> int:
    transitions.cancel(connection, ADMIN_ID, queued(connection), NOW)
    return 1


def expire_queued(connection: Connection, _: object) -> None:
    assert transitions.expire_queued(connection, LATER, 1000)


def forget(connection: Connection, _: object) -> None:
    if keys.has_expired_keys(connection, LATER):
        assert keys.delete_expired(connection, LATER, 1000) == 1


def answered_before(connection: Connection) -> None:
    keys.answer_once(connection, keys.Key(ADMIN_ID, "k", "d"), NOW, int, lambda: 1)


Prepare = Callable[[Connection], Any]
Run = Callable[[Connection, Any], Any]

OPERATIONS: dict[str, tuple[Prepare, Run]] = {
    "submit": (queued, lambda c, _: submission.submit(c, prompt(system_prompt="s", context="x"), NOW)),
    "submit to a new conversation": (queued, lambda c, _: submission.submit(c, prompt(conversation_id=None), NOW)),
    "claim": (queued, lambda c, _: claimed(c)),
    "finish": (
        lambda c: (queued(c), claimed(c), turns.read_turn(c, 1, 0).reply_to)[1:],
        lambda c, before: finish(c, before[0], reply_to=before[1]),
    ),
    "fail": (lambda c: (queued(c), claimed(c))[1], lambda c, claim: fail(c, claim, pause=None)),
    "times": (
        lambda c: (queued(c), claimed(c))[1],
        lambda c, claim: transitions.note_times(c, {claim.lease_token: transitions.AttemptTimes(NOW)}),
    ),
    "heartbeat": (lambda c: (queued(c), claimed(c))[1], lambda c, claim: leases.heartbeat(c, [claim.lease_token])),
    "cancel": (queued, lambda c, job_id: transitions.cancel(c, ADMIN_ID, job_id, NOW)),
    "cancel what is open in a conversation": (
        queued,
        lambda c, _: transitions.cancel_open(
            c, ADMIN_ID, NOW, statuses=[Status.QUEUED, Status.PROCESSING], limit=1000, conversation_id="c"
        ),
    ),
    "freed": (queued, lambda c, job_id: waiting.newly_runnable(c, [job_id], NOW)),
    "retry": (
        lambda c: transitions.cancel(c, ADMIN_ID, queued(c), NOW),
        lambda c, _: submission.retry(c, ADMIN_ID, 1, "r", NOW),
    ),
    "retry all that match": (
        lambda c: transitions.cancel(c, ADMIN_ID, queued(c), NOW),
        lambda c, _: submission.retry_matching(
            c, ADMIN_ID, "r", NOW, statuses=[Status.ERROR, Status.CANCELLED], models=["m"], limit=100
        ),
    ),
    "due": (queued, lambda c, _: waiting.due_jobs(c, ["m", "n"], NOW)),
    "load": (queued, lambda c, _: waiting.queue_depth(c, ["m", "n"], NOW)),
    "n_queued": (queued, lambda c, _: waiting.n_queued(c, ADMIN_ID)),
    "queue of one job": (queued, lambda c, job_id: reads.queue_places(c, {job_id: "m"})),
    "queue of jobs that wait for others": (
        lambda c: [queued(c) for _ in "ab"],
        lambda c, ids: reads.queue_places(c, dict.fromkeys(ids, "m")),
    ),
    "newest": (queued, lambda c, _: reads.newest(c, ADMIN_ID, limit=100, max_text=200)),
    "newest from an id on": (queued, lambda c, _: reads.newest(c, ADMIN_ID, limit=100, before=9)),
    "newest of a status": (queued, lambda c, _: reads.newest(c, ADMIN_ID, limit=100, status="done")),
    "newest of a conversation": (queued, lambda c, _: reads.newest(c, ADMIN_ID, limit=100, conversation_id="c")),
    "conversations, newest first": (
        lambda c: [queued(c) for _ in "ab"],
        lambda c, _: conversation_list.listed(c, ADMIN_ID, Filter(), limit=1),
    ),
    "the sidebar": (queued, lambda c, _: conversation_list.sidebar(c, ADMIN_ID, limit=0)),
    "newest of a source": (queued, lambda c, _: reads.newest(c, ADMIN_ID, limit=100, source="api")),
    "conversations that failed": (
        lambda c: [queued(c) for _ in "ab"],
        lambda c, _: conversation_list.listed(c, ADMIN_ID, Filter(status="error"), limit=1),
    ),
    "conversations that wait": (
        lambda c: [queued(c) for _ in "ab"],
        lambda c, _: conversation_list.listed(c, ADMIN_ID, Filter(status="queued"), limit=1),
    ),
    "conversations that match": (
        lambda c: ([submission.submit(c, prompt(conversation_id=i), NOW) for i in "ab"], search.index_messages(c)),
        lambda c, _: conversation_list.listed(c, ADMIN_ID, Filter("hel"), limit=2),
    ),
    "new messages come into the index of words": (
        lambda c: (queued(c), search.index_messages(c), queued(c)),
        lambda c, _: (search.is_behind(c), search.index_messages(c)),
    ),
    "delete a conversation": (
        queued,
        lambda c, _: conversation_changes.delete_conversations(c, ADMIN_ID, ["c"], NOW),
    ),
    "remove a deleted conversation": (
        lambda c: (queued(c), conversation_changes.delete_conversations(c, ADMIN_ID, ["c"], NOW)),
        lambda c, _: retention.remove_deleted(c, LATER, 100),
    ),
    "one": (queued, lambda c, job_id: reads.job_by_id(c, ADMIN_ID, job_id)),
    "latest": (queued, lambda c, _: conversations.latest(c, ADMIN_ID, "c")),
    "a turn's messages": (
        lambda c: (queued(c), finish(c, claimed(c)), queued(c)),
        lambda c, _: turns.read_turn(c, 2, 1000),
    ),
    "a conversation's messages": (queued, lambda c, _: conversations.messages(c, ADMIN_ID, "c")),
    "a thread": (queued, lambda c, _: conversations.thread(c, ADMIN_ID, "c", limit=9, max_text=200)),
    "a thread of many turns": (
        lambda c: [queued(c) for _ in range(20)],
        lambda c, _: conversations.thread(c, ADMIN_ID, "c", limit=20, max_text=200),
    ),
    "the longest beginning": (
        lambda c: (queued(c), finish(c, claimed(c))),
        lambda c, _: turns.longest_stored_prefix(
            c, ADMIN_ID, [Message(role="user", content="hello"), Message(role="assistant", content="a reply")]
        ),
    ),
    "continue a history": (
        lambda c: (queued(c), finish(c, claimed(c))),
        lambda c, _: submission.submit_history(
            c,
            prompt(conversation_id=None, inputs=[Message(role="user", content=text) for text in "abc"]),
            turns.StoredPrefix(1, 1, 2),
            NOW,
        ),
    ),
    "continue a response": (
        queued,
        lambda c, _: (submission.submit_behind(c, prompt(), 1, NOW), turns.job_before(c, 2)),
    ),
    "join a call": (called, lambda c, _: calls.join(c, "d", NOW, since_repeat=NOW - timedelta(days=1))),
    "leave a call": (called, lambda c, job_id: calls.leave(c, job_id, NOW)),
    "calls that were left": (
        lambda c: calls.leave(c, called(c), NOW),
        lambda c, _: (calls.first_left(c), calls.cancel_left(c, LATER, LATER)),
    ),
    "calls that expire": (
        lambda c: transitions.cancel(c, ADMIN_ID, called(c), NOW),
        lambda c, _: (
            retention.has_expired_calls(c, LATER, stored=True),
            retention.delete_expired_calls(c, LATER, 100, stored=True),
        ),
    ),
    "a sibling": (queued, lambda c, _: submission.submit_sibling(c, prompt(), 1, NOW)),
    "a fork": (
        lambda c: transitions.cancel(c, ADMIN_ID, queued(c), NOW),
        lambda c, _: submission.fork(c, ADMIN_ID, "c", 1, None, NOW),
    ),
    "a search": (queued, lambda c, _: listing.search(c, ADMIN_ID, JobFilter(status="queued"), limit=50, before=9)),
    "a search by all filters": (
        queued,
        lambda c, _: listing.search(
            c, ADMIN_ID, JobFilter("queued", "m", 1, "text", NOW - timedelta(days=1), LATER, "api"), limit=50
        ),
    ),
    "counts": (queued, lambda c, _: listing.count_by_status(c, ADMIN_ID, JobFilter())),
    "counts by all filters": (queued, lambda c, _: listing.count_by_status(c, ADMIN_ID, JobFilter(None, "m", 1, "x"))),
    "excerpts": (queued, lambda c, job_id: listing.excerpts(c, ADMIN_ID, [job_id], 300)),
    "the newest id": (queued, lambda c, _: listing.newest_id(c, ADMIN_ID)),
    "waiting classes": (queued, lambda c, _: statistics.waiting_classes(c, ADMIN_ID, ["m", "n"])),
    "the next jobs": (queued, lambda c, _: statistics.next_ids(c, ADMIN_ID, ["m", "n"], 50)),
    "running jobs": (queued, lambda c, _: statistics.running_ids(c, ADMIN_ID, 50)),
    "ended lately": (
        lambda c: transitions.cancel(c, ADMIN_ID, queued(c), NOW),
        lambda c, _: statistics.ended_lately(c, ADMIN_ID, NOW - timedelta(days=1), 1000),
    ),
    "details of a job": (queued, lambda c, job_id: details.job_details(c, ADMIN_ID, job_id)),
    "change of a class": (queued, lambda c, job_id: transitions.change_priority(c, ADMIN_ID, [job_id], 2)),
    "cancel jobs": (queued, lambda c, job_id: transitions.cancel_jobs(c, ADMIN_ID, [job_id], NOW)),
    "submit behind a turn": (queued, lambda c, _: submission.submit(c, prompt(parent=1), NOW)),
    "submit to the branch that was seen": (
        queued,
        lambda c, _: submission.submit(c, prompt()._replace(seen=1), NOW),
    ),
    "a thread of a fork": (
        lambda c: submission.fork(c, ADMIN_ID, "c", forkable(c), "fork", NOW),
        lambda c, _: conversations.thread(c, ADMIN_ID, "fork", limit=9, max_text=200),
    ),
    "a tree": (queued, lambda c, _: tree.tree(c, ADMIN_ID, "c", limit=9, after=0, max_text=200)),
    "select a branch": (queued, lambda c, _: tree.select_branch(c, ADMIN_ID, "c", 1)),
    "delete a turn": (
        lambda c: (queued(c), transitions.cancel(c, ADMIN_ID, queued(c), NOW)),
        lambda c, _: retention.delete_turn(c, ADMIN_ID, "c", 2),
    ),
    "edit a prompt": (queued, lambda c, job_id: transitions.edit_prompt(c, ADMIN_ID, job_id, "new")),
    "attempts": (queued, lambda c, job_id: reads.attempts(c, ADMIN_ID, job_id)),
    "held": (queued, lambda c, _: leases.active_leases(c)),
    "held by a worker": (queued, lambda c, _: leases.active_leases(c, 1)),
    "expire_queued": (lambda c: submission.submit(c, prompt(queue_timeout_s=60), NOW), expire_queued),
    "an answer to a key": (lambda c: None, lambda c, _: answered_before(c)),
    "has_expired": (queued, lambda c, _: retention.has_expired_jobs(c, LATER)),
    "expire": (
        lambda c: (transitions.cancel(c, ADMIN_ID, queued(c), NOW), queued(c)),
        lambda c, _: retention.delete_expired_jobs(c, LATER, 100),
    ),
    "look through conversations": (queued, lambda c, _: retention.scan_conversations(c, LATER, 0, 1000)),
    "forget conversations": (
        lambda c: submission.submit(c, prompt("", system_prompt="s"), NOW),
        lambda c, _: retention.delete_expired_conversations(c, LATER, [1]),
    ),
    "forget keys": (answered_before, forget),
}

THREAD = {"SCAN path", "SCAN earlier", "SCAN foreign", "SCAN everyone", "SCAN (subquery)"}
WHOLE_INDEXES = {
    # What is being worked on just now: as many rows as there are slots.
    "heartbeat": {"SCAN jobs USING INDEX one_processing"},
    "held": {"SCAN jobs USING INDEX one_processing"},
    # And what waits, once every half a second at most.
    "load": {"SCAN jobs USING INDEX one_processing", "SCAN jobs USING INDEX due"},
    # One path of turns.
    "a fork": {"SCAN path"},
    "latest": {"SCAN path", "SCAN by_role", "SCAN (subquery)"},
    "a turn's messages": {"SCAN path"},
    "a conversation's messages": {"SCAN path"},
    "submit to the branch that was seen": {"SCAN path"},
    # One path of turns, and the siblings of a page.
    "a thread": THREAD,
    "a thread of many turns": THREAD,
    "a thread of a fork": THREAD,
    "a tree": {"SCAN foreign"},
    # The turns below one.
    "select a branch": {"SCAN below"},
    "delete a turn": {"SCAN below"},
    "the longest beginning": {"SCAN path"},
    # The turns of one conversation that forks read.
    "remove a deleted conversation": {"SCAN continued"},
    # The newest 2,000 turns.
    "conversations, newest first": {"SCAN turns", "SCAN newest_turns"},
    # The first job that waits of each conversation.
    "conversations that wait": {"SCAN jobs USING INDEX heads"},
    # What the index of words finds, in the order that is asked for, up to the limit.
    "conversations that match": {
        "SCAN texts VIRTUAL TABLE INDEX 64:M1<",
        "SCAN texts VIRTUAL TABLE INDEX 192:M1>",
        "SCAN found",
    },
    # Backwards from the newest message to the newest that is indexed.
    "new messages come into the index of words": {"SCAN m"},
    # A window of jobs.
    "a search by all filters": {"SCAN searched"},
    "counts": {"SCAN searched"},
    "counts by all filters": {"SCAN searched"},
    "waiting classes": {"SCAN waiting"},
}
"""The only scans that are allowed: partial indexes of open jobs, and rows that are bounded already."""


OF_AN_OWNER = {
    # In the order that is asked for, up to the limit.
    "newest": {"SEARCH jobs USING INDEX jobs_of_owner (owner_id=?)"},
    "newest of a source": {"SEARCH jobs USING INDEX jobs_of_owner (owner_id=?)"},
    # Its last entry.
    "the newest id": {"SEARCH jobs USING COVERING INDEX jobs_of_owner (owner_id=?)"},
}
"""Indexes by which all rows of an owner are read."""


def plan_of(sqlite_engine: Engine, name: str) -> list[str]:
    prepare, run = OPERATIONS[name]
    steps: list[str] = []
    with sqlite_engine.begin() as connection:
        register_worker(connection)
        prepared = prepare(connection)
        with explained(connection, steps):
            run(connection, prepared)
    return steps


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_statement_scans_a_table(sqlite_engine: Engine, name: str) -> None:
    steps = plan_of(sqlite_engine, name)
    assert steps
    # How many subqueries a statement has before one is of no interest.
    steps = [re.sub(r"\(subquery-\d+\)", "(subquery)", step) for step in steps]
    read_whole = {step for step in steps if step.startswith("SCAN") and step != "SCAN CONSTANT ROW"}
    assert read_whole == WHOLE_INDEXES.get(name, set())
    # That would be everything in an installation of one person.
    assert {step for step in steps if step.endswith("(owner_id=?)")} == OF_AN_OWNER.get(name, set())


@pytest.mark.parametrize("name", ["a thread", "a thread of a fork"])
def test_the_siblings_of_a_page_are_found_by_their_parents(sqlite_engine: Engine, name: str) -> None:
    steps = plan_of(sqlite_engine, name)
    places = steps[steps.index("CO-ROUTINE everyone") : steps.index("SCAN everyone")]
    assert [step for step in places if step.startswith("SEARCH turns ")] == [
        "SEARCH turns USING INDEX ix_turns_parent_id (parent_id=?)"
    ]


def test_the_deletion_of_a_turn_does_not_scan_the_jobs_of_its_conversation(sqlite_engine: Engine) -> None:
    steps = plan_of(sqlite_engine, "expire")
    assert "SEARCH jobs USING INDEX sqlite_autoindex_jobs_2 (turn_id=?)" in steps


def test_a_retry_of_matching_jobs_reads_no_other_jobs_of_the_owner(sqlite_engine: Engine) -> None:
    steps = plan_of(sqlite_engine, "retry all that match")
    assert "SEARCH jobs USING INDEX jobs_of_owner_by_status (owner_id=? AND status=?)" in steps


@contextmanager
def steps_counted(connection: Connection, counts: list[int]) -> Iterator[None]:
    """Appends how much SQLite did within, in hundreds of its virtual machine's steps."""
    n_steps = 0

    def count() -> None:
        nonlocal n_steps
        n_steps += 1

    sqlite = connection.connection.driver_connection
    assert sqlite is not None
    sqlite.set_progress_handler(count, 100)
    yield
    sqlite.set_progress_handler(None, 0)
    counts.append(n_steps)


def test_the_words_of_a_message_cost_the_same_however_many_are_indexed(sqlite_engine: Engine) -> None:
    counts: list[int] = []
    with sqlite_engine.begin() as connection:
        for n_messages in (1, 300):
            for _ in range(n_messages):
                queued(connection)
            while search.index_messages(connection):
                pass
            queued(connection)
            with steps_counted(connection, counts):
                assert search.is_behind(connection)
                assert not search.index_messages(connection)
    few, many = counts
    assert many < few + 10


def test_the_cost_of_retention_is_linear_in_the_number_of_system_messages(sqlite_engine: Engine) -> None:
    def steps(n_turns: int) -> int:
        conversation_id = f"of {n_turns} turns"
        counts: list[int] = []
        with sqlite_engine.begin() as connection:
            for n in range(n_turns):
                job_id = submission.submit(
                    connection, prompt("x", conversation_id, system_prompt=f"of turn {n}"), NOW
                ).job_id
                assert job_id is not None
                transitions.cancel(connection, ADMIN_ID, job_id, NOW)
            with steps_counted(connection, counts):
                assert retention.delete_expired_jobs(connection, LATER, 10) == 10
            while retention.delete_expired_jobs(connection, LATER, 100):
                pass
        return counts[0]

    assert steps(400) < 6 * steps(100)


def test_a_page_of_a_conversation_costs_the_same_however_long_that_is(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "MAX_EARLIER", 20)
    newest_pages: list[int] = []
    early_pages: list[int] = []
    with sqlite_engine.begin() as connection:
        for n_turns in (100, 500):
            ids = [
                submission.submit(connection, prompt("x", f"of {n_turns}"), NOW).turn_id or 0 for _ in range(n_turns)
            ]
            with steps_counted(connection, newest_pages):
                thread = conversations.thread(connection, ADMIN_ID, f"of {n_turns}", limit=10, max_text=9)
            assert thread is not None
            earlier = (thread.n_earlier, thread.earlier_until, thread.last_earlier)
            assert earlier == (20, n_turns - 10, ids[n_turns - 11])
            assert not thread.counts_all_earlier
            with steps_counted(connection, early_pages):
                thread = conversations.thread(
                    connection, ADMIN_ID, f"of {n_turns}", limit=10, max_text=9, before=20, last=ids[19]
                )
            assert thread is not None
            assert [turn.turn_id for turn in thread.turns] == ids[10:20]
            assert (thread.n_earlier, thread.last_earlier, thread.until) == (10, ids[9], 20)
            assert thread.last_turn_id == ids[-1]
        foreign = conversations.thread(
            connection, ADMIN_ID, f"of {n_turns}", limit=10, max_text=9, before=20, last=ids[0] - 1
        )
        assert foreign is not None
        assert [turn.turn_id for turn in foreign.turns] == ids[10:20], "a turn of another conversation says nothing"
    assert newest_pages[1] < 1.5 * newest_pages[0]
    assert early_pages[1] < 1.5 * early_pages[0]


@pytest.mark.parametrize("name", ["claim", "due"])
def test_jobs_behind_the_first_in_a_lane_are_not_read(sqlite_engine: Engine, name: str) -> None:
    steps = plan_of(sqlite_engine, name)
    assert "SEARCH jobs USING INDEX heads (model=? AND priority=?)" in steps
    assert [step for step in steps if "ORDER BY" in step or "INDEX due" in step] == []


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name.startswith("newest")])
def test_the_newest_rows_are_found_without_a_sort_of_all(sqlite_engine: Engine, name: str) -> None:
    assert [step for step in plan_of(sqlite_engine, name) if "ORDER BY" in step] == []
