"""How often passwords may be tried: a delay that grows with the failures of an address, and with those of all.

The only writer of login failures. An attempt counts as failed before its password is looked at, in the transaction
that allows it: so several processes together allow no more than one would, and a restart forgets nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, insert, select, update

from llamalith_app.store.tables import LoginFailuresRow

FREE = 5
"""Failures of one address without a delay; from then on 1, 2, 4, … seconds."""
LONGEST = timedelta(minutes=15)
FORGOTTEN_AFTER = timedelta(hours=24)

FREE_OVERALL = 50
"""Failures of all addresses together without a delay; from then on 1 s, doubled every DOUBLED_OVERALL failures."""
DOUBLED_OVERALL = 10
LONGEST_OVERALL = timedelta(minutes=1)
FORGOTTEN_OVERALL_AFTER = timedelta(minutes=15)

EVERYBODY = ""


def reserve(connection: Connection, address: str, now: datetime) -> timedelta:
    """Zero: the attempt may be made and is counted as failed. Else how long to wait, and nothing is counted.

    The delay of all addresses together holds for those with failures of their own: somebody far away cannot lock out
    the owner, who comes from an address that has none.
    """
    _forget(connection, now)
    n_own, own_last = _failures(connection, address, now)
    n_all, all_last = _failures(connection, EVERYBODY, now)
    ready_at = own_last + _own_delay(n_own)
    if n_own:
        ready_at = max(ready_at, all_last + _overall_delay(n_all))
    if ready_at > now:
        return ready_at - now
    for key, n_failures in ((address, n_own), (EVERYBODY, n_all)):
        counted = {"n_failures": n_failures + 1, "last_at": now}
        row = LoginFailuresRow.address == key
        if connection.execute(update(LoginFailuresRow).where(row).values(**counted)).rowcount == 0:
            connection.execute(insert(LoginFailuresRow).values(address=key, **counted))
    return timedelta()


def succeeded(connection: Connection, address: str) -> None:
    """Forgives the address, and takes its attempt out of the count of all."""
    connection.execute(delete(LoginFailuresRow).where(LoginFailuresRow.address == address))
    connection.execute(
        update(LoginFailuresRow)
        .where(LoginFailuresRow.address == EVERYBODY, LoginFailuresRow.n_failures > 0)
        .values(n_failures=LoginFailuresRow.n_failures - 1)
    )


def _failures(connection: Connection, address: str, now: datetime) -> tuple[int, datetime]:
    row = connection.execute(
        select(LoginFailuresRow.n_failures, LoginFailuresRow.last_at).where(LoginFailuresRow.address == address)
    ).first()
    return (0, now) if row is None else (row.n_failures, row.last_at)


def _own_delay(n_failures: int) -> timedelta:
    if n_failures < FREE:
        return timedelta()
    return min(timedelta(seconds=2 ** min(n_failures - FREE, 30)), LONGEST)


def _overall_delay(n_failures: int) -> timedelta:
    if n_failures < FREE_OVERALL:
        return timedelta()
    return min(timedelta(seconds=2 ** min((n_failures - FREE_OVERALL) // DOUBLED_OVERALL, 30)), LONGEST_OVERALL)


def _forget(connection: Connection, now: datetime) -> None:
    for is_everybody, age in ((True, FORGOTTEN_OVERALL_AFTER), (False, FORGOTTEN_AFTER)):
        connection.execute(
            delete(LoginFailuresRow).where(
                (LoginFailuresRow.address == EVERYBODY) == is_everybody, LoginFailuresRow.last_at <= now - age
            )
        )
