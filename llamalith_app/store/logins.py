"""How often passwords may be tried: a delay that grows with the failures of an address under one Host, and of all.

The only writer of login failures. An attempt counts as failed before its password is looked at, in the transaction
that allows it: so several processes together allow no more than one would, and a restart forgets nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, and_, delete, insert, select, update

from llamalith_app.store.tables import LoginFailuresRow

FREE = 5
"""Failures of one address without a delay; from then on 1, 2, 4, … seconds."""
WIDER = 4
HOSTS_OF_ONE = 4
"""Names of this server under which one address has failures of its own."""
LONGEST = timedelta(minutes=15)
FORGOTTEN_AFTER = timedelta(hours=24)

FREE_OVERALL = 50
"""Failures of all addresses together without a delay; from then on 1 s, doubled every DOUBLED_OVERALL failures."""
DOUBLED_OVERALL = 10
LONGEST_OVERALL = timedelta(minutes=1)
FORGOTTEN_OVERALL_AFTER = timedelta(minutes=15)

MAX_PROVEN = 8
"""Names under which a login has succeeded lately: each has failures of its own, however many others are thought up."""
PROVEN_FOR = timedelta(days=90)

EVERYBODY = ""
PROVEN = "+"
"""Before the name, in the row of one that is proven."""


# Between "+" and the character behind it: what the primary key's index finds.
_IS_PROVEN = and_(LoginFailuresRow.address >= PROVEN, LoginFailuresRow.address < ",")


class Reserved(NamedTuple):
    wait: timedelta
    """Zero: the attempt may be made and is counted as failed. Else how long to wait, and nothing is counted."""
    keys: tuple[str, ...]
    """What it is counted for beside everybody, the narrowest first."""


def reserve(connection: Connection, addresses: tuple[str, ...], host: str, now: datetime) -> Reserved:
    """`addresses`: where it comes from, the narrowest first; each wider one has WIDER times as many free failures. Each
    counts for itself under every `host`, so that a page that another site has led here slows nobody but itself.

    The delay of everybody holds from an address's own last failure on: whatever others do, who waits for it may try,
    and an address without a failure need not wait.
    """
    _forget(connection, now)
    keys, counts, ready_at = _standing(connection, addresses, host, now)
    if ready_at > now:
        return Reserved(ready_at - now, keys)
    for key, n_failures in counts.items():
        _note(connection, key, n_failures + 1, now)
    return Reserved(timedelta(), keys)


def wait(connection: Connection, addresses: tuple[str, ...], host: str, now: datetime) -> timedelta:
    """How long `reserve` would have it wait; only reads."""
    _, _, ready_at = _standing(connection, addresses, host, now)
    return ready_at - now


def _standing(
    connection: Connection, addresses: tuple[str, ...], host: str, now: datetime
) -> tuple[tuple[str, ...], dict[str, int], datetime]:
    """What an attempt would be counted for, everybody's and each key's failures, and from when it may be made."""
    n_all, _ = _failures(connection, EVERYBODY, now)
    keys = tuple(_key(connection, address, host, now) for address in addresses)
    counts = {EVERYBODY: n_all}
    ready_at = now
    free = FREE
    for key in keys:
        counts[key], last_at = _failures(connection, key, now)
        delay = _delay(counts[key] - free, 1, LONGEST)
        if counts[key] and key == keys[0]:
            delay = max(delay, _delay(n_all - FREE_OVERALL, DOUBLED_OVERALL, LONGEST_OVERALL))
        ready_at = max(ready_at, last_at + delay)
        free *= WIDER
    return keys, counts, ready_at


def succeeded(connection: Connection, keys: tuple[str, ...], host: str, now: datetime) -> None:
    """Forgives the narrowest of `keys`, takes its attempt out of the wider counts, and proves the `host`. What several
    names share is not forgiven: it is the others' too."""
    is_shared = keys[0].endswith("#")
    if not is_shared:
        connection.execute(delete(LoginFailuresRow).where(LoginFailuresRow.address == keys[0]))
    wider = [EVERYBODY, *(keys if is_shared else keys[1:])]
    connection.execute(
        update(LoginFailuresRow)
        .where(LoginFailuresRow.address.in_(wider), LoginFailuresRow.n_failures > 0)
        .values(n_failures=LoginFailuresRow.n_failures - 1)
    )
    if host:
        _note(connection, f"{PROVEN}{host}", 0, now)
        newest_first = select(LoginFailuresRow.address).where(_IS_PROVEN).order_by(LoginFailuresRow.last_at.desc())
        surplus = list(connection.scalars(newest_first.offset(MAX_PROVEN)))
        connection.execute(delete(LoginFailuresRow).where(LoginFailuresRow.address.in_(surplus)))


def _note(connection: Connection, key: str, n_failures: int, now: datetime) -> None:
    noted = {"n_failures": n_failures, "last_at": now}
    row = LoginFailuresRow.address == key
    if connection.execute(update(LoginFailuresRow).where(row).values(**noted)).rowcount == 0:
        connection.execute(insert(LoginFailuresRow).values(address=key, **noted))


def _key(connection: Connection, address: str, host: str, now: datetime) -> str:
    """Where the failures of an address under a Host are counted. Names beyond HOSTS_OF_ONE share one count, but for
    proven ones: whoever can think up names would otherwise be as fast as he can think up more."""
    if not host:
        return address
    key = f"{address}#{host}"
    shared = f"{address}#"
    proven = {
        f"{shared}{name.removeprefix(PROVEN)}"
        for name in connection.scalars(
            select(LoginFailuresRow.address).where(_IS_PROVEN, LoginFailuresRow.last_at > now - PROVEN_FOR)
        )
    }
    others = LoginFailuresRow.address.between(shared, f"{address}$")
    lately = LoginFailuresRow.last_at > now - FORGOTTEN_AFTER
    known = set(connection.scalars(select(LoginFailuresRow.address).where(others, lately)))
    return key if key in known | proven or len(known - proven - {shared}) < HOSTS_OF_ONE else shared


def _failures(connection: Connection, address: str, now: datetime) -> tuple[int, datetime]:
    row = connection.execute(
        select(LoginFailuresRow.n_failures, LoginFailuresRow.last_at).where(LoginFailuresRow.address == address)
    ).first()
    return (0, now) if row is None else (row.n_failures, row.last_at)


def _delay(n_beyond: int, n_doubled: int, longest: timedelta) -> timedelta:
    """Nothing below zero failures beyond the free ones, then a second, doubled with every `n_doubled` more."""
    if n_beyond < 0:
        return timedelta()
    return min(timedelta(seconds=2 ** min(n_beyond // n_doubled, 30)), longest)


def _forget(connection: Connection, now: datetime) -> None:
    is_everybody = LoginFailuresRow.address == EVERYBODY
    for those, age in (
        (is_everybody, FORGOTTEN_OVERALL_AFTER),
        (~is_everybody & ~_IS_PROVEN, FORGOTTEN_AFTER),
        (_IS_PROVEN, PROVEN_FOR),
    ):
        connection.execute(delete(LoginFailuresRow).where(those, LoginFailuresRow.last_at <= now - age))
