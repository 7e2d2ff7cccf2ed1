"""One cookie of a request. The standard library's parser takes minutes over some that a client may send."""

from __future__ import annotations

from typing import Any

from litestar.connection import ASGIConnection


def cookie(connection: ASGIConnection[Any, Any, Any, Any], name: str) -> str:
    """Its value as it was sent, without quotes around it; the last of several, empty if there is none."""
    wanted = name.encode()
    found = b""
    for header, line in connection.scope["headers"]:
        if header == b"cookie":
            for pair in line.split(b";"):
                key, _, value = pair.partition(b"=")
                if key.strip() == wanted:
                    found = value.strip()
    return found.decode("latin-1").removeprefix('"').removesuffix('"')
