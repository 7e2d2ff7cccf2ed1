"""Rate limit of logins: a delay that grows with the failures of one address under one Host, and of all addresses.

The only writer of login failures. An attempt is counted as failed before its password is checked, in the transaction
that allows it. So several processes together allow no more attempts than one would, and a restart resets nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, and_, delete, insert, select, update

from llamalith_app.store.tables import LoginFailuresRow

FREE_FAILURES = 5
"""Failures of one address without a delay; the next ones cost 1, 2, 4, … seconds."""
WIDER_FACTOR = 4
"""Each wider network that an address belongs to has this many times the free failures of the narrower one."""
MAX_HOSTS_PER_ADDRESS = 4
"""Hosts under which one address has separate counts. Further ones share a count."""
MAX_DELAY = timedelta(minutes=15)
FAILURES_TTL = timedelta(hours=24)

FREE_FAILURES_OVERALL = 50
"""Failures of all addresses together without a delay; then 1 s, doubled every DOUBLED_OVERALL failures."""
DOUBLING_STEP_OVERALL = 10
MAX_DELAY_OVERALL = timedelta(minutes=1)
FAILURES_TTL_OVERALL = timedelta(minutes=15)

MAX_PROVEN_HOSTS = 8
"""Proven Hosts: a login has succeeded under them lately. Each keeps a count of its own, however many Hosts a client
makes up."""
PROVEN_TTL = timedelta(days=90)

ALL_ADDRESSES = ""
PROVEN_PREFIX = "+"
"""Begins the address in the row of a proven Host."""


# A range, so that SQLite uses the index of the primary key; "," is the character after "+".
_IS_PROVEN = and_(LoginFailuresRow.address >= PROVEN_PREFIX, LoginFailuresRow.address < ",")


class ReservedAttempt(NamedTuple):
    wait: timedelta
    """Zero: the attempt is allowed and counted as failed. Otherwise how long to wait; nothing is counted then."""
    keys: tuple[str, ...]
    """The counters of this attempt beside that of all addresses, the narrowest first."""


def reserve(connection: Connection, addresses: tuple[str, ...], host: str, now: datetime) -> ReservedAttempt:
    """Counts a login attempt as failed, or says how long it has to wait.

    `addresses`: the client's address and the networks around it, the narrowest first. Each has a count under every
    `host`, so that attempts through another site's name delay only clients that use that name.

    The delay that all failures together cause starts at the address's own last failure. So an address without a failure
    never waits for others, and an address that has waited may try, whatever others did meanwhile.
    """
    _delete_expired(connection, now)
    keys, counts, ready_at = _counts_and_ready_at(connection, addresses, host, now)
    if ready_at > now:
        return ReservedAttempt(ready_at - now, keys)
    for key, n_failures in counts.items():
        _set_failures(connection, key, n_failures + 1, now)
    return ReservedAttempt(timedelta(), keys)


def required_wait(connection: Connection, addresses: tuple[str, ...], host: str, now: datetime) -> timedelta:
    """How long `reserve` would make this attempt wait. Counts nothing."""
    _, _, ready_at = _counts_and_ready_at(connection, addresses, host, now)
    return ready_at - now


def _counts_and_ready_at(
    connection: Connection, addresses: tuple[str, ...], host: str, now: datetime
) -> tuple[tuple[str, ...], dict[str, int], datetime]:
    """The keys of an attempt's counters, the failures by key (ALL_ADDRESSES too), and from when it is allowed."""
    n_all, _ = _failures(connection, ALL_ADDRESSES, now)
    keys = tuple(_counter_key(connection, address, host, now) for address in addresses)
    counts = {ALL_ADDRESSES: n_all}
    ready_at = now
    free = FREE_FAILURES
    for key in keys:
        counts[key], last_at = _failures(connection, key, now)
        delay = _delay(counts[key] - free, 1, MAX_DELAY)
        if counts[key] and key == keys[0]:
            delay = max(delay, _delay(n_all - FREE_FAILURES_OVERALL, DOUBLING_STEP_OVERALL, MAX_DELAY_OVERALL))
        ready_at = max(ready_at, last_at + delay)
        free *= WIDER_FACTOR
    return keys, counts, ready_at


def record_success(connection: Connection, keys: tuple[str, ...], host: str, now: datetime) -> None:
    """Deletes the failures of the narrowest key, takes this attempt out of the wider counts, and marks `host` as
    proven. A count that several Hosts share is only lowered by one, since other Hosts' failures are in it."""
    is_shared = keys[0].endswith("#")
    if not is_shared:
        connection.execute(delete(LoginFailuresRow).where(LoginFailuresRow.address == keys[0]))
    wider = [ALL_ADDRESSES, *(keys if is_shared else keys[1:])]
    connection.execute(
        update(LoginFailuresRow)
        .where(LoginFailuresRow.address.in_(wider), LoginFailuresRow.n_failures > 0)
        .values(n_failures=LoginFailuresRow.n_failures - 1)
    )
    if host:
        _set_failures(connection, f"{PROVEN_PREFIX}{host}", 0, now)
        newest_first = select(LoginFailuresRow.address).where(_IS_PROVEN).order_by(LoginFailuresRow.last_at.desc())
        surplus = list(connection.scalars(newest_first.offset(MAX_PROVEN_HOSTS)))
        connection.execute(delete(LoginFailuresRow).where(LoginFailuresRow.address.in_(surplus)))


def _set_failures(connection: Connection, key: str, n_failures: int, now: datetime) -> None:
    noted = {"n_failures": n_failures, "last_at": now}
    row = LoginFailuresRow.address == key
    if connection.execute(update(LoginFailuresRow).where(row).values(**noted)).rowcount == 0:
        connection.execute(insert(LoginFailuresRow).values(address=key, **noted))


def _counter_key(connection: Connection, address: str, host: str, now: datetime) -> str:
    """The key of the counter of an address under a Host. Hosts beyond MAX_HOSTS_PER_ADDRESS share one, but for proven
    ones: otherwise a client could try as often as it makes up Hosts."""
    if not host:
        return address
    key = f"{address}#{host}"
    shared = f"{address}#"
    proven = {
        f"{shared}{name.removeprefix(PROVEN_PREFIX)}"
        for name in connection.scalars(
            select(LoginFailuresRow.address).where(_IS_PROVEN, LoginFailuresRow.last_at > now - PROVEN_TTL)
        )
    }
    others = LoginFailuresRow.address.between(shared, f"{address}$")
    lately = LoginFailuresRow.last_at > now - FAILURES_TTL
    known = set(connection.scalars(select(LoginFailuresRow.address).where(others, lately)))
    return key if key in known | proven or len(known - proven - {shared}) < MAX_HOSTS_PER_ADDRESS else shared


def _failures(connection: Connection, address: str, now: datetime) -> tuple[int, datetime]:
    row = connection.execute(
        select(LoginFailuresRow.n_failures, LoginFailuresRow.last_at).where(LoginFailuresRow.address == address)
    ).first()
    return (0, now) if row is None else (row.n_failures, row.last_at)


def _delay(n_beyond: int, n_doubled: int, longest: timedelta) -> timedelta:
    """0 s while `n_beyond` (failures beyond the free ones) is negative, then 1 s, doubled every `n_doubled`."""
    if n_beyond < 0:
        return timedelta()
    return min(timedelta(seconds=2 ** min(n_beyond // n_doubled, 30)), longest)


def _delete_expired(connection: Connection, now: datetime) -> None:
    is_everybody = LoginFailuresRow.address == ALL_ADDRESSES
    for those, age in (
        (is_everybody, FAILURES_TTL_OVERALL),
        (~is_everybody & ~_IS_PROVEN, FAILURES_TTL),
        (_IS_PROVEN, PROVEN_TTL),
    ):
        connection.execute(delete(LoginFailuresRow).where(those, LoginFailuresRow.last_at <= now - age))
