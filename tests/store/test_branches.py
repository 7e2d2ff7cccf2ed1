"""Branches: a prompt beside another, a conversation that goes on from another, a history that is found again."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, Engine

from llamalith_app.contracts.conversations import Message
from llamalith_app.store import check, conversations, turns
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.tables import Status
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, finish, prompt, register_worker


def submit(connection: Connection, new: submission.NewJob) -> tuple[int, int]:
    """The job and its turn."""
    accepted = submission.submit(connection, new, NOW)
    assert accepted.job_id is not None
    assert accepted.turn_id is not None
    return accepted.job_id, accepted.turn_id


def answer(connection: Connection, worker: int, reply: str = "a reply") -> transitions.Claim:
    claim = transitions.claim(connection, "m", 1, worker, NOW)
    assert claim is not None
    assert finish(connection, claim, reply)
    return claim


def texts(connection: Connection, turn_id: int) -> list[str]:
    return [message.content for message in turns.read_turn(connection, turn_id, 10**6).messages]


@pytest.mark.parametrize("behind", ["a cancelled prompt", "a system prompt alone"])
def test_a_fork_is_refused_while_anything_on_its_path_is_open(engine: Engine, behind: str) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submit(connection, prompt("first"))
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        if behind == "a cancelled prompt":
            job_id, turn_id = submit(connection, prompt("second"))
            transitions.cancel(connection, ADMIN_ID, job_id, NOW)
        else:
            alone = submission.submit(connection, prompt("", system_prompt="S"), NOW).turn_id
            assert alone is not None
            turn_id = alone
        fork = prompt("fork", conversation_id=None)
        assert submission.submit_fork(connection, fork, turn_id, NOW) is Status.PROCESSING
        assert finish(connection, claim, "first reply")
        accepted = submission.submit_fork(connection, fork, turn_id, NOW)
        assert isinstance(accepted, submission.Accepted)
        assert accepted.turn_id is not None
        assert texts(connection, accepted.turn_id)[-3:] == ["first", "first reply", "fork"]
        assert check.violations(connection) == []


@pytest.mark.parametrize(("given", "read"), [("", ["S", "edited"]), ("T", ["T", "edited"])])
def test_an_edited_first_prompt_keeps_the_system_prompt_unless_it_brings_another(
    engine: Engine, given: str, read: list[str]
) -> None:
    with engine.begin() as connection:
        register_worker(connection)
        _, turn_id = submit(connection, prompt("first", system_prompt="S"))
        edited = submission.submit_sibling(connection, prompt("edited", system_prompt=given), turn_id, NOW)
        assert edited is not None
        assert edited.turn_id is not None
        assert texts(connection, edited.turn_id) == read
        assert check.violations(connection) == []


def test_nobody_branches_off_from_the_turn_of_another(engine: Engine) -> None:
    with engine.begin() as connection:
        register_worker(connection)
        _, turn_id = submit(connection, prompt("mine"))
        stranger = prompt("not mine", None, owner_id=ADMIN_ID + 1)
        assert submission.submit_sibling(connection, stranger, turn_id, NOW) is None
        assert submission.submit_fork(connection, stranger, turn_id, NOW) is None


def test_a_history_is_found_by_its_system_prompt_and_all_that_was_said(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        for name, system_prompt in (("none", ""), ("kind", "be kind"), ("terse", "be terse")):
            submit(connection, prompt("hello", name, system_prompt=system_prompt))
            answer(connection, worker)
        tools = [{"id": "1", "function": {"name": "look", "arguments": "{}"}}]
        asked = [
            Message(role="user", content="look"),
            Message(role="assistant", content="", tool_calls=tools),
            Message(role="tool", content="seen", tool_call_id="1"),
        ]
        submit(connection, prompt(conversation_id="tools", inputs=asked))
        answer(connection, worker)

        def found(*history: Message) -> tuple[str, int] | None:
            prefix = turns.longest_stored_prefix(connection, ADMIN_ID, history)
            if prefix is None:
                return None
            (name,) = connection.exec_driver_sql(
                f"SELECT public_id FROM conversations WHERE id = {prefix.conversation_id}"
            ).one()
            return name, prefix.n_messages

        said = [Message(role="user", content="hello"), Message(role="assistant", content="a reply")]
        more = Message(role="user", content="and now?")
        assert found(*said, more) == ("none", 2)
        assert found(Message(role="system", content="be kind"), *said, more) == ("kind", 3)
        assert found(Message(role="system", content="be terse"), *said) == ("terse", 3)
        assert found(Message(role="system", content="be rude"), *said, more) is None
        assert found(*said, Message(role="system", content="from now on"), more) is None
        assert found(*asked, Message(role="assistant", content="a reply"), more) == ("tools", 4)
        other_tool = Message(role="tool", content="seen", tool_call_id="2")
        assert found(*asked[:2], other_tool, Message(role="assistant", content="a reply"), more) is None


@pytest.mark.parametrize("n_without_reply", [0, 5, 101])
def test_the_newest_reply_is_found_however_many_prompts_wait_behind_it(engine: Engine, n_without_reply: int) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submit(connection, prompt("first", context="given"))
        answer(connection, worker, "the reply")
        for number in range(n_without_reply):
            submit(connection, prompt(f"waiting {number}"))
        latest = conversations.latest(connection, ADMIN_ID, " c ")
        last = f"waiting {n_without_reply - 1}" if n_without_reply else "first"
        assert latest.last_user == Message(role="user", content=last)
        assert latest.last_assistant == Message(role="assistant", content="the reply")
        submit(connection, prompt("alone", "other"))
        assert conversations.latest(connection, ADMIN_ID, "other").last_assistant is None


@pytest.mark.parametrize("n_cancelled", [1, 2, 3])
def test_a_history_is_found_across_prompts_that_got_no_reply(engine: Engine, n_cancelled: int) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submit(connection, prompt("first"))
        answer(connection, worker, "one")
        for _ in range(n_cancelled):
            transitions.cancel(connection, ADMIN_ID, submit(connection, prompt("never mind"))[0], NOW)
        _, last = submit(connection, prompt("second"))
        answer(connection, worker, "two")
        history = [
            Message(role=role, content=content)
            for role, content in (("user", "first"), ("assistant", "one"), ("user", "second"), ("assistant", "two"))
        ]
        found = turns.longest_stored_prefix(connection, ADMIN_ID, history)
    assert found is not None
    assert (found.turn_id, found.n_messages) == (last, 4)
