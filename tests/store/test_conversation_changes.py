"""What people do with whole conversations: name, pin, archive, tag, delete and restore them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import Connection, Engine, text

from llamalith_app.contracts.conversations import Message
from llamalith_app.errors import BadInput, ConversationExists, NotFound
from llamalith_app.store import (
    check,
    conversation_changes,
    conversation_list,
    conversations,
    retention,
    search,
    tree,
    turns,
)
from llamalith_app.store.conversation_changes import MAX_TAGS, Change
from llamalith_app.store.conversation_list import Filter, first_words
from llamalith_app.store.jobs import listing, reads, submission, transitions
from llamalith_app.store.tables import Source, Status
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, finish, prompt, register_worker

LATER = NOW + timedelta(days=1)
LONG_AGO = NOW - timedelta(days=9)


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.begin() as connection:
        register_worker(connection)
        yield connection
        assert check.violations(connection) == []


def queue(connection: Connection, public_id: str, content: str = "hello", source: Source = Source.API) -> int:
    job_id = submission.submit(connection, prompt(content, public_id, source=source), NOW).job_id
    assert job_id is not None
    return job_id


def answer(connection: Connection, reply: str = "a reply") -> transitions.Claim:
    claimed = transitions.claim(connection, "m", 1, 1, NOW)
    assert claimed is not None
    assert finish(connection, claimed, reply)
    return claimed


def listed(connection: Connection, which: Filter | None = None) -> list[str]:
    return [one.public_id for one in conversation_list.listed(connection, ADMIN_ID, which or Filter(), limit=99)]


def change(connection: Connection, public_id: str, wanted: Change) -> list[str]:
    return conversation_changes.change(connection, ADMIN_ID, [public_id], wanted, NOW)


def delete(connection: Connection, *public_ids: str, at: datetime = NOW) -> conversation_changes.Deletion:
    return conversation_changes.delete_conversations(connection, ADMIN_ID, public_ids, at)


def test_the_sidebar_has_pinned_conversations_above_the_newest_and_no_archived_ones(connection: Connection) -> None:
    for name in "abcd":
        queue(connection, name)
    change(connection, "b", Change(is_pinned=True))
    change(connection, "c", Change(is_archived=True))
    shown = conversation_list.sidebar(connection, ADMIN_ID)
    assert [one.public_id for one in shown.pinned] == ["b"]
    assert [one.public_id for one in shown.recent] == ["d", "a"]
    change(connection, "b", Change(is_pinned=False, is_archived=True))
    shown = conversation_list.sidebar(connection, ADMIN_ID)
    assert [one.public_id for one in (*shown.pinned, *shown.recent)] == ["d", "a"]


def test_lists_are_filtered_by_archive_tag_and_source(connection: Connection) -> None:
    for name, source in (("a", Source.PAGE), ("b", Source.API), ("c", Source.LEGACY), ("d", Source.PAGE)):
        queue(connection, name, source=source)
    change(connection, "d", Change(is_archived=True, add_tags=["x y"]))
    change(connection, "a", Change(tags=["x y", "z"]))
    assert listed(connection) == ["c", "b", "a"]
    assert listed(connection, Filter(is_archived=True)) == ["d"]
    assert listed(connection, Filter(is_archived=None, tag="x y")) == ["d", "a"]
    assert listed(connection, Filter(source="page")) == ["a"]
    assert conversation_list.tags(connection, ADMIN_ID) == ["x y", "z"]
    change(connection, "a", Change(remove_tags=["x y"], add_tags=["w"]))
    (one,) = conversation_list.listed(connection, ADMIN_ID, Filter(tag="z"), limit=9)
    assert one.tags == ("w", "z")


def test_what_the_product_asks_for_itself_is_in_no_list(connection: Connection) -> None:
    queue(connection, "a title", source=Source.TITLE)
    assert listed(connection) == []
    assert reads.newest(connection, ADMIN_ID, limit=9) == []
    assert reads.newest_briefs(connection, ADMIN_ID, limit=9) == []


def test_a_title_stands_for_the_first_words_until_it_is_taken_away(connection: Connection) -> None:
    queue(connection, "a", "  What is\n a queue, " + "and why " * 20)
    assert conversation_list.sidebar(connection, ADMIN_ID).recent[0].name == (
        "What is a queue, and why and why and why and why and why and why and why and…"
    )
    change(connection, "a", Change(title="Queues"))
    assert conversation_list.sidebar(connection, ADMIN_ID).recent[0].name == "Queues"
    change(connection, "a", Change(title=""))
    assert conversation_list.sidebar(connection, ADMIN_ID).recent[0].title is None


@pytest.mark.parametrize(
    ("prompt", "name"),
    [(" \n", None), ("short", "short"), ("x" * 80, "x" * 80), ("x" * 81, "x" * 79 + "…"), ("a " + "x" * 90, None)],
)
def test_a_name_is_one_line_of_whole_words_where_they_are_not_too_long(prompt: str, name: str | None) -> None:
    assert first_words(prompt) == (name or ("a " + "x" * 77 + "…" if "a " in prompt else None))


def test_a_conversation_has_a_bounded_number_of_tags(connection: Connection) -> None:
    queue(connection, "a")
    change(connection, "a", Change(tags=[f"t{n}" for n in range(MAX_TAGS)]))
    change(connection, "a", Change(add_tags=["t1"]))
    with pytest.raises(BadInput, match="tags: a conversation has at most 20"):
        change(connection, "a", Change(add_tags=["one more"]))


def test_conversations_are_grouped_by_the_day_of_the_viewer(connection: Connection) -> None:
    at = datetime(2026, 11, 24, 23, 30, tzinfo=UTC)
    ago = {"a": 0.0, "b": 23.0, "c": 24.0 * 3, "d": 24.0 * 7, "e": 24.0 * 30, "f": 24.0 * 31}
    for name, hours in reversed(ago.items()):
        submission.submit(connection, prompt("x", name), at - timedelta(hours=hours))
    found = conversation_list.listed(connection, ADMIN_ID, Filter(), limit=9)

    def groups(zone: str) -> list[tuple[str, str, str]]:
        days = conversation_list.by_day(found, at, ZoneInfo(zone))
        return [(day.key, str(day.first), "".join(one.public_id for one in day.conversations)) for day in days]

    assert groups("UTC") == [
        ("today", "2026-11-24", "ab"),
        ("week", "2026-11-17", "cd"),
        ("month", "2026-10-01", "ef"),
    ]
    assert groups("Europe/Berlin") == [
        ("today", "2026-11-25", "a"),
        ("yesterday", "2026-11-24", "b"),
        ("week", "2026-11-18", "cd"),
        ("month", "2026-10-01", "ef"),
    ]


def test_a_deleted_conversation_is_gone_for_every_reader_and_its_open_jobs_are_cancelled(
    connection: Connection,
) -> None:
    done, running, waiting = (queue(connection, "a") for _ in range(3))
    claimed = answer(connection)
    assert transitions.claim(connection, "m", 1, 1, NOW) is not None
    other = queue(connection, "b")
    deletion = delete(connection, "a", "a", "nothing")
    assert (deletion.public_ids, sorted(deletion.cancelled)) == (["a"], [running, waiting])
    assert listed(connection) == ["b"]
    assert not conversations.exists(connection, ADMIN_ID, "a")
    assert conversations.messages(connection, ADMIN_ID, "a") == []
    assert not conversations.latest(connection, ADMIN_ID, "a").exists
    assert conversations.lane(connection, ADMIN_ID, "a") is None
    assert conversations.lanes(connection, ADMIN_ID, [(1, None), (2, None), (10**18 - 1, 1)]) == [
        None,
        conversations.Lane(2, [other], other),
        None,
    ]
    assert conversations.thread(connection, ADMIN_ID, "a", limit=9, max_text=9) is None
    assert [job.id for job in reads.newest(connection, ADMIN_ID, limit=9)] == [other]
    assert [job.id for job in reads.newest_briefs(connection, ADMIN_ID, limit=9)] == [other]
    assert reads.newest(connection, ADMIN_ID, limit=9, conversation_id="a") == []
    assert listing.search(connection, ADMIN_ID, listing.JobFilter(), limit=9).ids == [other]
    assert listing.search(connection, ADMIN_ID, listing.JobFilter(text="hello"), limit=9).ids == [other]
    assert reads.job_by_id(connection, ADMIN_ID, done) is None
    assert reads.attempts(connection, ADMIN_ID, done) is None
    assert submission.retry(connection, ADMIN_ID, waiting, "r", NOW) is None
    retried = submission.retry_matching(
        connection, ADMIN_ID, "r", NOW, statuses=[Status.CANCELLED], models=["m"], limit=9
    )
    assert retried == []
    with pytest.raises(NotFound):
        submission.fork(connection, ADMIN_ID, "a", claimed.turn_id, None, NOW)
    with pytest.raises(NotFound):
        tree.select_branch(connection, ADMIN_ID, "a", claimed.turn_id)
    assert transitions.edit_prompt(connection, ADMIN_ID, waiting, "x") is None
    assert submission.submit_sibling(connection, prompt(), claimed.turn_id, NOW) is None
    history = [Message(role="user", content="hello"), Message(role="assistant", content="a reply")]
    asked = [*history, Message(role="user", content="x")]
    assert turns.longest_stored_prefix(connection, ADMIN_ID, asked) is None
    assert conversation_changes.deleted_at(connection, ADMIN_ID, NOW) == ["a"]
    assert conversation_changes.restore(connection, ADMIN_ID, ["a", "nothing"], LONG_AGO) == ["a"]
    assert len(conversations.messages(connection, ADMIN_ID, "a")) == 4
    job = reads.job_by_id(connection, ADMIN_ID, waiting)
    assert job is not None
    assert job.status == "cancelled"
    assert turns.longest_stored_prefix(connection, ADMIN_ID, asked) is not None
    assert conversation_changes.restore(connection, ADMIN_ID, ["a"], LONG_AGO) == ["a"], "it is there already"


def test_a_new_prompt_under_the_id_of_a_deleted_conversation_begins_another_one(connection: Connection) -> None:
    queue(connection, "a", "the old one")
    answer(connection)
    delete(connection, "a")
    queue(connection, "a", "the new one")
    assert [message.content for message in conversations.messages(connection, ADMIN_ID, "a")] == ["the new one"]
    with pytest.raises(ConversationExists, match="under the id a"):
        conversation_changes.restore(connection, ADMIN_ID, ["a"], LONG_AGO)
    delete(connection, "a", at=LATER)
    assert conversation_changes.restore(connection, ADMIN_ID, ["a"], LONG_AGO) == ["a"]
    assert [message.content for message in conversations.messages(connection, ADMIN_ID, "a")] == ["the new one"]


def test_after_its_time_a_deleted_conversation_is_removed_some_turns_at_a_time(connection: Connection) -> None:
    for number in range(3):
        queue(connection, "a", f"prompt {number}")
        answer(connection)
    queue(connection, "b")
    change(connection, "a", Change(title="A", tags=["x"]))
    delete(connection, "a")
    assert retention.deleted_conversations(connection, NOW - timedelta(seconds=1)) == []
    assert conversation_changes.restore(connection, ADMIN_ID, ["a"], NOW) == [], "its time is over"
    assert retention.remove_deleted(connection, NOW, 2) == 2
    assert check.violations(connection) == []
    assert retention.remove_deleted(connection, NOW, 2) == 1
    assert retention.deleted_conversations(connection, NOW) == []
    assert connection.execute(text("SELECT count(*) FROM conversations")).scalar_one() == 1
    assert connection.execute(text("SELECT count(*) FROM conversation_tags")).scalar_one() == 0
    assert listed(connection) == ["b"]


def test_a_fork_keeps_what_it_reads_of_a_conversation_that_is_removed(connection: Connection) -> None:
    queue(connection, "a", "the beginning")
    first = answer(connection).turn_id
    queue(connection, "a", "goes on")
    answer(connection)
    fork = submission.fork(connection, ADMIN_ID, "a", first, None, NOW)
    queue(connection, fork.conversation_id, "the fork")
    answer(connection)
    delete(connection, "a")
    assert retention.remove_deleted(connection, NOW, 100) == 1
    assert retention.deleted_conversations(connection, NOW) == [], "nothing more can be removed now"
    thread = conversations.thread(connection, ADMIN_ID, fork.conversation_id, limit=9, max_text=9)
    assert thread is not None
    assert next(turn.job and turn.job.result for turn in thread.turns) == "a reply", "the page shows it, too"
    again = submission.submit_sibling(connection, prompt("instead", fork.conversation_id), first, NOW)
    assert again is not None
    answer(connection)
    tree.select_branch(connection, ADMIN_ID, fork.conversation_id, fork.head_turn_id)
    contents = [message.content for message in conversations.messages(connection, ADMIN_ID, fork.conversation_id)]
    assert contents == ["the beginning", "a reply", "the fork", "a reply"]
    assert check.violations(connection) == []
    delete(connection, fork.conversation_id)
    while retention.deleted_conversations(connection, NOW):
        assert retention.remove_deleted(connection, NOW, 1) == 1
        assert check.violations(connection) == []
    assert connection.execute(text("SELECT count(*) FROM turns")).scalar_one() == 0
    assert connection.execute(text("SELECT count(*) FROM conversations")).scalar_one() == 0


def test_nobody_changes_the_conversations_of_others(connection: Connection) -> None:
    connection.execute(
        text("INSERT INTO users (id, name, role, created_at) VALUES (7, 'other', 'user', '2026-11-24 00:00:00')")
    )
    queue(connection, "a")
    assert conversation_changes.change(connection, 7, ["a"], Change(title="mine"), NOW) == []
    assert conversation_changes.delete_conversations(connection, 7, ["a"], NOW).public_ids == []
    delete(connection, "a")
    assert conversation_changes.restore(connection, 7, ["a"], LONG_AGO) == []
    assert conversation_changes.deleted_at(connection, 7, NOW) == []
    assert conversation_changes.restore(connection, ADMIN_ID, ["a"], LONG_AGO) == ["a"]
    assert conversation_list.sidebar(connection, 7).recent == []
    assert conversations.lanes(connection, 7, [(1, None)]) == [None]
    assert not search.index_messages(connection)
    assert conversation_list.listed(connection, 7, Filter("hello"), limit=9) == []
