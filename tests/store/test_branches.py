"""Branches: a prompt beside another, a conversation that goes on from another, a history that is found again."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import pytest
from sqlalchemy import Connection, Engine, update

from llamalith_app.contracts.conversations import Message
from llamalith_app.errors import BadInput, ConversationExists, JobOpen, NotFound, TurnInUse
from llamalith_app.store import check, conversation_list, conversations, retention, tree, turns
from llamalith_app.store.conversation_list import Filter
from llamalith_app.store.jobs import reads, submission, transitions
from llamalith_app.store.tables import JobRow, Status
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, fail, finish, prompt, register_worker


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
        with pytest.raises(JobOpen, match="processing"):
            submission.fork(connection, ADMIN_ID, "c", turn_id, None, NOW)
        assert finish(connection, claim, "first reply")
        fork = submission.fork(connection, ADMIN_ID, "c", turn_id, None, NOW)
        _, turn_id = submit(connection, prompt("fork", conversation_id=fork.conversation_id))
        assert texts(connection, turn_id)[-3:] == ["first", "first reply", "fork"]
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
        job_id, turn_id = submit(connection, prompt("mine"))
        stranger = prompt("not mine", None, owner_id=ADMIN_ID + 1)
        assert submission.submit_sibling(connection, stranger, turn_id, NOW) is None
        for attempt in (
            lambda: submission.fork(connection, ADMIN_ID + 1, "c", turn_id, None, NOW),
            lambda: tree.select_branch(connection, ADMIN_ID + 1, "c", turn_id),
            lambda: tree.tree(connection, ADMIN_ID + 1, "c", limit=9, after=0, max_text=9),
            lambda: retention.delete_turn(connection, ADMIN_ID + 1, "c", turn_id),
        ):
            with pytest.raises(NotFound):
                attempt()
        with pytest.raises(BadInput, match="parent: this conversation is new"):
            submission.submit(connection, prompt("x", owner_id=ADMIN_ID + 1, parent=turn_id), NOW)
        assert transitions.edit_prompt(connection, ADMIN_ID + 1, job_id, "theirs") is None


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


def refused(connection: Connection, parent: int, conversation_id: str | None = "c") -> str:
    with pytest.raises(BadInput) as error:
        submission.submit(connection, prompt("x", conversation_id, parent=parent), NOW)
    return str(error.value)


def thread(connection: Connection, name: str = "c", **which: int) -> conversations.Thread:
    found = conversations.thread(connection, ADMIN_ID, name, limit=9, max_text=99, **which)
    assert found is not None
    return found


def shown(connection: Connection, name: str = "c", **which: int) -> list[str]:
    """The prompts of the page, each with its place among its siblings."""
    return [
        f"{turn.job.user_input} {turn.sibling}/{turn.n_siblings}"
        for turn in thread(connection, name, **which).turns
        if turn.job is not None
    ]


def test_a_prompt_continues_the_turn_that_it_names_and_becomes_the_head(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        _, first = submit(connection, prompt("first"))
        _, second = submit(connection, prompt("second"))
        other, branch = submit(connection, prompt("other", parent=first))
        anew, root = submit(connection, prompt("anew", parent=tree.ROOT))
        elsewhere, _ = submit(connection, prompt("elsewhere", "d"))
        assert shown(connection) == ["anew 2/2"]
        # One after another, in the order accepted, on whatever branch they are.
        assert [answer(connection, worker).job_id for _ in range(5)] == [1, 2, other, anew, elsewhere]
        assert texts(connection, branch) == ["first", "a reply", "other"]
        assert texts(connection, root) == ["anew"]
        _, third = submit(connection, prompt("third", parent=second))
        assert texts(connection, third) == ["first", "a reply", "second", "a reply", "third"]
        assert shown(connection) == ["first 1/2", "second 1/2", "third 1/1"]
        assert "neither this conversation nor the path to its head has a turn 5" in refused(connection, 5)
        assert "has a turn 99" in refused(connection, 99)
        assert "this conversation is new" in refused(connection, first, None)
        assert check.violations(connection) == []


def test_arrows_lead_through_the_siblings_each_to_the_newest_turn_below(engine: Engine) -> None:
    with engine.begin() as connection:
        register_worker(connection)
        _, first = submit(connection, prompt("first"))
        submit(connection, prompt("a"))
        submit(connection, prompt("a1"))
        submit(connection, prompt("b", parent=first))
        submit(connection, prompt("c", parent=first))
        middle = thread(connection).turns[-1]
        assert (middle.sibling, middle.n_siblings, middle.previous_sibling, middle.next_sibling) == (3, 3, 4, None)
        tree.select_branch(connection, ADMIN_ID, "c", 2)
        assert shown(connection) == ["first 1/1", "a 1/3", "a1 1/1"]
        assert [turn.next_sibling for turn in thread(connection).turns] == [None, 4, None]
        assert tree.select_branch(connection, ADMIN_ID, "c", first) == 5, "its newest turn of all"
        assert check.violations(connection) == []


def test_a_page_stays_on_its_branch_when_another_window_selects_one(engine: Engine) -> None:
    with engine.begin() as connection:
        register_worker(connection)
        _, first = submit(connection, prompt("first"))
        _, seen = submit(connection, prompt("seen"))
        submit(connection, prompt("edited", parent=first))
        assert shown(connection) == ["first 1/1", "edited 2/2"]
        page = thread(connection, seen=seen)
        assert shown(connection, seen=seen) == ["first 1/1", "seen 1/2"]
        assert (page.last_turn_id, page.is_head, page.is_lost) == (seen, False, False)
        # A reply goes to what its author saw.
        _, reply = submit(connection, prompt("reply")._replace(seen=seen))
        assert shown(connection) == ["first 1/1", "seen 1/2", "reply 1/1"]
        page = thread(connection, seen=seen)
        assert (page.last_turn_id, page.is_head) == (reply, True)
        # What others have added behind it is no other branch.
        assert turns.parent(connection, submit(connection, prompt("more")._replace(seen=first))[1]).depth == 3
        assert thread(connection, seen=99).is_lost
        assert check.violations(connection) == []


def test_a_fork_continues_where_it_began_and_outlives_its_origin(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submit(connection, prompt("first", system_prompt="S"))
        _, second = submit(connection, prompt("second"))
        submit(connection, prompt("third"))
        for _ in range(3):
            answer(connection, worker)
        fork = submission.fork(connection, ADMIN_ID, "c", second, "fork", NOW)
        assert fork.conversation_id == "fork"
        with pytest.raises(ConversationExists):
            submission.fork(connection, ADMIN_ID, "c", second, "c", NOW)
        assert [turn.is_own for turn in thread(connection, "fork").turns] == [False, False, True]
        assert thread(connection, "fork").system_prompt == "S"
        latest = conversations.latest(connection, ADMIN_ID, "fork")
        assert latest.last_job is not None
        assert latest.last_job.turn_id == second
        # A new one is not expired, although it has no job and its system message is all that it holds.
        assert retention.scan_conversations(connection, NOW - timedelta(days=1), 0, 9).expired == []
        _, own = submit(connection, prompt("on the fork", "fork"))
        assert texts(connection, own) == ["S", "first", "a reply", "second", "a reply", "on the fork"]
        # An edit of what it has from the other conversation makes a turn of the fork; the other one keeps its branch.
        edited = submission.submit_sibling(connection, prompt("edited", "fork"), second, NOW)
        assert edited is not None
        assert edited.conversation_id == "fork"
        assert shown(connection, "fork") == ["first 1/1", "edited 2/2"]
        assert shown(connection) == ["first 1/1", "second 1/1", "third 1/1"]
        anew = submission.submit_sibling(connection, prompt("anew", "fork"), 1, NOW)
        assert anew is not None
        assert shown(connection, "fork") == ["anew 2/2"]
        head = tree.select_branch(connection, ADMIN_ID, "fork", second)
        assert head == own
        assert shown(connection, "fork") == ["first 1/2", "second 1/2", "on the fork 1/1"]
        with pytest.raises(NotFound):
            tree.select_branch(connection, ADMIN_ID, "fork", 3)
        with pytest.raises(NotFound):
            retention.delete_turn(connection, ADMIN_ID, "fork", second)
        assert submission.submit_sibling(connection, prompt("x", "fork"), 3, NOW) is None
        for _ in range(3):
            answer(connection, worker)
        history = [Message(role=role, content=text) for role, text in (("system", "S"), ("user", "first"))]
        history += [Message(role="assistant", content="a reply"), Message(role="user", content="edited")]
        history += [Message(role="assistant", content="a reply"), Message(role="user", content="and now?")]
        prefix = turns.longest_stored_prefix(connection, ADMIN_ID, history)
        assert prefix is not None
        assert (prefix.turn_id, prefix.n_messages) == (edited.turn_id, 5)
        assert check.violations(connection) == []
        connection.execute(update(JobRow).where(JobRow.id > 3).values(processed_at=NOW + timedelta(days=1)))
        assert retention.delete_expired_jobs(connection, NOW, 100) == 3
        assert not conversations.exists(connection, ADMIN_ID, "c")
        assert texts(connection, own) == ["S", "on the fork"]
        assert check.violations(connection) == []


def test_a_fork_without_a_prompt_expires_with_its_age(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        _, first = submit(connection, prompt("first"))
        answer(connection, worker)
        submission.fork(connection, ADMIN_ID, "c", first, "fork", NOW)
        assert check.violations(connection) == []
        assert conversations.messages(connection, ADMIN_ID, "fork") == conversations.messages(connection, ADMIN_ID, "c")
        (summary, _) = conversation_list.listed(connection, ADMIN_ID, Filter(), limit=9)
        assert (summary.public_id, summary.status, summary.first_prompt) == ("fork", None, "first")
        scanned = retention.scan_conversations(connection, NOW, 0, 9)
        assert len(scanned.expired) == 1
        assert retention.delete_expired_conversations(connection, NOW, scanned.expired) == 1
        assert not conversations.exists(connection, ADMIN_ID, "fork")
        assert check.violations(connection) == []


def test_a_turn_in_the_middle_is_deleted_and_the_next_one_takes_its_place(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submit(connection, prompt("first"))
        _, second = submit(connection, prompt("second"))
        submit(connection, prompt("third"))
        with pytest.raises(JobOpen, match="Job 2 of this turn is queued: cancel it first"):
            retention.delete_turn(connection, ADMIN_ID, "c", second)
        for _ in range(3):
            answer(connection, worker)
        said = conversations.messages(connection, ADMIN_ID, "c")
        assert retention.delete_turn(connection, ADMIN_ID, "c", second) == 3
        assert shown(connection) == ["first 1/1", "third 1/1"]
        assert reads.job_by_id(connection, ADMIN_ID, 2) is None
        assert reads.attempts(connection, ADMIN_ID, 2) is None
        _, fourth = submit(connection, prompt("fourth"))
        assert texts(connection, fourth) == ["first", "a reply", "third", "a reply", "fourth"]
        # A client that still sends what was deleted continues the turn before it, not one that has read it.
        prefix = turns.longest_stored_prefix(connection, ADMIN_ID, said)
        assert prefix is not None
        assert (prefix.turn_id, prefix.n_messages) == (1, 2)
        with pytest.raises(NotFound):
            retention.delete_turn(connection, ADMIN_ID, "c", second)
        assert check.violations(connection) == []


def test_the_head_moves_to_what_is_left_when_it_is_deleted(engine: Engine) -> None:
    with engine.begin() as connection:
        register_worker(connection)
        _, first = submit(connection, prompt("first", system_prompt="S"))
        submit(connection, prompt("a"))
        submit(connection, prompt("b", parent=first))
        submit(connection, prompt("anew", parent=tree.ROOT, system_prompt="T"))
        transitions.cancel_open(connection, ADMIN_ID, NOW, statuses=[Status.QUEUED], limit=9)
        assert retention.delete_turn(connection, ADMIN_ID, "c", 4) == 3, "there is no other root with a newer turn"
        assert retention.delete_turn(connection, ADMIN_ID, "c", 3) == 2, "the sibling"
        # Its system message is in force for the next one, and stays.
        assert retention.delete_turn(connection, ADMIN_ID, "c", first) == 2
        assert [turn.system for turn in thread(connection).turns] == ["S", None]
        with pytest.raises(TurnInUse):
            retention.delete_turn(connection, ADMIN_ID, "c", first)
        assert retention.delete_turn(connection, ADMIN_ID, "c", 2) == first, "the parent"
        assert thread(connection).system_prompt == "S"
        assert retention.delete_turn(connection, ADMIN_ID, "c", first) == first, "the last turn stays, empty"
        assert thread(connection).system_prompt == ""
        assert conversations.message_list(connection, ADMIN_ID, "c").exists
        assert check.violations(connection) == []
        _, again = submit(connection, prompt("again"))
        assert texts(connection, again) == ["again"]
        assert check.violations(connection) == []


def test_only_a_prompt_that_was_never_started_is_edited(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        job_id, turn_id = submit(connection, prompt("frist", context="so far"))
        assert transitions.edit_prompt(connection, ADMIN_ID, job_id, "first")
        assert texts(connection, turn_id) == ["so far", "first"]
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        assert transitions.edit_prompt(connection, ADMIN_ID, job_id, "too late") is False
        fail(connection, claim)
        assert transitions.edit_prompt(connection, ADMIN_ID, job_id, "too late") is False, "queued, but it was started"
        transitions.cancel(connection, ADMIN_ID, job_id, NOW)
        assert transitions.edit_prompt(connection, ADMIN_ID, job_id, "too late") is False
        assert transitions.edit_prompt(connection, ADMIN_ID, 99, "nobody's") is None
        assert texts(connection, turn_id) == ["so far", "first"]


def test_a_tree_comes_in_pages_with_what_the_fork_has_from_elsewhere(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        _, first = submit(connection, prompt("a long first prompt", system_prompt="S"))
        submit(connection, prompt("beside", parent=tree.ROOT))
        answer(connection, worker)
        fork = submission.fork(connection, ADMIN_ID, "c", first, "fork", NOW)
        submit(connection, prompt("on", "fork"))
        pages, after, more = [], 0, True
        while more:
            page = tree.tree(connection, ADMIN_ID, "fork", limit=2, after=after, max_text=6)
            pages.append([(one.id, one.parent, one.conversation_id, one.prompt, one.status) for one in page.turns])
            after, more = page.turns[-1].id, page.more
        assert pages == [
            [(first, None, "c", "a long", "done"), (fork.head_turn_id, first, "fork", None, None)],
            [(4, fork.head_turn_id, "fork", "on", "queued")],
        ]
        whole = tree.tree(connection, ADMIN_ID, "c", limit=9, after=0, max_text=6)
        assert [(one.id, one.reply, one.system_prompt, one.depth) for one in whole.turns] == [
            (1, "a repl", "S", 0),
            (2, None, None, 0),
        ]
        assert (whole.head, whole.more) == (2, False)


def others_of(connection: Connection, conversation_id: str = "c", seen: int | None = None) -> list[list[int]]:
    """For each turn of the branch, all turns that a page shows for it."""
    thread = conversations.thread(connection, ADMIN_ID, conversation_id, limit=30, max_text=100, seen=seen)
    assert thread is not None
    return [[answer.turn_id for answer in turn.answers] for turn in thread.turns]


def compare(connection: Connection, new: submission.NewJob, *models: str, beside: int | None = None) -> list[int]:
    """The turns."""
    several = [new._replace(request=msgspec.structs.replace(new.request, model=model)) for model in models]
    accepted = submission.submit_compared(connection, several, beside, NOW)
    assert accepted is not None
    return [one.turn_id for one in accepted if one.turn_id is not None]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_comparison_is_what_different_models_were_asked_beside_each_other(engine: Engine, is_first: bool) -> None:
    with engine.begin() as connection:
        register_worker(connection)
        before = [] if is_first else [[submit(connection, prompt("before"))[1]]]
        m, n, o = compare(connection, prompt("x", system_prompt="S"), "m", "n", "o")
        for seen in (None, m, n, o):
            assert others_of(connection, seen=seen) == [*before, [m, n, o]], "whichever is seen"
        assert [texts(connection, turn_id) for turn_id in (m, n, o)] == [["S", "x"]] * 3
        assert tree.lock_conversation(connection, ADMIN_ID, "c").head_turn_id == m, "the first is the head"
        # Neither another prompt, nor another system prompt, nor another reply of the same model.
        newest = m
        for new, others in (
            (prompt("y"), []),
            (prompt("x", system_prompt="T", model="p"), []),
            (prompt("x"), [n, o]),
        ):
            [newest] = compare(connection, new, str(new.request.model), beside=m)
            assert others_of(connection) == [*before, [*others, newest]]
            assert others_of(connection, seen=m) == [*before, [m, n, o]]
        # Of a model's versions the newest one stands beside those of others, and no more than fit.
        again, fourth = compare(connection, prompt("x"), "n", "p", beside=m)
        assert others_of(connection, seen=m) == [*before, [m, again, fourth]]
        assert others_of(connection, seen=n) == [*before, [n, newest, fourth]]
        _, after = submit(connection, prompt("after", parent=n))
        assert others_of(connection) == [*before, [n, newest, fourth], [after]], "it stays"
        assert check.violations(connection) == []


def test_a_fork_compares_with_what_it_holds_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        submit(connection, prompt("first"))
        answer(connection, worker)
        m, _ = compare(connection, prompt("x"), "m", "n")
        assert answer(connection, worker).turn_id == m
        fork = submission.fork(connection, ADMIN_ID, "c", m, None, NOW).conversation_id
        assert others_of(connection, fork)[1] == [m], "the other one belongs to the other conversation"
        beside = submission.submit_sibling(connection, prompt("x", fork, model="n"), m, NOW)
        assert beside is not None
        of_fork = conversations.thread(connection, ADMIN_ID, fork, limit=30, max_text=9, seen=m)
        assert of_fork is not None
        assert [(one.turn_id, one.is_own) for one in of_fork.turns[1].answers] == [(m, False), (beside.turn_id, True)]
        assert others_of(connection, fork) == [[1], [m, beside.turn_id]]
        assert others_of(connection, "c", seen=m)[1] != others_of(connection, fork)[1]
