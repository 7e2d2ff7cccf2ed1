"""The admin's password: tried seldom, off the event loop, and never for longer than bcrypt takes.

Owns the order of a try: throttle, then bcrypt. Knows no session and no route.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import bcrypt

from llamalith_app.errors import TooManyLogins
from llamalith_app.guards.hosts import Hosts, is_address, name_of
from llamalith_app.store import logins
from llamalith_app.store.database import Database

MAX_BYTES = 72
"""bcrypt takes no more; a longer password is a wrong one."""
AT_ONCE = 2
"""Checks that run beside each other; each takes a core for a quarter of a second."""
MAX_WAITING = 64
"""Logins at work in this process, so that no single one takes all places; MAX_WAITING_OF_ONE of these from one address
under one Host."""
MAX_WAITING_OF_ONE = 6
MAX_WAITING_OF_STRANGE = 48
"""Of all, under names that a stranger may have led here; MAX_STRANGE_OF_ADDRESS of these from one address. The other
places stay free for addresses and for configured Hosts."""
MAX_STRANGE_OF_ADDRESS = 24
HOUSEHOLD_BITS, SITE_BITS = 64, 48
"""Of an IPv6 address: below the first one household has every address, below the second one customer may."""


class Passwords:
    def __init__(self, database: Database, password_hash: str, hosts: Hosts) -> None:
        self._database = database
        self._hash = password_hash.encode()
        self._hosts = hosts
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="bcrypt")
        self._waiting: Counter[tuple[str, str]] = Counter()

    async def is_right(self, password: str, client: str, host: str) -> bool:
        """`client`: the address that it comes from; `host`: the header. Raises TooManyLogins, and then nothing was
        looked at."""
        addresses = throttled_addresses(client)
        under = "" if self._hosts.is_named(host) else throttled_host(host)
        # A look takes no place and no turn of the writer: who has to wait holds up nobody.
        _refuse(await self._database.read(logins.wait, addresses, under, datetime.now(UTC)))
        one = (addresses[0], under)
        if not self._has_place(*one):
            raise TooManyLogins(1)
        self._waiting[one] += 1
        try:
            return await self._try(password, addresses, under)
        finally:
            self._waiting[one] -= 1
            self._waiting += Counter()  # forgets those at zero

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _has_place(self, address: str, under: str) -> bool:
        if self._waiting[address, under] >= MAX_WAITING_OF_ONE or self._waiting.total() >= MAX_WAITING:
            return False
        if not under:
            return True
        strange = [(of, n) for (of, name), n in self._waiting.items() if name]
        n_of_address = sum(n for of, n in strange if of == address)
        return n_of_address < MAX_STRANGE_OF_ADDRESS and sum(n for _, n in strange) < MAX_WAITING_OF_STRANGE

    async def _try(self, password: str, addresses: tuple[str, ...], host: str) -> bool:
        reserved = await self._database.write(logins.reserve, addresses, host, datetime.now(UTC))
        _refuse(reserved.wait)
        right = await asyncio.get_running_loop().run_in_executor(self._threads, self._check, password)
        if right:
            await self._database.write(logins.succeeded, reserved.keys, host, datetime.now(UTC))
        return right

    def _check(self, password: str) -> bool:
        given = password.encode(errors="replace")
        # The long one is looked at as well: how long an answer takes tells nothing.
        matches = bcrypt.checkpw(given[:MAX_BYTES], self._hash)
        return matches and len(given) <= MAX_BYTES


def _refuse(wait: timedelta) -> None:
    if wait:
        raise TooManyLogins(math.ceil(wait.total_seconds()))


def throttled_addresses(host: str) -> tuple[str, ...]:
    """What counts as one address, the narrowest first: an IPv4 address, or an IPv6 household and its site."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return (host[:48] or "unknown",)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return (str(address.ipv4_mapped),)
        return tuple(
            str(ipaddress.ip_network((int(address), bits), strict=False)) for bits in (HOUSEHOLD_BITS, SITE_BITS)
        )
    return (str(address),)


def throttled_host(host: str) -> str:
    """What counts as one Host: a short digest of its name, empty for an address and for none. Only a name can be one
    that another site has led here."""
    name = name_of(host)
    return "" if not name or is_address(name) else hashlib.sha256(name.encode()).hexdigest()[:12]
