"""Where a browser says that a request comes from. Pure: reads headers, knows neither sessions nor tokens.

Browsers tell it by `Sec-Fetch-Site` (on https and on this machine) and by `Origin` (on every unsafe request); a page
can forge neither. Another port of this host is another origin although cookies do not know ports.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection

Connection = ASGIConnection[Any, Any, Any, Any]

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
PORTS = {"http": 80, "https": 443}


def is_foreign(connection: Connection) -> bool:
    """Something about it says that another site, or another port, sent it."""
    if any(site.lower() not in ("same-origin", "none") for site in connection.headers.getall("sec-fetch-site", [])):
        return True
    return any(not _is_ours(connection, origin) for origin in connection.headers.getall("origin", []))


def is_same_origin(connection: Connection) -> bool:
    """Something about it says that one of our own pages sent it, and nothing says otherwise."""
    told = connection.headers.get("sec-fetch-site") == "same-origin" or "origin" in connection.headers
    return told and not is_foreign(connection)


def may_be_sent_from_elsewhere(connection: Connection) -> bool:
    """A page elsewhere made a browser ask for this, or may have: over plain http a browser tells nothing if that page
    wants it so. A request that does not look like a browser's passes: no page can choose the User-Agent of a link or a
    picture."""
    referer = connection.headers.get("referer")
    if is_foreign(connection) or (referer is not None and not _is_ours(connection, referer)):
        return True
    is_told = referer is not None or any(name in connection.headers for name in ("sec-fetch-site", "origin"))
    return not is_told and _is_browser(connection)


def _is_browser(connection: Connection) -> bool:
    accept = connection.headers.get("accept", "")
    return "mozilla/" in connection.headers.get("user-agent", "").lower() or "text/html" in accept or "image/" in accept


def _is_ours(connection: Connection, url: str) -> bool:
    """Is its origin the one that this request was sent to.

    https passes for http: a proxy that ends TLS may not be configured as one whose X-Forwarded-Proto counts.
    """
    scheme = connection.scope["scheme"]
    sent_to = connection.headers.get("host", "")
    theirs = _origin(url)
    return theirs is not None and theirs in (_origin(f"{scheme}://{sent_to}"), _origin(f"https://{sent_to}"))


def _origin(url: str) -> tuple[str, str, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in PORTS or not parts.hostname:
        return None
    return parts.scheme, parts.hostname, port or PORTS[parts.scheme]
