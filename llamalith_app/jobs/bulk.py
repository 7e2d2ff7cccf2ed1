"""Acts on all jobs that match a filter: cancels them, tries them again, or moves them to another class.

A page first says how many jobs an action concerns; the action then takes only jobs that were there already. Both are
bounded, and the writes come in chunks, so that others write in between. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple

from sqlalchemy import ColumnElement, or_

from llamalith_app.contracts.jobs import SAME_AGAIN_KINDS
from llamalith_app.contracts.principal import Principal
from llamalith_app.errors import QueueFull
from llamalith_app.jobs.cancel import Cancellations
from llamalith_app.jobs.submit import Submissions
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import listing, reads, transitions
from llamalith_app.store.jobs.listing import JobFilter
from llamalith_app.store.tables import JobRow, Status

ActionWord = Literal["cancel", "retry", "priority"]
MAX_WINDOWS = 50
"""Searches for one action, see `listing.search`."""


class _Rule(NamedTuple):
    statuses: tuple[Status, ...]
    """Of the jobs that the action can concern."""
    most: int
    """Jobs that one request acts on."""
    chunk: int
    """Jobs of one transaction."""


RULES: dict[ActionWord, _Rule] = {
    "cancel": _Rule((Status.QUEUED, Status.PROCESSING), 5000, 500),
    "retry": _Rule((Status.ERROR, Status.CANCELLED), 1000, 50),
    "priority": _Rule((Status.QUEUED,), 5000, 500),
}


class BulkAction(NamedTuple):
    """What is to be done, and with which jobs."""

    word: ActionWord
    wanted: JobFilter
    newest: int
    """No job with a larger id."""
    priority: int | None = None
    """The class to move to, for `priority`."""


class Concerned(NamedTuple):
    """Jobs that an action concerns, or concerned."""

    n_jobs: int
    is_more: bool
    """There may be more than one request acts on."""


class BulkActions:
    def __init__(
        self, database: Database, cancellations: Cancellations, submissions: Submissions, models: tuple[str, ...]
    ) -> None:
        self._database = database
        self._cancellations = cancellations
        self._submissions = submissions
        self._models = models

    async def count(self, owner_id: int, action: BulkAction) -> Concerned:
        """How many of the owner's jobs `run` would act on now. Raises StorageUnavailable."""
        ids, is_more = await self._concerned(owner_id, action)
        return Concerned(len(ids), is_more)

    async def run(self, principal: Principal, request_id: str, action: BulkAction) -> Concerned:
        """Acts, and returns on how many jobs; fewer where the queue has no room for more retries.

        Raises QueueFull where it has none at all, and StorageUnavailable; a part may be done then.
        """
        ids, is_more = await self._concerned(principal.user_id, action)
        if action.word == "retry":
            # In the order of their conversations.
            ids.sort()
        n_done = 0
        for chunk in _chunks(ids, RULES[action.word].chunk):
            try:
                n_done += await self._act(principal, request_id, action, chunk)
            except QueueFull:
                if not n_done:
                    raise
                return Concerned(n_done, True)
        return Concerned(n_done, is_more)

    async def _act(self, principal: Principal, request_id: str, action: BulkAction, ids: list[int]) -> int:
        if action.word == "cancel":
            return await self._cancellations.cancel_jobs(principal.user_id, ids)
        if action.word == "retry":
            return await self._submissions.retry_jobs(principal, request_id, ids)
        changed = await self._database.write(transitions.change_priority, principal.user_id, ids, action.priority or 0)
        return len(changed)

    async def _concerned(self, owner_id: int, action: BulkAction) -> tuple[list[int], bool]:
        """Their ids, newest first; and whether there may be more."""
        rule = RULES[action.word]
        statuses = [status for status in rule.statuses if action.wanted.status in (None, status.value)]
        ids: list[int] = []
        n_windows = 0
        for status in statuses:
            before: int | None = action.newest + 1
            while before is not None:
                if len(ids) >= rule.most or n_windows >= MAX_WINDOWS:
                    return sorted(ids, reverse=True), True
                found = await self._database.read(
                    listing.search,
                    owner_id,
                    action.wanted._replace(status=status.value),
                    limit=rule.most - len(ids),
                    before=before,
                    also=self._also(action),
                )
                ids += found.ids
                before = found.older
                n_windows += 1
        # Newest first: between two chunks no job starts because an earlier one of its conversation was cancelled.
        return sorted(ids, reverse=True), False

    def _also(self, action: BulkAction) -> Sequence[ColumnElement[bool]]:
        if action.word == "retry":
            may_help = or_(JobRow.error_kind.is_(None), JobRow.error_kind.not_in(SAME_AGAIN_KINDS))
            return [~reads.was_retried, JobRow.model.in_(self._models), may_help]
        return [JobRow.priority != action.priority] if action.word == "priority" else []


def _chunks(ids: list[int], size: int) -> Iterator[list[int]]:
    rest = iter(ids)
    while chunk := list(islice(rest, size)):
        yield chunk
