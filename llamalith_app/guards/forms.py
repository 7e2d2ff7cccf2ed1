"""The fields of an HTML form. Beside the guard, which reads the CSRF token among them.

Litestar's own parser keeps the last thousand bodies, passwords and all, in memory for good.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any
from urllib.parse import unquote_to_bytes

from litestar import Request
from litestar.connection import ASGIConnection

from llamalith_app.errors import BadInput, UnsupportedMediaType

MEDIA_TYPE = "application/x-www-form-urlencoded"
MAX_FIELDS = 50
ANONYMOUS_BYTES = 16 * 1024
"""Of a body from somebody who has shown no login."""
DRAFT_BYTES = 12 * 1024
"""Of a form that is kept over a login: it then fits into the login's own, beside the password."""
SMALL_BYTES = 64 * 1024
"""Larger ones are read beside the event loop, and a slice of so much at a time."""


def has_form(connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
    return connection.headers.get("content-type", "").partition(";")[0].strip().lower() == MEDIA_TYPE


async def form_fields(connection: ASGIConnection[Any, Any, Any, Any]) -> dict[str, str]:
    """The first field of each name; what is no UTF-8 becomes a replacement character.

    Raises UnsupportedMediaType for any other body, and BadInput for one with more than MAX_FIELDS fields.
    """
    if not has_form(connection) or not isinstance(connection, Request):
        raise UnsupportedMediaType(f"Content-Type: expected {MEDIA_TYPE}")
    body = _counted(await connection.body())
    return _parse(body) if len(body) <= SMALL_BYTES else await asyncio.to_thread(_parse, body)


async def anonymous_fields(connection: ASGIConnection[Any, Any, Any, Any]) -> dict[str, str] | None:
    """The form of somebody who has shown no login; None: it is longer than DRAFT_BYTES, and no more of it is read."""
    if not isinstance(connection, Request) or (connection.content_length or 0) > DRAFT_BYTES:
        return None
    body = bytearray()
    async with contextlib.aclosing(connection.stream()) as parts:
        async for part in parts:
            body += part
            if len(body) > DRAFT_BYTES:
                return None
    return _parse(_counted(bytes(body)))


def _counted(body: bytes) -> bytes:
    if body.count(b"&") >= MAX_FIELDS:
        raise BadInput(f"The form has too many fields: at most {MAX_FIELDS}.")
    return body


def _parse(body: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    for pair in body.split(b"&"):
        name, _, value = pair.partition(b"=")
        fields.setdefault(_text(name), _text(value))
    return fields


def _text(quoted: bytes) -> str:
    """In slices: the library makes an object of each escape, 3 GB for a form of 16 MiB, and holds the interpreter."""
    quoted = quoted.replace(b"+", b" ")
    plain, start = bytearray(), 0
    while start < len(quoted):
        end = start + SMALL_BYTES
        if (escape := quoted.rfind(b"%", end - 2, end)) != -1:
            end = escape
        plain += unquote_to_bytes(quoted[start:end])
        start = end
    return plain.decode("utf-8", errors="replace")
