"""The fields of an HTML form. Beside the guard, which reads the CSRF token among them."""

from __future__ import annotations

from typing import Any

from litestar import Request
from litestar.connection import ASGIConnection

from llamalith_app.errors import UnsupportedMediaType

MEDIA_TYPE = "application/x-www-form-urlencoded"


def has_form(connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
    return connection.headers.get("content-type", "").partition(";")[0].strip().lower() == MEDIA_TYPE


async def form_fields(connection: ASGIConnection[Any, Any, Any, Any]) -> dict[str, str]:
    """The first field of each name. Raises UnsupportedMediaType for any other body."""
    if not has_form(connection) or not isinstance(connection, Request):
        raise UnsupportedMediaType(f"Content-Type: expected {MEDIA_TYPE}")
    form = await connection.form()
    return {name: form[name] for name in form}
