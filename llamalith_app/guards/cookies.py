"""Cookies that this server sets: their names and attributes, and how they are read from a request.

Used by `guards/sessions.py` and by the login and form controllers. Does not know what a cookie's value means.
"""

from __future__ import annotations

from typing import Any, Literal

from litestar.connection import ASGIConnection
from litestar.datastructures import Cookie

Connection = ASGIConnection[Any, Any, Any, Any]


def is_https(connection: Connection) -> bool:
    return connection.scope["scheme"] == "https"


def sent_name(connection: Connection, name: str) -> str:
    """The cookie's name on the wire.

    Over https it has the `__Host-` prefix. Browsers accept such a cookie only from this exact host over https, so a
    cookie planted over plain http, by another port or by another host of the site has a different name.
    """
    return f"__Host-{name}" if is_https(connection) else name


def make_cookie(
    connection: Connection,
    name: str,
    value: str,
    max_age: int,
    *,
    path: str,
    httponly: bool = True,
    samesite: Literal["lax", "strict"] = "lax",
) -> Cookie:
    """A cookie to set. `max_age` is in seconds; 0 deletes the cookie in the browser.

    `path` is used over plain http only: over https the `__Host-` prefix requires `/`.
    """
    return Cookie(
        key=sent_name(connection, name),
        value=value,
        max_age=max_age,
        path="/" if is_https(connection) else path,
        httponly=httponly,
        samesite=samesite,
        secure=is_https(connection),
    )


def cookie_value(connection: Connection, name: str) -> str:
    """The value of the cookie of that name, without surrounding quotes. Empty if there is none; the last of several.

    Parsed by hand because the standard library's parser takes minutes for some Cookie headers a client can send.
    """
    wanted = sent_name(connection, name).encode()
    found = b""
    for header, line in connection.scope["headers"]:
        if header == b"cookie":
            for pair in line.split(b";"):
                key, _, value = pair.partition(b"=")
                if key.strip() == wanted:
                    found = value.strip()
    return found.decode("latin-1").removeprefix('"').removesuffix('"')
