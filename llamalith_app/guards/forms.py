"""Parses HTML forms (`application/x-www-form-urlencoded`), and those with a file (`multipart/form-data`).

Used by the guard, which looks for the CSRF token, by `AppRequest.form_as` and by the route of attachments. Does not
know what a form is for. Litestar's own parsers are not used: one caches the last thousand bodies, passwords included,
without expiry, the other writes files to disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from llamalith_app.errors import BadInput, FileTooLarge, UnsupportedMediaType

MEDIA_TYPE = "application/x-www-form-urlencoded"
FILE_MEDIA_TYPE = "multipart/form-data"
FILE_FIELD = "file"
MAX_FILE_MB = 16
"""Millions of bytes of a file in a form. The largest body has room for the other fields beside it."""
MAX_FIELDS = 50
ANONYMOUS_BYTES = 16 * 1024
"""Largest body accepted from a client that is not logged in."""
DRAFT_BYTES = 12 * 1024
"""Largest form kept across a login. It is sent again inside the login form, beside the password."""
SMALL_BYTES = 64 * 1024
"""Larger forms are parsed in a thread, in slices of this size."""


class FileForm(NamedTuple):
    fields: dict[str, str]
    """Those without a file, as `form_fields` has them."""
    name: str
    """The file's, as the client says it; may be anything."""
    data: bytes


def has_form(connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
    """Whether the request's Content-Type is that of a form."""
    return _media_type(connection) == MEDIA_TYPE


def has_file_form(connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
    """Whether the request's Content-Type is that of a form with a file."""
    return _media_type(connection) == FILE_MEDIA_TYPE


def _media_type(connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    return connection.headers.get("content-type", "").partition(";")[0].strip().lower()


async def form_fields(connection: ASGIConnection[Any, Any, Any, Any]) -> dict[str, str]:
    """The form's fields by name; of repeated names the first counts. Invalid UTF-8 becomes U+FFFD.

    Raises UnsupportedMediaType for a body that is not a form, and BadInput for more than MAX_FIELDS fields.
    """
    if not has_form(connection) or not isinstance(connection, Request):
        raise UnsupportedMediaType(f"Content-Type: expected {MEDIA_TYPE}")
    body = _refuse_many_fields(await connection.body())
    return _parse(body) if len(body) <= SMALL_BYTES else await asyncio.to_thread(_parse, body)


async def file_form(connection: ASGIConnection[Any, Any, Any, Any]) -> FileForm:
    """The form's file, in memory, and its other fields. Without a file, or where none was chosen, name and data are
    empty.

    Raises UnsupportedMediaType, FileTooLarge, and BadInput for a malformed form or more than MAX_FIELDS fields.
    """
    if not has_file_form(connection) or not isinstance(connection, Request):
        raise UnsupportedMediaType(f"Content-Type: expected {FILE_MEDIA_TYPE}")
    boundary = parse_options_header(connection.headers["content-type"])[1].get("boundary", "")
    try:
        body = await connection.body()
    except RequestEntityTooLarge:
        raise FileTooLarge(f"The file is too large: at most {MAX_FILE_MB} MB can be attached.") from None
    form = await asyncio.to_thread(_parse_file_form, body, boundary)
    if len(form.data) > MAX_FILE_MB * 1_000_000:
        size = len(form.data) / 1_000_000
        raise FileTooLarge(f"The file has {size:.1f} MB: at most {MAX_FILE_MB} MB can be attached.")
    return form


async def listed_values(connection: ASGIConnection[Any, Any, Any, Any], name: str) -> list[str]:
    """All values of this field, as of boxes that are checked in a list. Raises what `form_fields` raises."""
    if not has_form(connection) or not isinstance(connection, Request):
        raise UnsupportedMediaType(f"Content-Type: expected {MEDIA_TYPE}")
    pairs = (pair.partition(b"=") for pair in _refuse_many_fields(await connection.body()).split(b"&"))
    return [_unquote(value) for field, _, value in pairs if _unquote(field) == name]


async def anonymous_fields(connection: ASGIConnection[Any, Any, Any, Any]) -> dict[str, str] | None:
    """The form fields of a client that is not logged in; None if the body exceeds DRAFT_BYTES.

    Reading stops at that limit. Raises BadInput for more than MAX_FIELDS fields.
    """
    if not isinstance(connection, Request) or (connection.content_length or 0) > DRAFT_BYTES:
        return None
    body = bytearray()
    async with contextlib.aclosing(connection.stream()) as parts:
        async for part in parts:
            body += part
            if len(body) > DRAFT_BYTES:
                return None
    return _parse(_refuse_many_fields(bytes(body)))


def _refuse_many_fields(body: bytes) -> bytes:
    if body.count(b"&") >= MAX_FIELDS:
        raise BadInput(f"The form has too many fields: at most {MAX_FIELDS}.")
    return body


def _parse(body: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    for pair in body.split(b"&"):
        name, _, value = pair.partition(b"=")
        fields.setdefault(_unquote(name), _unquote(value))
    return fields


def _parse_file_form(body: bytes, boundary: str) -> FileForm:
    fields: dict[str, str] = {}
    name, data = "", b""
    segment, payload = None, b""
    try:
        with PushMultipartParser(boundary, max_segment_count=MAX_FIELDS) as parser:
            for event in parser.parse(body):
                if isinstance(event, MultipartSegment):
                    segment, payload = event, b""
                elif event is not None:
                    # The whole of it, because the body is parsed at once.
                    payload = bytes(event)
                elif segment is None:
                    continue
                elif segment.filename is None:
                    fields.setdefault(segment.name, payload.decode("utf-8", errors="replace"))
                elif segment.name == FILE_FIELD and not name:
                    name, data = segment.filename, payload
    except (MultipartError, UnicodeDecodeError):
        raise BadInput(
            f"The form cannot be read: expected {FILE_MEDIA_TYPE} with at most {MAX_FIELDS} fields, to its end."
        ) from None
    return FileForm(fields, name, data)


def _unquote(quoted: bytes) -> str:
    """Decodes percent escapes, slice by slice.

    `unquote_to_bytes` creates an object for each escape: for a form of 16 MiB that is 3 GB, while it holds the GIL.
    """
    quoted = quoted.replace(b"+", b" ")
    plain, start = bytearray(), 0
    while start < len(quoted):
        end = start + SMALL_BYTES
        if (escape := quoted.rfind(b"%", end - 2, end)) != -1:
            end = escape
        plain += unquote_to_bytes(quoted[start:end])
        start = end
    return plain.decode("utf-8", errors="replace")
