"""Validates the Host header, which every client and every DNS record can set to anything.

With DNS rebinding another site's name resolves to this machine, and a browser then treats our answers as that site's.
This works with names only: an IP address cannot be rebound. Pure: knows no request and no session.
"""

from __future__ import annotations

import ipaddress

NEUTRAL = "http://127.0.0.1:8000"


class Hosts:
    """The Hosts that are answered.

    `allowed` holds names or addresses, each with or without a port. If it is empty, every Host is answered.
    """

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = tuple(_split(host) for host in allowed)

    def allow(self, host: str) -> bool:
        """Whether a request with this Host header is answered.

        A header without a port means port 80 or 443; behind a proxy it is unknown which, so both match.
        """
        if not self._allowed:
            return True
        name, port = _split(host)
        return any(
            name == their_name and their_port in ("", port or "80", port or "443")
            for their_name, their_port in self._allowed
        )

    def is_configured(self, host: str) -> bool:
        """Whether the configuration names this Host explicitly, so that it cannot be a rebound name."""
        return bool(self._allowed) and self.allow(host)

    def origin(self, scheme: str, host: str) -> str:
        """The server's URL origin, to be shown for copying. NEUTRAL if the Host is a name that is not configured."""
        if not is_address(name_of(host)) and not self.is_configured(host):
            return NEUTRAL
        return f"{scheme}://{host}"


def name_of(host: str) -> str:
    """The Host without its port, in lower case."""
    return _split(host)[0]


def is_address(name: str) -> bool:
    """Whether `name` is an IP address or localhost, which no DNS record can redirect."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _split(host: str) -> tuple[str, str]:
    """Name and port; the port is empty if there is none."""
    name, colon, port = host.lower().rpartition(":")
    if not colon or "]" in port:
        name, port = host.lower(), ""
    return name.removesuffix("."), port
