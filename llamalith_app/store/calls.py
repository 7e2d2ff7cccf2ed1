"""The jobs of OpenAI clients: who still waits for which, and which of them are not to be kept.

An OpenAI client sends no key. One that lost its connection sends the same request again: within a while it finds the
job that it left (`join`). A job that nobody waits for any more is cancelled (`cancel_left`). Runs inside a transaction
of `store/database.py`. Knows no HTTP.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import Connection, Table, and_, bindparam, case, insert, or_, select, update

from llamalith_app.store.jobs import transitions
from llamalith_app.store.tables import CallRow, JobRow, Status, status_is

_calls = cast(Table, CallRow.__table__)

_INSERT = insert(_calls)
_FIND = select(CallRow.digest, CallRow.is_stored, CallRow.is_background).where(CallRow.job_id == bindparam("of_job"))
_LEFT_WITH_THE_SAME = (
    select(CallRow.job_id)
    .join(JobRow, JobRow.id == CallRow.job_id)
    .where(
        CallRow.digest == bindparam("of_digest"),
        status_is(Status.QUEUED, Status.PROCESSING, Status.DONE),
        or_(
            CallRow.left_at > bindparam("since"),
            # Its end may not have been noticed yet.
            and_(bindparam("is_repeat"), CallRow.n_open > 0, CallRow.created_at > bindparam("since_repeat")),
        ),
    )
    .order_by(CallRow.job_id.desc())
    .limit(1)
)
_JOIN = update(_calls).where(CallRow.job_id == bindparam("of_job")).values(n_open=CallRow.n_open + 1, left_at=None)
_LEAVE = (
    update(_calls)
    .where(CallRow.job_id == bindparam("of_job"), CallRow.digest.is_not(None), CallRow.n_open > 0)
    .values(
        n_open=CallRow.n_open - 1,
        left_at=case((CallRow.n_open == 1, bindparam("now", type_=CallRow.left_at.type)), else_=None),
    )
)
_TAKE_LEFT = (
    update(_calls)
    .where(CallRow.left_at <= bindparam("until"))
    .values(left_at=None, digest=None)
    .returning(CallRow.job_id)
)
_OWNERS = select(JobRow.id, JobRow.owner_id).where(
    JobRow.id.in_(bindparam("those", expanding=True)), status_is(Status.QUEUED, Status.PROCESSING)
)
_FIRST_LEFT = select(CallRow.left_at).where(CallRow.left_at.is_not(None)).order_by(CallRow.left_at).limit(1)


class Call(NamedTuple):
    """What is stored of a call with its job."""

    digest: str | None
    """Of the caller and the whole request. None: the job goes on when the client leaves, and nobody joins it."""
    is_stored: bool = True
    """False: it is deleted soon after its end."""
    is_background: bool = False
    """The client asked for the job alone, not for its answer."""


def find(connection: Connection, job_id: int) -> Call | None:
    """What is stored of the call that made this job. None: none did."""
    found = connection.execute(_FIND, {"of_job": job_id}).first()
    return None if found is None else Call._make(found)


def add(connection: Connection, job_id: int, call: Call, now: datetime) -> None:
    row = {"job_id": job_id, "n_open": 1, "left_at": None, "created_at": now, **call._asdict()}
    connection.execute(_INSERT, row)


def join(connection: Connection, digest: str, since: datetime, *, since_repeat: datetime | None = None) -> int | None:
    """The job of the same request that its client left after `since`; it is waited for again from now on. With
    `since_repeat`, which says that the client sends the request again, one that seems to be waited for counts too, if
    it was sent after that. None: there is none, or it ended without a reply."""
    of = {"of_digest": digest, "since": since, "is_repeat": since_repeat is not None}
    of["since_repeat"] = since if since_repeat is None else since_repeat
    job_id: int | None = connection.execute(_LEFT_WITH_THE_SAME, of).scalar()
    if job_id is not None:
        connection.execute(_JOIN, {"of_job": job_id})
    return job_id


def leave(connection: Connection, job_id: int, now: datetime) -> None:
    """A client that waited for the job is gone, and did not get its answer."""
    connection.execute(_LEAVE, {"of_job": job_id, "now": now})


def first_left(connection: Connection) -> datetime | None:
    """When the earliest client left of those whose jobs may be cancelled or joined. None: there is none."""
    left_at: datetime | None = connection.execute(_FIRST_LEFT).scalar()
    return left_at


def cancel_left(connection: Connection, until: datetime, now: datetime) -> list[int]:
    """Cancels the open jobs that the last client left by `until`, and returns their ids. Nobody joins these any more,
    nor those that have ended."""
    left = list(connection.execute(_TAKE_LEFT, {"until": until}).scalars())
    by_owner: dict[int, list[int]] = defaultdict(list)
    for job_id, owner_id in connection.execute(_OWNERS, {"those": left}) if left else ():
        by_owner[owner_id].append(job_id)
    return [
        job_id
        for owner_id, job_ids in by_owner.items()
        for job_id in transitions.cancel_jobs(connection, owner_id, job_ids, now)
    ]
