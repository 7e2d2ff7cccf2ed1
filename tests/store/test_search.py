"""Conversations are found by words in their titles and messages, and only by those that are there."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, text

from llamalith_app.store import backup, check, conversation_changes, conversation_list, retention, search
from llamalith_app.store.conversation_changes import Change
from llamalith_app.store.conversation_list import Filter, Listed
from llamalith_app.store.database import write_engine
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, finish, prompt, register_worker


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.begin() as connection:
        register_worker(connection)
        yield connection
        assert check.violations(connection) == []


def ask(connection: Connection, public_id: str, content: str, reply: str | None = None, system: str = "") -> None:
    submission.submit(connection, prompt(content, public_id, system_prompt=system), NOW)
    if reply is not None:
        claimed = transitions.claim(connection, "m", 1, 1, NOW)
        assert claimed is not None
        assert finish(connection, claimed, reply)


def listed(connection: Connection, query: str, limit: int = 99, before: int | None = None) -> list[Listed]:
    assert not search.index_messages(connection)
    return conversation_list.listed(connection, ADMIN_ID, Filter(query), limit=limit, before=before)


def found(connection: Connection, query: str) -> list[str]:
    return [one.public_id for one in listed(connection, query)]


def test_prompts_replies_and_titles_are_searched_and_system_prompts_are_not(connection: Connection) -> None:
    ask(connection, "a", "where is the harbour", "beside the lighthouse", system="be nautical")
    ask(connection, "b", "another harbour")
    conversation_changes.change(connection, ADMIN_ID, ["b"], Change(title="Ships and boats"), NOW)
    assert found(connection, "harbour") == ["b", "a"]
    assert found(connection, "LIGHTHOUSE") == ["a"]
    assert found(connection, "boats ships") == ["b"]
    assert found(connection, "nautical") == []
    assert found(connection, "harbour lighthouse") == [], "all words stand in one message"


def test_a_word_finds_longer_ones_and_a_phrase_only_itself(connection: Connection) -> None:
    ask(connection, "a", "the lightest houses")
    assert found(connection, "light hous") == ["a"]
    assert found(connection, '"lightest houses"') == ["a"]
    assert found(connection, '"houses lightest"') == []


def test_titles_are_searched_for_longer_words_unless_these_stand_in_very_many_messages(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite_engine.begin() as connection:
        for public_id in "abc":
            ask(connection, public_id, f"lightest {public_id}")
        for public_id, title in (("a", "A lighthouse"), ("b", "A light")):
            conversation_changes.change(connection, ADMIN_ID, [public_id], Change(title=title), NOW)
        assert found(connection, "light") == ["c", "b", "a"]
        monkeypatch.setattr(search, "MAX_HITS", 1)
        assert found(connection, "light") == ["c", "b"], "the word itself is found in titles all the same"
        assert found(connection, "lighthouse") == ["a"]


def test_case_and_diacritics_do_not_count(sqlite_engine: Engine) -> None:
    with sqlite_engine.begin() as connection:
        ask(connection, "a", "ÉCOLE supérieure, Straße, naïve")
        assert found(connection, "ecole superieure") == ["a"]
        (one,) = listed(connection, "naive superieure", limit=9)
    assert one.snippet is not None
    assert [part for part, is_found in one.snippet.parts if is_found] == ["supérieure", "naïve"]


def test_a_snippet_shows_the_newest_message_around_the_first_word(connection: Connection) -> None:
    ask(connection, "a", "needle", "nothing " * 100 + "before the\n\nneedle   and " + "after " * 100)
    (one,) = listed(connection, "needle", limit=9)
    assert one.snippet is not None
    shown, ((start, end),) = one.snippet
    assert shown[start:end] == "needle"
    assert shown.startswith("…nothing nothing nothing before the needle and after")
    assert shown.endswith("…")
    assert len(shown) <= search.SNIPPET_CHARS + 2


def test_a_search_goes_on_where_a_page_ended(connection: Connection) -> None:
    for number in range(5):
        ask(connection, f"c{number}", "the same words")
    first = listed(connection, "same", limit=3)
    more = listed(connection, "same", limit=3, before=first[-1].cursor)
    assert [one.public_id for one in (*first, *more)] == ["c4", "c3", "c2", "c1", "c0"]


def test_what_is_deleted_is_found_no_more_and_its_words_leave_the_index(connection: Connection) -> None:
    ask(connection, "a", "unusual", "remarkable")
    conversation_changes.change(connection, ADMIN_ID, ["a"], Change(title="extraordinary"), NOW)
    ask(connection, "b", "unusual", "remarkable")
    conversation_changes.delete_conversations(connection, ADMIN_ID, ["a"], NOW)
    for word in ("unusual", "remarkable"):
        assert found(connection, word) == ["b"]
    assert found(connection, "extraordinary") == []
    assert retention.remove_deleted(connection, NOW, 100) == 1
    assert found(connection, "unusual") == ["b"]
    assert check.violations(connection) == []
    retention.delete_expired_jobs(connection, NOW + timedelta(days=1), 100)
    assert found(connection, "unusual") == []
    assert check.violations(connection) == []


def test_a_prompt_that_changes_while_it_waits_is_found_as_it_is_now(connection: Connection) -> None:
    job_id = submission.submit(connection, prompt("before", "a"), NOW).job_id
    assert job_id is not None
    assert transitions.edit_prompt(connection, ADMIN_ID, job_id, "after")
    assert [found(connection, word) for word in ("before", "after")] == [[], ["a"]]


def test_a_title_is_found_as_it_is_now(connection: Connection) -> None:
    ask(connection, "a", "x")
    for title in ("first", "second", "", "third"):
        conversation_changes.change(connection, ADMIN_ID, ["a"], Change(title=title), NOW)
        assert [word for word in ("first", "second", "third") if found(connection, word)] == [title][: len(title)]


def test_a_long_message_is_searched_up_to_a_limit(sqlite_engine: Engine) -> None:
    with sqlite_engine.begin() as connection:
        register_worker(connection)
        ask(connection, "a", "early " + "x" * search.INDEXED_CHARS + " late", "y")
        assert found(connection, "early") == ["a"]
        assert found(connection, "late") == []
        assert retention.delete_expired_jobs(connection, NOW + timedelta(days=1), 100) == 1
        assert found(connection, "early") == []
        assert check.violations(connection) == []


def test_new_messages_are_indexed_some_at_a_time_and_none_is_forgotten(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MAX_INDEXED_CHARS", 12)
    with sqlite_engine.begin() as connection:
        register_worker(connection)
        ask(connection, "a", "one", "two")
        ask(connection, "b", "a prompt that is longer than the limit", "x")
        ask(connection, "a", "three", "four")
        assert search.is_behind(connection)
        n_transactions = 1
        while search.index_messages(connection):
            n_transactions += 1
            assert check.violations(connection) == []
        assert not search.is_behind(connection)
        assert n_transactions == 3
        assert [found(connection, word) for word in ("one", "longer", "four")] == [["a"], ["b"], ["a"]]


def test_messages_that_change_or_go_before_they_are_indexed_leave_no_trace(sqlite_engine: Engine) -> None:
    with sqlite_engine.begin() as connection:
        register_worker(connection)
        ask(connection, "a", "first", "second")
        ask(connection, "b", "third", "fourth")
        assert not search.index_messages(connection)
        # The newest messages go, so that those after them take their places in the order.
        conversation_changes.delete_conversations(connection, ADMIN_ID, ["b"], NOW)
        retention.remove_deleted(connection, NOW, 100)
        ask(connection, "c", "fifth", "sixth")
        ask(connection, "d", "seventh")
        job_id = submission.submit(connection, prompt("eighth", "d"), NOW).job_id
        assert job_id is not None
        assert transitions.edit_prompt(connection, ADMIN_ID, job_id, "ninth")
        conversation_changes.delete_conversations(connection, ADMIN_ID, ["c"], NOW)
        retention.remove_deleted(connection, NOW, 100)
        assert check.violations(connection) == []
        words = ("first", "third", "fifth", "sixth", "seventh", "eighth", "ninth")
        assert [found(connection, word) for word in words] == [["a"], [], [], [], ["d"], [], ["d"]]
        assert check.violations(connection) == []


def test_the_index_has_lost_a_word_if_check_says_so(sqlite_engine: Engine) -> None:
    with sqlite_engine.begin() as connection:
        ask(connection, "a", "words")
        ask(connection, "b", "others")
        assert not search.index_messages(connection)
        connection.execute(text("INSERT INTO texts (texts, rowid, text) VALUES ('delete', 1 << 20, 'words')"))
        (violation,) = check.violations(connection)
    assert "index of words" in violation.rule
    assert violation.rows == [{"place": 1 << 20, "is_indexed": 0}]


def test_a_copy_is_searched_as_the_original_was(sqlite_engine: Engine, tmp_path: Path) -> None:
    with sqlite_engine.begin() as connection:
        ask(connection, "a", "kept words")
    backup.copy(Path(str(sqlite_engine.url.database)), tmp_path / "copy.db", lambda *_: None)
    with write_engine(tmp_path / "copy.db").begin() as copied:
        assert found(copied, "kept") == ["a"]
        ask(copied, "b", "kept, too")
        assert found(copied, "kept") == ["b", "a"]
        assert check.violations(copied) == []


def test_without_an_index_of_words_only_the_newest_turns_are_searched(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MAX_SCANNED", 2)
    for public_id in "abc":
        ask(connection, public_id, "the same words")
    assert found(connection, "words") == (["c", "b", "a"] if connection.dialect.name == "sqlite" else ["c", "b"])
    assert found(connection, "other") == []
    assert not search.is_behind(connection)


def test_scripts_without_blanks_are_found_within_a_sentence(connection: Connection) -> None:
    ask(connection, "a", "東京は日本の首都です")
    ask(connection, "b", "ราคา 100%")
    assert found(connection, "日本") == ["a"]
    (one,) = listed(connection, "首都", limit=9)
    assert one.snippet is not None
    assert one.snippet.marks == [(6, 8)]
    assert found(connection, "ราคา") == ["b"]
    assert found(connection, "%") == ["b"], "signs alone are looked for as they stand"
    assert found(connection, "_") == []
