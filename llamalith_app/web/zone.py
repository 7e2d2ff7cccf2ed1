"""The viewer's time zone, as the page's script tells it in a cookie: it decides where a day begins.

Without the cookie, and for a name that is none, it is UTC.
"""

from __future__ import annotations

import re
from datetime import UTC, tzinfo
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

from litestar import Request

from llamalith_app.guards.cookies import cookie_value

ZONE_COOKIE = "llamalith_zone"
"""static/times.js sets it."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,3}")
MAX_NAME = 64


def zone_of(request: Request[Any, Any, Any]) -> tzinfo:
    return named(cookie_value(request, ZONE_COOKIE)[: MAX_NAME + 1])


@lru_cache(maxsize=512)
def named(name: str) -> tzinfo:
    """The zone of this IANA name; UTC where there is none."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        return UTC
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # no such file, a folder, another file
        return UTC
