"""The admin's password: tried seldom, off the event loop, and never for longer than bcrypt takes.

Owns the order of a try: throttle, then bcrypt. Knows no session and no route.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
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
MAX_WAITING = 20
IPV6_SITE_BITS = 64
"""One household has all addresses below such a prefix."""


class Passwords:
    def __init__(self, database: Database, password_hash: str) -> None:
        self._database = database
        self._hash = password_hash.encode()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="bcrypt")
        self._n_waiting = 0

    async def is_right(self, password: str, host: str) -> bool:
        """`host`: the address that it comes from. Raises TooManyLogins, and then nothing was looked at."""
        if self._n_waiting >= MAX_WAITING:
            raise TooManyLogins(1)
        self._n_waiting += 1
        try:
            return await self._try(password, throttled_address(host))
        finally:
            self._n_waiting -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _try(self, password: str, address: str) -> bool:
        wait = await self._database.write(logins.reserve, address, datetime.now(UTC))
        if wait:
            raise TooManyLogins(math.ceil(wait.total_seconds()))
        right = await asyncio.get_running_loop().run_in_executor(self._threads, self._check, password)
        if right:
            await self._database.write(logins.succeeded, address)
        return right

    def _check(self, password: str) -> bool:
        given = password.encode(errors="replace")
        # The long one is looked at as well: how long an answer takes tells nothing.
        matches = bcrypt.checkpw(given[:MAX_BYTES], self._hash)
        return matches and len(given) <= MAX_BYTES


def throttled_address(host: str) -> str:
    """What counts as one address: an IPv4 address, or an IPv6 site."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:64] or "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address), IPV6_SITE_BITS), strict=False))
    return str(address)
