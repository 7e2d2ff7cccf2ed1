"""Lists of jobs by filters, changes of many jobs, and what the status page reads, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, insert

from llamalith_app.store import check, conversation_list, search
from llamalith_app.store.conversation_list import Filter
from llamalith_app.store.jobs import details, listing, reads, statistics, submission, transitions
from llamalith_app.store.jobs.listing import JobFilter
from llamalith_app.store.tables import Outcome, Source, Status, UserRow
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, fail, finish, prompt, register_worker


def sent(
    connection: Connection, content: str = "hello", owner_id: int = ADMIN_ID, minute: int = 0, **fields: Any
) -> int:
    new = prompt(content, None, owner_id=owner_id, **fields)
    job_id = submission.submit(connection, new, NOW + timedelta(minutes=minute)).job_id
    assert job_id is not None
    return job_id


def another_owner(connection: Connection) -> int:
    row = {"name": "somebody", "role": "user", "created_at": NOW}
    owner_id: int = connection.execute(insert(UserRow).values(row).returning(UserRow.id)).scalar_one()
    return owner_id


def test_filters_find_the_owner_s_jobs_and_nobody_else_s(engine: Engine) -> None:
    with engine.begin() as connection:
        other = another_owner(connection)
        ids = [
            sent(connection, "A red fox", minute=0, source=Source.PAGE),
            sent(connection, "A RED_FOX 100%", minute=1, model="n"),
            sent(connection, "A red fox", other, minute=2),
            sent(connection, "A blue fox", minute=3, priority="batch"),
        ]

        def found(**wanted: object) -> list[int]:
            search = listing.search(connection, ADMIN_ID, JobFilter(**wanted), limit=9)  # type: ignore[arg-type]
            assert search.older is None
            return [ids.index(job_id) for job_id in search.ids]

        assert found() == [3, 1, 0]
        assert found(text="red") == [1, 0]
        assert found(text="red_fox 100%") == [1]
        assert found(model="n", text="red") == [1]
        assert found(priority=2) == [3]
        assert found(source="page") == [0]
        assert found(source="page", text="blue") == []
        assert [job.id for job in reads.newest(connection, ADMIN_ID, limit=9, source="page")] == [ids[0]]
        assert [job.id for job in reads.newest_briefs(connection, ADMIN_ID, limit=9, source="api")] == []
        assert found(text=str(ids[3])) == [3]
        assert found(text=str(ids[2])) == []
        assert found(since=NOW + timedelta(minutes=1), until=NOW + timedelta(minutes=3)) == [1]
        assert found(status="done") == []
        counts = listing.count_by_status(connection, ADMIN_ID, JobFilter(text="fox"))
        assert (counts[Status.QUEUED], counts[Status.DONE]) == ((3, False), (0, False))
        assert listing.newest_id(connection, ADMIN_ID) == ids[3]
        assert listing.excerpts(connection, ADMIN_ID, [ids[2]], 9) == []
        assert details.job_details(connection, ADMIN_ID, ids[2]) is None


def test_conversations_are_found_by_the_status_that_lists_show(engine: Engine) -> None:
    def send(name: str, **fields: Any) -> None:
        submission.submit(connection, prompt(name, name, **fields), NOW)

    def end(how: Callable[..., Any], **fields: Any) -> None:
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        how(connection, claim, **fields)

    with engine.begin() as connection:
        worker = register_worker(connection)
        for name in ("done", "failed", "failed then waits", "failed then done"):
            send(name)
            end(finish if name == "done" else fail, **({} if name == "done" else {"pause": None}))
        send("failed then done")
        end(finish)
        send("failed then waits")
        send("waits")
        send("waits")
        send("runs, and what waited behind it failed", priority="interactive")
        assert transitions.claim(connection, "m", 0, worker, NOW) is not None
        send("runs, and what waited behind it failed", queue_timeout_s=1)
        assert len(transitions.expire_queued(connection, NOW + timedelta(seconds=2), 9)) == 1
        every = conversation_list.listed(connection, ADMIN_ID, Filter(), limit=99)
        assert len(every) == 6
        for status, n in (("processing", 1), ("queued", 2), ("error", 1)):
            found = conversation_list.listed(connection, ADMIN_ID, Filter(status=status), limit=99)
            assert found == [one for one in every if one.status == status], status
            assert len(found) == n, status
        assert not search.index_messages(connection)
        assert conversation_list.listed(connection, ADMIN_ID, Filter("waits", status="error"), limit=99) == []
        assert conversation_list.listed(connection, ADMIN_ID, Filter(status="queued", tag="x"), limit=99) == []


def test_pages_of_a_search_have_each_job_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "WINDOW_JOBS", 3)
    with engine.begin() as connection:
        ids = [sent(connection, model="m" if n % 2 else "n") for n in range(10)]
        found, before = [], None
        while True:
            page = listing.search(connection, ADMIN_ID, JobFilter(model="n"), limit=1, before=before)
            found += page.ids
            if (before := page.older) is None:
                break
    assert found == [job_id for job_id in reversed(ids) if not ids.index(job_id) % 2]


def test_a_change_of_class_takes_only_the_owner_s_jobs_that_wait_and_decides_who_is_next(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        started, first, second, foreign = (
            sent(connection),
            sent(connection),
            sent(connection),
            sent(connection, owner_id=another_owner(connection)),
        )
        claim = transitions.claim(connection, "m", 1, worker, NOW)
        assert claim is not None
        assert claim.job_id == started
        changed = transitions.change_priority(connection, ADMIN_ID, [started, first, second, foreign, 999], 0)
        assert sorted(changed) == [first, second]
        assert transitions.change_priority(connection, ADMIN_ID, [first], 0) == []
        again = transitions.claim(connection, "m", 0, worker, NOW)
        assert again is not None
        assert again.job_id == first
        assert sorted(transitions.cancel_jobs(connection, ADMIN_ID, [started, second, foreign], NOW)) == [
            started,
            second,
        ]
        assert check.violations(connection) == []


def test_what_waits_and_what_ended_is_read_by_class_from_the_first_start_on(engine: Engine) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        for _ in range(2):
            sent(connection)
        sent(connection, priority="batch", minute=5)
        sent(connection, owner_id=another_owner(connection))
        claim = transitions.claim(connection, "m", 1, worker, NOW + timedelta(seconds=7))
        assert claim is not None
        fail(connection, claim, outcome=Outcome.LOST)
        again = transitions.claim(connection, "m", 1, worker, NOW + timedelta(seconds=90))
        assert again is not None
        assert finish(connection, again)
        (one,) = statistics.ended_lately(connection, ADMIN_ID, NOW - timedelta(hours=1), 10)
        assert (one.status, one.first_started_at) == ("done", NOW + timedelta(seconds=7))
        assert statistics.ended_lately(connection, ADMIN_ID, NOW + timedelta(hours=1), 10) == []
        groups = statistics.waiting_classes(connection, ADMIN_ID, ["m", "n"])
        assert [(group.priority, group.n_jobs, group.oldest_at) for group in groups] == [
            (1, 1, NOW),
            (2, 1, NOW + timedelta(minutes=5)),
        ]
        assert len(statistics.next_ids(connection, ADMIN_ID, ["m", "n"], 1)) == 1
        assert statistics.running_ids(connection, ADMIN_ID, 9) == []
