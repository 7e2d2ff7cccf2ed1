"""Finds out from the headers which origin made a browser send a request. Called by the guard and the login.

Browsers send `Sec-Fetch-Site` (over https and to localhost) and `Origin` (with every unsafe request); a page can forge
neither. Another port of this host is another origin, although cookies ignore ports. Pure: knows no sessions, no tokens.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection

Connection = ASGIConnection[Any, Any, Any, Any]

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
PORTS = {"http": 80, "https": 443}


def is_foreign(connection: Connection) -> bool:
    """Whether a header says that another site or another port sent the request."""
    if any(site.lower() not in ("same-origin", "none") for site in connection.headers.getall("sec-fetch-site", [])):
        return True
    return any(not _is_ours(connection, origin) for origin in connection.headers.getall("origin", []))


def is_same_origin(connection: Connection) -> bool:
    """Whether a header says that one of our own pages sent the request, and no header contradicts it."""
    has_proof = connection.headers.get("sec-fetch-site") == "same-origin" or "origin" in connection.headers
    return has_proof and not is_foreign(connection)


def may_be_sent_from_elsewhere(connection: Connection) -> bool:
    """Whether another site's page may have caused this request.

    Over plain http such a page can suppress every header that would show it, so a browser's request without any of
    them counts as foreign. A request that does not look like a browser's passes: a page cannot choose the User-Agent
    of a link or an image.
    """
    referer = connection.headers.get("referer")
    if is_foreign(connection) or (referer is not None and not _is_ours(connection, referer)):
        return True
    names_source = referer is not None or any(name in connection.headers for name in ("sec-fetch-site", "origin"))
    return not names_source and _is_browser(connection)


def _is_browser(connection: Connection) -> bool:
    accept = connection.headers.get("accept", "")
    return "mozilla/" in connection.headers.get("user-agent", "").lower() or "text/html" in accept or "image/" in accept


def _is_ours(connection: Connection, url: str) -> bool:
    """Whether `url` has the origin that this request was sent to.

    An https origin also matches a request that arrived as http: a proxy may terminate TLS without being listed among
    the trusted proxies, and its X-Forwarded-Proto is then ignored.
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
