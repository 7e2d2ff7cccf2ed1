"""One transition of the product, or the making of its record, by a process that can be killed at any moment of it.

The process opens the record and says which threads it has; it begins on a signal, and says what came of it
when the call has returned, as the web answers its client. Then it sends its hints and closes the record.

The scene that every step begins from: job 1 is done; job 2 of the same conversation is being processed by a worker
that is gone; job 3 waits behind it; job 4 waits in another conversation.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from llamalith_app.contracts.jobs import JobRequest
from llamalith_app.contracts.principal import Principal
from llamalith_app.jobs.cancel import Cancellations
from llamalith_app.jobs.forecast import Forecasts
from llamalith_app.jobs.queue import Hints
from llamalith_app.jobs.submit import Submissions
from llamalith_app.jobs.worker.sweep import Sweeper
from llamalith_app.settings.declaration import Settings
from llamalith_app.store import turns, workers
from llamalith_app.store.database import Database, write_engine
from llamalith_app.store.jobs import leases, submission, transitions
from llamalith_app.store.keys import Key
from llamalith_app.store.migrate import migrate
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import finish as finish_attempt
from tests.store.samples import prompt

MODELS = ("m",)
HELD, NEW = 2, 5
"""The job that is being processed, and the one that a submit makes."""
HELD_TURN = HELD
"""Each job here has a turn of its own, in the same order."""

Step = Callable[[Database, Hints], Awaitable[Any]]


def set_scene(path: Path, lock_path: Path) -> None:
    """`lock_path`: of the worker that is gone; a file that nobody holds locked."""
    now = datetime.now(UTC)

    def register(lock: str) -> int:
        return workers.register(connection, host="here", pid=1, lock_path=lock, models=["m"], n_slots=1, now=now)

    engine = write_engine(path)
    with engine.begin() as connection:
        gone = register(str(lock_path))
        register("")
        for content, conversation in (("1", "c"), ("2", "c"), ("3", "c"), ("4", "d")):
            submission.submit(connection, prompt(content, conversation), now)
        first = transitions.claim(connection, "m", 1, gone, now)
        assert first is not None
        assert finish_attempt(connection, first)
        held = transitions.claim(connection, "m", 1, gone, now)
        assert held is not None
        assert held.job_id == HELD
    engine.dispose()


async def submit(database: Database, hints: Hints) -> Any:
    submissions = Submissions(
        database,
        hints,
        models=MODELS,
        grammars={},
        limits=Settings(),
        forecasts=Forecasts(database, MODELS, {}),
    )
    accepted = await submissions.submit(
        Principal(ADMIN_ID, "token"),
        "r",
        JobRequest(content="5", system_prompt="be terse", assistant_context="so far"),
        conversation_id="c",
        key=Key(ADMIN_ID, "a key", "a digest"),
    )
    return accepted.job_id


async def claim(database: Database, hints: Hints) -> Any:
    claim = await database.write_lightly(transitions.claim, "m", 1, 2, datetime.now(UTC))
    return claim is not None and claim.job_id


async def heartbeat(database: Database, hints: Hints) -> Any:
    await database.write_lightly(
        leases.heartbeat, [lease.lease_token for lease in await database.read(leases.active_leases)]
    )
    return HELD


async def finish(database: Database, hints: Hints) -> Any:
    (lease,) = await database.read(leases.active_leases)
    turn = await database.read(turns.read_turn, HELD_TURN, 0)
    return await database.write(
        transitions.finish,
        lease.job_id,
        lease.lease_token,
        datetime.now(UTC),
        reply_to=turn.reply_to,
        reply="a reply",
        finish_reason="stop",
        prompt_tokens=1,
        prompt_tokens_reused=0,
        completion_tokens=1,
        omitted_messages=0,
    )


async def cancel(database: Database, hints: Hints) -> Any:
    status = await Cancellations(database, hints, MODELS, lambda _: None).cancel_job(ADMIN_ID, HELD)
    return status and status.value


async def sweep(database: Database, hints: Hints) -> Any:
    await Sweeper(database, 2, set, lambda _: None, lambda: "[]").sweep()
    return True


STEPS: dict[str, Step] = {step.__name__: step for step in (submit, claim, heartbeat, finish, cancel, sweep)}


async def close(database: Database, hints: Hints) -> None:
    """After every hint has gone out."""
    await asyncio.gather(*hints._senders.values())
    await hints.close()
    await database.close()


def migration(path: Path, test: Pipe) -> None:
    """The whole life of a process that makes the record."""
    _begin(test)
    test.send(migrate(path))
    os._exit(0)


def transition(name: str, redis_url: str, path: Path, test: Pipe) -> None:
    """The whole life of a process that does one of STEPS."""
    asyncio.run(_transition(STEPS[name], redis_url, path, test))


async def _transition(step: Step, redis_url: str, path: Path, test: Pipe) -> None:
    database, hints = Database(path), Hints(redis_url, MODELS)
    database.open()
    # Every thread that the step will use is there before it begins, so that each can be watched.
    await database.read(leases.active_leases)
    await asyncio.to_thread(int)
    _begin(test)
    test.send(await step(database, hints))
    await close(database, hints)
    # Nothing is left to do; asyncio would end its threads by yet another one, which nobody could watch.
    os._exit(0)


def _begin(test: Pipe) -> None:
    test.send({thread.name: thread.native_id for thread in threading.enumerate()})
    test.recv()
