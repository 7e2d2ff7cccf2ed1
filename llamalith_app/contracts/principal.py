"""The authenticated caller of a request."""

from __future__ import annotations

from typing import Literal

import msgspec


class Principal(msgspec.Struct, frozen=True):
    """Whose rows a request may see and write."""

    user_id: int
    door: Literal["token", "session"]
    csrf_token: str = ""
    """The token that this session's forms carry; empty for a bearer token."""
