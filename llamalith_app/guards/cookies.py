"""Our cookies: their names and attributes, and how one of a request is read."""

from __future__ import annotations

from typing import Any, Literal

from litestar.connection import ASGIConnection
from litestar.datastructures import Cookie

Connection = ASGIConnection[Any, Any, Any, Any]


def is_https(connection: Connection) -> bool:
    return connection.scope["scheme"] == "https"


def sent_name(connection: Connection, name: str) -> str:
    """Over https with a prefix that browsers take only from this very host, over https: what plain http, another port
    or another host of the site has set is no cookie of ours there."""
    return f"__Host-{name}" if is_https(connection) else name


def own_cookie(
    connection: Connection,
    name: str,
    value: str,
    max_age: int,
    *,
    path: str,
    httponly: bool = True,
    samesite: Literal["lax", "strict"] = "lax",
) -> Cookie:
    """`max_age`: seconds; 0 takes it out of the browser. `path` counts over plain http only: the prefix wants `/`."""
    return Cookie(
        key=sent_name(connection, name),
        value=value,
        max_age=max_age,
        path="/" if is_https(connection) else path,
        httponly=httponly,
        samesite=samesite,
        secure=is_https(connection),
    )


def cookie(connection: Connection, name: str) -> str:
    """The value of our cookie of that name, as it was sent, without quotes around it; the last of several, empty if
    there is none. The standard library's parser takes minutes over some that a client may send."""
    wanted = sent_name(connection, name).encode()
    found = b""
    for header, line in connection.scope["headers"]:
        if header == b"cookie":
            for pair in line.split(b";"):
                key, _, value = pair.partition(b"=")
                if key.strip() == wanted:
                    found = value.strip()
    return found.decode("latin-1").removeprefix('"').removesuffix('"')
