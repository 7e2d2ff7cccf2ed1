"""Where a browser says that a request comes from. Pure: reads headers, knows neither sessions nor tokens.

Browsers tell it by `Sec-Fetch-Site` (on https and on this machine) and by `Origin` (on every unsafe request); a page
can forge neither. Another port of this host is another origin although cookies do not know ports.
"""

from __future__ import annotations

from typing import Any

from litestar.connection import ASGIConnection

Connection = ASGIConnection[Any, Any, Any, Any]

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def is_foreign(connection: Connection) -> bool:
    """Something about it says that another site, or another port, sent it."""
    site, origin = connection.headers.get("sec-fetch-site"), connection.headers.get("origin")
    if site is not None and site.lower() not in ("same-origin", "none"):
        return True
    return origin is not None and origin not in _own_origins(connection)


def is_same_origin(connection: Connection) -> bool:
    """Something about it says that one of our own pages sent it, and nothing says otherwise."""
    told = connection.headers.get("sec-fetch-site") == "same-origin" or "origin" in connection.headers
    return told and not is_foreign(connection)


def _own_origins(connection: Connection) -> tuple[str, ...]:
    host = connection.headers.get("host", "")
    # https too: a proxy that ends TLS may not be configured as one whose X-Forwarded-Proto counts.
    return (f"{connection.scope['scheme']}://{host}", f"https://{host}")
