"""Titles that a model writes: asked for once, in nobody's way, and never over a person's."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Connection, Engine, text

from llamalith_app.store import check, conversation_changes, conversation_list, conversations, search, titles, turns
from llamalith_app.store.conversation_changes import Change
from llamalith_app.store.conversation_list import Filter
from llamalith_app.store.jobs import listing, reads, submission, transitions, waiting
from llamalith_app.store.tables import Priority, Source, Status
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, fail, finish, prompt, register_worker

INTERACTIVE, BATCH = Priority.INTERACTIVE.value, Priority.BATCH.value


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.begin() as connection:
        register_worker(connection)
        yield connection
        assert check.violations(connection) == []


def chat(connection: Connection, public_id: str = "a", source: Source = Source.PAGE) -> None:
    """A conversation with one reply."""
    new = prompt("What is a queue?", public_id, source=source, priority="interactive", system_prompt="be kind")
    submission.submit(connection, new, NOW)
    assert finish(connection, claim(connection, INTERACTIVE), "A line.")


def claim(connection: Connection, priority: int) -> transitions.Claim:
    claimed = transitions.claim(connection, "m", priority, 1, NOW)
    assert claimed is not None
    return claimed


def asked(connection: Connection) -> list[int]:
    """The jobs for titles that are made now."""
    wanted = titles.work(connection, NOW, 9).ask_for
    return [job_id for one in wanted if (job_id := titles.ask(connection, one, NOW)) is not None]


def collected(connection: Connection) -> list[str | None]:
    return [titles.collect(connection, fork_id) for fork_id in titles.work(connection, NOW, 9).collect]


def title(connection: Connection, public_id: str = "a") -> str | None:
    found = conversation_list.conversation(connection, ADMIN_ID, public_id)
    assert found is not None
    return found.title


def test_a_conversation_of_the_page_gets_a_title_after_its_first_reply(connection: Connection) -> None:
    submission.submit(connection, prompt("not answered yet", "b", source=Source.PAGE), NOW)
    chat(connection)
    messages = conversations.messages(connection, ADMIN_ID, "a")
    (job_id,) = asked(connection)
    assert asked(connection) == [], "once"
    assert collected(connection) == [], "not before it has ended"
    claimed = claim(connection, BATCH)
    assert claimed.job_id == job_id
    read = turns.read_turn(connection, claimed.turn_id, 10**6).messages
    assert [(one.role, one.content) for one in read] == [
        ("system", "be kind"),
        ("user", "What is a queue?"),
        ("assistant", "A line."),
        ("user", titles.QUESTION),
    ], "the engine has read all but the question"
    assert finish(connection, claimed, '{"title": "Queues, explained"}')
    assert collected(connection) == ["Queues, explained"]
    assert title(connection) == "Queues, explained"
    assert conversations.messages(connection, ADMIN_ID, "a") == messages
    assert reads.job_by_id(connection, ADMIN_ID, job_id) is None
    assert connection.execute(text("SELECT count(*) FROM conversations")).scalar_one() == 2
    assert titles.work(connection, NOW, 9) == titles.Work([], [])


def test_it_is_in_no_list_and_in_nobodys_way(connection: Connection) -> None:
    chat(connection)
    (job_id,) = asked(connection)
    assert [job.user_input for job in reads.newest(connection, ADMIN_ID, limit=9)] == ["What is a queue?"]
    assert len(listing.search(connection, ADMIN_ID, listing.JobFilter(), limit=9).ids) == 1
    assert listing.count_by_status(connection, ADMIN_ID, listing.JobFilter())[Status.QUEUED].n == 0
    assert [one.public_id for one in conversation_list.listed(connection, ADMIN_ID, Filter(), limit=9)] == ["a"]
    assert not search.index_messages(connection)
    assert conversation_list.listed(connection, ADMIN_ID, Filter("title"), limit=9) == []
    submission.submit(connection, prompt("and then?", "a", priority="interactive"), NOW)
    due = waiting.due_jobs(connection, ["m"], NOW)
    assert [(jobs.priority, jobs.n_jobs) for jobs in due] == [(INTERACTIVE, 1), (BATCH, 1)], (
        "the chat waits for nothing"
    )
    assert transitions.cancel(connection, ADMIN_ID, job_id, NOW) is Status.CANCELLED
    assert collected(connection) == [None]
    assert asked(connection) == []


def test_nothing_is_asked_of_a_conversation_that_runs_or_is_none_of_the_page_or_is_old(connection: Connection) -> None:
    for source in (Source.API, Source.LEGACY, Source.IMPORT):
        chat(connection, source.value, source)
    chat(connection)
    assert titles.work(connection, NOW + titles.MAX_AGE, 9).ask_for == []
    submission.submit(connection, prompt("more", "a"), NOW)
    assert asked(connection) == []
    finish(connection, claim(connection, Priority.NORMAL.value))
    assert len(asked(connection)) == 1


def test_a_title_of_a_person_stays(connection: Connection) -> None:
    chat(connection)
    conversation_changes.change(connection, ADMIN_ID, ["a"], Change(title="Mine"), NOW)
    assert asked(connection) == []
    chat(connection, "b")
    assert len(asked(connection)) == 1
    conversation_changes.change(connection, ADMIN_ID, ["b"], Change(title="Mine, too"), NOW)
    assert finish(connection, claim(connection, BATCH), '{"title": "A machine\'s"}')
    assert collected(connection) == [None]
    assert title(connection, "b") == "Mine, too"
    conversation_changes.change(connection, ADMIN_ID, ["b"], Change(title=""), NOW)
    assert asked(connection) == [], "who takes a title away wants none"


def test_a_job_that_fails_brings_no_title_and_is_not_repeated(connection: Connection) -> None:
    chat(connection)
    asked(connection)
    assert fail(connection, claim(connection, BATCH)) is Status.ERROR
    assert collected(connection) == [None]
    assert asked(connection) == []
    assert title(connection) is None
    shown = conversation_list.conversation(connection, ADMIN_ID, "a")
    assert shown is not None
    assert shown.name == "What is a queue?"


def test_with_its_conversation_the_job_for_its_title_is_cancelled(connection: Connection) -> None:
    chat(connection)
    (job_id,) = asked(connection)
    deletion = conversation_changes.delete_conversations(connection, ADMIN_ID, ["a"], NOW)
    assert deletion.cancelled == [job_id]
    assert collected(connection) == [None]
    conversation_changes.restore(connection, ADMIN_ID, ["a"], NOW - timedelta(days=1))
    assert title(connection) is None


@pytest.mark.parametrize(
    ("reply", "title"),
    [
        ('{"title": "Plain"}', "Plain"),
        ('{"title": " \\"In quotes\\". "}', "In quotes"),
        ('{"title": "Title: **Bold**\\nsecond line"}', "Bold** second line"),
        ('{"title": "' + "word " * 30 + '"}', "word " * 14 + "word…"),
        ('{"title": "cut off in the mid', "cut off in the mid"),
        ('{"title": "\\u0000\\u202e\\u200b"}', None),
        ('{"title": "   "}', None),
        ('{"title": 7}', None),
        ('{"title": "At most six words"}', None),
        ("I cannot", None),
        ("", None),
        ("[" * 10_000, None),
    ],
)
def test_a_title_is_one_clean_line(reply: str, title: str | None) -> None:
    assert titles.title_in(reply) == title
