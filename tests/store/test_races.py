"""Many concurrent writers, which only PostgreSQL has: of those that claim one job, one gets it.

Under READ COMMITTED, PostgreSQL's own default, where a statement sees what others committed a moment ago.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from llamalith_app.errors import JobOpen
from llamalith_app.store import check, retention
from llamalith_app.store.jobs import leases, reads, submission, transitions
from llamalith_app.store.tables import Outcome, Status
from llamalith_app.store.users import ADMIN_ID
from tests.store.conftest import Cluster
from tests.store.samples import NOW, fail, finish, prompt, register_worker

Act = Callable[[Connection], Any]
CLAIMERS = 4
N_ROUNDS = 200


@pytest.fixture
def record(cluster: Cluster) -> Iterator[Engine]:
    with cluster.record() as engine:
        yield engine


@pytest.fixture
def worker(record: Engine) -> int:
    with record.begin() as connection:
        assert connection.execute(text("SHOW transaction_isolation")).scalar() == "read committed"
        return register_worker(connection)


@pytest.fixture
def at_once(record: Engine) -> Iterator[Callable[[Sequence[Act]], list[Any]]]:
    """Runs each act in its own transaction, once all have a connection. Returns their results in order."""
    with ThreadPoolExecutor(CLAIMERS) as threads:

        def run(acts: Sequence[Act]) -> list[Any]:
            ready = threading.Barrier(len(acts))

            def one(act: Act) -> Any:
                with record.begin() as connection:
                    connection.execute(text("SELECT 1"))
                    ready.wait(20)
                    return act(connection)

            return list(threads.map(one, acts))

        yield run


def test_of_claimers_that_race_for_one_job_exactly_one_gets_it(
    record: Engine, worker: int, at_once: Callable[[Sequence[Act]], list[Any]]
) -> None:
    for _ in range(N_ROUNDS):
        with record.begin() as connection:
            job_id = submission.submit(connection, prompt(), NOW).job_id
        claims = at_once([lambda connection: transitions.claim(connection, "m", 1, worker, NOW)] * CLAIMERS)
        (claim,) = filter(None, claims)
        assert (claim.job_id, claim.attempt) == (job_id, 1)
        with record.begin() as connection:
            assert finish(connection, claim)
            assert leases.active_leases(connection) == []
    with record.connect() as connection:
        assert check.violations(connection) == []


@pytest.mark.parametrize("pair", ["finish finish", "finish lose", "lose lose", "finish cancel"])
def test_of_two_that_end_an_attempt_at_once_exactly_one_does(
    record: Engine, worker: int, at_once: Callable[[Sequence[Act]], list[Any]], pair: str
) -> None:
    ends: dict[str, Callable[..., bool]] = {
        "finish": finish,
        "lose": lambda connection, claim: (
            fail(connection, claim, outcome=Outcome.LOST, kind="worker_lost", pause=None, seen_heartbeat=0)
            is Status.ERROR
        ),
        "cancel": lambda connection, claim: (
            transitions.cancel(connection, ADMIN_ID, claim.job_id, NOW) is Status.CANCELLED
        ),
    }
    left = {"finish": "done", "lose": "error", "cancel": "cancelled"}
    words = pair.split()
    for _ in range(N_ROUNDS):
        with record.begin() as connection:
            submission.submit(connection, prompt(), NOW)
            claim = transitions.claim(connection, "m", 1, worker, NOW)
            assert claim is not None
        won = at_once([partial(ends[word], claim=claim) for word in words])
        (winner,) = (word for word, did in zip(words, won, strict=True) if did)
        with record.connect() as connection:
            job = reads.job_by_id(connection, ADMIN_ID, claim.job_id)
            assert job is not None
            assert job.status == left[winner]
    with record.connect() as connection:
        assert check.violations(connection) == []


def test_a_claim_skips_a_job_that_another_is_claiming_and_gets_it_when_that_claim_fails(
    record: Engine, worker: int
) -> None:
    with record.begin() as connection:
        for conversation in ("a", "a", "b"):
            submission.submit(connection, prompt(conversation_id=conversation), NOW)
    with record.connect() as one, record.connect() as two, record.connect() as three:
        first = transitions.claim(one, "m", 1, worker, NOW)
        other = transitions.claim(two, "m", 1, worker, NOW)
        assert first is not None
        assert other is not None
        assert (first.job_id, other.job_id) == (1, 3), "the second job waits for the first of its conversation"
        assert transitions.claim(three, "m", 1, worker, NOW) is None
        one.rollback()
        two.commit()
        again = transitions.claim(three, "m", 1, worker, NOW)
        assert again is not None
        assert (again.job_id, again.attempt) == (1, 1)
        three.commit()
    with record.connect() as connection:
        assert check.violations(connection) == []


def test_of_two_prompts_at_once_one_goes_on_from_the_other(
    record: Engine, at_once: Callable[[Sequence[Act]], list[Any]]
) -> None:
    for n in range(20):
        new = prompt(conversation_id=f"c{n}")
        with record.begin() as connection:
            submission.submit(connection, new, NOW)
        at_once([partial(submission.submit, new=new, now=NOW)] * 4)
        with record.begin() as connection:
            depths = connection.execute(
                text("SELECT depth FROM turns WHERE conversation_id = (SELECT max(id) FROM conversations) ORDER BY id")
            )
            assert list(depths.scalars()) == [0, 1, 2, 3, 4]
    with record.connect() as connection:
        assert check.violations(connection) == []


def sibling(connection: Connection, conversation_id: str, turn_id: int) -> None:
    new = prompt("x", conversation_id=None)
    assert submission.submit_sibling(connection, new, turn_id, NOW)


def fork(connection: Connection, conversation_id: str, turn_id: int) -> None:
    with contextlib.suppress(JobOpen):
        submission.fork(connection, ADMIN_ID, conversation_id, turn_id, None, NOW)


def delete(connection: Connection, conversation_id: str, turn_id: int) -> None:
    with contextlib.suppress(JobOpen):
        retention.delete_turn(connection, ADMIN_ID, conversation_id, turn_id)


@pytest.mark.parametrize("branch", [sibling, fork, delete])
def test_a_branch_is_made_while_its_turn_ends(
    record: Engine, worker: int, at_once: Callable[[Sequence[Act]], list[Any]], branch: Any
) -> None:
    for n in range(30):
        with record.begin() as connection:
            accepted = submission.submit(connection, prompt(conversation_id=f"d{n}"), NOW)
            claim = transitions.claim(connection, "m", 1, worker, NOW)
            assert claim is not None
        at_once(
            [
                partial(finish, claim=claim),
                partial(branch, conversation_id=f"d{n}", turn_id=accepted.turn_id),
            ]
        )
        with record.begin() as connection:
            transitions.cancel_open(connection, ADMIN_ID, NOW, statuses=[Status.QUEUED], limit=100)
    with record.connect() as connection:
        assert check.violations(connection) == []
