"""The names under which requests ask for this server: the Host header, which every client and every DNS record can set.

A page of another site may have its own name lead to this machine (DNS rebinding): its browser then takes what we answer
for that site's own. Such a page always comes under a name; an address that was asked for cannot be rebound.
"""

from __future__ import annotations

import ipaddress

NEUTRAL = "http://127.0.0.1:8000"


class Hosts:
    """Which Hosts are answered. `allowed`: names or addresses, each with or without a port; none: every Host."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = tuple(_split(host) for host in allowed)

    def allow(self, host: str) -> bool:
        """`host`: of the header. Where it tells no port, that is one of the usual two, and nobody can say which."""
        if not self._allowed:
            return True
        name, port = _split(host)
        return any(
            name == their_name and their_port in ("", port or "80", port or "443")
            for their_name, their_port in self._allowed
        )

    def is_named(self, host: str) -> bool:
        """Whether the configuration names it: no stranger has led it here."""
        return bool(self._allowed) and self.allow(host)

    def origin(self, scheme: str, host: str) -> str:
        """Where this server is, for people to copy: never a name that only a stranger has told."""
        if not is_address(name_of(host)) and not self.is_named(host):
            return NEUTRAL
        return f"{scheme}://{host}"


def name_of(host: str) -> str:
    """A Host without its port, in lower case."""
    return _split(host)[0]


def is_address(name: str) -> bool:
    """An address, or this machine: no DNS record says where that leads."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _split(host: str) -> tuple[str, str]:
    """Name and port; an empty one where none is told."""
    name, colon, port = host.lower().rpartition(":")
    if not colon or "]" in port:
        name, port = host.lower(), ""
    return name.removesuffix("."), port
