"""Verifies the admin's password: first the throttle (`store/logins.py`), then bcrypt in a thread.

Called by the login controller. Bounds how many logins are in progress. Knows no session and no route.
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
"""bcrypt's limit. A longer password is always wrong."""
BCRYPT_THREADS = 2
"""Each check keeps a core busy for a quarter of a second."""
MAX_WAITING = 64
"""Logins in progress in this process."""
MAX_WAITING_PER_CLIENT = 6
"""Logins in progress from one address under one Host."""
MAX_WAITING_UNCONFIGURED = 48
"""Logins in progress under Host names that are not configured. Another site may have pointed such a name here, so the
other places of MAX_WAITING stay free for IP addresses and configured Hosts."""
MAX_UNCONFIGURED_PER_ADDRESS = 24
"""Logins in progress from one address under Host names that are not configured."""
HOUSEHOLD_BITS, SITE_BITS = 64, 48
"""IPv6 prefix lengths. One household owns a whole /64; one customer of a provider may own a whole /48."""


class Passwords:
    """`password_hash`: the admin's, by bcrypt. `hosts`: those that are configured."""

    def __init__(self, database: Database, password_hash: str, hosts: Hosts) -> None:
        self._database = database
        self._hash = password_hash.encode()
        self._hosts = hosts
        self._threads = ThreadPoolExecutor(BCRYPT_THREADS, thread_name_prefix="bcrypt")
        self._waiting: Counter[tuple[str, str]] = Counter()

    async def is_correct(self, password: str, client: str, host: str) -> bool:
        """Whether this is the admin's password. `client` is the sender's address, `host` the Host header.

        Raises TooManyLogins if the client must wait; the password was not checked then. Raises StorageUnavailable.
        """
        addresses = throttled_addresses(client)
        unconfigured_host = "" if self._hosts.is_configured(host) else throttled_host(host)
        # A read takes no place and no turn of the writer, so a throttled client delays nobody else.
        _refuse(await self._database.read(logins.wait, addresses, unconfigured_host, datetime.now(UTC)))
        key = (addresses[0], unconfigured_host)
        if not self._has_room(*key):
            raise TooManyLogins(1)
        self._waiting[key] += 1
        try:
            return await self._attempt(password, addresses, unconfigured_host)
        finally:
            self._waiting[key] -= 1
            self._waiting += Counter()  # drops the keys that are at zero

    def close(self) -> None:
        """Cancels the checks that have not begun; does not wait for those that have."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _has_room(self, address: str, unconfigured_host: str) -> bool:
        if self._waiting[address, unconfigured_host] >= MAX_WAITING_PER_CLIENT or self._waiting.total() >= MAX_WAITING:
            return False
        if not unconfigured_host:
            return True
        unconfigured = [(client, n) for (client, name), n in self._waiting.items() if name]
        n_of_address = sum(n for client, n in unconfigured if client == address)
        return (
            n_of_address < MAX_UNCONFIGURED_PER_ADDRESS and sum(n for _, n in unconfigured) < MAX_WAITING_UNCONFIGURED
        )

    async def _attempt(self, password: str, addresses: tuple[str, ...], host: str) -> bool:
        reserved = await self._database.write(logins.reserve, addresses, host, datetime.now(UTC))
        _refuse(reserved.wait)
        is_correct = await asyncio.get_running_loop().run_in_executor(self._threads, self._check, password)
        if is_correct:
            await self._database.write(logins.succeeded, reserved.keys, host, datetime.now(UTC))
        return is_correct

    def _check(self, password: str) -> bool:
        given = password.encode(errors="replace")
        # A password that is too long is checked as well, so that the time of the answer reveals nothing.
        matches = bcrypt.checkpw(given[:MAX_BYTES], self._hash)
        return matches and len(given) <= MAX_BYTES


def _refuse(wait: timedelta) -> None:
    if wait:
        raise TooManyLogins(math.ceil(wait.total_seconds()))


def throttled_addresses(host: str) -> tuple[str, ...]:
    """The keys under which an address is throttled, narrowest first: an IPv4 address, or an IPv6 /64 and its /48."""
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
    """The key under which a Host is throttled: a short digest of its name. Empty for an IP address and for no Host.

    Only a name can be one that another site has pointed here.
    """
    name = name_of(host)
    return "" if not name or is_address(name) else hashlib.sha256(name.encode()).hexdigest()[:12]
