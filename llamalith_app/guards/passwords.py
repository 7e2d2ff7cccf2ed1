"""The admin's password: tried seldom, off the event loop, and never for longer than bcrypt takes.

Owns the order of a try: throttle, then bcrypt. Knows no session and no route.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import bcrypt

from llamalith_app.errors import TooManyLogins
from llamalith_app.store import logins
from llamalith_app.store.database import Database

MAX_BYTES = 72
"""bcrypt takes no more; a longer password is a wrong one."""
AT_ONCE = 2
"""Checks that run beside each other; each takes a core for a quarter of a second."""
MAX_WAITING = 64
"""Logins at work in this process; MAX_WAITING_OF_ONE from one address, so that no single one takes all places."""
MAX_WAITING_OF_ONE = 6
HOUSEHOLD_BITS, SITE_BITS = 64, 48
"""Of an IPv6 address: below the first one household has every address, below the second one customer may."""


class Passwords:
    def __init__(self, database: Database, password_hash: str) -> None:
        self._database = database
        self._hash = password_hash.encode()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="bcrypt")
        self._waiting: Counter[str] = Counter()

    async def is_right(self, password: str, host: str) -> bool:
        """`host`: the address that it comes from. Raises TooManyLogins, and then nothing was looked at."""
        addresses = throttled_addresses(host)
        if self._waiting[addresses[0]] >= MAX_WAITING_OF_ONE or self._waiting.total() >= MAX_WAITING:
            raise TooManyLogins(1)
        self._waiting[addresses[0]] += 1
        try:
            return await self._try(password, addresses)
        finally:
            self._waiting[addresses[0]] -= 1
            self._waiting += Counter()  # forgets those at zero

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _try(self, password: str, addresses: tuple[str, ...]) -> bool:
        wait = await self._database.write(logins.reserve, addresses, datetime.now(UTC))
        if wait:
            raise TooManyLogins(math.ceil(wait.total_seconds()))
        right = await asyncio.get_running_loop().run_in_executor(self._threads, self._check, password)
        if right:
            await self._database.write(logins.succeeded, addresses)
        return right

    def _check(self, password: str) -> bool:
        given = password.encode(errors="replace")
        # The long one is looked at as well: how long an answer takes tells nothing.
        matches = bcrypt.checkpw(given[:MAX_BYTES], self._hash)
        return matches and len(given) <= MAX_BYTES


def throttled_addresses(host: str) -> tuple[str, ...]:
    """What counts as one address, the narrowest first: an IPv4 address, or an IPv6 household and its site."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return (host[:64] or "unknown",)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return (str(address.ipv4_mapped),)
        return tuple(
            str(ipaddress.ip_network((int(address), bits), strict=False)) for bits in (HOUSEHOLD_BITS, SITE_BITS)
        )
    return (str(address),)
